"""Running a notebook as a batch job: checked parameters, private folders, success only when a manifest is there."""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ember.batch.code import code_hash
from ember.batch.notebooks import check_parameters, default_parameters
from ember.batch.planning import FRAMES, frame_path, manifest_path, nothing_found_by, plan, run_name
from ember.batch.profiles import list_profiles, load_profile
from ember.errors import EmberError, NothingFoundError, UnknownNameError
from ember.store.files import atomic_file, write_text
from ember.store.paths import notebooks_dir


def run_notebook(name: str, parameters: Mapping[str, Any], *, progress: bool = False) -> Path:
    """Execute a notebook with papermill into the profile's results; return the manifest's path.

    The executed copy moves into place after the last cell; the manifest (parameters, code hash, start, wall seconds) is
    written last of all, so that a run without one did not finish. The copy of a failed run is kept beside it under
    ``….failed.ipynb``. A run that finds nothing of the concept to edit, or needs one that did, is no failure: its
    manifest holds the reason under ``nothing_found``, and its frames are empty files.

    Raises
    ------
    EmberError
        If a parameter is unknown or of the wrong type (before anything runs), or a cell fails.
    """
    check_parameters(name, parameters)
    profile = parameters.get("profile", default_parameters(name)["profile"])
    if profile not in list_profiles():
        raise UnknownNameError("profile", profile, list_profiles())
    stem = run_name(name, **parameters)
    manifest = manifest_path(profile, stem)
    target, failed = manifest.with_name(f"{stem}.ipynb"), manifest.with_name(f"{stem}.failed.ipynb")
    for stale in (manifest, target, failed):
        stale.unlink(missing_ok=True)
    started = time.time()
    reason = _unmet(profile, stem) or _finished(name, stem, target, parameters, progress)
    if reason:
        for frame in FRAMES.get(name, ()):
            write_text(frame_path(profile, stem, frame), "")
    about = {
        "notebook": name,
        "parameters": dict(parameters),
        "code_hash": code_hash(name),
        "started": round(started, 1),
        "wall_seconds": round(time.time() - started, 1),
    }
    write_text(manifest, json.dumps(about | ({"nothing_found": reason} if reason else {}), indent=1) + "\n")
    return manifest


def _finished(name: str, stem: str, target: Path, parameters: Mapping[str, Any], progress: bool) -> str:
    """Execute the notebook; why it has found nothing to edit, or nothing."""
    with tempfile.TemporaryDirectory() as scratch, _private_folders(Path(scratch)), atomic_file(target) as temporary:
        try:
            _execute(name, stem, temporary, parameters, progress)
        except NothingFoundError as error:
            return str(error)
        except EmberError:
            if temporary.stat().st_size:
                os.replace(temporary, target.with_name(f"{stem}.failed.ipynb"))
            raise
    return ""


def _unmet(profile: str, run: str) -> str:
    """Why a run of the profile's plan cannot do anything: what a run that it needs has not found."""
    job = next((job for job in plan(load_profile(profile)) if job.name == run), None)
    # The report and the tour show what there is.
    needs = job.needs if job and job.notebook in FRAMES else ()
    return next(filter(None, (nothing_found_by(profile, needed) for needed in needs)), "")


def _execute(name: str, stem: str, target: Path, parameters: Mapping[str, Any], progress: bool) -> None:
    import papermill

    try:
        papermill.execute_notebook(
            str(notebooks_dir() / f"{name}.ipynb"),
            str(target),
            parameters=dict(parameters),
            kernel_name="python3",
            progress_bar=progress,
            cwd=str(notebooks_dir()),
        )
    except papermill.PapermillExecutionError as error:
        kind = NothingFoundError if error.ename == NothingFoundError.__name__ else EmberError
        raise kind(f"{stem} failed in cell {error.exec_count}: {error.ename}: {error.evalue}") from error
    except RuntimeError as error:  # what nbclient raises for a dead kernel
        raise EmberError(f"{stem}: the kernel died ({error}); out of memory?") from error
    # A cell that calls exit() ends a notebook early, and papermill calls that a success.
    cells = json.loads(target.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    if not all(c["execution_count"] for c in code):
        raise EmberError(f"{stem} stopped before its last cell")


@contextmanager
def _private_folders(scratch: Path) -> Iterator[None]:
    """Kernels side by side race for the folders that Jupyter and IPython share."""
    names = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(scratch / name.lower()) for name in names})
    # Otherwise each kernel warns that its loopback connection is not encrypted.
    write_text(
        scratch / "ipythondir" / "profile_default" / "ipython_kernel_config.py",
        "get_config().IPKernelApp.log_level = 40\n",
    )
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def refresh_outputs(name: str) -> None:
    """Execute a committed notebook in place; keep what cells tagged ``nbval-check-output`` print, strip all else."""
    import nbformat
    from nbclient import NotebookClient

    path = notebooks_dir() / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as scratch, _private_folders(Path(scratch)):
        NotebookClient(
            notebook, kernel_name="python3", resources={"metadata": {"path": str(notebooks_dir())}}
        ).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            checked = "nbval-check-output" in cell.metadata.get("tags", [])
            # nbval compares nothing with a cell that has no count.
            cell.execution_count = cell.execution_count if checked else None
            cell.outputs = [o for o in cell.outputs if checked and o.output_type == "stream" and o.name == "stdout"]
    write_text(path, nbformat.writes(notebook) + "\n")
