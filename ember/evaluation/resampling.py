"""The only bootstrap: which items are drawn, the interval of a statistic, and runs pooled with their items.

Intervals are percentiles of the draws. One ``seed`` draws the same items, so draws can be subtracted one by one.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np


def draws(n: int, *, n_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Positions of the items of every draw [n_resamples, n]."""
    return np.random.default_rng(seed).integers(0, n, (n_resamples, n))


def draw_weights(n: int, *, n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Each item's weight [1 + n_resamples, n]: all alike in the first row, how often it was drawn ÷ n in the others.

    Weights times items [n, m] give the mean and its draws of m measures at once.
    """
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples)
    return np.concatenate([np.ones((1, n)), drawn]) / n


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the middle 95 % of the draws along the last axis; NaN draws are left out, nothing but NaN is NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of slices that hold nothing but NaN
        low, high = np.nanpercentile(values, [2.5, 97.5], axis=-1)
    return low, high


def statistic_draws(
    sizes: Sequence[int], statistic: Callable[..., np.ndarray], *, n_resamples: int = 2000, seed: int = 0
) -> np.ndarray:
    """Draws [..., n_resamples] of a vectorized statistic of several independent groups of items.

    ``statistic(*positions, axis)`` takes an array of positions of each group, and is NaN in draws without a value.
    """
    from scipy import stats  # takes a second to import, and most notebooks open without

    everything = tuple(np.arange(size) for size in sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            everything, statistic, n_resamples=n_resamples, method="percentile", vectorized=True,
            rng=np.random.default_rng(seed), batch=200,
        )  # fmt: skip
    return np.asarray(result.bootstrap_distribution)


def pooled(
    parts: Sequence[tuple[float, np.ndarray]], *, groups: Sequence[str] = (), seed: int = 0
) -> tuple[float, float, float]:
    """Mean over runs with its 95 % interval over items and runs.

    Each part is one run's value and its draws; every draw resamples the runs too. Runs of the same group (a concept)
    draw the same items; those of different groups, independent ones.
    """
    values, drawn = np.array([value for value, _ in parts]), np.stack([draw for _, draw in parts])
    if len(set(groups)) > 1:
        numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
        mixed = [np.random.default_rng([seed, numbers[group]]).permutation(drawn.shape[1]) for group in groups]
        drawn = np.take_along_axis(drawn, np.stack(mixed), axis=1)
    chosen = np.random.default_rng(seed).integers(0, len(parts), (len(parts), drawn.shape[1]))
    low, high = interval(np.take_along_axis(drawn, chosen, axis=0).mean(0))
    return float(values.mean()), float(low), float(high)


def pooled_mean_draws(parts: Sequence[np.ndarray], *, n_resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Draws [k, n_resamples] of the mean over parts of their means over items.

    Each part holds k measures of its own items [k, n]; every draw resamples the parts and, in each, its items.
    """
    generator = np.random.default_rng(seed)
    items = [generator.integers(0, part.shape[1], (n_resamples, part.shape[1])) for part in parts]
    means = np.stack([part[:, drawn].mean(-1) for part, drawn in zip(parts, items, strict=True)])
    chosen = generator.integers(0, len(parts), (len(parts), n_resamples))
    return np.asarray(np.take_along_axis(means, chosen[:, None, :], axis=0).mean(0))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; NaN for nothing."""
    if not n:
        return math.nan, math.nan
    from scipy import stats

    ends = stats.binomtest(round(successes), n).proportion_ci(0.95, method="wilson")
    return float(ends.low), float(ends.high)
