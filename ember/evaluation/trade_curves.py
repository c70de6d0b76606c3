"""What edits take against what they cost over their strength: curves, areas under them, and runs pooled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from ember.evaluation.resampling import draw_weights, interval, pooled

GAIN = ("concept", "gold_prob")
# What an edit should leave alone: the concept's words in another sense (KL, nats per token), questions on the
# neighbour (fall of the right answer's log-likelihood, nats per character), and everyday text (``_everyday``).
COSTS = ("other sense", "neighbour", "everyday")

ConceptSeed = tuple[str, int]  # what tells the runs of a profile apart
Part = tuple[float, np.ndarray]  # a run's value and its draws

# x and y of a curve have one value for each strength, in rising order, along the last axis but one; draws run along the
# last.


def area(x: np.ndarray, y: np.ndarray, limit: float) -> np.ndarray:
    """Mean over costs in [0, limit] of the best gain to be had at no more than that cost.

    ``x`` (cost) and ``y`` (gain) [strengths, …] are points of a path that starts at no edit, (0, 0), and is straight
    between strengths; a negative cost counts as none. Returns […].
    """
    x0, x1, y0, y1 = _pieces(x, y)
    cost = np.linspace(0, limit, 101).reshape(-1, *[1] * x0.ndim)
    low, high = np.minimum(x0, x1), np.maximum(x0, x1)
    at_low, at_high = np.where(x0 <= x1, y0, y1), np.where(x0 <= x1, y1, y0)
    sloped = high > low
    along = np.where(sloped, np.clip((cost - low) / np.where(sloped, high - low, 1.0), 0, 1), 1.0)
    reached = np.maximum(at_low, at_low + along * (at_high - at_low))
    best = np.where(cost >= low, reached, 0.0).max(axis=1)
    return np.asarray(best.clip(min=0).mean(axis=0))


def cost_at(x: np.ndarray, y: np.ndarray, gain: float) -> np.ndarray:
    """Least cost at which the path of ``area`` reaches a gain; NaN where it never does. Shapes as there."""
    x0, x1, y0, y1 = _pieces(x, y)
    rise = np.where(y1 != y0, y1 - y0, 1.0)
    crossing = x0 + np.clip((gain - y0) / rise, 0, 1) * (x1 - x0)
    inside = (np.minimum(y0, y1) <= gain) & (gain <= np.maximum(y0, y1))
    costs = [np.where(inside, crossing, np.nan), np.where(y1 >= gain, x1, np.nan)]
    return np.asarray(np.fmin.reduce(np.concatenate(costs)))


def _pieces(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where each straight piece of the path starts and ends: x₀, x₁, y₀, y₁ [strengths, …]."""
    zero = np.zeros((1, *x.shape[1:]))
    x, y = np.concatenate([zero, x.clip(min=0)]), np.concatenate([zero, y])
    return x[:-1], x[1:], y[:-1], y[1:]


@dataclass(frozen=True)
class Curves:
    """One run's curves: edit → (x or y) [strengths, 1 + draws], the first of which is the point estimate.

    ``gain[edit]`` is the fall in the right answer's probability, ``cost[name][edit]`` what is said of ``COSTS``. All
    edits draw the same items.
    """

    strengths: tuple[float, ...]
    gain: Mapping[str, np.ndarray]
    cost: Mapping[str, Mapping[str, np.ndarray]]


def curves(items: pd.DataFrame, *, n_resamples: int = 1000, seed: int = 0) -> Curves:
    """The curves of one run from its item scores (edit, delta, set, item, metric, base, edited).

    A cost is left out where no text tells it.
    """
    strengths = tuple(sorted(items.delta.unique()))
    mean = partial(_mean_changes, items, strengths, n_resamples, seed)
    gain = {edit: -change for edit, change in mean(*GAIN).items()}
    neighbour = {edit: -change for edit, change in mean("simdom", "gold_logprob").items()}
    costs = {"other sense": mean("other_sense", "kl"), "neighbour": neighbour, "everyday": _everyday(items, mean)}
    return Curves(strengths, gain, {name: by_edit for name, by_edit in costs.items() if by_edit})


