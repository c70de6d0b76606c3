"""Factorizations that the paper's authors published, as ``ConceptFeatures``.

They are pickles of live objects (Hub data set ``ClSu/ember-features``, one ``embedding.pkl`` a concept): a table with
``nmf``, an object whose parameters ``F_`` [d_model, K] and ``G_`` [n, K] are the factors, and ``vprime_token_ids``, the
ids of G's rows. ``ember.store.pickles`` reads them without running anything.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ember.data.types import Concept
from ember.errors import DataError
from ember.factorization import Factorization
from ember.features import ConceptFeatures, about_model, scaled_rows, score_features
from ember.models.loading import LoadedModel
from ember.store.files import sha256_of
from ember.store.pickles import unpickle
from ember.tokens import token_table

# Classes of the published objects; their attributes are read, they are not imported.
CLASSES = ("ember.utils.SparseMatrixFactorization", "factorization.seminmf.NMFSemiNMF")
FIELDS = {"F": "nmf._parameters.F_", "G": "nmf._parameters.G_", "tokens": "vprime_token_ids"}
MOST_UNSEEN = 0.05  # of the tokens may occur in none of the concept's texts
SCALE = (0.5, 2.0)  # least-squares factor between the rows and G Fᵀ: 1 for a factorization of these rows


def import_published(
    path: str | Path,
    loaded: LoadedModel,
    concept: Concept,
    *,
    fields: Mapping[str, str] | None = None,
    classes: Collection[str] = CLASSES,
) -> ConceptFeatures:
    """A published factorization, scored like one of ours, with F and G in the units of the *scaled* rows of E.

    That G Fᵀ approximates the model's rows in this order is checked; ``settings["imported"]`` holds the share of their
    squared norm that it explains. The texts of ``concept`` (``source="released"`` for the published files) tell the
    tokens' roles; tokens in none of them, 5 % at most, count as ``neutral``, so are never edited. ``fields`` says which
    field is ``F``, ``G`` or ``tokens`` in another layout; ``classes`` is as in ``unpickle``. Errors are ``DataError``s.
    """
    content = unpickle(path, classes=classes)
    try:
        if unknown := sorted((fields or {}).keys() - FIELDS.keys()):
            raise DataError(f"fields must name {', '.join(FIELDS)}, got {unknown[0]!r}")
        names = FIELDS | dict(fields or {})
        for role, name in names.items():
            if name not in content:
                held = [f"{place!r} ({_described(value)})" for place, value in content.items()]
                held[30:] = [f"{len(held) - 30} more"] if len(held) > 30 else []
                asked = f"no field {name!r} for {role}; say which in fields (--field)"
                raise DataError(f"{asked}. The file holds {'; '.join(held) or 'nothing'}")
        ids = _token_ids(loaded, names["tokens"], content[names["tokens"]])
        F = _matrix(names["F"], content[names["F"]], loaded.embedding.shape[1], "the model's d_model")
        G = _matrix(names["G"], content[names["G"]], len(ids), "the number of tokens")
        if F.shape[1] != G.shape[1]:
            raise DataError(f"F has {F.shape[1]} features (shape {list(F.shape)}), G {G.shape[1]} ({list(G.shape)})")
        table, unseen = _table(loaded, concept, ids)
        loss, explained = _check_fit(loaded, table, F, G)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    origin = {"file": Path(path).name, "sha256": sha256_of(Path(path)), "fields": names}
    settings = {"rank": F.shape[1], "imported": origin | {"explained": explained, "unseen": unseen}}
    fit = Factorization(F, G, (loss,), False)  # whether it had converged is not known, so not claimed
    about = (concept.name, loaded.name, loaded.weights_hash, table, fit, score_features(table, G))
    return ConceptFeatures(*about, settings | about_model(loaded))


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{len(value)} entries" if isinstance(value, list | tuple) else type(value).__name__


def _matrix(place: str, value: Any, rows: int, what: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
        raise DataError(f"field {place!r}: expected a matrix of numbers, got {_described(value)}")
    if not value.isfinite().all():
        raise DataError(f"field {place!r}: not all values are finite")
    if len(value) != rows:
        raise DataError(f"field {place!r}: its shape is {list(value.shape)}, but {what} is {rows}")
    return value.float()


def _token_ids(loaded: LoadedModel, place: str, value: Any) -> list[int]:
    """Different ids of the model's vocabulary."""
    ids = value.tolist() if isinstance(value, torch.Tensor) else value
    if not isinstance(ids, list | tuple) or {type(i) for i in ids} != {int}:
        raise DataError(f"field {place!r}: expected the token ids of G's rows, got {_described(value)}")
    if strange := [i for i in ids if not 0 <= i < len(loaded.embedding) or i in loaded.special_ids]:
        raise DataError(f"no content tokens of {loaded.name} (0..{len(loaded.embedding) - 1}): {strange[:10]}")
    if twice := sorted(i for i, count in Counter(ids).items() if count > 1):
        raise DataError(f"tokens that occur twice: {twice[:10]}")
    return list(ids)


def _check_fit(loaded: LoadedModel, table: pd.DataFrame, F: torch.Tensor, G: torch.Tensor) -> tuple[float, float]:
    """Loss of G Fᵀ against the model's rows, and the share of their squared norm that it explains."""
    X = scaled_rows(loaded, table, "float32")
    product = G @ F.T
    loss, shifted = (float((rows - product).square().sum()) for rows in (X, X.roll(1, dims=0)))
    explained = 1 - loss / float(X.square().sum())
    factor = float((X * product).sum() / product.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    if explained <= 0 or loss >= shifted or not SCALE[0] <= factor <= SCALE[1]:
        raise DataError(
            f"G Fᵀ is no approximation of these rows of {loaded.name} (it explains {explained:.1%} of their squared "
            f"norm, and fits best times {factor:.3g}): another model, another order of tokens, or features of rows "
            f"that are not scaled (by {loaded.embedding_scale:.4g} here)"
        )
    return loss, explained


def _table(loaded: LoadedModel, concept: Concept, ids: list[int]) -> tuple[pd.DataFrame, list[int]]:
    """The token table in the order of G's rows, and the ids that the concept's texts do not hold."""
    known = token_table(loaded, concept.sentences, concept.neutral, concept.further_neutral)
    unseen = sorted(set(ids) - set(known.token_id))
    if len(unseen) > MOST_UNSEEN * len(ids):
        raise DataError(
            f"{len(unseen)} of {len(ids)} tokens occur nowhere in the texts of {concept.name!r} (source "
            f"{concept.source!r}), such as {[loaded.decode([i]) for i in unseen[:5]]}: was it fitted to others?"
        )
    others = pd.DataFrame({"token_id": unseen, "token": [loaded.tokenizer.decode([i]) for i in unseen]})
    others = others.assign(concept_count=0, neutral_count=0, role="neutral", keyness=0.0, key=False, ordinary=False)
    whole = pd.concat([known, others]) if unseen else known
    return whole.set_index("token_id").loc[ids].reset_index(), unseen
