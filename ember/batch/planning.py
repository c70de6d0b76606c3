"""The notebook runs that a profile consists of: what each needs, its name, and where its results lie."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ember.batch.profiles import Profile
from ember.data.arms import UNEDITED, Arm
from ember.errors import UnknownNameError
from ember.store.paths import results_dir, slug

TOUR, REPORT = "00_tour", "10_report"
FACTORIZE, SELECT, ERASE = "01_factorize_embeddings", "02_select_features", "03_erase_concept"
RELEARN, LOCALIZE, CONTROL = "04_relearn", "05_localize_coherence", "06_control_edits"
STABILITY, TEACH = "08_factor_stability", "09_teach_and_erase"
FRAMES = {
    FACTORIZE: ("loss",),
    SELECT: ("scores", "preview"),
    ERASE: ("records", "cells", "items", "samples", "selected", "autoencoders", "lexical", "verdicts"),
    RELEARN: ("records", "curve", "items", "moved"),
    LOCALIZE: ("records", "tokens", "everyday", "samples"),
    CONTROL: ("records", "items", "rows"),
    STABILITY: ("records", "fits", "pairs", "outcomes"),
    TEACH: ("records", "cells", "items", "knowledge", "damage", "samples"),
}

_ORDER = ("model", "concept", "method", "ember", "attack", "precision", "lr", "budget", "rank", "sparsity", "seed")


@dataclass(frozen=True)
class Job:
    """One notebook run: its parameters, and the runs it needs."""

    notebook: str
    parameters: Mapping[str, Any]
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return run_name(self.notebook, **self.parameters)


def arms(profile: Profile) -> list[Arm]:
    """Every arm: EMBER first, then each other method alone and after it, then controls."""
    others = [Arm(method, ember) for method in profile.methods if method != "ember" for ember in (False, True)]
    return [Arm("ember"), *others, *map(Arm, profile.controls)]


def plan(profile: Profile) -> list[Job]:
    """The notebook runs of a profile, in an order in which each finds what it needs."""
    parts = (_erasures, _tours, _relearnings, _localizations, _trades, _stabilities, _teachings)
    jobs = list({job.name: job for part in parts for job in part(profile)}.values())
    return [*jobs, Job(REPORT, {"profile": profile.name}, tuple(job.name for job in jobs))]


def _choices(profile: Profile, seeds: int | None = None) -> list[dict[str, Any]]:
    """Parameters of the profile's concepts on the first seeds."""
    return [
        {"profile": profile.name, "model": profile.model, "concept_name": concept, "seed": seed}
        for concept, seed in itertools.product(profile.concepts, profile.seeds[:seeds])
    ]


def _fit(profile: Profile) -> dict[str, int | float]:
    return {"rank": profile.fit["rank"], "sparsity": profile.fit["sparsity"]}


def _named(profile: Profile, names: Sequence[str], use: str, *unedited: Arm) -> list[Arm]:
    """The arms that a part of the profile names."""
    known = {arm.key: arm for arm in [*unedited, *arms(profile)]}
    for name in names:
        if name not in known:
            raise UnknownNameError(f"arm in {use} of profile {profile.name}", name, known)
    return [known[name] for name in names]


def _erasures(profile: Profile) -> Iterator[Job]:
    """The features and every arm's erasure."""
    for one in _choices(profile):
        first = Job(FACTORIZE, one | _fit(profile))
        second = Job(SELECT, one | _fit(profile), (first.name,))
        yield from (first, second)
        for method, ember in arms(profile):
            # After EMBER: its saved edit, and what the method alone has put into the cache (autoencoders).
            alone = tuple(run_name(ERASE, **one, method=m, ember=False) for m in ("ember", method))
            needs = alone if ember else (second.name,) if method in profile.factorizing else ()
            yield Job(ERASE, {**one, "method": method, "ember": ember}, needs)


def _tours(profile: Profile) -> Iterator[Job]:
    for one in _choices(profile, 1):
        shown = {key: value for key, value in one.items() if key != "seed"}
        yield Job(TOUR, shown, (run_name(ERASE, **one, method="ember", ember=False),))


def _relearnings(profile: Profile) -> Iterator[Job]:
    """Each attack of each sweep on each arm; sweeps may overlap."""
    for sweep in profile.relearn.sweeps:
        chosen = _named(profile, sweep.arms, "a relearning sweep", Arm(UNEDITED))
        settings = itertools.product(sweep.attacks, sweep.precisions, sweep.lrs, sweep.budgets)
        attacks = [dict(zip(("attack", "precision", "lr", "budget"), values, strict=True)) for values in settings]
        for one, attack, arm in itertools.product(_choices(profile, sweep.seeds), attacks, chosen):
            erased = one | arm._asdict()
            yield Job(RELEARN, erased | attack, () if arm.method == UNEDITED else (run_name(ERASE, **erased),))


def _localizations(profile: Profile) -> Iterator[Job]:
    chosen = _named(profile, profile.localize.arms, "localize")
    for one, arm in itertools.product(_choices(profile, profile.localize.seeds), chosen):
        # Whatever the arm, EMBER's edit says which tokens to watch.
        needed = dict.fromkeys(run_name(ERASE, **one, **needed._asdict()) for needed in (Arm("ember"), arm))
        yield Job(LOCALIZE, one | arm._asdict(), tuple(needed))


def _trades(profile: Profile) -> Iterator[Job]:
    for one in _choices(profile, profile.trade.seeds) if profile.trade.edits else ():
        yield Job(CONTROL, one, (run_name(SELECT, **one | _fit(profile)),))


def _stabilities(profile: Profile) -> Iterator[Job]:
    for one in _choices(profile, 1) if profile.stability.seeds else ():
        yield Job(STABILITY, one | _fit(profile), (run_name(FACTORIZE, **one | _fit(profile)),))


def _teachings(profile: Profile) -> Iterator[Job]:
    """One run a seed: all arms erase from one taught copy."""
    for seed in profile.seeds[: profile.teach.seeds] if _named(profile, profile.teach.arms, "teach") else ():
        yield Job(TEACH, {"profile": profile.name, "model": profile.model, "seed": seed})


def run_name(notebook: str, **parameters: Any) -> str:
    """File name of a run: the notebook's name and its parameters, profile excepted (that is the folder).

    ``concept_name`` is short for itself: ``concept=ancient-rome``.
    """
    named = {key.removesuffix("_name"): value for key, value in parameters.items() if key != "profile"}
    order = [key for key in _ORDER if key in named] + sorted(named.keys() - {*_ORDER})
    values = {key: slug(value) if isinstance(value, str) else value for key, value in named.items()}
    return "__".join([notebook, *(f"{key}={values[key]}" for key in order)])


def manifest_path(profile: str, name: str) -> Path:
    """The file that is written last by a successful run."""
    return results_dir(profile) / "notebooks" / f"{name}.json"


def nothing_found_by(profile: str, name: str) -> str:
    """Why a finished run found nothing of the concept to edit; empty if it did, or has not finished."""
    path = manifest_path(profile, name)
    return str(json.loads(path.read_text(encoding="utf-8")).get("nothing_found", "")) if path.exists() else ""


def frame_path(profile: str, name: str, frame: str) -> Path:
    """One of the result frames of a run."""
    return results_dir(profile) / "records" / name / f"{frame}.parquet"
