"""Trades of row edits: untouched items are left alone, areas and costs against computations by hand."""

from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers.edits import EMBED
from helpers.suites import shared_data
from helpers.tiny import make_concept, make_loaded

from ember.errors import UnknownNameError
from ember.evaluation import trade_off as trade
from ember.evaluation.evaluate import question_scores, text_scores
from ember.evaluation.localization import expected_per_thousand
from ember.evaluation.suite import load_suite
from ember.evaluation.trade_curves import (
    COSTS,
    area,
    area_table,
    compare_areas,
    cost_at,
    curves,
    equal_gain_table,
    point_table,
    strength_table,
)
from ember.evaluation.trade_off import Probe
from ember.methods import METHODS
from ember.methods.ember import EmberConfig
from ember.models.scoring import sequence_scores
from ember.reporting import edit_plots

CONFIG = EmberConfig(rank=8, sparsity=0.1, max_iter=60, patience=20, features=(0, 1), delta=3.0)


@pytest.fixture(scope="module")
def loaded():
    return make_loaded()


@pytest.fixture(scope="module")
def probe(loaded):
    concept = make_concept()
    questions = {name: [q for q in concept.questions if q.set == name] for name in ("concept", "simdom")}
    texts = {"other_sense": concept.paragraphs[:3], "neutral": (*concept.neutral, "?")[:4]}
    frames = [question_scores(loaded, chosen).assign(set=name) for name, chosen in questions.items()]
    frames += [text_scores(loaded, chosen).assign(set=name) for name, chosen in texts.items()]
    return Probe(questions, texts, pd.concat(frames, ignore_index=True))


@pytest.fixture(scope="module")
def edits(loaded):
    """An edit of the input embeddings, and the same of the output embeddings."""
    configs = {side: EmberConfig(**vars(CONFIG) | {"side": side}) for side in ("input", "output")}
    return {side: METHODS["ember"].run(loaded, make_concept(), config) for side, config in configs.items()}


@pytest.mark.parametrize("side", ["input", "output"])
def test_scores_are_those_of_the_edited_model(loaded, probe, edits, side):
    found = trade.probe_edit(loaded, probe, edits[side])
    measured = found[found.metric.isin(probe.base.metric)]
    assert len(measured) == len(probe.base)
    assert (len(found) > len(measured)) == (side == "input")  # what is expected of general English
    expected = {name: question_scores(loaded, asked, edits[side]) for name, asked in probe.questions.items()}
    expected |= {name: text_scores(loaded, texts, edits[side]) for name, texts in probe.texts.items()}
    for name, scores in expected.items():
        mine = found[found.set == name].set_index(["item", "metric"]).edited
        np.testing.assert_allclose(
            mine.loc[list(zip(scores["item"], scores.metric, strict=True))], scores.value, atol=1e-4
        )


def test_everyday_damage_is_what_follows_an_edited_token_times_their_frequency(loaded, probe, edits):
    edit, texts = edits["input"], probe.texts["other_sense"]
    marked = edit.rows_of(EMBED)
    sequences = [loaded.encode(text) for text in texts]
    scores = sequence_scores(loaded, sequences, [1] * len(texts), partial(edit.applied, loaded))
    count = sum(i in marked for ids in sequences for i in ids[:-1])
    items = trade.probe_edit(loaded, probe, edit).assign(edit="EMBER", delta=1.0)
    found = curves(items, n_resamples=20).cost["everyday"]["EMBER"]
    expected = sum(score.kl.sum() for score in scores) / count * expected_per_thousand(loaded, marked)
    assert found[0, 0] == pytest.approx(expected, rel=1e-4)
    assert found[0, 0] > 0 and found[0, 1:].std() > 0


def test_an_edit_of_output_embeddings_acts_everywhere(loaded, probe, edits):
    items = trade.probe_edit(loaded, probe, edits["output"])
    neutral = items[(items.set == "neutral") & (items.metric == "kl")].edited.mean()
    found = curves(items.assign(edit="EMBER", delta=1.0), n_resamples=20).cost["everyday"]["EMBER"]
    assert found[0, 0] == pytest.approx(1000 * neutral) and neutral > 0


def test_items_without_an_edited_token_are_not_scored_again(loaded, probe, edits, monkeypatch):
    asked: list[str] = []

    def counted(loaded, texts, edit):
        asked.extend(texts)
        return text_scores(loaded, texts, edit)

    monkeypatch.setattr(trade, "text_scores", counted)
    trade.probe_edit(loaded, probe, edits["input"])
    marked = edits["input"].rows_of(EMBED)
    holding = [t for texts in probe.texts.values() for t in texts if marked & set(loaded.encode(t))]
    assert asked == holding
    assert 0 < len(holding) < sum(map(len, probe.texts.values()))


