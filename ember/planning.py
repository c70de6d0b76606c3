"""The notebook runs that a profile consists of, and what each of them needs."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ember.errors import UnknownNameError
from ember.profiles import Profile, run_name

FACTORIZE, SELECT, ERASE, RELEARN = "01_factorize_embeddings", "02_select_features", "03_erase_concept", "04_relearn"
FRAMES = {
    FACTORIZE: ("loss",),
    SELECT: ("scores", "preview"),
    ERASE: ("records", "cells", "items", "samples", "selected", "autoencoders", "lexical"),
    RELEARN: ("records", "curve", "items", "moved"),
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
    jobs += {job.name: job for job in _relearnings(profile)}.values()
    jobs.append(Job("08_report", {"profile": profile.name}, tuple(job.name for job in jobs)))
    return jobs


def _relearnings(profile: Profile) -> Iterator[Job]:
    """Each attack of each sweep on each arm; sweeps may overlap."""
    named = {relearned_arm(*arm): arm for arm in [("none", False), *arms(profile)]}
    for sweep in profile.relearn["sweeps"]:
        for name in sweep["arms"]:
            if name not in named:
                raise UnknownNameError(f"arm in a relearning sweep of profile {profile.name}", name, named)
        seeds = profile.seeds[: sweep.get("seeds")]
        settings = itertools.product(sweep["attacks"], sweep["precisions"], sweep["lrs"], sweep.get("budgets", [1]))
        for concept, (attack, precision, lr, budget) in itertools.product(profile.concepts, settings):
            for seed, name in itertools.product(seeds, sweep["arms"]):
                method, ember = named[name]
                arm = {"model": profile.model, "concept": concept, "method": method, "ember": ember, "seed": seed}
                needs = () if method == "none" else (run_name(ERASE, **arm),)
                attacked = {**arm, "attack": attack, "precision": precision, "lr": float(lr), "budget": budget}
                yield Job(RELEARN, {"profile": profile.name, **attacked}, needs, FRAMES[RELEARN])


def relearned_arm(method: str, ember: bool) -> str:
    """How sweeps name an arm: ``none`` (the unedited model), ``rmu``, ``ember+rmu``."""
    return f"ember+{method}" if ember else method
