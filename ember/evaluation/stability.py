"""Does the same concept feature come back: fits of other seeds, ranks, sparsities and precisions, compared.

One comparison changes nothing but rounding: X with its columns in another order is the same problem. A factorization is
unique only up to the order, scale and sign of its features, so those of two fits are paired by the |cosine| of their
directions. Embeddings share directions, and unlike features reach high values too: what counts is more than a feature
has with its nearest sibling, another feature of its own fit.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment

from ember.errors import NothingFoundError
from ember.evaluation.resampling import draws, interval
from ember.factorization import sparse_mf
from ember.features import ConceptFeatures, scaled_rows, score_features
from ember.models.loading import LoadedModel
from ember.store.files import digest
from ember.store.paths import cache_dir

MEASURES = (
    "cosine", "sibling", "mate_selected", "returned", "cosine_all", "same", "rows_a", "rows_b", "rows_jaccard",
    "edit_cosine", "tokens_jaccard",
)  # fmt: skip
_VARIED = ("rank", "sparsity", "seed", "precision", "reordered")
_FIT_KEYS = ("rank", "sparsity", "ridge", "max_iter", "patience", "tol", "seed")


class Matching(NamedTuple):
    """Arrays [m]: feature ``first[i]`` of one fit belongs to ``second[i]`` of another, at |cosine| ``cosine[i]``."""

    first: np.ndarray
    second: np.ndarray
    cosine: np.ndarray


def match_features(F_a: torch.Tensor, F_b: torch.Tensor) -> Matching:
    """Pair the columns of F_a [d, K_a] one to one with those of F_b [d, K_b]: the largest sum of |cosines| there is.

    There are min(K_a, K_b) pairs; a column of zeros has cosine 0 with all. ``ValueError`` if d is not the same.
    """
    similar = _cosines(F_a, F_b)
    first, second = linear_sum_assignment(similar, maximize=True)
    return Matching(first, second, similar[first, second])


def _cosines(F_a: torch.Tensor, F_b: torch.Tensor) -> np.ndarray:
    """|cosine| of every column of F_a with every column of F_b [K_a, K_b]."""
    if F_a.ndim != 2 or F_b.ndim != 2 or F_a.shape[0] != F_b.shape[0]:
        raise ValueError(f"expected F [d, K] of one width d, got {tuple(F_a.shape)} and {tuple(F_b.shape)}")
    unit_a, unit_b = (torch.nn.functional.normalize(F.double().cpu(), dim=0, eps=1e-300) for F in (F_a, F_b))
    return np.asarray((unit_a.T @ unit_b).abs().clamp_max(1))


def selected_features(features: ConceptFeatures, /, **selection: Any) -> list[int]:
    """``features.select(**selection)``; an empty list where it finds nothing."""
    try:
        return features.select(**selection)
    except NothingFoundError:
        return []


def concept_mates(a: ConceptFeatures, b: ConceptFeatures, **selection: Any) -> pd.DataFrame:
    """What became in ``b`` of each feature that ``selection`` takes from ``a``, best first; no rows if it takes none.

    Columns: feature; mate, its partner in ``b`` (``match_features``; NaN where ``b`` has fewer features and left it
    none) and their |cosine|; sibling, the largest |cosine| with another feature of ``a``; returned, whether the mate
    is selected in ``b``; tokens and mate_tokens, the most activating ones. Raises ``ValueError`` if the fits are of
    different weights or tokens V'.
    """
    if a.weights_hash != b.weights_hash or a.table.token_id.tolist() != b.table.token_id.tolist():
        raise ValueError(f"the fits of {a.concept!r} and {b.concept!r} are not of the same weights and tokens V'")
    pairs, own = match_features(a.factorization.F, b.factorization.F), _cosines(a.factorization.F, a.factorization.F)
    np.fill_diagonal(own, 0)
    mates = {int(k): (int(mate), float(cosine)) for k, mate, cosine in zip(*pairs, strict=True)}
    chosen = selected_features(b, **selection)
    tokens, mate_tokens = (fit.scores.set_index("feature").top_tokens for fit in (a, b))
    rows = []
    for k in selected_features(a, **selection):
        mate, cosine = mates.get(k, (math.nan, math.nan))
        rows.append((k, mate, cosine, float(own[k].max()), mate in chosen, tokens[k], mate_tokens.get(mate, "")))
    return pd.DataFrame(rows, columns=["feature", "mate", "cosine", "sibling", "returned", "tokens", "mate_tokens"])


def compare_fits(a: ConceptFeatures, b: ConceptFeatures, **selection: Any) -> dict[str, float]:
    """``MEASURES`` of how well the concept features of ``a`` come back in ``b``; ``ValueError`` as ``concept_mates``.

    ``cosine``, ``sibling``, ``mate_selected``: of the best selected feature of ``a``; ``cosine_all``: median of all
    pairs, and ``same`` the share of them at 0.99 or more; ``returned``: share of the selected features of ``a`` whose
    mate is selected in ``b``; ``rows_a``, ``rows_b``: rows that an edit changes; ``rows_jaccard``: those that both
    change ÷ those that either does; ``edit_cosine``: of the edits, each as one vector, 0 in rows it leaves alone;
    ``tokens_jaccard``: overlap of the 20 tokens, of any role, that the selected features reach most. NaN where there is
    no feature, or nothing to overlap.
    """
    mates = concept_mates(a, b, **selection)
    best = mates.iloc[0] if len(mates) else pd.Series(math.nan, mates.columns)
    every = match_features(a.factorization.F, b.factorization.F).cosine
    chosen = [selected_features(fit, **selection) for fit in (a, b)]
    moved_a, moved_b = map(_displacements, (a, b), chosen)
    product = sum(float(moved_a[i] @ moved_b[i]) for i in moved_a.keys() & moved_b.keys())
    norm = math.prod(sum(float(c.square().sum()) for c in moved.values()) for moved in (moved_a, moved_b)) ** 0.5
    values = (
        best.cosine, best.sibling, best.returned, mates.returned.mean(), np.median(every), np.mean(every >= 0.99),
        len(moved_a), len(moved_b), _jaccard(set(moved_a), set(moved_b)), product / norm if norm else math.nan,
        _jaccard(*map(_top_tokens, (a, b), chosen)),
    )  # fmt: skip
    return {name: float(value) for name, value in zip(MEASURES, values, strict=True)}


def _displacements(features: ConceptFeatures, selected: list[int]) -> dict[int, torch.Tensor]:
    return {i: c.double() for i, c in features.contributions(selected).items()}


def _top_tokens(features: ConceptFeatures, selected: list[int], top: int = 20) -> set[int]:
    """Ids of the tokens with the longest F[:, S] G[i, S]ᵀ."""
    reach = (features.factorization.G[:, selected] @ features.factorization.F[:, selected].T).norm(dim=1)
    order = reach.argsort(descending=True, stable=True)[:top].tolist()
    return {int(features.table.token_id.iloc[i]) for i in order if reach[i] > 0}


def _jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a | b else math.nan


def fit_label(features: ConceptFeatures) -> str:
    """Name of a fit among others of its concept, such as ``"rank 300, sparsity 0.01, seed 42, float64"``."""
    order = f", order {features.settings['reordered']}" if features.settings.get("reordered") else ""
    return "rank {rank}, sparsity {sparsity:g}, seed {seed}, {precision}".format(**features.settings) + order


def fit_table(fits: Mapping[str, ConceptFeatures], X: torch.Tensor, **selection: Any) -> pd.DataFrame:
    """One row a fit of X [n, d] (``scaled_rows``).

    Columns: fit, rank, sparsity, seed, precision, reordered, iterations, unexplained (‖X − G Fᵀ‖² / ‖X‖²), best_score
    (bits), selected (features), rows (that their edit changes), top_tokens (of the best feature, selected or not).
    """
    rows = []
    for name, fit in fits.items():
        chosen, best, result = selected_features(fit, **selection), fit.scores.nlargest(1, "score"), fit.factorization
        about = [fit.settings.get(key, 0) for key in _VARIED]
        unexplained = result.loss / float(X.double().square().sum())
        reach = (best.score.item(), len(chosen), len(_displacements(fit, chosen)), best.top_tokens.item())
        rows.append((name, *about, len(result.loss_curve), unexplained, *reach))
    columns = ["iterations", "unexplained", "best_score", "selected", "rows", "top_tokens"]
    return pd.DataFrame(rows, columns=["fit", *_VARIED, *columns])


def pair_table(fits: Mapping[str, ConceptFeatures], **selection: Any) -> pd.DataFrame:
    """``compare_fits`` of all ordered pairs of fits: fit, other, ``MEASURES``."""
    rows = [(a, b, *compare_fits(fits[a], fits[b], **selection).values()) for a, b in itertools.permutations(fits, 2)]
    return pd.DataFrame(rows, columns=["fit", "other", *MEASURES])


def varied_pairs(fits: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs whose fits differ in one thing only, and in which: ``pairs`` with a column ``varied``.

    ``fits`` is ``fit_table``'s. ``varied`` is ``rank``, ``sparsity``, ``seed``, ``precision``, or ``rounding in``
    float64 or float32: the same fit with its columns in another order.
    """
    first, second = (fits.set_index("fit")[list(_VARIED)].loc[names] for names in (pairs.fit, pairs.other))
    differing = first.to_numpy() != second.to_numpy()
    kinds = np.array(_VARIED, dtype=object)[differing.argmax(axis=1)]
    kinds = np.where(kinds == "reordered", "rounding in " + first.precision.to_numpy(), kinds)
    return pairs.assign(varied=kinds)[differing.sum(axis=1) == 1].reset_index(drop=True)


