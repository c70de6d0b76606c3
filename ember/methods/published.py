"""Factorizations that the paper's authors published, as ``ConceptFeatures``.

They are pickles of live objects (Hub data set ``ClSu/ember-features``, one ``embedding.pkl`` a concept): a table with
``nmf``, an object whose parameters ``F_`` [d_model, K] and ``G_`` [n, K] are the factors, and ``vprime_token_ids``, the
ids of G's rows. ``ember.store.pickles`` reads them without running anything.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
# What a field may be called (the last part of its path), the likeliest first. W H is scikit-learn's X ≈ W H.
NAMES: Mapping[str, tuple[str, ...]] = {
    "F": ("F_", "F", "H", "components_", "features", "directions"),
    "G": ("G_", "G", "W", "activations", "token_activations"),
    "tokens": ("vprime_token_ids", "token_ids", "ids", "tokens", "token_strings", "vocab"),
}
SCALE = (0.5, 2.0)  # least-squares factor between the rows and G Fᵀ: 1 for a factorization of these rows


def import_published(
    path: str | Path,
    loaded: LoadedModel,
    concept: Concept,
    *,
    tokens: Sequence[int] | Sequence[str] | None = None,
    fields: Mapping[str, str] | None = None,
    classes: Collection[str] = CLASSES,
    max_unseen: float = 0.05,
) -> ConceptFeatures:
    """A published factorization, scored like one of ours.

    F must be [d_model, K] and G [n, K], in the units of the *scaled* rows of E (Gemma: times √d_model), as published; a
    transposed F or G is recognized by its shape. That G Fᵀ approximates the model's rows, and those in this order best,
    is checked; ``settings["imported"]`` holds the share of their squared norm that it explains.

    ``concept`` is the one whose texts tell the tokens' roles; the published files go with ``source="released"``. Tokens
    that occur in none of them count as ``neutral``, so are never edited: at most ``max_unseen`` of all. ``tokens`` are
    the ids or strings of G's rows, if not the file's. A string must be one entry of the tokenizer's vocabulary, or what
    exactly one id decodes to, as it stands. ``fields`` says which field is ``F``, ``G`` or ``tokens``, where ``NAMES``
    do not find it; ``classes`` is as in ``unpickle``.

    Raises
    ------
    DataError
        If the file is refused, a field is missing (the message lists what there is), shapes or tokens do not fit, or
        G Fᵀ is no approximation of the model's rows.
    """
    content = unpickle(path, classes=classes)
    try:
        names = _field_names(content, fields or {}, [role for role in NAMES if role != "tokens" or tokens is None])
        ids = _token_ids(loaded, _listed(names["tokens"], content[names["tokens"]]) if tokens is None else tokens)
        F = _matrix("F", names["F"], content[names["F"]], loaded.embedding.shape[1], "the model's d_model")
        G = _matrix("G", names["G"], content[names["G"]], len(ids), "the number of tokens")
        if F.shape[1] != G.shape[1]:
            raise DataError(f"F has {F.shape[1]} features (shape {list(F.shape)}), G {G.shape[1]} ({list(G.shape)})")
        table, unseen = _table(loaded, concept, ids, max_unseen)
        loss, explained = _check_fit(loaded, table, F, G)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    origin = {"file": Path(path).name, "sha256": sha256_of(Path(path)), "fields": names}
    settings = {"rank": F.shape[1], "imported": origin | {"explained": explained, "unseen": unseen}}
    fit = Factorization(F, G, (loss,), False)  # whether it had converged is not known, so not claimed
    about = (concept.name, loaded.name, loaded.weights_hash, table, fit, score_features(table, G))
    return ConceptFeatures(*about, settings | about_model(loaded))


def _field_names(content: Mapping[str, Any], fields: Mapping[str, str], roles: Sequence[str]) -> dict[str, str]:
    """Which field plays which role."""
    if unknown := sorted(fields.keys() - NAMES.keys()):
        raise DataError(f"fields must name {', '.join(NAMES)}, got {unknown[0]!r}")
    held = "; ".join(f"{place!r} ({_described(value)})" for place, value in list(content.items())[:30]) or "nothing"
    held += f"; {len(content) - 30} more" if len(content) > 30 else ""
    names = {}
    for role in roles:
        named = ([place for place in content if place.rpartition(".")[2] == name] for name in NAMES[role])
        matches = [fields[role]] if role in fields else next(filter(None, named), [])
        if len(matches) > 1:
            raise DataError(f"{role} may be {' or '.join(map(repr, matches))}; say which in fields (--field)")
        if not matches or matches[0] not in content:
            looked = repr(fields[role]) if role in fields else ", ".join(NAMES[role])
            raise DataError(f"no field {looked} for {role}; say which in fields (--field). The file holds {held}")
        names[role] = matches[0]
    return names


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{len(value)} entries" if isinstance(value, list | dict) else type(value).__name__


def _matrix(role: str, place: str, value: Any, rows: int, what: str) -> torch.Tensor:
    """The matrix with so many rows; a square one is as it should be."""
    if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
        raise DataError(f"field {place!r}: expected a matrix of numbers, got {_described(value)}")
    if not value.isfinite().all():
        raise DataError(f"field {place!r}: not all values are finite")
    if rows not in value.shape:
        raise DataError(f"{role} has shape {list(value.shape)}, but {what} is {rows}")
    return value.float() if value.shape[0] == rows else value.float().T.contiguous()


def _listed(place: str, value: Any) -> list[Any]:
    """Tokens in the order of G's rows, from a list, a tensor, or a table of row numbers."""
    if isinstance(value, torch.Tensor) and value.ndim == 1 and not value.is_floating_point():
        return list(value.tolist())
    if isinstance(value, dict):
        by_row = value if all(isinstance(key, int) for key in value) else {row: key for key, row in value.items()}
        value = [by_row.get(row) for row in range(len(value))] if by_row.keys() == set(range(len(value))) else value
    if isinstance(value, list):
        return value
    raise DataError(f"field {place!r}: expected the tokens of G's rows, got {_described(value)}")


