"""The committed notebooks, the check of parameters, and the runner."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.notebooks import cell, write_notebook

from ember.batch.notebooks import check_parameters, code_hash, default_parameters, list_notebooks, read_notebook
from ember.batch.planning import Job, frame_path, manifest_path, run_name
from ember.batch.runner import run_notebook
from ember.errors import EmberError, UnknownNameError
from ember.store.paths import REPOSITORY

NAMES = list_notebooks()
CHECKED = "nbval-check-output"
PARAMETERS = 'profile = "smoke"\nvalue = 1.0\n'


def code_cells(name: str) -> list[dict]:
    return [cell for cell in read_notebook(name)["cells"] if cell["cell_type"] == "code"]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


# The committed notebooks


def test_the_notebooks_are_found_and_an_unknown_one_lists_them():
    """Without this, a broken search would make every test below pass."""
    assert len(NAMES) >= 10
    assert NAMES[-1] == "10_report", "the report reads what all others write"
    assert sum(CHECKED in tags(c) for name in NAMES for c in code_cells(name)) >= 4
    with pytest.raises(UnknownNameError, match=", ".join(NAMES)):
        read_notebook("../notebooks/00_tour")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_uses_its_literal_parameters_opens_one_run_and_defines_little(name):
    """What a notebook would define belongs in the package; the code hash does not see ``import ember; ember.x``."""
    defaults = default_parameters(name)
    assert defaults["profile"] == "laptop"
    code = "\n".join("".join(c["source"]) for c in code_cells(name) if "parameters" not in tags(c))
    nodes = list(ast.walk(ast.parse(code)))
    assert defaults.keys() <= {node.id for node in nodes if isinstance(node, ast.Name)}  # or a parameter does nothing
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert sum(isinstance(node, kinds) for node in nodes) <= 2
    assert not any(alias.name == "ember" for node in nodes if isinstance(node, ast.Import) for alias in node.names)
    calls = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert calls.count("Run") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs_but_for_checked_cells_and_without_paths(name):
    """No path of a machine; what it shows is said (the README's table is made from this)."""
    assert "widgets" not in read_notebook(name)["metadata"], "progress bars leave their state there"
    for c in code_cells(name):
        assert c["outputs"] if CHECKED in tags(c) else not c["outputs"] and c["execution_count"] is None, c["source"]
    text = (REPOSITORY / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"""(?<![\w.~:/])/(home|Users|root|tmp|work|mnt|opt|usr|var|data)/|[A-Z]:\\\\""", text)
    assert read_notebook(name)["metadata"]["ember"]["shows"].strip()


# Parameters


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder of notebooks in place of ours; results go to a scratch folder."""
    path = tmp_path / "notebooks"
    path.mkdir()
    for module in ("notebooks", "runner"):
        monkeypatch.setattr(f"ember.batch.{module}.notebooks_dir", lambda: path)
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path / "results"))
    return path


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr("papermill.execute_notebook", lambda *a, **k: pytest.fail("the notebook was started"))


@pytest.fixture
def typed(folder):
    """A notebook with a default of every type."""
    source = 'profile = "p"\ncount = 3\nrate = 0.5\nflag = False\nanything = None\nitems = [1]\n'
    write_notebook(folder, "20_typed", cell(source, tags=["parameters"]))
    return "20_typed"


def test_exactly_one_parameters_cell_of_literals(folder):
    """A value derived in that cell keeps its default when the parameter changes."""
    for cells in ([], [cell(PARAMETERS, tags=["parameters"]), cell("value = 2", tags=["parameters"])]):
        write_notebook(folder, "20_x", cell("a = 1"), *cells)
        with pytest.raises(EmberError, match=f"20_x needs exactly one .*found {len(cells)}"):
            default_parameters("20_x")
    for source in ("a = 1\nb = a * 2", "a = 1\nprint(a)", "a, b = 1, 2", "a = b = 1", "import os"):
        write_notebook(folder, "20_x", cell(source, tags=["parameters"]))
        with pytest.raises(EmberError, match="literal"):
            default_parameters("20_x")


def test_what_is_unknown_or_of_a_wrong_type_is_refused_before_anything_runs(typed, nothing_runs):
    for key, value in (
        ("rate", "1e-4"), ("rate", True), ("rate", None), ("count", 3.0), ("count", "3"), ("count", True),
        ("flag", 1), ("flag", "false"), ("profile", 5), ("profile", None), ("items", "1"), ("items", 1),
    ):  # fmt: skip
        said = f"^{typed}, parameter '{key}': expected .*, got {re.escape(repr(value))}$"
        with pytest.raises(EmberError, match=said):
            run_notebook(typed, {key: value})
    for key, value, message in (
        ("cuont", 3, "'cuont'; known: anything, count, flag, items, profile, rate"),
        ("profile", "../outside", r"profile '\.\./outside'; known: .*full, "),
        ("profile", "nope", "profile 'nope'; known: .*full, "),
    ):
        with pytest.raises(UnknownNameError, match=message):
            run_notebook(typed, {key: value})
    fitting = {"rate": [1, 0.1], "count": [4], "flag": [True], "profile": ["q"], "items": [[2, 3]]}
    for key, values in (fitting | {"anything": [1, 0.5, "x", True, [1], None]}).items():
        for value in values:
            check_parameters(typed, {key: value})


# Running


def given(folder: Path, *sources: str, name: str = "20_x") -> str:
    write_notebook(folder, name, cell(PARAMETERS, tags=["parameters"]), *map(cell, sources))
    return name


def printed(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))


def test_a_good_run_leaves_a_copy_and_a_manifest_and_all_else_as_it_was(folder):
    name = given(folder, "print(profile, value, type(value).__name__)")
    source, environment = (folder / f"{name}.ipynb").read_bytes(), dict(os.environ)
    path = run_notebook(name, {"profile": "laptop", "value": 2.5})
    assert path == manifest_path("laptop", run_name(name, value=2.5))
    about = json.loads(path.read_text())
    assert (about["notebook"], about["parameters"]) == (name, {"profile": "laptop", "value": 2.5})
    assert about["code_hash"] == code_hash(name)
    assert about["wall_seconds"] > 0 and about["peak_memory_mb"] > 10
    assert "laptop 2.5 float" in printed(path.with_suffix(".ipynb"))
    assert sorted(p.name for p in path.parent.iterdir()) == [f"{path.stem}.ipynb", path.name]
    assert ((folder / f"{name}.ipynb").read_bytes(), dict(os.environ)) == (source, environment)


@pytest.mark.parametrize(("source", "message"), [
    ("raise ValueError('too cold')", r"20_x__value=2\.0 failed in cell \d+: ValueError: too cold"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", r"20_x__value=2\.0: the kernel died"),
    ("import sys\nsys.exit()", r"20_x__value=2\.0 stopped before its last cell"),
    ("raise SystemExit(0)", r"20_x__value=2\.0 stopped before its last cell"),
])  # fmt: skip
def test_a_run_that_stops_is_named_and_only_its_copy_is_kept_apart(folder, source, message):
    """Papermill calls a killed kernel's copy completed, takes exit 0 for success and leaves the other cells unrun."""
    path = manifest_path("smoke", run_name("20_x", value=2.0))
    for earlier in (path, path.with_suffix(".ipynb")):
        earlier.parent.mkdir(parents=True, exist_ok=True)
        earlier.write_text("{}")
    given(folder, "print('so far')", source, "print('never')")
    with pytest.raises(EmberError, match=message):
        run_notebook("20_x", {"value": 2.0})
    (kept,) = path.parent.iterdir()
    assert kept.name == f"{path.stem}.failed.ipynb"
    assert printed(kept).startswith("so far") and "never" not in printed(kept)


def test_a_stale_manifest_goes_before_anything_runs(folder, monkeypatch):
    given(folder, "print(1)")
    path = manifest_path("smoke", "20_x")
    path.parent.mkdir(parents=True)
    path.write_text("{}")

    def interrupted(*args, **kwargs):
        assert not path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("papermill.execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_notebook("20_x", {})
    assert not path.exists() and not path.with_suffix(".ipynb").exists()


NOTHING = "from ember.errors import NothingFoundError\nraise NothingFoundError('no feature of Rome')"


@pytest.mark.parametrize("found", [True, False])
def test_a_run_that_finds_nothing_to_edit_says_so_and_one_that_needs_it_does_not_start(folder, monkeypatch, found):
    first, second = {"profile": "smoke", "value": 1.0}, {"profile": "smoke", "value": 2.0}
    jobs = [Job("20_x", first), Job("20_x", second, (run_name("20_x", **first),))]
    monkeypatch.setattr("ember.batch.runner.plan", lambda profile: jobs)
    monkeypatch.setattr("ember.batch.runner.FRAMES", {"20_x": ("scores",)})
    given(folder, "print('so far')", "print('found')" if found else NOTHING, "print('then')")
    one = run_notebook("20_x", first)
    assert ("then" in printed(one.with_suffix(".ipynb"))) is found and "so far" in printed(one.with_suffix(".ipynb"))
    given(folder, "print('ran')")
    two = run_notebook("20_x", second)
    assert two.with_suffix(".ipynb").exists() is found
    for path in (one, two):
        assert ("no feature of Rome" in json.loads(path.read_text()).get("nothing_found", "")) is not found
        frame = frame_path("smoke", path.stem, "scores")
        assert not frame.exists() if found else frame.read_bytes() == b""


def test_eight_at_once(folder, tmp_path):
    """Kernels race for the folders that Jupyter and IPython share."""
    given(folder, "print('value', value)")
    script = tmp_path / "one.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom ember.batch import notebooks, runner\n"
        "notebooks.notebooks_dir = runner.notebooks_dir = lambda: Path(sys.argv[1])\n"
        "runner.run_notebook('20_x', {'value': float(sys.argv[2])})\n"
    )
    running = [
        subprocess.Popen([sys.executable, script, folder, str(k)], stderr=subprocess.PIPE, text=True) for k in range(8)
    ]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * 8, "\n".join(errors)
    for k in range(8):
        path = manifest_path("smoke", run_name("20_x", value=float(k)))
        assert json.loads(path.read_text())["parameters"] == {"value": float(k)}
        assert f"value {float(k)}" in printed(path.with_suffix(".ipynb"))