def _everyday(items: pd.DataFrame, mean: Callable[[str, str], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Expected KL in a thousand words of general English (nats).

    Edited input embeddings are so rare there that a few hundred texts hold none. So: how many a thousand words bring,
    by word frequencies, times the KL that follows one of them where it does occur, in other-sense texts. Edits of
    output embeddings act everywhere: for them, KL on neutral text per thousand tokens. Empty without such texts.
    """
    everyday = {edit: 1000 * kl for edit, kl in mean("neutral", "kl").items()}
    totals, occurrences = mean("other_sense", "kl_sum"), mean("other_sense", "occurrences")
    english = items[items.set == "general English"].groupby("edit").edited.first()
    if len(english) and not occurrences:
        return {}
    for edit, per_thousand in english.items():
        total, count = totals[str(edit)], occurrences[str(edit)]
        everyday[str(edit)] = per_thousand * np.divide(total, count, out=np.zeros_like(count), where=count > 0)
    return everyday


def _mean_changes(
    items: pd.DataFrame, strengths: Sequence[float], n_resamples: int, seed: int, set_: str, metric: str
) -> dict[str, np.ndarray]:
    """Mean change of one measure: edit → [strengths, 1 + draws]. All edits draw the same items."""
    mine = items[(items.set == set_) & (items.metric == metric)]
    wide = mine.assign(change=mine.edited - mine.base).pivot(index="item", columns=["edit", "delta"], values="change")
    if wide.empty:
        return {}
    weights = draw_weights(len(wide), n_resamples=n_resamples, seed=seed)
    return {edit: (weights @ wide[edit][list(strengths)].to_numpy()).T for edit in mine.edit.unique()}


def compare_areas(run: Curves, *, reference: str = "EMBER") -> dict[tuple[str, str], Part]:
    """``area`` of every edit for every cost: (cost, edit) → value and draws.

    Costs run up to that of the reference at its greatest strength. NaN where the reference costs nothing.
    """
    areas = {}
    for cost, by_edit in run.cost.items():
        limit = float(by_edit[reference][:, 0].max())
        for edit, x in by_edit.items():
            values = area(x, run.gain[edit], limit) if limit > 0 else np.full(x.shape[1], np.nan)
            areas[cost, edit] = (float(values[0]), values[1:])
    return areas


def costs_at_equal_gain(
    run: Curves, edit: str, *, reference: str = "EMBER", share: float = 0.8
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Costs of the reference and of another edit where both have gained the same: cost → two arrays [1 + draws].

    The gain is ``share`` of the smaller of their greatest gains.
    """
    pair = (reference, edit)
    gain = share * min(float(run.gain[name][:, 0].max()) for name in pair)
    first, second = ({cost: cost_at(x[name], run.gain[name], gain) for cost, x in run.cost.items()} for name in pair)
    return {cost: (first[cost], second[cost]) for cost in run.cost}


def point_table(run: Curves) -> pd.DataFrame:
    """A run's curves for a figure: cost, edit, delta, x, x_low, x_high (its cost), y, y_low, y_high (its gain)."""
    rows: list[tuple[object, ...]] = []
    for cost, by_edit in run.cost.items():
        for edit, x in by_edit.items():
            spans = [span for v in (x, run.gain[edit]) for span in (v[:, 0], *interval(v[:, 1:]))]
            rows += [(cost, edit, *point) for point in zip(run.strengths, *spans, strict=True)]
    return pd.DataFrame(rows, columns=["cost", "edit", "delta", "x", "x_low", "x_high", "y", "y_low", "y_high"])


def area_table(runs: Mapping[ConceptSeed, Curves], *, reference: str = "EMBER") -> pd.DataFrame:
    """``compare_areas`` pooled over runs, and each edit's difference from the reference, draw by draw.

    Columns: cost, edit, runs, area, ci_low, ci_high, difference, difference_low, difference_high; 95 % intervals over
    items, seeds and concepts. A run in which the reference costs nothing has no area, and is not among ``runs``.
    """
    areas = {key: compare_areas(run, reference=reference) for key, run in runs.items()}
    rows = []
    for cost, edit in next(iter(areas.values())):
        told = {key: by_cost for key, by_cost in areas.items() if np.isfinite(by_cost[cost, reference][0])}
        own, others = ([by_cost[cost, name] for by_cost in told.values()] for name in (edit, reference))
        rows.append((cost, edit, len(told), *(_pooled_beside(own, others, told) if told else (np.nan,) * 6)))
    return pd.DataFrame(rows, columns=["cost", "edit", "runs", "area", *_ENDS])


def strength_table(runs: Mapping[ConceptSeed, Curves], *, reference: str = "EMBER") -> pd.DataFrame:
    """What each edit takes at each strength, pooled over runs, and the difference from the reference at the same one.

    Columns: edit, delta, runs, gain (fall in the probability of the right answer), ci_low, ci_high, difference,
    difference_low, difference_high; 95 % intervals over items, seeds and concepts. A random direction moves each row
    as far as EMBER does at the same strength.
    """
    first = next(iter(runs.values()))
    rows = []
    for edit in first.gain:
        for k, delta in enumerate(first.strengths):
            own, others = ([_part(run.gain[name][k]) for run in runs.values()] for name in (edit, reference))
            rows.append((edit, delta, len(runs), *_pooled_beside(own, others, runs)))
    return pd.DataFrame(rows, columns=["edit", "delta", "runs", "gain", *_ENDS])


def equal_gain_table(runs: Mapping[ConceptSeed, Curves], edit: str, *, reference: str = "EMBER") -> pd.DataFrame:
    """``costs_at_equal_gain`` pooled over runs: what an edit saves, where both erase the same.

    Columns: cost, edit, runs, reference (its cost), own (the edit's), difference and its 95 % interval over items,
    seeds and concepts.
    """
    equal = [costs_at_equal_gain(run, edit, reference=reference) for run in runs.values()]
    groups = [concept for concept, _ in runs]
    rows = []
    for cost in equal[0]:
        theirs, own = (np.stack([pair[cost][side] for pair in equal]) for side in (0, 1))
        gap = pooled([_part(draws) for draws in own - theirs], groups=groups)
        rows.append((cost, edit, len(runs), theirs[:, 0].mean(), own[:, 0].mean(), *gap))
    return pd.DataFrame(rows, columns=["cost", "edit", "runs", "reference", "own", *_ENDS[2:]])


_ENDS = ("ci_low", "ci_high", "difference", "difference_low", "difference_high")


def _part(values: np.ndarray) -> Part:
    return float(values[0]), values[1:]


def _pooled_beside(
    own: Sequence[Part], others: Sequence[Part], runs: Mapping[ConceptSeed, object]
) -> tuple[float, ...]:
    """``pooled`` values, and pooled differences from others that drew the same items; each with its interval."""
    groups = [concept for concept, _ in runs]
    gaps = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(own, others, strict=True)]
    return (*pooled(own, groups=groups), *pooled(gaps, groups=groups))
