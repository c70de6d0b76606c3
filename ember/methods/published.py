"""Factorizations that the paper's authors published, as ``ConceptFeatures``.

They are pickles of live objects (Hub data set ``ClSu/ember-features``, one ``embedding.pkl`` a concept): a table with
``nmf``, an object whose parameters ``F_`` [d_model, K] and ``G_`` [n, K] are the factors, and ``vprime_token_ids``, the
ids of G's rows. ``ember.store.pickles`` reads them without running anything.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ember.data.types import Concept
from ember.errors import DataError
from ember.factorization import Factorization
from ember.features import ConceptFeatures, about_model, score_features
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
UNSEEN = 0.05  # share of rows whose token may be missing from the concept's texts
SCALE = (0.5, 2.0)  # least-squares factor between the rows and G Fᵀ: 1 for a factorization of these rows


def read_published(path: str | Path, *, classes: Collection[str] = CLASSES) -> dict[str, Any]:
    """The fields of a published file by dotted path (``nmf._parameters.F_``); errors as in ``unpickle``."""
    return unpickle(path, classes=classes)


def import_published(
    path: str | Path,
    loaded: LoadedModel,
    concept: Concept,
    *,
    tokens: Sequence[int] | Sequence[str] | None = None,
    fields: Mapping[str, str] | None = None,
    classes: Collection[str] = CLASSES,
) -> ConceptFeatures:
    """A published factorization, scored like one of ours.

    F must be [d_model, K] and G [n, K], in the units of the *scaled* rows of E (Gemma: times √d_model), as published; a
    transposed F or G is recognized by its shape. Rows are matched to tokens by id. Where there are only strings, each
    must be one entry of the tokenizer's vocabulary, or what exactly one id decodes to, as it stands: nothing is
    stripped. That G Fᵀ approximates the model's rows, and those in this order best, is checked.

    Parameters
    ----------
    path
        The file.
    loaded
        The model that the factorization belongs to.
    concept
        The concept whose texts tell the tokens' roles; the published files go with ``source="released"``. Tokens that
        occur in none of them count as ``neutral``, and so are never edited; there may be a few
        (``settings["imported"]["unseen"]`` holds their ids).
    tokens
        Ids or strings of G's rows, if not the file's.
    fields
        Which field is ``F``, ``G`` or ``tokens``, where the names in ``NAMES`` do not find it.
    classes
        As in ``unpickle``.

    Returns
    -------
    features
        ``settings["imported"]`` tells where they come from and the share of the rows' squared norm that they explain;
        ``loss_curve`` holds the one loss, measured here. Whether the fit had converged is not known, so not claimed.

    Raises
    ------
    DataError
        If the file is refused, a field is missing (the message lists what there is), shapes or tokens do not fit, or
        G Fᵀ is no approximation of the model's rows.
    """
    found = read_published(path, classes=classes)
    for role in sorted((fields or {}).keys() - NAMES.keys()):
        raise DataError(f"fields must name {', '.join(NAMES)}, got {role!r}")
    chosen = {role: _field(path, found, role, fields or {}) for role in NAMES if role != "tokens" or tokens is None}
    rows = tokens if tokens is not None else _listed(path, chosen["tokens"], found[chosen["tokens"]])
    ids = _token_ids(path, loaded, rows)
    F, G = (_matrix(path, chosen[role], found[chosen[role]]) for role in ("F", "G"))
    F = _oriented(path, "F", F, loaded.embedding.shape[1], "the model's d_model")
    G = _oriented(path, "G", G, len(ids), "the number of tokens")
    if F.shape[1] != G.shape[1]:
        raise DataError(
            f"{path}: F has {F.shape[1]} features (shape {list(F.shape)}), G {G.shape[1]} ({list(G.shape)})"
        )
    loss, explained = _check_fit(path, loaded, ids, F, G)
    table, unseen = _table(path, loaded, concept, ids)
    imported = {
        "file": Path(path).name, "sha256": sha256_of(Path(path)), "fields": chosen, "explained": explained,
        "unseen": unseen,
    }  # fmt: skip
    return ConceptFeatures(
        concept=concept.name,
        model=loaded.name,
        weights_hash=loaded.weights_hash,
        table=table,
        factorization=Factorization(F, G, (loss,), False),
        scores=score_features(table, G),
        settings={"rank": F.shape[1], "imported": imported} | about_model(loaded),
    )


def _field(path: str | Path, found: Mapping[str, Any], role: str, fields: Mapping[str, str]) -> str:
    """The path of the field that plays a role."""
    if role in fields:
        if fields[role] not in found:
            raise DataError(f"{path}: no field {fields[role]!r} for {role}; the file holds {_listing(found)}")
        return fields[role]
    for name in NAMES[role]:
        matches = [place for place in found if place.rpartition(".")[2] == name]
        if len(matches) > 1:
            raise DataError(f"{path}: {role} may be {' or '.join(map(repr, matches))}; say which in fields (--field)")
        if matches:
            return matches[0]
    looked = ", ".join(NAMES[role])
    held = _listing(found)
    raise DataError(f"{path}: no field {looked} for {role}; say which in fields (--field). The file holds {held}")


def _listing(found: Mapping[str, Any], *, most: int = 30) -> str:
    shown = [f"{place!r} ({_described(value)})" for place, value in list(found.items())[:most]]
    return "; ".join([*shown, *([f"{len(found) - most} more"] if len(found) > most else [])]) or "nothing"


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{len(value)} entries" if isinstance(value, list | dict) else type(value).__name__


def _matrix(path: str | Path, place: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
        raise DataError(f"{path}, field {place!r}: expected a matrix of numbers, got {_described(value)}")
    if not value.isfinite().all():
        raise DataError(f"{path}, field {place!r}: not all values are finite")
    return value.float()


def _oriented(path: str | Path, role: str, matrix: torch.Tensor, rows: int, what: str) -> torch.Tensor:
    """The matrix with so many rows; a square one is as it should be."""
    if rows not in matrix.shape:
        raise DataError(f"{path}: {role} has shape {list(matrix.shape)}, but {what} is {rows}")
    return matrix if matrix.shape[0] == rows else matrix.T.contiguous()


def _listed(path: str | Path, place: str, value: Any) -> list[Any]:
    """Tokens in the order of G's rows, from a list, a tensor, or a table of row numbers."""
    if isinstance(value, torch.Tensor) and value.ndim == 1 and not value.is_floating_point():
        return list(value.tolist())
    if isinstance(value, dict):
        by_row = value if all(isinstance(key, int) for key in value) else {row: key for key, row in value.items()}
        if sorted(by_row, key=repr) == sorted(range(len(value)), key=repr):
            return [by_row[row] for row in range(len(value))]
    if isinstance(value, list):
        return value
    raise DataError(f"{path}, field {place!r}: expected the tokens of G's rows, got {_described(value)}")


