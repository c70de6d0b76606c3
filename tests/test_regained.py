"""The share of erased knowledge that comes back: by hand, with intervals, and where there is nothing to divide by."""

import math
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ember.relearning.regained import regained_items, regained_summary, regained_table, share_regained
from ember.reporting import relearn_plots, relearn_tables

rng = np.random.default_rng(0)
BASE = rng.uniform(0.5, 0.9, 60)
ERASED = BASE - rng.uniform(0.1, 0.4, 60)


def test_nothing_half_all_more_and_less_than_before():
    """The same share of every question comes back, so that every draw has it."""
    for expected in (0.0, 0.5, 1.0, 2.0, -1.0):
        share = share_regained([(BASE, ERASED, ERASED + expected * (BASE - ERASED))])
        assert (share.share, share.ci_low, share.ci_high) == pytest.approx((expected, expected, expected))
        assert share.gap == pytest.approx((BASE - ERASED).mean()) and share.back == pytest.approx(expected * share.gap)
        assert share.gap_low < share.gap < share.gap_high and share.back_low <= share.back <= share.back_high
        assert (share.n, share.note) == (60, "")


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    hits, truth = 0, 0.3
    for seed in range(120):
        noise = np.random.default_rng(seed)
        base = noise.normal(0.6, 0.2, 80)
        erased = base - noise.normal(0.3, 0.2, 80)
        parts = [(base, erased, erased + noise.normal(0.3 * truth, 0.1, 80))]
        share = share_regained(parts, n_resamples=300, seed=seed)
        hits += share.ci_low <= truth <= share.ci_high
    assert 0.88 <= hits / 120 <= 0.99


def test_a_gap_that_may_be_nothing_is_said_and_not_divided_by():
    for base in (ERASED, ERASED + rng.normal(0, 0.2, 60), ERASED - 0.1):  # none, unsure, negative
        share = share_regained([(base, ERASED, ERASED + 0.05)])
        assert all(math.isnan(v) for v in (share.share, share.ci_low, share.ci_high))
        assert share.note.startswith(f"gap {share.gap:.3f} [") and "too small" in share.note
        assert share.back == pytest.approx(0.05)


def test_parts_are_pooled_by_their_means_widen_the_interval_and_must_be_whole():
    far = (BASE, ERASED, BASE)
    one, both = share_regained([far]), share_regained([far, (BASE, ERASED, ERASED)])
    assert (both.share, both.ci_low, both.ci_high) == pytest.approx((0.5, 0.0, 1.0))
    assert one.ci_low == one.ci_high == pytest.approx(1.0)
    holed = np.where(np.arange(60) == 3, np.nan, ERASED)
    bad = {"same questions": ERASED[:-1], "at least one": ERASED[:0], "missing": holed}
    for message, after in bad.items():
        with pytest.raises(ValueError, match=message):
            share_regained([(BASE, ERASED, after) if len(after) else (BASE[:0], ERASED[:0], after)])


def scores(values, metric="gold_prob", **columns) -> pd.DataFrame:
    items = [f"q{k}" for k in range(len(values))]
    return pd.DataFrame({"set": "concept", "item": items, "metric": metric, "value": values}).assign(**columns)


def run_items(after=BASE, *, scale: float = 1.0) -> pd.DataFrame:
    """Two points after the start: half way and all the way to ``after``; the first ten questions are stated."""
    frames = []
    for metric in ("gold_prob", "gold_logprob", "correct"):
        base, erased, end = (scale * v for v in (BASE, ERASED, after))
        points = {0: erased, 100: (erased + end) / 2, 203: end}
        if metric == "correct":
            base, points = base > 0.5, {0: erased > 0.5, 100: erased > 0.5, 203: end > 0.5}
        relearned = pd.concat([scores(v * 1.0, metric, tokens=t) for t, v in points.items()])
        frames.append(regained_items(scores(base * 1.0, metric), relearned))
    items = pd.concat(frames, ignore_index=True)
    return items.assign(stated=items.item.isin([f"q{k}" for k in range(10)]), run="a")


