"""Trades of row edits: untouched items are left alone, areas and costs against computations by hand."""

import itertools
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers.edits import EMBED
from helpers.suites import shared_data
from helpers.tiny import SENTENCES, make_concept, make_loaded

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
from ember.evaluation.trade_off import RARE
from ember.methods import METHODS
from ember.methods.ember import EmberConfig
from ember.models.scoring import sequence_scores
from ember.reporting import control_plots

CONFIG = EmberConfig(rank=8, sparsity=0.1, max_iter=60, patience=20, features=(0, 1), delta=3.0)


@pytest.fixture(scope="module")
def loaded():
    return make_loaded()


@pytest.fixture(scope="module")
def probe(loaded):
    concept = replace(make_concept(), other_sense=SENTENCES * 2)
    return trade.make_probe(loaded, load_suite(concept, shared=shared_data()), "train")


@pytest.fixture(scope="module")
def edits(loaded):
    """An edit of the input embeddings, and the same of the output embeddings."""
    configs = {side: replace(CONFIG, side=side) for side in ("input", "output")}
    return {side: METHODS["ember"].run(loaded, make_concept(), config) for side, config in configs.items()}


def test_scores_are_those_of_the_base_model_and_of_the_edited_one(loaded, probe, edits):
    """Released concepts have no texts in another sense."""
    released = load_suite(replace(make_concept(), other_sense=()), shared=shared_data())
    sets = {"concept", "simdom", "neutral"}
    for base, names in ((probe.base, sets | {"other_sense"}), (trade.make_probe(loaded, released).base, sets)):
        assert set(base.set) == names and (base[base.metric == "kl"].value == 0).all()
    for side, edit in edits.items():
        found = trade.probe_edit(loaded, probe, edit)
        measured = found[found.metric.isin(probe.base.metric)]
        assert len(measured) == len(probe.base)
        assert (len(found) > len(measured)) == (side == "input")  # what is expected of general English
        expected = {name: question_scores(loaded, asked, edit) for name, asked in probe.questions.items()}
        expected |= {name: text_scores(loaded, texts, edit) for name, texts in probe.texts.items()}
        mine, wanted = measured.set_index(["set", "item", "metric"]).edited, pd.concat(expected, names=["set"])
        wanted = wanted.set_index(["item", "metric"], append=True).droplevel(1).value
        pd.testing.assert_series_equal(mine, wanted.loc[mine.index], atol=1e-4, check_names=False)


def test_everyday_damage_is_what_follows_an_edited_token_times_their_frequency(loaded, probe, edits):
    """An edit of output embeddings acts everywhere."""
    edit, texts = edits["input"], probe.texts["other_sense"]
    marked = edit.rows_of(EMBED)
    sequences = [loaded.encode(text) for text in texts]
    scores = sequence_scores(loaded, sequences, [1] * len(texts), partial(edit.applied, loaded))
    count = sum(i in marked for ids in sequences for i in ids[:-1])
    items = {side: trade.probe_edit(loaded, probe, e).assign(edit="EMBER", delta=1.0) for side, e in edits.items()}
    found = {side: curves(part, n_resamples=20).cost["everyday"]["EMBER"][0] for side, part in items.items()}
    expected = sum(score.kl.sum() for score in scores) / count * expected_per_thousand(loaded, marked)
    assert found["input"][0] == pytest.approx(expected, rel=1e-4)
    assert found["input"][0] > 0 and found["input"][1:].std() > 0
    neutral = items["output"].query("set == 'neutral' and metric == 'kl'").edited.mean()
    assert found["output"][0] == pytest.approx(1000 * neutral) and neutral > 0


def test_items_without_an_edited_token_are_not_scored_again(loaded, probe, edits, monkeypatch):
    spy = Mock(wraps=text_scores)
    monkeypatch.setattr(trade, "text_scores", spy)
    trade.probe_edit(loaded, probe, edits["input"])
    marked = edits["input"].rows_of(EMBED)
    holding = [t for texts in probe.texts.values() for t in texts if marked & set(loaded.encode(t))]
    assert [text for call in spy.call_args_list for text in call.args[1]] == holding
    assert 0 < len(holding) < sum(map(len, probe.texts.values()))


def test_areas_of_simple_paths():
    """A path is straight from (0, 0) on."""
    for x, y, expected in (
        ([1], [1], 0.5),  # a straight line
        ([0], [1], 1.0),  # free
        ([-0.5], [1], 1.0),  # a negative cost counts as none
        ([1], [-1], 0.0),  # no edit is better
        ([0.5], [1], 0.75),  # flat after the last strength
        ([2], [2], 0.5),  # cut at the limit
        ([1, 0.5], [0.5, 1], 0.5625),  # coming back is better: 1 from 0.5 on
        ([0, 1], [1, 0], 1.0),  # the best so far counts
    ):
        assert area(np.c_[x], np.c_[y], 1.0) == pytest.approx(expected, abs=0.01)


def test_a_better_edit_never_has_a_smaller_area_and_draws_are_independent_of_each_other():
    x, y = np.random.default_rng(0).random((2, 4, 200))
    areas, costs = area(x, y, 1.0), cost_at(x, y, 0.5)
    assert (area(x, y + 0.1, 1.0) >= areas).all()
    assert (area(0.5 * x, y, 1.0) >= areas - 1e-12).all()
    for k in range(5):
        one = x[:, [k]], y[:, [k]]
        np.testing.assert_allclose([areas[k], costs[k]], [area(*one, 1.0)[0], cost_at(*one, 0.5)[0]])


