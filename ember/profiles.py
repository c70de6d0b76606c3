"""Profiles: what a batch run covers, read from ``notebooks/params/PROFILE.yaml``, and the jobs that follow from it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ember.errors import DataError, UnknownNameError
from ember.paths import notebooks_dir, results_dir, slug


@dataclass(frozen=True)
class Profile:
    """One batch run.

    ``fit`` holds settings of the factorization, ``deltas`` the grid of edit strengths, ``sizes`` the number of
    questions, texts, instructions and generations of each split.
    """

    name: str
    model: str
    concepts: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    deltas: tuple[float, ...]
    fit: Mapping[str, int | float]
    sizes: Mapping[str, Mapping[str, int]]


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


_ORDER = ("model", "concept", "method", "ember", "rank", "sparsity", "seed")


def run_name(notebook: str, **parameters: Any) -> str:
    """File name of a run: the notebook's name and its parameters, profile excepted (that is the folder)."""
    order = sorted(parameters, key=lambda key: (_ORDER.index(key) if key in _ORDER else len(_ORDER), key))
    parts = [f"{key}={_text(parameters[key])}" for key in order if key != "profile"]
    return "__".join([notebook, *parts])


def _text(value: Any) -> str:
    return slug(value) if isinstance(value, str) else str(value)


def list_profiles() -> list[str]:
    """Names of the profiles in ``notebooks/params``."""
    return sorted(path.stem for path in (notebooks_dir() / "params").glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """Read a profile.

    Where ``$EMBER_SIZES`` names another profile, ``deltas`` and ``sizes`` are taken from that one: so the tests run
    the notebooks as they stand with shorter loops.

    Raises
    ------
    UnknownNameError
        If there is no such profile, or the file holds an unknown key.
    DataError
        If a value has the wrong type (YAML reads ``1e-4`` as text: write ``1.0e-4``).
    """
    raw = _read(name)
    sizes = os.environ.get("EMBER_SIZES")
    if sizes:
        raw |= {key: _read(sizes)[key] for key in ("deltas", "sizes")}
    return Profile(name=name, **raw)


def _read(name: str) -> dict[str, Any]:
    if name not in list_profiles():
        raise UnknownNameError("profile", name, list_profiles())
    path = notebooks_dir() / "params" / f"{name}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({error})") from None
    known = {f.name for f in fields(Profile)} - {"name"}
    _checked(path, "the file", raw, dict)
    for key in sorted(raw.keys() ^ known):
        if key in known:
            raise DataError(f"{path}: missing key {key!r}")
        raise UnknownNameError(f"key in {path.name}", key, known)
    _checked(path, "model", raw["model"], str)
    for key, kind in (("concepts", str), ("methods", str), ("seeds", int), ("deltas", (int, float))):
        raw[key] = tuple(_checked(path, key, value, kind) for value in _checked(path, key, raw[key], list))
    raw["deltas"] = tuple(float(delta) for delta in raw["deltas"])
    for key, value in _checked(path, "fit", raw["fit"], dict).items():
        _checked(path, f"fit.{key}", value, (int, float))
    for key in ("rank", "sparsity"):
        if key not in raw["fit"]:
            raise DataError(f"{path}: missing key 'fit.{key}'")
    for split, entries in _checked(path, "sizes", raw["sizes"], dict).items():
        for key, value in _checked(path, f"sizes.{split}", entries, dict).items():
            _checked(path, f"sizes.{split}.{key}", value, int)
    return dict(raw)


def _checked(path: Path, key: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{path}, key {key!r}: {value!r} is {type(value).__name__}; numbers look like 1.0e-4 in YAML")
    return value


def plan(profile: Profile) -> list[Job]:
    """The notebook runs of a profile, in an order in which each finds what it needs."""
    jobs = []
    common = {"profile": profile.name, "model": profile.model}
    fit = {key: profile.fit[key] for key in ("rank", "sparsity")}
    for concept in profile.concepts:
        for seed in profile.seeds:
            chosen = {**common, "concept": concept}
            first = Job("01_factorize_embeddings", {**chosen, **fit, "seed": seed}, (), ("loss",))
            second = Job("02_select_features", {**chosen, **fit, "seed": seed}, (first.name,), ("scores", "preview"))
            jobs += [first, second]
            for method in profile.methods:
                jobs.append(
                    Job(
                        "03_erase_concept",
                        {**chosen, "method": method, "ember": False, "seed": seed},
                        (second.name,),
                        ("records", "cells", "items", "samples", "lexical"),
                    )
                )
        erased = [job.name for job in jobs if job.notebook == "03_erase_concept"]
        jobs.append(Job("00_tour", {**common, "concept": concept}, tuple(erased)))
    jobs.append(Job("08_report", {"profile": profile.name}, tuple(job.name for job in jobs)))
    return jobs


def manifest_path(profile: str, name: str) -> Path:
    """The file that is written last by a successful run."""
    return results_dir(profile) / "notebooks" / f"{name}.json"


def frame_path(profile: str, name: str, frame: str) -> Path:
    """One of the result frames of a run."""
    return results_dir(profile) / "records" / name / f"{frame}.parquet"