def test_items_stand_beside_the_base_and_the_start_and_the_summary_holds_accuracy_changes_and_shares():
    items = run_items()
    start, end = items[items.point == 0], items[(items.point == 2) & (items.metric == "gold_prob")]
    assert (start.after == start.erased).all()
    assert items.groupby("point").tokens.first().tolist() == [0, 100, 203]
    np.testing.assert_allclose(end.set_index("item").after[[f"q{k}" for k in range(60)]], BASE)
    with pytest.raises(ValueError, match="not asked"):  # a question that the base model was not asked
        regained_items(scores(BASE[:-1]), pd.concat([scores(ERASED, tokens=0), scores(BASE, tokens=9)]))
    summary = regained_summary(items)
    measured = {f"{what}_{score}" for what in ("delta", "regained") for score in ("gold_prob", "gold_logprob")}
    assert set(summary.metric) == {"accuracy"} | measured
    end = summary[(summary.tokens == 203) & (summary.set == "concept")].set_index("metric").value
    expected = [(BASE > 0.5).mean(), 1.0, (BASE - ERASED).mean()]
    assert end[["accuracy", "regained_gold_logprob", "delta_gold_prob"]].tolist() == pytest.approx(expected)


def test_the_table_splits_stated_questions_and_arms_and_pools_the_runs_of_one():
    table = regained_table(run_items())
    assert table.groupby("questions", sort=False).n.first().to_dict() == {"all": 60, "stated": 10, "not stated": 50}
    for _, part in table.groupby("questions"):
        np.testing.assert_allclose(part.share, [0.0, 0.5, 1.0], atol=1e-12)
    # No stated question is no row.
    assert set(regained_table(run_items().assign(stated=False)).questions) == {"all", "not stated"}
    items = pd.concat([run_items(), run_items(ERASED).assign(run="b")])
    for method, shares in (("rmu", [0.5]), (items.run, [1.0, 0.0])):
        end = regained_table(items.assign(method=method), ["method"]).query("point == 2 and questions == 'all'")
        assert end.share.tolist() == pytest.approx(shares, abs=1e-12)


def attacked(method="ember", *, after=BASE, scale=1.0, concept="Rome", **labels):
    recipe = {"attack": "all", "precision": "fp32", "lr": 1e-5, "budget": 1}
    labels = {"method": method, "ember": False, **recipe, "seed": 1} | labels
    run = f"{concept} {labels}"
    return run_items(after, scale=scale).assign(**labels, concept=concept, run=run, diverged=False)


def unedited_losing(lost: float, **labels) -> pd.DataFrame:
    """The unedited model, which loses as much on every question when it is trained."""
    run = attacked("none", scale=0.0, **labels).assign(base=0.0, erased=0.0)
    return run.assign(after=np.where(run.point == 0, 0.0, -lost))


def last_of(*runs: pd.DataFrame) -> pd.DataFrame:
    table = relearn_tables.relearning_table(pd.concat(runs, ignore_index=True))
    return relearn_tables.final_points(table).set_index("arm")


@cache
def all_attacks() -> pd.DataFrame:
    return pd.concat([
        attacked(), attacked(seed=2, after=ERASED), attacked("rmu"), attacked("rmu", ember=True, after=ERASED),
        attacked("none", scale=0.0), attacked(attack="mlps"), attacked(precision="bf16", after=ERASED),
        attacked("none", precision="bf16", scale=0.0), attacked(lr=1e-4), attacked(concept="Greece"),
    ], ignore_index=True)  # fmt: skip


@cache
def all_table() -> pd.DataFrame:
    return relearn_tables.relearning_table(all_attacks())


def test_the_relearning_table_pools_seeds_and_concepts_and_the_papers_attack_stands_beside_its_figures():
    """An attack without a reference has no net share."""
    table = all_table()
    assert set(table.concept) == {"Rome", "Greece", "all concepts"}
    last = relearn_tables.final_points(table)
    assert len(last) == last.groupby(["concept", *relearn_tables.ATTACKED]).ngroups
    assert set(last.point) == {2}
    main = last[(last.attack == "all") & (last.precision == "fp32") & (last.lr == 1e-5)].set_index(["concept", "arm"])
    assert main.seeds["Rome", "EMBER"] == 2
    arms = ["EMBER", "RMU", "EMBER + RMU", "unedited"]
    shares = [*main.share["Rome"][arms], main.share["all concepts", "EMBER"]]
    assert shares == pytest.approx([0.5, 1, 0, math.nan, 2 / 3], nan_ok=True)
    assert main.accuracy["Rome", "RMU"] == pytest.approx((BASE > 0.5).mean())
    mlps = last[last.attack == "mlps"]
    assert mlps.net_share.isna().all() and mlps.share.notna().all()
    beside = relearn_tables.beside_the_paper(table, "tiny")
    assert set(beside.model) == {"tiny"} and beside.source.str.startswith("here: ").all()
    assert set(beside.arm) == set(arms)


