"""Where changes sit: per token against the model itself, shares against sums by hand, and planted concentrations."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.edits import EMBED
from helpers.tiny import NEUTRAL, SENTENCES, make_concept, make_loaded

from ember.editing import applying
from ember.evaluation.localization import (
    DISTANCES,
    EXPOSED,
    EXPOSURES,
    by_arm,
    by_distance,
    by_exposure,
    concentration,
    everyday_exposure,
    most_damaged,
    token_changes,
)
from ember.methods import METHODS
from ember.methods.ember import EmberConfig
from ember.reporting import localization_plots
from ember.tokens import background_frequency

TEXTS = {"paragraph": SENTENCES, "neutral": NEUTRAL}
NAN = math.nan


@pytest.fixture(scope="module")
def loaded():
    return make_loaded()


@pytest.fixture(scope="module")
def edit(loaded):
    config = EmberConfig(rank=8, sparsity=0.1, max_iter=60, patience=20, features=(0, 1), delta=3.0)
    return METHODS["ember"].run(loaded, make_concept(), config)


@pytest.fixture(scope="module")
def changes(loaded, edit):
    return token_changes(loaded, edit, TEXTS, edit.rows_of(EMBED))


def test_tokens_before_the_first_edited_one_are_unchanged_to_the_bit(changes):
    untouched = changes[changes.before == 0]
    assert len(untouched) > 20
    assert (untouched.change == 0).all()
    assert (changes[changes.before > 0].change != 0).mean() > 0.9  # the control


def test_losses_and_counts_are_those_of_the_model_itself(loaded, edit, changes):
    """Of every token but the first."""
    marked = edit.rows_of(EMBED)
    for name, number in ((name, k) for name, texts in TEXTS.items() for k in range(len(texts))):
        ids = torch.tensor([loaded.encode(TEXTS[name][number])])
        losses = []
        for one in (None, edit):
            with applying(loaded, one), torch.no_grad():
                logits = loaded.model(ids).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none"))
        mine = changes[(changes.set == name) & (changes.text == number)]
        np.testing.assert_allclose(mine.loss, losses[1], atol=1e-4)
        np.testing.assert_allclose(mine.change, losses[1] - losses[0], atol=1e-4)
        hits = [i in marked for i in ids[0].tolist()]
        for row in mine.itertuples():
            back = [row.position - k for k in range(row.position) if hits[k]]
            assert (row.marked, row.before) == (hits[row.position], len(back))
            assert row.since == min(back) if back else math.isnan(row.since)


def made(kl: list[float], before: list[int], since: list[float], text: list[int]) -> pd.DataFrame:
    values = {"kl": np.array(kl, dtype=float), "before": before, "since": since, "text": text}
    return pd.DataFrame(values).assign(set="neutral", change=[2.0 * v for v in kl])


def test_shares_are_sums_over_sums():
    changes = made([0, 1, 3, 4], [0, 1, 2, 9], [NAN, 1, 3, 20], [0, 0, 1, 1])
    exposure, distance = (table(changes).set_index("group") for table in (by_exposure, by_distance))
    assert exposure.index.tolist() == ["none", "1", "2-3", "8 or more"]
    assert distance.index.tolist() == ["none before", "1", "2-4", "17 or more"]
    for table in (exposure, distance):
        assert table.share_of_kl.tolist() == pytest.approx([0, 1 / 8, 3 / 8, 1 / 2])
    assert exposure.kl.tolist() == [0, 1, 3, 4]
    assert exposure.change.tolist() == [0, 2, 6, 8]
    assert exposure.share_of_tokens.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("before", "since", "groups"),
    [(3, 4, ("2-3", "2-4")), (4, 5, ("4-7", "5-16")), (7, 16, ("4-7", "5-16")), (8, 17, ("8 or more", "17 or more"))],
)
def test_bounds_belong_to_the_groups_that_name_them(before, since, groups):
    one = made([1.0], [before], [since], [0])
    assert (by_exposure(one).group.item(), by_distance(one).group.item()) == groups
    assert groups[0] in EXPOSURES and groups[1] in DISTANCES


def test_the_interval_of_a_share_comes_from_texts_not_tokens():
    """All texts alike: no uncertainty, however many tokens; texts that differ: some; a text alone: no interval."""
    alike = made([0, 1] * 6, [0, 1] * 6, [NAN, 1] * 6, [k // 2 for k in range(12)])
    row = by_exposure(alike).set_index("group").loc["1"]
    assert row.kl_low == row.kl == row.kl_high == 1
    row = by_exposure(alike.assign(kl=[0, 1, 0, 3] * 3)).set_index("group").loc["1"]
    assert row.kl_low < row.kl == 2 < row.kl_high
    rows = by_exposure(made([0, 2, 0, 0], [0, 1, 0, 0], [NAN, 1, NAN, NAN], [0, 0, 1, 1])).set_index("group")
    assert rows.kl["1"] == 2
    assert rows.loc["1", ["kl_low", "kl_high", "change_low", "change_high"]].isna().all()
    assert rows.kl_high["none"] == 0  # two texts, both unchanged


def test_an_edit_that_changes_nothing_has_no_shares():
    still = made([0.0, 0.0], [0, 0], [NAN, NAN], [0, 1])
    assert by_exposure(still).share_of_kl.isna().all()
    assert concentration(still)[["value", "ci_low", "ci_high"]].isna().all(axis=None)


@pytest.mark.parametrize(("kl", "expected"), [([1.0] * 10, 0.5), ([0.0] * 9 + [5.0], 0.1), ([4, 3, 2, 1], 0.5)])
def test_half_the_change_sits_on_so_many_tokens(kl, expected):
    n = len(kl)
    found = concentration(made(kl, [1] * n, [1] * n, [k % 2 for k in range(n)])).iloc[0]
    assert found.value == pytest.approx(expected)
    assert found.ci_low <= found.value + 1e-9


def test_the_most_damaged_tokens_stand_first_with_what_came_before(changes):
    found = most_damaged(changes, top=3, width=4)
    assert found.change.tolist() == sorted(changes.change, reverse=True)[:3]
    first = found.iloc[0]
    assert first.context + first.token in " ".join(TEXTS[first.set])


def test_everyday_exposure_counts_texts_and_tokens(loaded):
    encoded = [loaded.encode(text, bos=False) for text in NEUTRAL]
    token = encoded[0][-2]
    found = everyday_exposure(loaded, {token}, {"mine": NEUTRAL, "empty": ()}).set_index("set")
    holding = [ids.count(token) for ids in encoded]
    assert found.share["mine"] == sum(h > 0 for h in holding) / 4
    assert found.per_thousand["mine"] == pytest.approx(1000 * sum(holding) / sum(map(len, encoded)))
    assert found.ci_low["mine"] < found.share["mine"] < found.ci_high["mine"]
    assert found.n["empty"] == 0 and found.loc["empty"].drop("n").isna().all()
    expected = 1000 * background_frequency(loaded).get(token, 0.0)
    assert found.per_thousand["general English"] == pytest.approx(expected)


def test_arms_are_split_at_the_first_edited_token_and_seeds_pooled():
    seeds = [made([0, 1, 3, 4], [0, 1, 0, 9], [NAN] * 4, [0, 0, 1, 1]).assign(seed=seed) for seed in (1, 2)]
    ember = pd.concat(seeds).assign(concept="Rome", method="ember", ember=False)
    table = by_arm(pd.concat([ember, ember.assign(method="rmu", kl=ember.kl + 1)]))
    assert table[["method", "group"]].agg(tuple, axis=1).tolist() == [(m, g) for m in ("ember", "rmu") for g in EXPOSED]
    assert table.tokens.tolist() == [4] * 4
    assert table.kl.tolist() == pytest.approx([1.5, 2.5, 2.5, 3.5])
    assert table.share_of_kl[1] == pytest.approx(5 / 8)
    figure = localization_plots.arm_exposure(table)
    figure.canvas.draw()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["EMBER", "RMU"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(EXPOSED)
    plt.close("all")


def test_the_figures_show_every_set_and_group(changes):
    ax = localization_plots.exposure_bars(by_exposure(changes))
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["concept text", "neutral text"]
    bars = localization_plots.share_bars(by_distance(changes), title="x")
    bars.figure.canvas.draw()
    labels = [f"{name}: {what}" for name in ("concept text", "neutral text") for what in ("tokens", "KL")]
    assert [t.get_text() for t in bars.get_yticklabels()] == labels
    assert sum(patch.get_width() for patch in bars.patches) == pytest.approx(3)  # neutral texts do not change
    assert [t.get_text() for t in bars.texts] == ["no change"]
    text = changes[(changes.set == "paragraph") & (changes.text == 0)]
    assert len(localization_plots.token_strip(text).patches) == len(text)
    plt.close("all")