def _token_ids(loaded: LoadedModel, tokens: Sequence[Any]) -> list[int]:
    """Different ids of the model's vocabulary."""
    kinds = {type(token) for token in tokens}
    if kinds not in ({str}, {int}):
        raise DataError("the tokens of G's rows must be ids, or all strings")
    ids = _ids_of_strings(loaded, tokens) if kinds == {str} else list(tokens)
    if strange := [i for i in ids if not 0 <= i < len(loaded.embedding) or i in loaded.special_ids]:
        raise DataError(f"no content tokens of {loaded.name} (0..{len(loaded.embedding) - 1}): {strange[:10]}")
    if twice := sorted(i for i, count in Counter(ids).items() if count > 1):
        raise DataError(f"tokens that occur twice: {twice[:10]}")
    return ids


def _ids_of_strings(loaded: LoadedModel, tokens: Sequence[str]) -> list[int]:
    """Ids of strings, all of which are vocabulary entries, or else all decoded tokens."""
    entries: dict[str, list[int]] = {entry: [i] for entry, i in loaded.tokenizer.get_vocab().items()}
    decoded: dict[str, list[int]] = {}
    for (i,) in entries.values():
        decoded.setdefault(loaded.tokenizer.decode([i]), []).append(i)
    missing = [[token for token in tokens if token not in known] for known in (entries, decoded)]
    if all(missing):
        raise DataError(f"not in the vocabulary of {loaded.name}, as they stand: {min(missing, key=len)[:10]}")
    readings = [known for known, lacks in zip((entries, decoded), missing, strict=True) if not lacks]
    ids = [sorted({i for known in readings for i in known[token]}) for token in tokens]
    if unclear := [token for token, several in zip(tokens, ids, strict=True) if len(several) > 1]:
        raise DataError(f"strings that may be several tokens: {unclear[:10]}. Give ids (tokens=…)")
    return [i for (i,) in ids]


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


def _table(loaded: LoadedModel, concept: Concept, ids: list[int], most: float) -> tuple[pd.DataFrame, list[int]]:
    """The token table in the order of G's rows, and the ids that the concept's texts do not hold."""
    known = token_table(loaded, concept.sentences, concept.neutral, concept.further_neutral)
    unseen = sorted(set(ids) - set(known.token_id))
    if len(unseen) > most * len(ids):
        raise DataError(
            f"{len(unseen)} of {len(ids)} tokens occur nowhere in the texts of {concept.name!r} (source "
            f"{concept.source!r}), such as {[loaded.decode([i]) for i in unseen[:5]]}: was it fitted to others?"
        )
    rows = [(i, loaded.tokenizer.decode([i]), 0, 0, "neutral", 0.0, False, False) for i in unseen]
    columns = ["token_id", "token", "concept_count", "neutral_count", "role", "keyness", "key", "ordinary"]
    whole = pd.concat([known, pd.DataFrame(rows, columns=columns)]) if unseen else known
    return whole.set_index("token_id").loc[ids].reset_index(), unseen