def test_the_suite_s_probe_holds_the_base_model_s_scores(loaded):
    for texts in (make_concept().other_sense, ()):  # released concepts have none
        suite = load_suite(replace(make_concept(), other_sense=texts), shared=shared_data())
        found = trade.make_probe(loaded, suite, "train").base
        assert set(found.set) == {"concept", "simdom", "neutral"} | ({"other_sense"} if texts else set())
        assert (found[found.metric == "kl"].value == 0).all()


# Areas. A path is straight from (0, 0) on.


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


@pytest.mark.parametrize(
    ("x", "y", "limit", "expected"),
    [
        (column(1.0), column(1.0), 1.0, 0.5),  # a straight line
        (column(0.0), column(1.0), 1.0, 1.0),  # free
        (column(-0.5), column(1.0), 1.0, 1.0),  # a negative cost counts as none
        (column(1.0), column(-1.0), 1.0, 0.0),  # no edit is better
        (column(0.5), column(1.0), 1.0, 0.75),  # flat after the last strength
        (column(2.0), column(2.0), 1.0, 0.5),  # cut at the limit
        (column(1.0, 0.5), column(0.5, 1.0), 1.0, 0.5625),  # coming back is better: 1 from 0.5 on
        (column(0.0, 1.0), column(1.0, 0.0), 1.0, 1.0),  # the best so far counts
    ],
)
def test_areas_of_simple_paths(x, y, limit, expected):
    assert area(x, y, limit) == pytest.approx(expected, abs=0.01)


def test_a_better_edit_never_has_a_smaller_area():
    generator = np.random.default_rng(0)
    x, y = generator.random((4, 200)), generator.random((4, 200))
    assert (area(x, y + 0.1, 1.0) >= area(x, y, 1.0)).all()
    assert (area(0.5 * x, y, 1.0) >= area(x, y, 1.0) - 1e-12).all()


def test_draws_are_independent_of_each_other():
    x, y = np.random.default_rng(0).random((2, 3, 5))
    for k in range(5):
        one = x[:, k : k + 1], y[:, k : k + 1]
        assert area(x, y, 0.8)[k] == pytest.approx(area(*one, 0.8)[0])
        np.testing.assert_allclose(cost_at(x, y, 0.5)[k], cost_at(*one, 0.5)[0])


@pytest.mark.parametrize(("gain", "expected"), [(0.5, 0.5), (1.0, 1.0), (1.5, 2.0), (2.5, np.nan), (0.0, 0.0)])
def test_the_cost_of_a_gain_lies_on_the_path(gain, expected):
    x, y = column(1.0, 3.0), column(1.0, 2.0)
    np.testing.assert_allclose(cost_at(x, y, gain), [expected])


def test_a_path_that_returns_reaches_a_gain_at_the_lesser_cost():
    np.testing.assert_allclose(cost_at(column(1.0, 0.2), column(1.0, 2.0), 0.9), [0.2])


def run_items(seed: int = 0, better: float = 0.0) -> pd.DataFrame:
    """Two edits on 40 items a set; the second takes ``better`` more from the concept at every strength."""
    generator = np.random.default_rng(seed)
    rows = []
    for set_, metric, sign in (
        ("concept", "gold_prob", -1), ("simdom", "gold_logprob", -1), ("other_sense", "kl", 1), ("neutral", "kl", 1),
    ):  # fmt: skip
        noise = generator.random(40)
        for edit, more in (("EMBER", 0.0), ("EMBER, rare tokens", better if set_ == "concept" else 0.0)):
            for delta in (0.5, 1.0):
                for item in range(40):
                    change = sign * delta * (noise[item] + more)
                    rows.append((edit, delta, set_, str(item), metric, 1.0, 1.0 + change))
    return pd.DataFrame(rows, columns=["edit", "delta", "set", "item", "metric", "base", "edited"])


def test_curves_are_mean_changes_and_all_edits_draw_the_same_items():
    items = run_items(better=0.3)
    found = curves(items, n_resamples=50)
    assert found.strengths == (0.5, 1.0)
    mine = items[(items.set == "concept") & (items.edit == "EMBER") & (items.delta == 1.0)]
    assert found.gain["EMBER"][1, 0] == pytest.approx((mine.base - mine.edited).mean())
    gaps = found.gain["EMBER, rare tokens"] - found.gain["EMBER"]
    np.testing.assert_allclose(gaps, np.array([[0.15], [0.3]]).repeat(51, 1), atol=1e-12)
    assert found.gain["EMBER"][1].std() > 0
    assert found.cost["neighbour"]["EMBER"][0, 0] > 0


