"""The files of a profile's results: records with provenance, frames, saved edits and figures; read strictly."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ember.batch.planning import frame_path, nothing_found_by
from ember.editing import Edit
from ember.errors import DamagedFileError, EmberError
from ember.store.files import atomic_file
from ember.store.frames import read_frame, write_frame
from ember.store.paths import results_dir

RECORD_COLUMNS = (
    "model", "revision", "weights_hash", "profile", "concept", "method", "ember", "config", "cell", "seed", "split",
    "set", "metric", "value", "n", "ci_low", "ci_high", "effect_size", "git_commit", "versions", "device", "dtype",
    "wall_seconds",
)  # fmt: skip


def read_records(paths: Iterable[Path]) -> pd.DataFrame:
    """Concatenate record files strictly: each must hold all of ``RECORD_COLUMNS``."""
    frames = []
    for path in sorted(paths):
        frame = read_frame(path)
        missing = sorted(set(RECORD_COLUMNS) - set(frame.columns))
        if missing:
            raise DamagedFileError(f"{path} lacks the record columns {', '.join(missing)}")
        frames.append(frame)
    if not frames:
        raise FileNotFoundError("no records found; run the profile's notebooks first (python -m ember reproduce)")
    return pd.concat(frames, ignore_index=True)


def saved_edit(profile: str, run: str) -> Edit:
    """The edit that a run of ``03_erase_concept`` saved.

    Raises
    ------
    EmberError
        If it has saved none.
    """
    folder = results_dir(profile) / "edits" / run
    if not folder.exists():
        raise EmberError(
            f"no edit of {run} in {results_dir(profile)}; run 03_erase_concept with those parameters first"
        )
    return Edit.load(folder)


def write_run(profile: str, run: str, **frames: pd.DataFrame) -> Path:
    """Write the result frames of one notebook run to ``records/RUN/NAME.parquet``; return the folder."""
    for name, frame in frames.items():
        write_frame(frame_path(profile, run, name), frame)
    return frame_path(profile, run, "x").parent


def read_runs(profile: str, notebook: str, frame: str) -> pd.DataFrame:
    """One frame of all runs of a notebook, one under the other, with the run's name in column ``run``.

    Runs that found nothing to edit have no frames; ``nothing_found`` lists them.

    Raises
    ------
    FileNotFoundError
        If no run of the notebook has written it.
    DamagedFileError
        If a file cannot be read.
    """
    empty = set(nothing_found(profile).run)
    paths = sorted((results_dir(profile) / "records").glob(f"{notebook}__*/{frame}.parquet"))
    paths = [path for path in paths if path.parent.name not in empty]
    if not paths:
        raise FileNotFoundError(
            f"no {frame!r} of {notebook} in {results_dir(profile)}; run: python -m ember reproduce --profile {profile}"
        )
    reader = (lambda path: read_records([path])) if frame == "records" else read_frame
    return pd.concat([reader(path).assign(run=path.parent.name) for path in paths], ignore_index=True)


def nothing_found(profile: str) -> pd.DataFrame:
    """The runs that found nothing of the concept to edit: run, reason."""
    runs = sorted(path.stem for path in (results_dir(profile) / "notebooks").glob("*.json"))
    reasons = [(run, nothing_found_by(profile, run)) for run in runs]
    return pd.DataFrame([row for row in reasons if row[1]], columns=["run", "reason"])


def save_figure(figure: Figure, profile: str, name: str) -> None:
    """Write a figure as PNG and SVG to the profile's figures, the same bytes for the same figure."""
    folder = results_dir(profile) / "figures"
    with plt.rc_context({"svg.hashsalt": name}), atomic_file(folder / f"{name}.svg") as temporary:
        figure.savefig(temporary, metadata={"Date": None})
    with atomic_file(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, metadata={"Software": None})
