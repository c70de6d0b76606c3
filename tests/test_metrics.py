"""Published scores and their continuous twins against values by hand; intervals; the choice of a cell."""

import math

import numpy as np
import pandas as pd
import pytest
from helpers.items import make_items, noisy_items

from ember.evaluation.metrics import Comparison, accuracy_table, compare, harmonic_mean, retained
from ember.evaluation.resampling import wilson


def compared(changes: dict[str, object]) -> Comparison:
    return compare(make_items(), make_items(changes), n_resamples=20)


def row(comparison: Comparison, metric: str, set_: str = "") -> pd.Series:
    summary = comparison.summary
    return summary[(summary.metric == metric) & (summary.set == set_)].squeeze(axis=0)


def values(comparison: Comparison, metrics) -> dict[str, float]:
    return {metric: comparison.value(metric) for metric in metrics}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ((1, 1, 1), 1), ((0.5, 1), 2 / 3), ((0.2, 0.4, 0.8), 3 / (5 + 2.5 + 1.25)), ((0.5, 2), 0.8), ((0.3,), 0.3),
        ((0, 1), 0), ((-0.1, 1, 1), 0), ((math.nan, 1), 0), ((math.inf, 1), 0),
        ((np.array([[1.0, 0.5], [0.0, np.nan]]), np.array([1.0, 0.5]), 1.0), np.array([[1, 3 / 5], [0, 0]])),
    ],
)  # fmt: skip
def test_harmonic_mean(terms, expected):
    assert harmonic_mean(*terms) == pytest.approx(expected)


def test_retained():
    value, clipped, continuous = np.array([0.75, 0.5, 0.25, 0.0, 1.0]), [1, 0.5, 0, 0, 1], [1, 0.5, 0, -0.5, 1.5]
    np.testing.assert_allclose(retained(value, 0.75, clip=True), clipped)
    np.testing.assert_allclose(retained(value, 0.75, clip=False), continuous)
    for base in (0.25, 0.1):  # at chance there is nothing to retain
        assert np.isnan([retained(value, base, clip=clip) for clip in (True, False)]).all()