def test_the_recipe_is_the_one_most_arms_share_and_float32_among_equals():
    rome = all_table().query("concept == 'Rome' and attack == 'all'")
    chosen = relearn_tables.recipe(rome, most="method").iloc[0]
    assert (chosen.precision, chosen.lr, chosen.budget) == ("fp32", 1e-5, 1)
    rounded, equal = rome.query("precision == 'bf16' or method == 'ember'"), rome.query("method == 'ember'")
    for arms, precision in ((rounded, "bf16"), (equal, "fp32")):
        assert set(relearn_tables.recipe(arms, most="method").precision) == {precision}


def test_what_training_does_to_the_unedited_model_is_taken_off():
    """It loses a tenth on every question; an arm that stays where it was has come nearer to it."""
    last = last_of(unedited_losing(0.1), attacked(after=ERASED))
    found = last.loc["EMBER", ["share", "net_back", "net_share"]].tolist()
    assert found == pytest.approx([0.0, 0.1, 0.1 / (BASE - ERASED).mean()])
    assert math.isnan(last.net_share["unedited"])
    # Two seeds that lose 0.1 and 0.3 are averaged before: an arm of a third seed is 0.2 nearer.
    seeds = [unedited_losing(lost, seed=seed) for seed, lost in ((1, 0.1), (2, 0.3))]
    assert last_of(*seeds, attacked(after=ERASED, seed=3)).net_back["EMBER"] == pytest.approx(0.2)
    # Its scores fell by a thousandth when its weights were rounded, surely; still there is no share.
    last = last_of(attacked("none", precision="bf16", scale=0.0).assign(erased=lambda f: f.base - 0.001))
    assert (last.gap_low > 0).all() and last.share.isna().all()
    assert last.note.str.contains("nothing was erased").all()


def test_the_overview_has_a_dash_where_there_is_nothing_to_divide_by_and_marks_divergence():
    overview, last = relearn_tables.relearning_overview(all_table()), relearn_tables.final_points(all_table())
    assert (overview[overview.arm == "unedited"].share == "–").all()
    assert (overview[overview.arm == "RMU"].share == "100% [100%, 100%]").all()
    assert overview.runs.tolist() == last.runs.tolist()
    early = attacked("rmu").query("point < 2").assign(diverged=True)
    table = relearn_tables.relearning_table(pd.concat([attacked(), early], ignore_index=True))
    ends = relearn_tables.relearning_overview(table).set_index("arm").tokens
    assert ends.to_dict() == {"EMBER": "203", "RMU": "100 (diverged)"}


def movement() -> pd.DataFrame:
    rows = all_attacks().drop_duplicates("run")[[*relearn_tables.ATTACKED, "concept", "seed"]]
    trained = rows.assign(part="all that is trained", changed=0.1 * rows.seed, travelled=np.nan)
    edited = rows.assign(part="edited rows of E", changed=1.0, travelled=0.01 * rows.seed)
    return pd.concat([trained, edited[edited.method == "ember"]])


def test_a_control_is_set_against_ember_and_ember_with_a_method_against_it_alone_after_the_same_attack():
    ember = [attacked(seed=seed, concept=c) for seed in (1, 2) for c in ("Rome", "Greece")]
    control = [attacked("zero_rows", seed=seed, after=ERASED) for seed in (1, 2)]
    alone = attacked("zero_rows", seed=3)  # EMBER has no run with this seed
    items = pd.concat([*ember, *control, alone])
    arms = [attacked("rmu"), attacked("rmu", ember=True, after=ERASED), attacked(after=ERASED), attacked("crisp")]
    with_ember = relearn_tables.left_with_ember(pd.concat([*arms, attacked("none", scale=0.0)]))
    beside = relearn_tables.left_beside_ember(items, ["zero_rows"])
    for table, method, runs in ((beside, "zero_rows", 2), (with_ember, "rmu", 1)):
        (row,) = table.query("metric == 'gold_prob'").itertuples()
        assert (row.concept, row.method, row.attack, row.runs) == ("Rome", method, "all", runs)
        assert row.value == pytest.approx((ERASED - BASE).mean())
        assert row.ci_low < row.value < row.ci_high < 0
    both = pd.concat([items, attacked("zero_rows", seed=1, concept="Greece")])
    table = relearn_tables.left_beside_ember(both, ["zero_rows"]).query("metric == 'gold_prob'").set_index("concept")
    assert table.runs.to_dict() == {"Rome": 2, "Greece": 1, "all concepts": 3}
    assert table.value["Greece"] == pytest.approx(0)


