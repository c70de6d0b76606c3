"""Profiles: what a batch run covers, read from a YAML file."""

import itertools
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Required

import yaml
from pydantic import AfterValidator, PrivateAttr
from typing_extensions import TypedDict

from ember.errors import DataError, UnknownNameError
from ember.evaluation.suite import Sizes
from ember.judging.settings import JudgeConfig
from ember.store.paths import notebooks_dir
from ember.store.validated import Listed, Strict, validated

_HINT = "numbers look like 1.0e-4 in YAML"


def _no_quoted_number(value: Any) -> Any:
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str) and entry.lstrip("+-.")[:1].isdigit():
            raise ValueError(f"{entry!r} is str; {_HINT}")
    return value


# Of any kind, as each method has its own; a string where a number belongs is what YAML makes of 1e-4.
Setting = Annotated[Any, AfterValidator(_no_quoted_number)]


class Sweep(Strict):
    """Which arms meet which attacks, in which precisions, at which rates, for how many times the settings' tokens."""

    arms: Listed[str]
    attacks: Listed[str]
    precisions: Listed[str]
    lrs: Listed[float]
    budgets: Listed[int] = (1,)
    seeds: int | None = None


class Relearn(Strict):
    """The ``settings`` of every relearning (``RelearnConfig``), and the ``sweeps``, which may overlap."""

    settings: dict[str, Setting]
    sweeps: Listed[Sweep]


class Localize(Strict):
    """The ``arms`` whose damage is traced token by token, and how many ``texts`` of each kind."""

    arms: Listed[str]
    texts: int
    seeds: int | None = None


class Trade(Strict):
    """The ``edits`` of EMBER's rows that are compared over their ``strengths``, on how many questions and texts."""

    edits: Listed[str]
    strengths: Listed[float]
    questions: int
    texts: int
    seeds: int | None = None


class Stability(Strict):
    """The fits that are compared, each with each; in each of the ``precisions`` the first is made again, and mixed."""

    ranks: Listed[int]
    sparsities: Listed[float]
    seeds: Listed[int]
    precisions: Listed[str]
    questions: int


class Teach(Strict):
    """The ``arms`` that erase an invented subject, how it is taught, how many questions and texts watch the damage."""

    arms: Listed[str]
    tokens: int
    lr: float
    batch_size: int
    questions: int
    texts: int
    seeds: int | None = None


class Fit(TypedDict, total=False):
    """Settings of EMBER's factorization, its controls' too."""

    rank: Required[int]
    sparsity: Required[float]
    ridge: float
    max_iter: int
    patience: int
    tol: float
    precision: str


class Profile(Strict):
    """One batch run.

    ``source`` says whose data on the concepts it uses, one of ``ember.data.types.SOURCES``. ``controls`` are edits of
    EMBER's rows, run alone. ``grids`` holds for each method the settings that all its cells share and, as lists, those
    that are searched (the gentlest value first). ``seeds`` of a part is how many of the profile's it uses: all, if it
    does not say; a part with an empty list is not run. ``judge`` is the language model that grades what the sizes leave
    to it (the fields of ``JudgeConfig``), or nothing. ``dtype`` is that of the weights, where it is not to be the
    model's own. ``needs`` tells in words what the profile takes, and whether that was measured.
    """

    model: str
    source: Literal["ours", "released"]
    concepts: Listed[str]
    methods: Listed[str]
    controls: Listed[str]
    seeds: Listed[int]
    fit: Fit
    grids: dict[str, dict[str, Setting]]
    sizes: dict[str, Sizes]
    relearn: Relearn
    localize: Localize
    trade: Trade
    stability: Stability
    teach: Teach
    judge: dict[str, Any]
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    needs: str = ""
    _name: str = PrivateAttr("")

    @property
    def name(self) -> str:
        """The name of its file."""
        return self._name

    @property
    def factorizing(self) -> tuple[str, ...]:
        """The methods that edit the rows which EMBER's factorization selects."""
        return ("ember", *self.controls)

    def cells(self, method: str) -> dict[str, dict[str, Any]]:
        """The grid of a method: label, such as ``"layer=7 lr=0.001"``, → settings; the first keys vary slowest."""
        grid: dict[str, Any] = {**(self.fit if method in self.factorizing else {}), **self.grids[method]}
        searched = {key: value for key, value in grid.items() if isinstance(value, list)}
        cells = {}
        for values in itertools.product(*searched.values()):
            cell = dict(zip(searched, values, strict=True))
            varied = [(key, value) for key, value in cell.items() if len(searched[key]) > 1]
            shown = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in varied]
            label = " ".join(shown) or "only cell"
            if label in cells:
                raise DataError(f"profile {self.name}: two cells of {method} are both {label!r}")
            cells[label] = grid | cell
        return cells


def profiles_dir() -> Path:
    """Folder of the profiles: ``$EMBER_PROFILES``, else ``notebooks/params``."""
    override = os.environ.get("EMBER_PROFILES")
    return Path(override).expanduser() if override else notebooks_dir() / "params"


def list_profiles() -> list[str]:
    """Names of the profiles in ``profiles_dir()``."""
    return sorted(path.stem for path in profiles_dir().glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """Read a profile; an ``UnknownNameError`` or ``DataError`` names what is unknown, missing or of a wrong type."""
    if name not in list_profiles():
        raise UnknownNameError("profile", name, list_profiles())
    path = profiles_dir() / f"{name}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({error})") from None
    profile = validated(Profile, raw, str(path), word="key", file=path.name, hint=_HINT)
    profile._name = name
    for method in (*profile.methods, *profile.controls):
        if method not in profile.grids:
            raise DataError(f"{path}: missing key 'grids.{method}'")
    if profile.judge:
        validated(JudgeConfig, profile.judge, f"{path}, judge", word="key", file=f"the judge of {path.name}")
    return profile