def test_the_cost_of_a_gain_lies_on_the_path_and_is_the_least_where_it_returns():
    for gain, expected in ((0.5, 0.5), (1, 1), (1.5, 2), (2.5, np.nan), (0, 0)):
        np.testing.assert_allclose(cost_at(np.c_[[1, 3]], np.c_[[1, 2]], gain), [expected])
    np.testing.assert_allclose(cost_at(np.c_[[1, 0.2]], np.c_[[1, 2]], 0.9), [0.2])


def run_items(seed: int = 0, better: float = 0.0) -> pd.DataFrame:
    """Two edits on 40 items a set; the second takes ``better`` more from the concept at every strength."""
    generator = np.random.default_rng(seed)
    rows, metrics = [], {"concept": "gold_prob", "simdom": "gold_logprob", "other_sense": "kl", "neutral": "kl"}
    for set_, metric in metrics.items():
        noise, more, sign = generator.random(40), better * (set_ == "concept"), 1 if metric == "kl" else -1
        for (edit, taken), delta in itertools.product((("EMBER", noise), (RARE, noise + more)), (0.5, 1.0)):
            rows += [(edit, delta, set_, str(k), metric, 1.0, 1 + sign * delta * taken[k]) for k in range(40)]
    return pd.DataFrame(rows, columns=["edit", "delta", "set", "item", "metric", "base", "edited"])


def test_curves_are_mean_changes_and_all_edits_draw_the_same_items():
    items = run_items(better=0.3)
    found = curves(items, n_resamples=50)
    assert found.strengths == (0.5, 1.0)
    mine = items.query("set == 'concept' and edit == 'EMBER' and delta == 1")
    assert found.gain["EMBER"][1, 0] == pytest.approx((mine.base - mine.edited).mean())
    gaps = found.gain[RARE] - found.gain["EMBER"]
    np.testing.assert_allclose(gaps, np.array([[0.15], [0.3]]).repeat(51, 1), atol=1e-12)
    assert found.gain["EMBER"][1].std() > 0 and found.cost["neighbour"]["EMBER"][0, 0] > 0


def test_a_better_trade_has_a_larger_area_and_takes_more_at_the_same_strength_draw_by_draw():
    runs = {("Rome", seed): curves(run_items(seed, 0.3), n_resamples=200) for seed in (1, 2)}
    table = area_table(runs).set_index(["cost", "edit"])
    own, better = table.loc["everyday", "EMBER"], table.loc["everyday", RARE]
    differences = ["difference", "difference_low", "difference_high"]
    assert better.runs == 2 and 0 < better.difference_low < better.difference < better.difference_high
    assert own[differences].tolist() == [0, 0, 0]
    assert better.area == pytest.approx(own.area + better.difference)
    table = strength_table(runs).set_index(["edit", "delta"])
    assert table.index.tolist() == [(edit, d) for edit in ("EMBER", RARE) for d in (0.5, 1.0)]
    for delta in (0.5, 1.0):
        own, better = table.loc["EMBER", delta], table.loc[RARE, delta]
        assert own.ci_low < own.gain < own.ci_high and own.runs == 2
        assert own[differences].tolist() == [0, 0, 0]
        assert better[differences].tolist() == pytest.approx([0.3 * delta] * 3)
        assert better.gain == pytest.approx(own.gain + 0.3 * delta)
    equal = compare_areas(curves(run_items(), n_resamples=20))
    for cost in COSTS:
        assert equal[cost, "EMBER"][0] == pytest.approx(equal[cost, RARE][0])


def test_a_run_without_a_cost_is_left_out_of_its_areas_alone():
    items = run_items(2, 0.3)
    items["edited"] = items.edited.where(items.set != "neutral", items.base)
    run, free = (curves(part, n_resamples=50) for part in (run_items(1, 0.3), items))
    one, both, none = (
        area_table({("Rome", seed): part for seed, part in enumerate(parts)}).set_index(["cost", "edit"])
        for parts in ([run], [run, free], [free])
    )
    assert both.runs.groupby("cost").first().to_dict() == {"everyday": 1, "neighbour": 2, "other sense": 2}
    assert both.area["everyday"].to_list() == one.area["everyday"].to_list()
    assert both.area["neighbour"].to_list() != one.area["neighbour"].to_list()
    assert none.loc["everyday"].runs.eq(0).all() and none.loc["everyday"].area.isna().all()


def test_costs_are_compared_where_both_erase_the_same():
    """The second edit is everywhere half as costly."""
    items = run_items()
    cheaper = (items.edit == RARE) & (items.metric == "kl")
    items["edited"] = items.edited.mask(cheaper, (1 + items.edited) / 2)
    table = equal_gain_table({("Rome", 1): curves(items, n_resamples=100)}, RARE).set_index("cost")
    row = table.loc["everyday"]
    assert row.own == pytest.approx(row.reference / 2) and row.difference_high < 0
    assert table.difference["neighbour"] == pytest.approx(0)


def test_the_figures_hold_every_edit_and_unknown_edits_list_the_known_ones():
    run = curves(run_items(), n_resamples=50)
    figure = control_plots.trade_curves(point_table(run))
    figure.canvas.draw()
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"EMBER", RARE, "base model"}
    assert len(figure.axes) == len(COSTS)
    figure = control_plots.area_differences(area_table({("Rome", 1): run}))
    figure.canvas.draw()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [RARE]
    plt.close("all")
    assert set(control_plots._EDIT_STYLES) == set(trade.EDITS) and set(trade.known_edits(["LEACE"])) == {"LEACE"}
    assert all(method in METHODS for method, _ in trade.EDITS.values())
    with pytest.raises(UnknownNameError, match="'EMBR'; known: EMBER, EMBER, both sides"):
        trade.known_edits(["EMBR"])
