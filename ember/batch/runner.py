"""Running a notebook as a batch job: checked parameters, private folders, success only when a manifest is there."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ember.batch.planning import FRAMES, plan
from ember.batch.profiles import frame_path, list_profiles, load_profile, manifest_path, nothing_found_by, run_name
from ember.errors import EmberError, NothingFoundError, UnknownNameError
from ember.store.files import atomic_file, write_text
from ember.store.paths import REPOSITORY, notebooks_dir, results_root

if TYPE_CHECKING:  # both bring torch, which starting a run does without
    from ember.evaluation.evaluate import Evaluation, Suite
    from ember.models.loading import LoadedModel

# A change of the figures' looks must not rerun the experiments; the report draws them all again.
_LOOKS = {"plots", "relearn_plots", "control_plots", "stability_plots", "teaching_plots"}


def list_notebooks() -> list[str]:
    """Names of the numbered notebooks."""
    return sorted(path.stem for path in notebooks_dir().glob("[0-9][0-9]_*.ipynb"))


def read_notebook(name: str) -> dict[str, Any]:
    """The parsed notebook; an unknown name is an error that lists the known ones."""
    if name not in list_notebooks():
        raise UnknownNameError("notebook", name, list_notebooks())
    notebook: dict[str, Any] = json.loads((notebooks_dir() / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def default_parameters(name: str) -> dict[str, Any]:
    """The literals of the notebook's ``parameters`` cell.

    Raises
    ------
    EmberError
        If there is not exactly one such cell, or it holds anything but assignments of literals.
    """
    cells = [c for c in read_notebook(name)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise EmberError(f"{name} needs exactly one cell tagged 'parameters', found {len(cells)}")
    values = {}
    for node in ast.parse("".join(cells[0]["source"])).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise EmberError(f"{name}: the parameters cell may only assign literals, line {node.lineno} does not")
        try:
            values[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError as error:
            raise EmberError(f"{name}: parameter {node.targets[0].id!r} is not a literal") from error
    return values


def check_parameters(name: str, given: Mapping[str, Any]) -> None:
    """Refuse names the notebook does not have and values of another type than its default's (None takes any)."""
    defaults = default_parameters(name)
    for key, value in given.items():
        if key not in defaults:
            raise UnknownNameError(f"parameter of {name}", key, defaults)
        default = defaults[key]
        accepted = (int, float) if isinstance(default, float) else (type(default),)
        if default is not None and (
            not isinstance(value, accepted) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise EmberError(
                f"parameter {key!r} of {name} must be {type(default).__name__}, got {type(value).__name__} {value!r}"
            )


def run_notebook(name: str, parameters: Mapping[str, Any], *, progress: bool = False) -> Path:
    """Execute a notebook with papermill into the profile's results; return the manifest's path.

    The executed copy moves into place after the last cell; the manifest (parameters, code hash, wall seconds, peak
    memory) is written last of all, so that a run without one did not finish. The copy of a failed run is kept beside
    it under ``….failed.ipynb``. A run that finds nothing of the concept to edit, or needs one that did, is no failure:
    its manifest holds the reason under ``nothing_found``, and its frames are empty files.

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
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
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


def code_hash(name: str) -> str:
    """Hash of what a notebook's results depend on: its code cells and the ``ember`` modules they reach.

    Markdown, comments, docstrings and layout do not count, nor do the figures' looks, except for the report.
    """
    cells = [c for c in read_notebook(name)["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in cells]
    skipped = set() if name.startswith("08_") else _LOOKS
    pending = {module for source in sources for module in _imports(source)}
    seen: dict[str, str] = {}
    while pending:
        module = pending.pop()
        path = _module_path(module)
        if module in seen or path is None or module.split(".")[-1] in skipped:
            continue
        text = path.read_text(encoding="utf-8")
        seen[module] = _canonical(text)
        pending |= _imports(text)
    running = hashlib.sha256()
    for part in [*map(_canonical, sources), *(f"{k}\n{seen[k]}" for k in sorted(seen))]:
        running.update(part.encode() + b"\0")
    return running.hexdigest()[:16]


@cache
def _imports(source: str) -> frozenset[str]:
    """Dotted names of ``ember`` modules that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "ember"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ember":
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    # ``from ember import x`` resolves lazily; the export table says where x lives.
    from ember import _EXPORTS

    return frozenset(found) | {
        _EXPORTS[name.split(".")[1]] for name in found if name.count(".") == 1 and name.split(".")[1] in _EXPORTS
    }


def _module_path(module: str) -> Path | None:
    # Without importing anything: what imports torch takes seconds, and every job on a cluster comes through here.
    path = REPOSITORY.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def _canonical(source: str) -> str:
    """The syntax tree without docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and body
            and ast.get_docstring(node) is not None
        ):
            node.body = body[1:]
    return ast.dump(tree)


def base_evaluation(loaded: LoadedModel, suite: Suite, split: str, *, progress: bool = False) -> Evaluation:
    """The evaluation of the unedited model, which all notebooks and arms share through the cache of cells."""
    from ember.evaluation.cache import EvaluationCache
    from ember.evaluation.evaluate import evaluate

    cache = EvaluationCache(results_root() / "cells")
    key = cache.key(loaded, code_hash("03_erase_concept"), suite, split, "base")
    return cache.get_or_run(key, lambda: evaluate(loaded, suite, split, progress=progress))


def run_summary(started: float) -> str:
    """One line for a notebook's last cell: minutes since ``started`` and this process's peak memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return f"{(time.time() - started) / 60:.1f} minutes, peak memory {peak / 1024:.1f} GB"
