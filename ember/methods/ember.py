"""EMBER: subtract the concept features' contribution from the embedding rows of concept-only tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import pandas as pd
import torch

from ember.data.types import Concept
from ember.editing import Edit
from ember.errors import EmberError, require_at_least
from ember.features import PRECISIONS, RULES, ConceptFeatures, concept_features
from ember.methods.training import made_edit
from ember.models.loading import LoadedModel
from ember.tokens import preview_rows

SIDES = ("input", "output", "both")


@dataclass(frozen=True)
class EmberConfig:
    """Settings of an EMBER edit (paper, section 3).

    ``delta`` is the edit strength δ; ``rank``, ``sparsity``, ``ridge``, ``max_iter``, ``patience``, ``tol`` and
    ``precision`` are the factorization's; ``rule``, ``threshold`` and ``features`` select features
    (``ConceptFeatures.select``); ``side`` names the embedding matrices to edit: ``input`` (the paper's), ``output`` or
    ``both``. ``max_zipf`` spares the rows of tokens more frequent in general English than that (zipf scale; None, the
    paper's rule, spares none). ``features_from`` is a folder of ``ConceptFeatures.save`` (``import-features`` writes
    one): its features are used, and the factorization's settings mean nothing.
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
    features_from: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("side", SIDES), ("precision", PRECISIONS), ("rule", RULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        require_at_least(self, 1, "rank")
        if not 0 < self.sparsity <= 1:
            raise ValueError(f"sparsity must be in (0, 1], got {self.sparsity}")


def run(loaded: LoadedModel, concept: Concept, config: EmberConfig, *, seed: int = 42, **other: Any) -> Edit:
    """The EMBER edit e_i ← e_i − δ c_i; ``other`` options of ``edit_from_features`` make it a control edit."""
    return edit_from_features(loaded, fit(loaded, concept, config, seed=seed), config, seed=seed, **other)


def fit(loaded: LoadedModel, concept: Concept, config: EmberConfig, *, seed: int = 42) -> ConceptFeatures:
    """The factorization behind ``run``: the one in ``features_from``, or else made once for every strength and method.

    That the features in the folder are those of another concept is an ``EmberError``.
    """
    if config.features_from is not None:
        features = ConceptFeatures.load(config.features_from)
        if features.concept != concept.name:
            raise EmberError(f"{config.features_from} holds features of {features.concept!r}, not of {concept.name!r}")
        return features
    return concept_features(
        loaded, concept, rank=config.rank, sparsity=config.sparsity, ridge=config.ridge, max_iter=config.max_iter,
        patience=config.patience, tol=config.tol, precision=config.precision, seed=seed,
    )  # fmt: skip


@dataclass(frozen=True)
class RowTarget:
    """What an edit of embedding rows sets out from.

    ``matrix`` [vocab, d_model] of ``loaded``; ``rows`` [r], the token ids that EMBER edits there by ``features``; its
    ``contributions`` [r, d_model], c_i in the units of the matrix; and the ``seed`` of what is random.
    """

    loaded: LoadedModel
    features: ConceptFeatures
    matrix: torch.Tensor
    rows: torch.Tensor
    contributions: torch.Tensor
    seed: int

    @property
    def old(self) -> torch.Tensor:
        """The rows as they are [r, d_model], in float32."""
        return self.matrix[self.rows.to(self.matrix.device)].float()


def edit_from_features(
    loaded: LoadedModel,
    features: ConceptFeatures,
    config: EmberConfig = EmberConfig(),
    *,
    seed: int = 42,
    method: str = "ember",
    displacement: Callable[[RowTarget], torch.Tensor] = attrgetter("contributions"),
    others: Callable[[RowTarget], torch.Tensor] = attrgetter("rows"),
) -> Edit:
    """The edit of already fitted features: δ times a displacement, c_i by default, is subtracted from each row.

    Contributions are divided by the scale with which the model multiplies embeddings (Gemma). ``method`` and another
    ``displacement`` [r, d_model] make a control edit of the same rows, ``others`` [r] one of as many other rows.
    Features that were fitted on other weights, or touch no row, are an ``EmberError``.
    """
    selected, contributions = _contributions(loaded, features, config)
    if not contributions:
        rare = "" if config.max_zipf is None else f" of zipf ≤ {config.max_zipf:g}"
        raise EmberError(f"features {selected} are active on no concept-only token{rare}; nothing to edit")
    rows = torch.tensor(sorted(contributions))
    c = torch.stack([contributions[int(i)] for i in rows]) / loaded.embedding_scale
    matrices, values = {"input": loaded.embedding_name, "output": loaded.head_name}, {}
    for name in matrices.values() if config.side == "both" else [matrices[config.side]]:
        target = RowTarget(loaded, features, loaded.model.get_parameter(name).detach(), rows, c, seed)
        target = replace(target, rows=others(target))
        change = config.delta * displacement(target).to(target.matrix.device)
        values[name] = (target.rows, (target.old - change).to(target.matrix.dtype))
    extra = {"selected": selected} | ({"fitted": features.settings} if config.features_from else {})
    made = {"method": method, "seed": seed, "concept": features.concept, "side": config.side}
    return made_edit(loaded, values, config, extra, **made)


def _contributions(
    loaded: LoadedModel, features: ConceptFeatures, config: EmberConfig
) -> tuple[list[int], dict[int, torch.Tensor]]:
    if features.weights_hash != loaded.weights_hash:
        place = f" in {config.features_from}" if config.features_from else ""
        made_for = f"{features.model} ({features.weights_hash[:12]})"
        raise EmberError(f"the features{place} were fitted on {made_for}, not this model")
    selected = features.select(rule=config.rule, threshold=config.threshold, features=config.features)
    return selected, features.contributions(selected, max_zipf=config.max_zipf)


def preview(loaded: LoadedModel, concept: Concept, config: EmberConfig, *, seed: int = 42) -> pd.DataFrame:
    """The rows that ``run`` would change, before anything is edited (``ember.tokens.preview_rows``)."""
    features = fit(loaded, concept, config, seed=seed)
    scale = config.delta / loaded.embedding_scale
    change = {token: scale * vector for token, vector in _contributions(loaded, features, config)[1].items()}
    return preview_rows(loaded, features.table, change)