def variation_table(varied: pd.DataFrame) -> pd.DataFrame:
    """What comes back when one thing varies (``varied_pairs``): one row a kind of variation.

    Columns: varied, pairs; found, the share of them whose first fit selects a feature; returned, the share of those
    whose best feature has a selected mate; of cosine, same, rows_jaccard and edit_cosine the median, least and most.
    """
    found = varied.cosine.notna()
    kinds = varied.assign(found=found, returned=varied.mate_selected.where(found)).groupby("varied", sort=False)
    table = kinds.agg(pairs=("fit", "size"), found=("found", "mean"), returned=("returned", "mean"))
    for measure in ("cosine", "same", "rows_jaccard", "edit_cosine"):
        table[[measure, f"{measure}_low", f"{measure}_high"]] = kinds[measure].agg(["median", "min", "max"])
    return table.reset_index()


def outcome_table(scores: Mapping[str, pd.DataFrame], *, reference: str) -> pd.DataFrame:
    """Change of the right answer's probability by each fit's edit (``scores``: fit → ``trade_off.probe_edit``'s frame).

    Columns: fit, set, n, change, ci_low, ci_high and the same of its ``difference`` from the reference's edit, item by
    item (NaN if that has none). 95 % bootstrap intervals over items; all fits draw the same.
    """
    gold = {fit: frame[frame.metric == "gold_prob"].set_index(["set", "item"]) for fit, frame in scores.items()}
    rows = []
    for name in dict.fromkeys(key for frame in gold.values() for key, _ in frame.index):
        wide = pd.DataFrame({fit: (frame.edited - frame.base)[name] for fit, frame in gold.items()})
        drawn = draws(len(wide))
        for fit in wide:
            changes = wide[fit], wide[fit] - wide.get(reference, math.nan)
            spans = [float(x) for one in changes for x in (one.mean(), *interval(one.to_numpy()[drawn].mean(1)))]
            rows.append((fit, name, len(wide), *spans))
    columns = ["change", "ci_low", "ci_high", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=["fit", "set", "n", *columns])


