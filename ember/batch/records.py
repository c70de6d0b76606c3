"""The files of a profile's results: records with provenance and other frames, read strictly, and figures."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ember.batch.planning import nothing_found_by
from ember.errors import DamagedFileError
from ember.store.files import atomic_file
from ember.store.frames import read_frame
from ember.store.paths import results_dir

RECORD_COLUMNS = (
    "model", "revision", "weights_hash", "profile", "concept", "method", "ember", "config", "cell", "seed", "split",
    "set", "metric", "value", "n", "ci_low", "ci_high", "effect_size", "git_commit", "versions", "device", "dtype",
    "wall_seconds",
)  # fmt: skip


def read_runs(profile: str, notebook: str, frame: str) -> pd.DataFrame:
    """One frame of all runs of a notebook, one under the other, with the run's name in column ``run``.

    Runs that found nothing to edit have no frames; ``nothing_found`` lists them. If there is no other run, that is a
    ``FileNotFoundError``. A file that cannot be read is a ``DamagedFileError``, and so are records without all of
    ``RECORD_COLUMNS``.
    """
    frames = []
    empty = set(nothing_found(profile).run)
    for path in sorted((results_dir(profile) / "records").glob(f"{notebook}__*/{frame}.parquet")):
        if path.parent.name in empty:
            continue
        frames.append(read_frame(path).assign(run=path.parent.name))
        missing = set(RECORD_COLUMNS) - set(frames[-1].columns)
        if frame == "records" and missing:
            raise DamagedFileError(f"{path} lacks the record columns {', '.join(sorted(missing))}")
    if not frames:
        raise FileNotFoundError(
            f"no {frame!r} of {notebook} in {results_dir(profile)}; run: python -m ember reproduce --profile {profile}"
        )
    return pd.concat(frames, ignore_index=True)


def nothing_found(profile: str) -> pd.DataFrame:
    """The runs that found nothing of the concept to edit: run, reason."""
    runs = sorted(path.stem for path in (results_dir(profile) / "notebooks").glob("*.json"))
    found = pd.DataFrame({"run": runs, "reason": [nothing_found_by(profile, run) for run in runs]})
    return found[found.reason != ""].reset_index(drop=True)


def save_figure(figure: Figure, profile: str, name: str) -> None:
    """Write a figure as PNG and SVG to the profile's figures, the same bytes for the same figure."""
    path = results_dir(profile) / "figures" / name
    for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        with plt.rc_context({"svg.hashsalt": name}), atomic_file(path.with_name(f"{name}.{suffix}")) as temporary:
            figure.savefig(temporary, metadata=metadata)