def test_the_unedited_model_against_itself():
    none = dict.fromkeys(("efficacy", "efficacy_cont", "selectivity", "harmonic", "final_cont"), 0)
    whole = dict.fromkeys(("specificity", "specificity_cont", "coherence", "instruction", "fluency", "neutral"), 1)
    assert values(compared({}), none | whole) == pytest.approx(none | whole, abs=1e-12)
    summary = compare(*[noisy_items(12, seed=3)] * 2, n_resamples=20).summary
    deltas = summary[summary.metric.str.startswith("delta_")]
    assert len(deltas) == 3 * 3 + 4 + 2
    assert (deltas[["value", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert deltas.effect_size.isna().all()


EDITED = {
    "concept/correct": [1.0, 1.0, 0.0, 0.0] * 2,  # 0.75 → 0.5
    "simdom/correct": [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0],  # 0.75 → 0.625
    "concept/gold_prob": [0.25, 0.65] * 4, "simdom/gold_prob": 0.45, "general/gold_prob": 0.75,  # from 0.65
    "concept/gold_logprob": [-1.0, -3.0] * 4, "simdom/gold_logprob": -1.2,
    "instruction/loss": 3 + math.log(2), "other_sense/loss": 3.5, "other_sense/kl": 0.2,
    "generation/distinct": 0.4,
}  # fmt: skip


def test_scores_by_hand():
    expected = {
        "efficacy": 0.5, "specificity": 2 / (1 + 1 / 0.75), "selectivity": 1 - 0.2,
        "instruction": 0.5, "fluency": 0.5, "neutral": 1, "coherence": 3 / (2 + 2 + 1),
        "harmonic": 2 / (2 + (1 + 1 / 0.75) / 2), "final": 3 / (2 + (1 + 1 / 0.75) / 2 + 1 / 0.6),
        "efficacy_cont": 0.5, "specificity_cont": 2 / (1 / 1.25 + 1 / 0.5),
        "harmonic_cont": 2 / (2 + 1.4), "final_cont": 3 / (2 + 1.4 + 1 / 0.6),
    }  # fmt: skip
    assert values(compared(EDITED), expected) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("set_", "metric", "value", "delta", "effect_size"),
    [
        ("concept", "accuracy", 0.5, -0.25, -0.25 / math.sqrt((2 * 0.75**2 + 6 * 0.25**2) / 7)),
        ("concept", "gold_prob", 0.45, -0.2, -0.2 / (0.2 * math.sqrt(8 / 7))),
        ("concept", "gold_logprob", -2, -1, -1 / math.sqrt(8 / 7)),
        ("general", "accuracy", 0.75, 0, math.nan),
        ("other_sense", "loss", 3.5, 0.5, math.nan),
    ],
)
def test_changes_of_a_set_by_hand(set_, metric, value, delta, effect_size):
    """d_z is the mean over the standard deviation of the changes; there is none where all items change alike."""
    found = compared(EDITED)
    assert found.value(metric, set_) == pytest.approx(value)
    assert found.value(f"delta_{metric}", set_) == pytest.approx(delta)
    assert row(found, f"delta_{metric}", set_).effect_size == pytest.approx(effect_size, nan_ok=True)
    assert row(found, metric, set_).n == 8
    assert math.isnan(row(found, metric, set_).effect_size)
    assert found.value("kl", "other_sense") == pytest.approx(0.2)
    assert "delta_kl" not in set(found.summary.metric)  # it is a distance from the base model already


@pytest.mark.parametrize(("gold_prob", "efficacy"), [(0.25, 1), (0.15, 1.25), (0.05, 1.5)])
def test_only_continuous_scores_see_gains_of_others_and_more_than_chance_of_the_concept(gold_prob, efficacy):
    found = compared({f"{s}/{m}": v for s in ("general", "simdom") for m, v in (("correct", 1), ("gold_prob", 0.85))})
    assert (found.value("specificity"), found.value("specificity_cont")) == (1, pytest.approx(1.5))
    found = compared({"concept/correct": 0, "concept/gold_prob": gold_prob})
    capped = dict.fromkeys(("efficacy", "harmonic", "harmonic_cont", "final_cont"), 1)
    expected = capped | {"efficacy_cont": efficacy}
    assert values(found, expected) == pytest.approx(expected)


def test_intervals_hold_the_value_and_shrink_with_n():
    """Sixteen times the items: a quarter of the width."""
    few, many = (compare(noisy_items(n, 1), noisy_items(n, 2, drop=0.4), n_resamples=400) for n in (30, 480))
    for set_, metric in (
        ("concept", "accuracy"), ("concept", "delta_gold_logprob"), ("paragraph", "delta_loss"), ("neutral", "kl"),
        ("generation", "distinct"), ("", "selectivity"), ("", "efficacy_cont"), ("", "specificity_cont"),
        ("", "coherence"),
    ):  # fmt: skip
        ends = [row(found, metric, set_) for found in (few, many)]
        assert all(one.ci_low < one.value < one.ci_high for one in ends), metric
        width, shrunk = (one.ci_high - one.ci_low for one in ends)
        assert 0.1 < shrunk / width < 0.5, metric


def test_a_delta_has_the_interval_of_the_normal_approximation():
    n = 1500
    change = np.random.default_rng(0).normal(-0.3, 1.0, n)
    edited = make_items({"concept/gold_logprob": change - 1}, {"concept": n})
    found = row(compare(make_items(sizes={"concept": n}), edited), "delta_gold_logprob", "concept")
    error = change.std(ddof=1) / math.sqrt(n)
    assert found.value == pytest.approx(change.mean())
    assert found.ci_low == pytest.approx(change.mean() - 1.96 * error, abs=0.25 * error)
    assert found.ci_high == pytest.approx(change.mean() + 1.96 * error, abs=0.25 * error)


def test_the_seed_fixes_the_draws_of_all_comparisons_with_one_base():
    """Two edits that differ by a constant differ by it in every draw. Items are matched by name, not by place."""
    base, edited = noisy_items(10, 1), noisy_items(10, 2, drop=0.4)
    worse = edited.assign(value=edited.value - 0.5 * (edited.set.eq("concept") & edited.metric.eq("gold_logprob")))
    one, same, other, lower = (
        compare(base, frame, n_resamples=50, seed=seed)
        for frame, seed in ((edited, 5), (edited.sample(frac=1, random_state=0), 5), (edited, 6), (worse, 5))
    )
    pd.testing.assert_frame_equal(one.summary, same.summary)
    for metric, draws in one.draws.items():
        np.testing.assert_array_equal(draws, same.draws[metric])
    assert len(one.draws["selectivity"]) == 50
    assert (one.draws["selectivity"] != other.draws["selectivity"]).any()
    assert one.draws["concept/gold_logprob"].std() > 0.1
    np.testing.assert_allclose(one.draws["concept/gold_logprob"] - lower.draws["concept/gold_logprob"], 0.5)
    np.testing.assert_allclose(lower.draws["selectivity"] - one.draws["selectivity"], 0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda items: items.iloc[1:],
        lambda items: items[items.set != "general"],
        lambda items: items[items.metric != "kl"],
        lambda items: items.assign(item=items.item.replace("concept-3", "concept-9")),
        lambda items: pd.concat([items, items.tail(1)]),
    ],
    ids=["row", "set", "metric", "renamed", "twice"],
)
def test_other_items_and_a_set_of_one_are_an_error(change):
    items, other = make_items(), change(make_items())
    for pair in ((items, other), (other, items)):
        with pytest.raises(ValueError, match="do not hold the same items"):
            compare(*pair)
    with pytest.raises(ValueError, match="set 'general' holds one item"):
        compare(*[make_items(sizes={"general": 1})] * 2)


def test_an_empty_generation_is_left_out_of_the_loss():
    """Not counted 0, which would be the best loss there is; and of the change, though it was the base's easiest."""
    found = compared({"generation/gen_loss": [math.nan] + [2.0] * 7, "generation/distinct": [0] + [0.8] * 7})
    assert found.value("gen_loss", "generation") == pytest.approx(2)
    assert found.value("delta_gen_loss", "generation") == pytest.approx(1)
    assert found.value("fluency") == pytest.approx(math.exp(-1) * 7 / 8)
    losses = [0.2, *[1.0, 1.4] * 3, 1.2]
    pair = (make_items({"generation/gen_loss": [first, *losses[1:]]}) for first in (0.2, math.nan))
    assert compare(*pair, n_resamples=20).value("delta_gen_loss", "generation") == pytest.approx(0)


def test_when_all_generations_break_down_fluency_and_final_are_0():
    found = compared(EDITED | {"generation/gen_loss": math.nan, "generation/distinct": 0})
    assert set(values(found, ("fluency", "coherence", "final", "final_cont")).values()) == {0}
    assert found.value("harmonic") > 0.5


def test_without_generations_coherence_is_that_of_the_two_other_parts():
    """A grid generates nothing; a part that was not measured counts neither as 0 nor as 1."""
    pair = make_items(), make_items(EDITED | {"neutral/loss": 3 + math.log(1.25)})
    with_all = compare(*pair, n_resamples=20)
    found = compare(*(items[items.set != "generation"] for items in pair), n_resamples=20)
    assert "fluency" not in set(found.summary.metric) and "generation" not in set(found.summary.set)
    coherence = 2 / (2 + 1.25)
    expected = {"instruction": 0.5, "neutral": 0.8, "coherence": coherence}
    expected |= {"final_cont": 3 / (2 + 1.4 + 1 / coherence)}
    expected |= values(with_all, ("efficacy", "specificity_cont", "harmonic_cont", "selectivity"))
    assert values(found, expected) == pytest.approx(expected)
    assert with_all.value("coherence") == pytest.approx(3 / (2 + 1.25 + 2))


def test_without_divergence_everything_else_is_the_same():
    pair = make_items(), make_items(EDITED)
    with_all = compare(*pair, n_resamples=20).summary
    found = compare(*(items[items.metric != "kl"] for items in pair), n_resamples=20).summary
    assert len(found) == len(with_all) - 4
    pd.testing.assert_frame_equal(found, with_all[with_all.metric != "kl"].reset_index(drop=True))


def test_a_base_at_chance_has_no_efficacy_and_no_final_score():
    base = make_items({"concept/correct": [1.0, 0.0, 0.0, 0.0] * 2})
    found = compare(base, make_items(EDITED), n_resamples=20)
    assert math.isnan(found.value("efficacy"))
    assert found.value("harmonic") == found.value("final") == 0
    assert found.value("efficacy_cont") == pytest.approx(0.5)


def test_accuracy_table_by_hand_and_beside_the_comparison():
    """An accuracy of 0 is not certain."""
    changes, sizes = {"simdom/correct": [1, 0, 0, 0, 0], "general/correct": 0}, {"simdom": 5, "general": 3}
    items = make_items(changes, sizes)
    table = accuracy_table(items)
    expected = [("concept", 6, 8), ("simdom", 1, 5), ("general", 0, 3)]  # as they come; texts have no accuracy
    rows = [(name, pytest.approx(k / n), *map(pytest.approx, wilson(k, n)), n) for name, k, n in expected]
    assert table.columns.tolist() == ["set", "accuracy", "ci_low", "ci_high", "n"]
    assert list(table.itertuples(index=False, name=None)) == rows
    summary = compare(items, items, n_resamples=20).summary
    accuracies = summary[summary.metric == "accuracy"].rename(columns={"value": "accuracy"}).set_index("set")
    pd.testing.assert_frame_equal(table.set_index("set"), accuracies.loc[table.set, table.columns[1:]])
    assert accuracy_table(items[items.set == "neutral"]).empty
