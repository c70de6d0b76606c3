"""Running a notebook as a batch job: checked parameters, private folders, success only when a manifest is there."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ember.batch.notebooks import check_parameters, code_hash, default_parameters
from ember.batch.planning import FRAMES, frame_path, manifest_path, nothing_found_by, plan, run_name
from ember.batch.profiles import Profile, load_profile
from ember.errors import EmberError, NothingFoundError
from ember.store.files import write_text
from ember.store.paths import REPOSITORY, notebooks_dir, results_root


def run_notebook(name: str, parameters: Mapping[str, Any]) -> Path:
    """Execute a notebook with papermill into the profile's results; return the manifest's path.

    The executed copy is called ``….failed.ipynb`` until its last cell has run. The manifest (parameters, code hash,
    start, seconds, memory) is written last of all, so that a run without one did not finish. A run that finds nothing
    of the concept to edit, or needs one that did, is no failure: its manifest holds the reason under ``nothing_found``,
    and its frames are empty files. A parameter that is unknown or of a wrong type, before anything runs, or a failing
    cell is an ``EmberError``.
    """
    check_parameters(name, parameters)
    profile = parameters.get("profile", default_parameters(name)["profile"])
    stem = run_name(name, **parameters)
    needs = next((job.needs for job in plan(load_profile(profile)) if job.name == stem), ())
    manifest = manifest_path(profile, stem)
    copy, failed = manifest.with_suffix(".ipynb"), manifest.with_name(f"{stem}.failed.ipynb")
    for stale in (manifest, copy, failed):
        stale.unlink(missing_ok=True)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    # The report and the tour show what there is.
    unmet = filter(None, (nothing_found_by(profile, needed) for needed in needs if name in FRAMES))
    reason = next(unmet, "")
    if not reason:
        with _private_folders():
            reason = _execute(name, failed, parameters)
        failed.replace(copy)
    for frame in FRAMES.get(name, ()) if reason else ():
        write_text(frame_path(profile, stem, frame), "")
    about: dict[str, Any] = {"notebook": name, "parameters": dict(parameters), "code_hash": code_hash(name)}
    about |= {"started": round(started, 1), "wall_seconds": round(time.time() - started, 1)}
    # Snakemake's benchmark samples memory every half minute, and misses most peaks; this is the kernel's own maximum.
    about["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    about |= {"nothing_found": reason} if reason else {}
    write_text(manifest, json.dumps(about, indent=1) + "\n")
    return manifest


def _execute(name: str, target: Path, parameters: Mapping[str, Any]) -> str:
    """Execute the notebook; why it has found nothing to edit, or nothing."""
    import papermill

    stem, folder = target.name.removesuffix(".failed.ipynb"), str(notebooks_dir())
    options = {"kernel_name": "python3", "progress_bar": sys.stderr.isatty(), "cwd": folder}
    try:
        papermill.execute_notebook(f"{folder}/{name}.ipynb", str(target), parameters=dict(parameters), **options)
    except papermill.PapermillExecutionError as error:
        reason = f"{stem} failed in cell {error.exec_count}: {error.ename}: {error.evalue}"
        if error.ename == NothingFoundError.__name__:
            return reason
        raise EmberError(reason) from error
    except RuntimeError as error:  # what nbclient raises for a dead kernel
        raise EmberError(f"{stem}: the kernel died ({error}); out of memory?") from error
    # A cell that calls exit() ends a notebook early, and papermill calls that a success.
    cells = json.loads(target.read_text(encoding="utf-8"))["cells"]
    if not all(c["execution_count"] for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()):
        raise EmberError(f"{stem} stopped before its last cell")
    return ""


@contextmanager
def _private_folders() -> Iterator[None]:
    """Kernels side by side race for the folders that Jupyter and IPython share."""
    names = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")
    with (
        tempfile.TemporaryDirectory() as scratch,
        patch.dict(os.environ, {name: f"{scratch}/{name}" for name in names}),
    ):
        # Otherwise each kernel warns that its loopback connection is not encrypted.
        path = Path(scratch, "IPYTHONDIR", "profile_default", "ipython_kernel_config.py")
        write_text(path, "get_config().IPKernelApp.log_level = 40\n")
        yield


def run_profile(profile: Profile, *options: str) -> int:
    """Run a profile's notebooks through the Snakefile; Snakemake's exit status."""
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "all",
        "--config", f"profile={profile.name}", "--rerun-triggers", "mtime", "params", "input",
        "--rerun-incomplete", "--nolock", "--keep-going", "--resources", "gpu=1", "--quiet", "rules",
        "--directory", str(results_root()),  # Snakemake's own notes stand beside the results they are about
    ]  # fmt: skip
    results_root().mkdir(parents=True, exist_ok=True)
    return subprocess.run([*command, *options], check=False).returncode
