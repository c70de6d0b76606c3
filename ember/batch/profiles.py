"""Profiles: what a batch run covers, read from a YAML file, and where its results lie."""

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ember.data.types import SOURCES
from ember.errors import DataError, UnknownNameError
from ember.judging.settings import JudgeConfig
from ember.store.paths import notebooks_dir, results_dir, slug


@dataclass(frozen=True)
class Profile:
    """One batch run.

    ``source`` says whose data on the concepts it uses, one of ``ember.data.ours.SOURCES``. ``controls`` are edits of
    EMBER's rows, run alone. ``fit`` holds the settings of EMBER's factorization, theirs too; ``grids`` for each
    method the settings that all its cells share and, as lists, those that are searched (the gentlest value first);
    ``sizes`` the number of questions, texts, instructions and generations of each split; ``relearn`` the
    ``settings`` of every relearning and the ``sweeps``, each of which says which ``arms`` meet which ``attacks`` at
    which ``precisions`` and learning rates ``lrs``, for how many times the settings' tokens (``budgets``), on the
    first ``seeds`` of the profile's; ``localize`` the ``arms`` whose damage is traced token by token and how many
    ``texts`` of each kind; ``trade`` the ``edits`` of EMBER's rows that are compared over their ``strengths`` on so
    many ``questions`` and ``texts``; both on the first ``seeds``, if given.

    ``stability`` holds the ``ranks``, ``sparsities`` and ``seeds`` of the fits that are compared, each with each, the
    ``precisions`` in which the first is made again, also with its columns in other orders, and how many ``questions``
    their edits are asked. ``teach`` holds the ``arms`` that erase an invented subject, the ``tokens`` on which it is
    taught, at which ``lr`` and ``batch_size``, and how many general ``questions`` and ``texts`` watch the damage.

    ``judge`` is the language model that grades what the sizes leave to it (the fields of ``JudgeConfig``), or nothing.

    ``dtype`` is that of the weights, where it is not to be the model's own (``ModelSpec.dtype``); it may be left out.
    """

    name: str
    model: str
    source: str
    concepts: tuple[str, ...]
    methods: tuple[str, ...]
    controls: tuple[str, ...]
    seeds: tuple[int, ...]
    fit: Mapping[str, int | float | str]
    grids: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, Mapping[str, int]]
    relearn: Mapping[str, Any]
    localize: Mapping[str, Any]
    trade: Mapping[str, Any]
    stability: Mapping[str, Any]
    teach: Mapping[str, Any]
    judge: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    @property
    def factorizing(self) -> tuple[str, ...]:
        """The methods that edit the rows which EMBER's factorization selects."""
        return ("ember", *self.controls)

    def cells(self, method: str) -> dict[str, dict[str, Any]]:
        """The grid of a method: label, such as ``"layer=7 lr=0.001"``, → settings; the first keys vary slowest.

        The same cells serve the arms with and without EMBER.
        """
        grid: dict[str, Any] = {**(self.fit if method in self.factorizing else {}), **self.grids[method]}
        searched = {key: value for key, value in grid.items() if isinstance(value, list)}
        cells = {}
        for values in itertools.product(*searched.values()):
            cell = dict(zip(searched, values, strict=True))
            varied = [f"{key}={_shown(value)}" for key, value in cell.items() if len(searched[key]) > 1]
            label = " ".join(varied) or "only cell"
            if label in cells:
                raise DataError(f"profile {self.name}: two cells of {method} are both {label!r}")
            cells[label] = grid | cell
        return cells


DTYPES = ("float32", "bfloat16", "float16", "float64")
_LOOPS = ("grids", "sizes", "relearn", "localize", "trade", "stability", "teach", "judge")
_ORDER = ("model", "concept", "method", "ember", "attack", "precision", "lr", "budget", "rank", "sparsity", "seed")


def run_name(notebook: str, **parameters: Any) -> str:
    """File name of a run: the notebook's name and its parameters, profile excepted (that is the folder)."""
    order = sorted(parameters, key=lambda key: (_ORDER.index(key) if key in _ORDER else len(_ORDER), key))
    parts = [f"{key}={_text(parameters[key])}" for key in order if key != "profile"]
    return "__".join([notebook, *parts])


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    return slug(value) if isinstance(value, str) else str(value)


def profiles_dir() -> Path:
    """Folder of the profiles: ``$EMBER_PROFILES``, else ``notebooks/params``."""
    override = os.environ.get("EMBER_PROFILES")
    return Path(override).expanduser() if override else notebooks_dir() / "params"


