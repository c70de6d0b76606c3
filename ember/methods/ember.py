"""EMBER: subtract the concept features' contribution from the embedding rows of concept-only tokens."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import pandas as pd
import torch

from ember.data.types import Concept
from ember.editing import Edit, Provenance
from ember.errors import EmberError
from ember.features import PRECISIONS, RULES, ConceptFeatures, concept_features
from ember.models.loading import LoadedModel
from ember.store.environment import library_versions
from ember.tokens import preview_rows

SIDES = ("input", "output", "both")


@dataclass(frozen=True)
class EmberConfig:
    """Settings of an EMBER edit (paper, section 3).

    ``delta`` is the edit strength δ; ``rank``, ``sparsity``, ``ridge``, ``max_iter``, ``patience``, ``tol`` and
    ``precision`` are the factorization's; ``rule``, ``threshold`` and ``features`` select features
    (``ConceptFeatures.select``); ``side`` names the embedding matrices to edit: ``input`` (the paper's), ``output`` or
    ``both``. ``max_zipf`` spares the rows of tokens more frequent in general English than that (zipf scale; None, the
    paper's rule, spares none).
    """

    delta: float = 1.0
    rank: int = 300
    sparsity: float = 0.01
    ridge: float = 1e-4
    max_iter: int = 20_000
    patience: int = 500
    tol: float = 1e-4
    precision: str = "float64"
    rule: str = "keyness"
    threshold: float | None = None
    features: tuple[int, ...] | None = None
    side: str = "input"
    max_zipf: float | None = None

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}, got {self.side!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.sparsity <= 1:
            raise ValueError(f"sparsity must be in (0, 1], got {self.sparsity}")


def run(
    loaded: LoadedModel,
    concept: Concept,
    config: EmberConfig = EmberConfig(),
    *,
    seed: int = 42,
    progress: bool = False,
) -> Edit:
    """Make the EMBER edit e_i ← e_i − δ c_i for a concept; the model is left bit-identical.

    Errors are those of ``concept_features`` (rank, texts), ``ConceptFeatures.select`` (nothing selected) and
    ``edit_from_features``.
    """
    features = fit(loaded, concept, config, seed=seed, progress=progress)
    return edit_from_features(loaded, features, config, seed=seed)


def fit(
    loaded: LoadedModel, concept: Concept, config: EmberConfig, *, seed: int = 42, progress: bool = False
) -> ConceptFeatures:
    """The factorization behind ``run``; cached, because every strength and method shares it."""
    return concept_features(
        loaded, concept, rank=config.rank, sparsity=config.sparsity, ridge=config.ridge, max_iter=config.max_iter,
        patience=config.patience, tol=config.tol, precision=config.precision, seed=seed, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class RowTarget:
    """What an edit of embedding rows sets out from.

    ``matrix`` [vocab, d_model] of ``loaded``; ``rows`` [r], the token ids that EMBER edits there by ``features``; and
    its ``contributions`` [r, d_model], c_i in the units of the matrix.
    """

    loaded: LoadedModel
    features: ConceptFeatures
    matrix: torch.Tensor
    rows: torch.Tensor
    contributions: torch.Tensor

    @property
    def old(self) -> torch.Tensor:
        """The rows as they are [r, d_model], in float32."""
        return self.matrix[self.rows.to(self.matrix.device)].float()


Displacement = Callable[[RowTarget], torch.Tensor]  # → [r, d_model]


def own_contributions(target: RowTarget) -> torch.Tensor:
    """EMBER's own displacement: c_i."""
    return target.contributions


def edit_from_features(
    loaded: LoadedModel,
    features: ConceptFeatures,
    config: EmberConfig = EmberConfig(),
    *,
    seed: int = 42,
    method: str = "ember",
    displacement: Displacement = own_contributions,
    others: Callable[[RowTarget], torch.Tensor] | None = None,
) -> Edit:
    """The edit of already fitted features: δ times a displacement, c_i by default, is subtracted from each row.

    Where the model multiplies its embeddings by a scale (Gemma), features live in scaled units and the contributions
    are divided by the scale. ``method`` and another ``displacement`` make a control edit of the same rows, ``others``
    one of as many other rows.

    Raises
    ------
    EmberError
        If the features were fitted on other weights, or touch no row.
    """
    if features.weights_hash != loaded.weights_hash:
        raise EmberError(f"the features were fitted on {features.model} ({features.weights_hash[:12]}), not this model")
    selected = features.select(rule=config.rule, threshold=config.threshold, features=config.features)
    contributions = features.contributions(selected, max_zipf=config.max_zipf)
    if not contributions:
        rare = "" if config.max_zipf is None else f" of zipf ≤ {config.max_zipf:g}"
        raise EmberError(f"features {selected} are active on no concept-only token{rare}; nothing to edit")
    rows = torch.tensor(sorted(contributions))
    c = torch.stack([contributions[int(i)] for i in rows]) / loaded.embedding_scale
    names = {"input": [loaded.embedding_name], "output": [loaded.head_name]}
    names["both"] = names["input"] + names["output"]
    values = {}
    for name in names[config.side]:
        target = RowTarget(loaded, features, loaded.model.get_parameter(name).detach(), rows, c)
        target = target if others is None else replace(target, rows=others(target))
        change = config.delta * displacement(target).to(target.matrix.device)
        values[name] = (target.rows, (target.old - change).to(target.matrix.dtype))
    provenance = Provenance(
        base_model=loaded.name, base_hash=loaded.weights_hash, method=method, seed=seed, concept=features.concept,
        config=asdict(config) | {"selected": selected}, side=config.side, versions=library_versions(),
    )  # fmt: skip
    return Edit.from_values(loaded, values, provenance)


def preview(
    loaded: LoadedModel,
    concept: Concept,
    config: EmberConfig = EmberConfig(),
    *,
    seed: int = 42,
    progress: bool = False,
) -> pd.DataFrame:
    """The rows that ``run`` would change, before anything is edited (``ember.tokens.preview_rows``)."""
    features = fit(loaded, concept, config, seed=seed, progress=progress)
    selected = features.select(rule=config.rule, threshold=config.threshold, features=config.features)
    scale = config.delta / loaded.embedding_scale
    contributions = features.contributions(selected, max_zipf=config.max_zipf)
    change = {token: scale * vector for token, vector in contributions.items()}
    return preview_rows(loaded, features.table, change)
