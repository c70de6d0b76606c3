"""What edits take against what they cost over their strength: curves, areas under them, and runs pooled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ember.evaluation.resampling import draw_weights, interval, pooled

REFERENCE = "EMBER"  # the edit that all others are compared with
# What an edit should leave alone: the concept's words in another sense (KL, nats per token), questions on the
# neighbour (fall of the right answer's log-likelihood, nats per character), and everyday text (``_everyday``).
COSTS = ("other sense", "neighbour", "everyday")
_DIFFERENCE = ("difference", "difference_low", "difference_high")


def area(x: np.ndarray, y: np.ndarray, limit: float) -> np.ndarray:
    """Mean over costs in [0, limit] of the best gain to be had at no more than that cost.

    ``x`` (cost) and ``y`` (gain) [strengths, …] are points, in rising order of strength, of a path that starts at no
    edit, (0, 0), and is straight between strengths; a negative cost counts as none. Returns […].
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

    ``gain[edit]`` is the fall in the right answer's probability, ``cost[name][edit]`` what is said of ``COSTS``.
    """

    strengths: tuple[float, ...]
    gain: Mapping[str, np.ndarray]
    cost: Mapping[str, Mapping[str, np.ndarray]]


Runs = Mapping[tuple[str, int], Curves]  # by concept and seed


def curves(items: pd.DataFrame, *, n_resamples: int = 1000) -> Curves:
    """The curves of one run from its item scores (edit, delta, set, item, metric, base, edited).

    All edits draw the same items. A cost is left out where no text tells it.
    """
    strengths = tuple(sorted(items.delta.unique()))

    def mean(set_: str, metric: str, sign: int = 1) -> dict[str, np.ndarray]:
        """Mean change of one measure: edit → [strengths, 1 + draws]."""
        mine = items[(items.set == set_) & (items.metric == metric)]
        if mine.empty:
            return {}
        changes = mine.assign(change=sign * (mine.edited - mine.base))
        wide = changes.pivot(index="item", columns=["edit", "delta"], values="change")
        weights = draw_weights(len(wide), n_resamples=n_resamples)
        return {edit: (weights @ wide[edit][list(strengths)].to_numpy()).T for edit in mine.edit.unique()}

    costs = mean("other_sense", "kl"), mean("simdom", "gold_logprob", -1), _everyday(items, mean)
    told = {name: by_edit for name, by_edit in zip(COSTS, costs, strict=True) if by_edit}
    return Curves(strengths, mean("concept", "gold_prob", -1), told)


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


def compare_areas(run: Curves) -> dict[tuple[str, str], np.ndarray]:
    """``area`` of every edit for every cost: (cost, edit) → value and draws [1 + draws].

    Costs run up to that of the reference at its greatest strength. NaN where the reference costs nothing.
    """
    areas = {}
    for cost, by_edit in run.cost.items():
        limit = float(by_edit[REFERENCE][:, 0].max())
        for edit, x in by_edit.items():
            areas[cost, edit] = area(x, run.gain[edit], limit) if limit > 0 else np.full(x.shape[1], np.nan)
    return areas


def point_table(run: Curves) -> pd.DataFrame:
    """A run's curves for a figure: cost, edit, delta, x, x_low, x_high (its cost), y, y_low, y_high (its gain)."""
    rows: list[tuple[object, ...]] = []
    for cost, by_edit in run.cost.items():
        for edit, x in by_edit.items():
            spans = [span for v in (x, run.gain[edit]) for span in (v[:, 0], *interval(v[:, 1:]))]
            rows += [(cost, edit, *point) for point in zip(run.strengths, *spans, strict=True)]
    return pd.DataFrame(rows, columns=["cost", "edit", "delta", "x", "x_low", "x_high", "y", "y_low", "y_high"])


def area_table(runs: Runs) -> pd.DataFrame:
    """``compare_areas`` pooled over runs, and each edit's difference from the reference, draw by draw.

    Columns: cost, edit, runs, area, ci_low, ci_high, difference, difference_low, difference_high; 95 % intervals over
    items, seeds and concepts. A run in which the reference costs nothing has no area, and is not among ``runs``.
    """
    areas = {key: compare_areas(run) for key, run in runs.items()}
    rows = []
    for cost, edit in next(iter(areas.values())):
        told = {key: by_cost for key, by_cost in areas.items() if np.isfinite(by_cost[cost, REFERENCE][0])}
        own, others = ([by_cost[cost, name] for by_cost in told.values()] for name in (edit, REFERENCE))
        rows.append((cost, edit, len(told), *_pooled(own, told), *_pooled(np.subtract(own, others), told)))
    return pd.DataFrame(rows, columns=["cost", "edit", "runs", "area", "ci_low", "ci_high", *_DIFFERENCE])


def strength_table(runs: Runs) -> pd.DataFrame:
    """What each edit takes at each strength, pooled over runs, and the difference from the reference at the same one.

    Columns: edit, delta, runs, gain (fall in the probability of the right answer), ci_low, ci_high, difference,
    difference_low, difference_high; 95 % intervals over items, seeds and concepts. A random direction moves each row
    as far as EMBER does at the same strength.
    """
    first = next(iter(runs.values()))
    rows = []
    for edit in first.gain:
        for k, delta in enumerate(first.strengths):
            own, others = ([run.gain[name][k] for run in runs.values()] for name in (edit, REFERENCE))
            rows.append((edit, delta, len(runs), *_pooled(own, runs), *_pooled(np.subtract(own, others), runs)))
    return pd.DataFrame(rows, columns=["edit", "delta", "runs", "gain", "ci_low", "ci_high", *_DIFFERENCE])


def equal_gain_table(runs: Runs, edit: str) -> pd.DataFrame:
    """What an edit saves where it and the reference erase the same, pooled over runs.

    In each run that is 0.8 times the smaller of their greatest gains. Columns: cost, edit, runs, reference (its cost),
    own (the edit's), difference and its 95 % interval over items, seeds and concepts.
    """
    pair = (REFERENCE, edit)
    equal = [(run, 0.8 * min(float(run.gain[name][:, 0].max()) for name in pair)) for run in runs.values()]
    rows = []
    for cost in next(iter(runs.values())).cost:
        paid = [[cost_at(run.cost[cost][name], run.gain[name], gain) for run, gain in equal] for name in pair]
        theirs, own = np.array(paid)
        means = (theirs[:, 0].mean(), own[:, 0].mean())
        rows.append((cost, edit, len(runs), *means, *_pooled(own - theirs, runs)))
    return pd.DataFrame(rows, columns=["cost", "edit", "runs", "reference", "own", *_DIFFERENCE])


def _pooled(values: Sequence[np.ndarray] | np.ndarray, runs: Mapping[tuple[str, int], object]) -> tuple[float, ...]:
    """``pooled`` values and draws of runs [runs, 1 + draws]; NaN without a run."""
    parts = [(float(one[0]), one[1:]) for one in values]
    return pooled(parts, groups=[concept for concept, _ in runs]) if parts else (np.nan,) * 3