def bars_of(ax) -> list:
    return [c for c in ax.containers if type(c).__name__ == "ErrorbarContainer"]


def test_the_figures_show_each_method_alone_and_after_ember_shares_and_one_runs_training():
    """Panels beside the unedited model; unknown shares are left open; the curve has all groups of questions."""
    table = all_table().query("concept == 'Rome' and precision == 'fp32' and lr == 1e-5")
    panels = table.query("attack == 'all' and metric == 'gold_prob' and questions == 'all'")
    figure = relearn_plots.regained_panels(panels)
    figure.canvas.draw()
    shown = [ax for ax in figure.axes if ax.get_title()]
    assert [(ax.get_title(), len(bars_of(ax))) for ax in shown] == [("EMBER", 2), ("RMU", 3)]
    assert len(figure.legends[0].get_texts()) == 5
    ax = relearn_plots.share_heatmap(relearn_tables.final_points(table))
    ax.figure.canvas.draw()
    assert "100%\n[100%, 100%]" in [t.get_text() for t in ax.texts]
    assert {label.get_text() for label in ax.get_yticklabels()} == {"all", "mlps"}
    steps = pd.DataFrame({"tokens": [50, 100, 150, 203], "loss": [4.0, 3.5, 3.2, 3.1]})
    left, right = relearn_plots.relearning_curve(steps, regained_table(run_items()))
    left.figure.canvas.draw()
    assert len(bars_of(right)) == 3
    labels = {t.get_text() for t in right.get_legend().get_texts()}
    assert labels == {"all (n = 60)", "stated (n = 10)", "not stated (n = 50)", "base model"}
    plt.close("all")


def test_the_precision_table_and_panel_compare_only_arms_that_were_run_in_several():
    table = relearn_tables.precision_table(all_attacks(), movement())
    rows = table[table.concept == "Rome"]
    mine = rows.set_index(["arm", "precision", "lr"])
    assert {arm for arm, *_ in mine.index} == {"EMBER", "unedited"}
    assert set(mine.runs) == {1}  # the second seed was run in float32 only
    rounded, single = (mine.loc["EMBER", precision, 1e-5] for precision in ("bf16", "fp32"))
    assert [rounded.back, single.back] == pytest.approx([0.0, (BASE - ERASED).mean()])
    assert [rounded.changed, single.travelled] == pytest.approx([0.1, 0.01])
    assert not len(relearn_tables.precision_table(attacked(), movement()))
    means = [relearn_tables.mean_movement(movement(), concept) for concept in ("Rome", "all concepts")]
    rome, everywhere = (mean.set_index(["arm", "precision", "lr"]) for mean in means)
    arms = [("EMBER", "fp32", 1e-5), ("unedited", "fp32", 1e-5)]
    assert rome.travelled[arms].tolist() == pytest.approx([0.015, math.nan], nan_ok=True)
    assert [mean.changed[arms[0]] for mean in (rome, everywhere)] == pytest.approx([0.15, 0.4 / 3])  # over seeds
    figure = relearn_plots.precision_panel(rows)
    figure.canvas.draw()
    shown = figure.axes[0]
    assert len(shown.get_xticks()) == len(rows.drop_duplicates(relearn_tables.RECIPE)) == 2
    places = {(bar.get_label(), x) for bar in bars_of(shown) for x in bar.lines[0].get_xdata()}
    assert len(places) == len(rows) == 4
    assert {t.get_text() for t in shown.get_legend().get_texts()} == {"EMBER", "unedited"}
    plt.close("all")