def list_profiles() -> list[str]:
    """Names of the profiles in ``profiles_dir()``."""
    return sorted(path.stem for path in profiles_dir().glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """Read a profile.

    Where ``$EMBER_SIZES`` names another profile, what sets the length of loops (``grids``, ``sizes`` and the parts of
    single notebooks) is taken from that one: so the tests run the notebooks as they stand with shorter loops.

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
        raw |= {key: _read(sizes)[key] for key in _LOOPS}
    return Profile(name=name, **raw)


def _read(name: str) -> dict[str, Any]:
    if name not in list_profiles():
        raise UnknownNameError("profile", name, list_profiles())
    path = profiles_dir() / f"{name}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({error})") from None
    known = {f.name for f in fields(Profile)} - {"name"}
    _checked(path, "the file", raw, dict)
    for key in sorted(({"dtype": None} | raw).keys() ^ known):
        if key in known:
            raise DataError(f"{path}: missing key {key!r}")
        raise UnknownNameError(f"key in {path.name}", key, known)
    _checked(path, "model", raw["model"], str)
    if "dtype" in raw and _checked(path, "dtype", raw["dtype"], str) not in DTYPES:
        raise UnknownNameError(f"dtype in {path.name}", raw["dtype"], DTYPES)
    if _checked(path, "source", raw["source"], str) not in SOURCES:
        raise UnknownNameError(f"source in {path.name}", raw["source"], SOURCES)
    for key, kind in (("concepts", str), ("methods", str), ("controls", str), ("seeds", int)):
        raw[key] = tuple(_checked(path, key, value, kind) for value in _checked(path, key, raw[key], list))
    _checked(path, "grids", raw["grids"], dict)
    for method in (*raw["methods"], *raw["controls"]):
        if method not in raw["grids"]:
            raise DataError(f"{path}: missing key 'grids.{method}'")
    for method, grid in raw["grids"].items():
        for key, value in _checked(path, f"grids.{method}", grid, dict).items():
            for entry in value if isinstance(value, list) else [value]:
                # A string where a number belongs is what YAML makes of 1e-4.
                if isinstance(entry, str) and entry.lstrip("+-.")[:1].isdigit():
                    _checked(path, f"grids.{method}.{key}", entry, (int, float))
    for key, value in _checked(path, "fit", raw["fit"], dict).items():
        _checked(path, f"fit.{key}", value, str if key == "precision" else (int, float))
    for key in ("rank", "sparsity"):
        if key not in raw["fit"]:
            raise DataError(f"{path}: missing key 'fit.{key}'")
    for split, entries in _checked(path, "sizes", raw["sizes"], dict).items():
        for key, value in _checked(path, f"sizes.{split}", entries, dict).items():
            switch = key in ("divergence", "letters", "judge")
            if switch and not isinstance(value, bool):
                raise DataError(f"{path}, key 'sizes.{split}.{key}': {value!r} is neither true nor false")
            if not switch:
                _checked(path, f"sizes.{split}.{key}", value, int)
    _check_relearn(path, raw["relearn"])
    numbers = {"questions": int, "texts": int}
    fits = {"ranks": int, "sparsities": float, "seeds": int, "precisions": str}
    teaching = numbers | {"tokens": int, "lr": float, "batch_size": int}
    _check_lists(path, "localize", raw["localize"], {"arms": str}, {"texts": int})
    _check_lists(path, "trade", raw["trade"], {"edits": str, "strengths": (int, float)}, numbers)
    _check_lists(path, "stability", raw["stability"], fits, {"questions": int})
    _check_lists(path, "teach", raw["teach"], {"arms": str}, teaching)
    _check_judge(path, raw["judge"])
    return dict(raw)


def _check_judge(path: Path, judge: Any) -> None:
    known = {f.name for f in fields(JudgeConfig)}
    for key in sorted(_checked(path, "judge", judge, dict).keys() - known):
        raise UnknownNameError(f"key in judge of {path.name}", key, known)
    if not judge:
        return
    for key in ("base_url", "model"):
        if key not in judge:
            raise DataError(f"{path}: missing key 'judge.{key}'")
    try:
        JudgeConfig(**judge)
    except ValueError as error:
        raise DataError(f"{path}, key 'judge': {error}") from None


def _check_lists(
    path: Path,
    name: str,
    part: Any,
    lists: Mapping[str, Any],
    numbers: Mapping[str, Any],
    *,
    optional: Mapping[str, Any] | None = None,
) -> None:
    """Refuse anything but the lists and numbers that a part consists of; ``optional`` lists may be left out.

    So may ``seeds``, a number unless it is one of the lists.
    """
    optional = optional or {}
    known = {**lists, **optional, **numbers, "seeds": int}
    for key in sorted(_checked(path, name, part, dict).keys() - known.keys()):
        raise UnknownNameError(f"key in {name} of {path.name}", key, known)
    for key in (*lists, *numbers):
        if key not in part:
            raise DataError(f"{path}: missing key '{name}.{key}'")
    for key, value in part.items():
        if key in lists or key in optional:
            for entry in _checked(path, f"{name}.{key}", value, list):
                _checked(path, f"{name}.{key}", entry, {**lists, **optional}[key])
        else:
            _checked(path, f"{name}.{key}", value, known[key])


def _check_relearn(path: Path, relearn: Any) -> None:
    parts: dict[str, Any] = {"settings": dict, "sweeps": list}
    for key in sorted(_checked(path, "relearn", relearn, dict).keys() ^ parts.keys()):
        raise DataError(f"{path}: 'relearn' needs the keys {' and '.join(map(repr, parts))}, not {key!r}")
    for key, kind in parts.items():
        _checked(path, f"relearn.{key}", relearn[key], kind)
    wanted: dict[str, Any] = {"arms": str, "attacks": str, "precisions": str, "lrs": (int, float)}
    for k, sweep in enumerate(relearn["sweeps"]):
        _check_lists(path, f"relearn.sweeps[{k}]", sweep, wanted, {}, optional={"budgets": int})


def _checked(path: Path, key: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{path}, key {key!r}: {value!r} is {type(value).__name__}; numbers look like 1.0e-4 in YAML")
    return value


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