def _token_ids(path: str | Path, loaded: LoadedModel, tokens: Sequence[Any]) -> list[int]:
    """Different ids of the model's vocabulary."""
    if tokens and all(isinstance(token, str) for token in tokens):
        ids = _ids_of_strings(path, loaded, tokens)
    elif tokens and all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        ids = list(tokens)
    else:
        raise DataError(f"{path}: the tokens of G's rows must be ids, or all strings")
    vocabulary = loaded.embedding.shape[0]
    strange = [i for i in ids if not 0 <= i < vocabulary or i in loaded.special_ids]
    if strange:
        raise DataError(f"{path}: no content tokens of {loaded.name} (0..{vocabulary - 1}): {strange[:10]}")
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise DataError(f"{path}: tokens that occur twice: {twice[:10]}")
    return ids


def _ids_of_strings(path: str | Path, loaded: LoadedModel, tokens: Sequence[str]) -> list[int]:
    """Ids of strings, all of which are vocabulary entries, or else all decoded tokens."""
    vocabulary: dict[str, list[int]] = {entry: [i] for entry, i in loaded.tokenizer.get_vocab().items()}
    decoded: dict[str, list[int]] = {}
    for (i,) in vocabulary.values():
        decoded.setdefault(str(loaded.tokenizer.decode([i])), []).append(i)
    readings = [[known.get(token, []) for token in tokens] for known in (vocabulary, decoded)]
    complete = [reading for reading in readings if all(reading)]
    if not complete:
        fewest = min(readings, key=lambda reading: sum(not ids for ids in reading))
        missing = [token for token, ids in zip(tokens, fewest, strict=True) if not ids]
        raise DataError(f"{path}: not in the vocabulary of {loaded.name}, as they stand: {missing[:10]}")
    unclear = [token for token, *ids in zip(tokens, *complete, strict=True) if len({i for one in ids for i in one}) > 1]
    if unclear:
        raise DataError(f"{path}: strings that may be several tokens: {unclear[:10]}. Give ids (tokens=…)")
    return [ids[0] for ids in complete[0]]


def _check_fit(
    path: str | Path, loaded: LoadedModel, ids: Sequence[int], F: torch.Tensor, G: torch.Tensor
) -> tuple[float, float]:
    """Loss of G Fᵀ against the model's rows, and the share of their squared norm that it explains."""
    X = loaded.embedding.detach()[list(ids)].float().cpu() * loaded.embedding_scale
    product = G @ F.T
    loss, shifted = (float((rows - product).square().sum()) for rows in (X, X.roll(1, dims=0)))
    explained = 1 - loss / float(X.square().sum())
    factor = float((X * product).sum() / product.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    if explained <= 0 or loss >= shifted or not SCALE[0] <= factor <= SCALE[1]:
        raise DataError(
            f"{path}: G Fᵀ is no approximation of these rows of {loaded.name} (it explains {explained:.1%} of their "
            f"squared norm, and fits best times {factor:.3g}): another model, another order of tokens, or features of "
            f"rows that are not scaled (by {loaded.embedding_scale:.4g} here)"
        )
    return loss, explained


def _table(
    path: str | Path, loaded: LoadedModel, concept: Concept, ids: Sequence[int]
) -> tuple[pd.DataFrame, list[int]]:
    """The token table in the order of G's rows, and the ids that the concept's texts do not hold."""
    known = token_table(loaded, concept.sentences, concept.neutral, concept.further_neutral)
    unseen = sorted(set(ids) - set(known.token_id))
    if len(unseen) > UNSEEN * len(ids):
        raise DataError(
            f"{path}: {len(unseen)} of {len(ids)} tokens occur nowhere in the texts of {concept.name!r} (source "
            f"{concept.source!r}), such as {[loaded.decode([i]) for i in unseen[:5]]}: was it fitted to others?"
        )
    nothing = {"concept_count": 0, "neutral_count": 0, "role": "neutral", "keyness": 0.0, "key": False}
    rows = pd.DataFrame([{"token_id": i, "token": loaded.tokenizer.decode([i]), **nothing} for i in unseen])
    whole = pd.concat([known, rows.assign(ordinary=False)]) if unseen else known
    return whole.set_index("token_id").loc[list(ids)].reset_index(), unseen
