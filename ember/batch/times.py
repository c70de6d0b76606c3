"""What a profile's runs will do and take, from what they took when they were last measured."""

import json
from pathlib import Path

import pandas as pd

from ember.batch.planning import manifest_path, plan
from ember.batch.profiles import Profile
from ember.store.frames import write_frame
from ember.store.paths import REPOSITORY, results_dir

_COLUMNS = ["run", "notebook", "start", "wall_seconds", "peak_memory_mb"]


def describe(profile: Profile) -> str:
    """What a profile's run consists of, and how long each part took when it was last measured."""
    runs = measured_times(profile.name)
    measured = runs.set_index("run").wall_seconds
    lines = [f"Profile {profile.name}: {profile.model}; {', '.join(profile.concepts)}; {', '.join(profile.methods)}"]
    total = 0.0
    for job in plan(profile):
        done = manifest_path(profile.name, job.name).exists()
        seconds = measured.get(job.name)
        total += 0.0 if done or seconds is None else seconds
        time = "not measured yet" if seconds is None else f"about {max(1, round(seconds))} s"
        lines.append(f"  {job.notebook:<26} {time:<18} {'done before' if done else 'to run'}")
    if profile.needs:
        return "\n".join([*lines, profile.needs])
    total *= busy_seconds(runs) / max(1.0, runs.wall_seconds.sum())
    return "\n".join([*lines, f"About {total / 60:.0f} minutes to go on a machine like the one measured (2 cores)."])


def busy_seconds(runs: pd.DataFrame) -> float:
    """Seconds in which at least one of the runs (columns start, wall_seconds) was going on."""
    total, end = 0.0, float("-inf")
    for start, seconds in sorted(zip(runs.start, runs.wall_seconds, strict=True)):
        total += max(0.0, start + seconds - max(start, end))
        end = max(end, start + seconds)
    return total


def measured_times(profile: str) -> pd.DataFrame:
    """A profile's ``run_times.csv``: its own, or the committed one; empty if there is neither."""
    paths = (root / "tables" / "run_times.csv" for root in (results_dir(profile), REPOSITORY / "results" / profile))
    path = next((path for path in paths if path.exists()), None)
    return pd.read_csv(path) if path else pd.DataFrame(columns=_COLUMNS)


def write_run_times(profile: Profile) -> Path:
    """Collect start, wall seconds and peak memory (MB) of a profile's runs into ``tables/run_times.csv``.

    ``start`` counts seconds from the start of the first run.
    """
    rows = []
    for job in plan(profile):
        about = json.loads(manifest_path(profile.name, job.name).read_text(encoding="utf-8"))
        rows.append((job.name, job.notebook, *(about[key] for key in ("started", *_COLUMNS[3:]))))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    table["start"] = (table.start - table.start.min()).round(1)
    return write_frame(results_dir(profile.name) / "tables" / "run_times.csv", table)