@pytest.fixture(scope="module")
def better_runs():
    return {("Rome", seed): curves(run_items(seed, 0.3), n_resamples=200) for seed in (1, 2)}


def test_a_better_trade_has_a_larger_area_with_an_interval_above_zero(better_runs):
    table = area_table(better_runs).set_index(["cost", "edit"])
    own, better = table.loc["everyday", "EMBER"], table.loc["everyday", "EMBER, rare tokens"]
    assert better.runs == 2
    assert 0 < better.difference_low < better.difference < better.difference_high
    assert own.difference == own.difference_low == own.difference_high == 0
    assert better.area == pytest.approx(own.area + better.difference)


def test_what_is_taken_at_the_same_strength_is_compared_draw_by_draw(better_runs):
    table = strength_table(better_runs).set_index(["edit", "delta"])
    assert table.index.tolist() == [(edit, d) for edit in ("EMBER", "EMBER, rare tokens") for d in (0.5, 1.0)]
    differences = ["difference", "difference_low", "difference_high"]
    for delta in (0.5, 1.0):
        own, better = table.loc["EMBER", delta], table.loc["EMBER, rare tokens", delta]
        assert own.ci_low < own.gain < own.ci_high and own.runs == 2
        assert own[differences].tolist() == [0, 0, 0]
        assert better[differences].tolist() == pytest.approx([0.3 * delta] * 3)
        assert better.gain == pytest.approx(own.gain + 0.3 * delta)


def test_equal_edits_differ_by_nothing_and_free_ones_have_no_area():
    found = curves(run_items(), n_resamples=20)
    areas = compare_areas(found)
    for cost in COSTS:
        assert areas[cost, "EMBER"][0] == pytest.approx(areas[cost, "EMBER, rare tokens"][0])
    free = run_items().assign(edited=lambda f: np.where(f.set == "neutral", f.base, f.edited))
    assert np.isnan(compare_areas(curves(free, n_resamples=20))["everyday", "EMBER"][0])


def test_a_run_without_a_cost_is_left_out_of_its_areas_alone():
    items, free = run_items(1, 0.3), run_items(2, 0.3)
    free = free.assign(edited=np.where(free.set == "neutral", free.base, free.edited))
    one, both = (area_table({("Rome", seed): curves(part, n_resamples=50) for seed, part in enumerate(parts)})
                 .set_index(["cost", "edit"]) for parts in ([items], [items, free]))  # fmt: skip
    assert both.runs.groupby("cost").first().to_dict() == {"everyday": 1, "neighbour": 2, "other sense": 2}
    assert both.area["everyday"].to_list() == one.area["everyday"].to_list()
    assert both.area["neighbour"].to_list() != one.area["neighbour"].to_list()
    none = area_table({("Rome", 1): curves(free, n_resamples=50)}).set_index(["cost", "edit"])
    assert none.loc["everyday"].runs.eq(0).all() and none.loc["everyday"].area.isna().all()


def test_costs_are_compared_where_both_erase_the_same():
    """The second edit is everywhere half as costly."""
    items = run_items()
    second = items.edit == "EMBER, rare tokens"
    kl = items.metric == "kl"
    items.loc[second & kl, "edited"] = 1 + (items.edited[second & kl] - 1) / 2
    table = equal_gain_table({("Rome", 1): curves(items, n_resamples=100)}, "EMBER, rare tokens").set_index("cost")
    row = table.loc["everyday"]
    assert row.own == pytest.approx(row.reference / 2)
    assert row.difference_high < 0
    assert table.difference["neighbour"] == pytest.approx(0)


def test_unknown_edits_list_the_known_ones():
    with pytest.raises(UnknownNameError, match="'EMBR'; known: EMBER, EMBER, both sides"):
        trade.known_edits(["EMBR"])
    assert set(trade.known_edits(["LEACE"])) == {"LEACE"}
    assert all(method in METHODS for method, _ in trade.EDITS.values())


def test_the_figures_hold_every_edit():
    table = point_table(curves(run_items(), n_resamples=50))
    figure = edit_plots.trade_curves(table)
    figure.canvas.draw()
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"EMBER", "EMBER, rare tokens", "base model"}
    assert len(figure.axes) == len(COSTS)
    figure = edit_plots.area_differences(area_table({("Rome", 1): curves(run_items(), n_resamples=50)}))
    figure.canvas.draw()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["EMBER, rare tokens"]
    assert set(edit_plots._EDIT_STYLES) == set(trade.EDITS)
    plt.close("all")
