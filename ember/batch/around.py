"""Around a batch run: what it will do and take, what it took, and whether its data are sound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ember.batch.expected import measured_times
from ember.batch.planning import Job, plan
from ember.batch.profiles import Profile, manifest_path
from ember.errors import EmberError
from ember.store.paths import results_dir

if TYPE_CHECKING:  # both bring torch, which most commands do without
    from ember.evaluation.data_checks import CheckReport
    from ember.models.loading import LoadedModel


def describe(profile: Profile) -> str:
    """What a profile's run consists of, and how long each part took when it was last measured."""
    runs = measured_times(profile.name)
    measured = dict(zip(runs.run, runs.wall_seconds, strict=True))
    lines = [f"Profile {profile.name}: {profile.model}; {', '.join(profile.concepts)}; {', '.join(profile.methods)}"]
    total = 0.0
    for job in plan(profile):
        done = manifest_path(profile.name, job.name).exists()
        seconds = measured.get(job.name)
        total += 0.0 if done or seconds is None else seconds
        time = "not measured yet" if seconds is None else f"about {max(1, round(seconds))} s"
        lines.append(f"  {job.notebook:<26} {time:<18} {'done before' if done else 'to run'}")
    total *= busy_seconds(runs) / max(1.0, runs.wall_seconds.sum())
    return "\n".join([*lines, f"About {total / 60:.0f} minutes to go on a machine like the one measured (2 cores)."])


def busy_seconds(runs: pd.DataFrame) -> float:
    """Seconds in which at least one of the runs (columns start, wall_seconds) was going on."""
    total, end = 0.0, float("-inf")
    for start, seconds in sorted(zip(runs.start, runs.wall_seconds, strict=True)):
        total += max(0.0, start + seconds - max(start, end))
        end = max(end, start + seconds)
    return total


def write_run_times(profile: Profile) -> Path:
    """Collect start, wall seconds and peak memory from the manifests into ``tables/run_times.csv``.

    ``start`` counts seconds from the start of the first run.
    """
    from ember.store.frames import write_frame

    rows = pd.DataFrame([_run_time(profile, job) for job in plan(profile)])
    rows["start"] = (rows.start - rows.start.min()).round(1)
    return write_frame(results_dir(profile.name) / "tables" / "run_times.csv", rows)


def _run_time(profile: Profile, job: Job) -> dict[str, object]:
    about = json.loads(manifest_path(profile.name, job.name).read_text(encoding="utf-8"))
    keep = {key: about[key] for key in ("wall_seconds", "peak_memory_mb")}
    return {"run": job.name, "notebook": job.notebook, "start": about["started"]} | keep


def check_data(
    folder: str | None = None, *, source: str = "ours", loaded: LoadedModel | None = None
) -> list[CheckReport]:
    """Check every concept and what they share; or one folder of your own; or the released data (in a folder)."""
    from ember.data.ours import list_concepts, load_concept, load_shared
    from ember.data.released import list_released
    from ember.evaluation.data_checks import check_concept, check_shared

    if source == "released":
        concepts = [load_concept(name, source=source, folder=folder) for name in list_released(folder)]
    elif folder is not None:
        concepts = [load_concept(folder=folder)]
    else:
        concepts = [load_concept(name) for name in list_concepts()]
    if not concepts:
        raise EmberError("the data folder holds no concept")
    reports = [check_concept(concept, loaded) for concept in concepts]
    return reports if folder is not None or source == "released" else [*reports, check_shared(load_shared(), loaded)]


def check_table(reports: Sequence[CheckReport]) -> pd.DataFrame:
    """One row a check, one column a subject; what fails is marked with "!"."""
    rows = pd.concat([report.table for report in reports], ignore_index=True)
    digits = rows.value.map(lambda v: f"{v:.2f}" if isinstance(v, float) else str(v))
    rows["shown"] = digits + rows.ok.map({True: "", False: " !"})
    order = rows.drop_duplicates("check")[["check", "wanted"]]
    wide = rows.pivot(index="check", columns="subject", values="shown").fillna("")
    subjects = list(dict.fromkeys(rows.subject))
    return order.merge(wide[subjects], left_on="check", right_index=True)
