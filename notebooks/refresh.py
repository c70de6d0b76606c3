"""Renew the checked outputs in the committed notebooks from the smoke profile's run: `make notebooks`.

What cells tagged `nbval-check-output` printed is copied, from the run with the notebook's own parameters; all other
outputs are stripped.
"""

import json

from ember.batch.notebooks import default_parameters, list_notebooks, read_notebook
from ember.batch.planning import manifest_path, plan
from ember.batch.profiles import load_profile
from ember.store.files import write_text
from ember.store.paths import notebooks_dir


def refresh(name: str) -> None:
    """Renew one notebook's outputs."""
    wanted = default_parameters(name) | {"profile": "smoke"}
    jobs = [job for job in plan(load_profile("smoke")) if job.notebook == name]
    run = next(job.name for job in jobs if job.parameters.items() <= wanted.items())
    executed = json.loads(manifest_path("smoke", run).with_suffix(".ipynb").read_text(encoding="utf-8"))
    printed = {cell["id"]: cell for cell in executed["cells"]}
    notebook = read_notebook(name)
    notebook["metadata"].pop("widgets", None)
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        checked = "nbval-check-output" in cell["metadata"].get("tags", [])
        # nbval compares nothing with a cell that has no count.
        cell["execution_count"] = printed[cell["id"]]["execution_count"] if checked else None
        cell["outputs"] = [o for o in printed[cell["id"]]["outputs"] if checked and o.get("name") == "stdout"]
    write_text(notebooks_dir() / f"{name}.ipynb", json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for notebook in list_notebooks():
        refresh(notebook)
        print(f"{notebook}: checked outputs renewed")
