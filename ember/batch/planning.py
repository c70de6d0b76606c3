"""The notebook runs that a profile consists of, and what each of them needs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ember.batch.profiles import Profile, run_name
from ember.errors import UnknownNameError

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


@dataclass(frozen=True)
class Job:
    """One notebook run: its parameters, the runs it needs, and the result frames it writes."""

    notebook: str
    parameters: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    frames: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return run_name(self.notebook, **self.parameters)


def arms(profile: Profile) -> list[tuple[str, bool]]:
    """(method, after EMBER?) of every arm: EMBER first, then each other method alone and after it, then controls."""
    others = [(method, ember) for method in profile.methods if method != "ember" for ember in (False, True)]
    return [("ember", False), *others, *((control, False) for control in profile.controls)]


def plan(profile: Profile) -> list[Job]:
    """The notebook runs of a profile, in an order in which each finds what it needs."""
    jobs = []
    common = {"profile": profile.name, "model": profile.model}
    fit = {key: profile.fit[key] for key in ("rank", "sparsity")}
    for concept in profile.concepts:
        for seed in profile.seeds:
            chosen = {**common, "concept": concept}
            first = Job(FACTORIZE, {**chosen, **fit, "seed": seed}, (), FRAMES[FACTORIZE])
            second = Job(SELECT, {**chosen, **fit, "seed": seed}, (first.name,), FRAMES[SELECT])
            jobs += [first, second]
            for method, ember in arms(profile):
                arm = {**chosen, "seed": seed}
                before = [run_name(ERASE, **arm, method=m, ember=False) for m in ("ember", method)]
                # After EMBER: its saved edit, and what the method alone has put into the cache (autoencoders).
                needs = before if ember else [second.name] if method in profile.factorizing else []
                jobs.append(Job(ERASE, {**arm, "method": method, "ember": ember}, tuple(needs), FRAMES[ERASE]))
        alone = {"concept": concept, "method": "ember", "seed": profile.seeds[0]}
        erased = [job.name for job in jobs if alone.items() <= job.parameters.items()]
        jobs.append(Job("00_tour", {**common, "concept": concept}, tuple(erased)))
    further = (_relearnings, _localizations, _trades, _stabilities, _teachings)
    jobs += {job.name: job for part in further for job in part(profile)}.values()
    jobs.append(Job("10_report", {"profile": profile.name}, tuple(job.name for job in jobs)))
    return jobs


def _named(profile: Profile, names: Sequence[str], use: str, *, unedited: bool = False) -> list[tuple[str, bool]]:
    """The arms that a part of the profile names."""
    named = {arm_key(*arm): arm for arm in [*([("none", False)] if unedited else []), *arms(profile)]}
    for name in names:
        if name not in named:
            raise UnknownNameError(f"arm in {use} of profile {profile.name}", name, named)
    return [named[name] for name in names]


def _localizations(profile: Profile) -> Iterator[Job]:
    chosen = _named(profile, profile.localize["arms"], "localize")
    seeds = profile.seeds[: profile.localize.get("seeds")]
    for concept, seed, (method, ember) in itertools.product(profile.concepts, seeds, chosen):
        arm = {"model": profile.model, "concept": concept, "method": method, "ember": ember, "seed": seed}
        # Whatever the arm, EMBER's edit says which tokens to watch.
        needed = dict.fromkeys(run_name(ERASE, **arm | one) for one in ({"method": "ember", "ember": False}, {}))
        yield Job(LOCALIZE, {"profile": profile.name, **arm}, tuple(needed), FRAMES[LOCALIZE])


def _trades(profile: Profile) -> Iterator[Job]:
    seeds = profile.seeds[: profile.trade.get("seeds")] if profile.trade["edits"] else ()
    fit = {key: profile.fit[key] for key in ("rank", "sparsity")}
    for concept, seed in itertools.product(profile.concepts, seeds):
        chosen = {"model": profile.model, "concept": concept, "seed": seed}
        yield Job(CONTROL, {"profile": profile.name, **chosen}, (run_name(SELECT, **chosen, **fit),), FRAMES[CONTROL])


def _stabilities(profile: Profile) -> Iterator[Job]:
    for concept in profile.concepts if profile.stability["seeds"] else ():
        fit = {key: profile.fit[key] for key in ("rank", "sparsity")}
        chosen = {"model": profile.model, "concept": concept, **fit, "seed": profile.seeds[0]}
        yield Job(STABILITY, {"profile": profile.name, **chosen}, (run_name(FACTORIZE, **chosen),), FRAMES[STABILITY])


def _teachings(profile: Profile) -> Iterator[Job]:
    """One run a seed: all arms erase from one taught copy."""
    if _named(profile, profile.teach["arms"], "teach"):
        for seed in profile.seeds[: profile.teach.get("seeds")]:
            yield Job(TEACH, {"profile": profile.name, "model": profile.model, "seed": seed}, (), FRAMES[TEACH])


def _relearnings(profile: Profile) -> Iterator[Job]:
    """Each attack of each sweep on each arm; sweeps may overlap."""
    for sweep in profile.relearn["sweeps"]:
        named = dict(
            zip(sweep["arms"], _named(profile, sweep["arms"], "a relearning sweep", unedited=True), strict=True)
        )
        seeds = profile.seeds[: sweep.get("seeds")]
        settings = itertools.product(sweep["attacks"], sweep["precisions"], sweep["lrs"], sweep.get("budgets", [1]))
        for concept, (attack, precision, lr, budget) in itertools.product(profile.concepts, settings):
            for seed, name in itertools.product(seeds, sweep["arms"]):
                method, ember = named[name]
                arm = {"model": profile.model, "concept": concept, "method": method, "ember": ember, "seed": seed}
                needs = () if method == "none" else (run_name(ERASE, **arm),)
                attacked = {**arm, "attack": attack, "precision": precision, "lr": float(lr), "budget": budget}
                yield Job(RELEARN, {"profile": profile.name, **attacked}, needs, FRAMES[RELEARN])


def arm_key(method: str, ember: bool) -> str:
    """How profiles name an arm: ``none`` (the unedited model), ``rmu``, ``ember+rmu``."""
    return f"ember+{method}" if ember else method
