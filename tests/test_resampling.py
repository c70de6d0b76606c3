"""The bootstrap: which items are drawn, intervals against loops and by hand, runs pooled with their items."""

import math

import numpy as np
import pytest

from ember.evaluation.resampling import (
    draw_weights,
    draws,
    interval,
    pooled,
    pooled_mean_draws,
    statistic_draws,
    wilson,
)

DRAWS = 400


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, DRAWS)


def percentiles(values) -> tuple[float, float]:
    return pytest.approx(tuple(np.nanpercentile(values, [2.5, 97.5])))


def test_the_seed_fixes_the_items():
    one, same, other = (draws(7, n_resamples=50, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (50, 7) and set(one.flat) == set(range(7))
    assert (one == same).all() and (one != other).any()


def test_weights_count_how_often_each_item_is_drawn():
    weights = draw_weights(7, n_resamples=50, seed=3)
    assert weights.shape == (51, 7)
    np.testing.assert_allclose(weights[0], 1 / 7)
    counts = 7 * weights[1:]
    np.testing.assert_allclose(counts, counts.round(), atol=1e-12)
    np.testing.assert_allclose(counts.sum(1), 7)
    assert counts.std() > 0.5


def test_means_of_drawn_items_scatter_by_the_standard_error():
    """Whichever way they are drawn."""
    items = np.random.default_rng(0).normal(size=100)
    error = items.std() / 10
    statistic = statistic_draws([100], lambda k, axis: items[k].mean(axis), seed=1)
    by_weight = (draw_weights(100, n_resamples=2000) @ items)[1:]
    for found in (items[draws(100)].mean(1), by_weight, statistic, pooled_mean_draws([items[None]])[0]):
        assert len(found) == 2000
        assert found.mean() == pytest.approx(items.mean(), abs=0.1 * error)
        assert found.std() == pytest.approx(error, rel=0.1)


def test_groups_are_drawn_apart_and_undefined_statistics_are_nan():
    groups = [np.array([0.0, 1.0]), np.array([0.0, 1.0])]

    def statistic(*positions, axis):
        first, second = (group[k].mean(axis) for group, k in zip(groups, positions, strict=True))
        return np.stack([first, second, np.where(second > 0, first, np.nan)])

    first, second, ratio = statistic_draws([2, 2], statistic, n_resamples=DRAWS)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2
    np.testing.assert_array_equal(np.isnan(ratio), second == 0)
    assert 0.1 < np.isnan(ratio).mean() < 0.4


def test_an_interval_leaves_undefined_draws_out():
    values = np.stack([noise(1), np.where(np.arange(DRAWS) % 3, noise(1), np.nan), np.full(DRAWS, np.nan)])
    low, high = interval(values)
    for k in (0, 1):
        assert (low[k], high[k]) == percentiles(values[k])
    assert math.isnan(low[2]) and math.isnan(high[2])
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0, 0.27753), (10, 10, 0.72247, 1), (5, 10, 0.23659, 0.76341), (0, 1, 0, 0.79345)],
)
def test_wilson(successes, n, low, high):
    """At 0 of n the upper end is z²/(n + z²)."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize("values", [(0.4,), (0.1, 0.5, 0.4)])
def test_pooling_equals_a_loop(values):
    """Each draw takes as many seeds as there are, with replacement, and their values for one draw of the items."""
    n, parts = len(values), [(v, v + noise(k)) for k, v in enumerate(values)]
    chosen = np.random.default_rng(7).integers(0, n, (n, DRAWS))
    means = [np.mean([parts[chosen[k, d]][1][d] for k in range(n)]) for d in range(DRAWS)]
    value, *ends = pooled(parts, seed=7)
    assert value == pytest.approx(np.mean(values)) and tuple(ends) == percentiles(means)


def test_draws_without_a_value_are_left_out_and_without_any_there_is_no_interval():
    values = np.where(np.arange(DRAWS) % 3, noise(1), np.nan)
    assert pooled([(0.4, values)]) == (0.4, *interval(values))
    assert all(map(math.isnan, pooled([(math.nan, np.full(DRAWS, np.nan))])))


def test_seeds_that_are_certain_of_different_values():
    """The mean of two is the lower one, the upper one or, in half of the draws, the middle one."""
    parts = [(0.2, np.full(4000, 0.2)), (0.6, np.full(4000, 0.6))]
    assert pooled(parts) == pytest.approx((0.4, 0.2, 0.6))


def test_the_interval_covers_items_and_seeds():
    """Seeds that agree add nothing to the items' interval; seeds that differ widen it."""
    one, same, apart = (
        pooled([(v, v + noise(1)) for v in values]) for values in ([0.5], [0.5] * 4, [0.1, 0.3, 0.7, 0.9])
    )
    assert same == pytest.approx(one)
    assert apart[0] == pytest.approx(one[0])
    assert apart[2] - apart[1] > 1.5 * (one[2] - one[1])


def test_concepts_draw_their_items_independently_and_seeds_of_one_do_not():
    """The same draws in every group would make their errors add up; apart, errors of two groups average out."""
    parts = [(0.0, noise(3)), (0.0, noise(3))]
    same, apart = (pooled(parts, groups=groups) for groups in (["Rome", "Rome"], ["Rome", "Greece"]))
    assert same == pooled(parts)
    assert apart[2] - apart[1] < 0.95 * (same[2] - same[1])


def test_means_of_parts_draw_parts_and_items():
    """Parts that are certain of different values: the mean of two is the lower, the upper or the middle one."""
    found = pooled_mean_draws([np.zeros((2, 5)), np.ones((2, 9))], n_resamples=DRAWS)
    assert found.shape == (2, DRAWS)
    np.testing.assert_array_equal(found[0], found[1])
    assert np.unique(found).tolist() == [0, 0.5, 1] and np.mean(found == 0.5) == pytest.approx(0.5, abs=0.1)