def refit(
    loaded: LoadedModel, features: ConceptFeatures, *, precision: str | None = None, reordered: int = 0
) -> ConceptFeatures:
    """The same factorization from the same start G₀, in another precision or with the columns of X reordered.

    ``reordered`` numbers the order, 0 leaves them as they are. Either changes only how numbers are rounded. Kept in the
    user cache; ``ValueError`` for features of other weights.
    """
    if features.weights_hash != loaded.weights_hash:
        raise ValueError(f"the features were fitted on other weights of {features.model}, not this model's")
    settings = {name: features.settings[name] for name in _FIT_KEYS}
    changed: dict[str, Any] = {"precision": precision or features.settings["precision"], "reordered": reordered}
    ids = features.table.token_id.tolist()
    folder = cache_dir() / "refits" / digest(loaded.weights_hash, ids, sorted((settings | changed).items()))
    if not folder.exists():
        X = scaled_rows(loaded, features.table, changed["precision"])
        generator = torch.Generator().manual_seed(reordered)
        order = torch.randperm(X.shape[1], generator=generator) if reordered else torch.arange(X.shape[1])
        exact = sparse_mf(X[:, order], **settings)
        fit = replace(exact, F=exact.F[order.argsort()].float(), G=exact.G.float())
        replace(features, factorization=fit, settings=features.settings | changed).save(folder)
    fit = ConceptFeatures.load(folder).factorization
    scores = score_features(features.table, fit.G)  # how features are scored may have changed since
    return replace(features, factorization=fit, scores=scores, settings=features.settings | changed)
