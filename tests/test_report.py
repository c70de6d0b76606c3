"""The tables of the report against computations by hand, with one seed and with several; how values are written."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from ember.data.arms import UNEDITED, Arm
from ember.errors import EmberError
from ember.evaluation.metrics import Comparison, compare
from ember.reporting.format import error_bars, fill_blocks, interval_text, interval_texts, markdown
from ember.reporting.report import figure_name, first_seeds
from ember.reporting.tables import (
    ALL,
    ARM_COLUMNS,
    RUN_COLUMNS,
    SCORES,
    arm_overview,
    change_table,
    comparisons,
    control_table,
    effect_table,
    grid_table,
    headline,
    main_table,
    verdicts,
)

DRAWS = 400
ARMS = [("ember", False), ("rmu", False), ("rmu", True)]


def noise(seed: int, size: int = DRAWS, spread: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size)


def made(value: float, draws: np.ndarray | float = 0.0, **others: float) -> Comparison:
    """A comparison in which every score has this value and these draws, but for ``others``."""
    values = dict.fromkeys(SCORES, value) | others
    summary = pd.DataFrame({"set": "", "metric": list(values), "value": list(values.values())})
    return Comparison(summary, {metric: v + np.broadcast_to(draws, DRAWS) for metric, v in values.items()})


def cells_of(chosen: dict, *others: tuple) -> pd.DataFrame:
    """The cell that each run (concept, method, ember, seed) chose, and rows (*run, cell) of cells that were not."""
    rows = [(*run, cell, True) for run, cell in chosen.items()] + [(*row, False) for row in others]
    return pd.DataFrame(rows, columns=[*RUN_COLUMNS, "cell", "chosen"]).assign(behind=0.0, standard_error=0.1, tie=True)


def row(table: pd.DataFrame, **where) -> pd.Series:
    """The only row with these values."""
    hits = table[np.logical_and.reduce([table[key] == value for key, value in where.items()])]
    assert len(hits) == 1, where
    return hits.iloc[0]


def interval(one: pd.Series) -> tuple[float, float, float]:
    return one.value, one.ci_low, one.ci_high


def test_how_values_arms_and_figures_are_written():
    assert interval_text(0.1, 0.04, 0.17) == "+0.10 [+0.04, +0.17]"
    assert interval_text(0.126, 0.1, 0.9, ".0%") == "13% [10%, 90%]"
    assert interval_text(-0.5, math.nan, math.nan) == interval_text(-0.5) == "-0.50"
    assert interval_text(math.nan, 0.0, 1.0) == "–"
    rows = pd.DataFrame({"kl": [1.0, math.nan], "kl_low": [0.5, 0.0], "kl_high": [2.0, 0.0]})
    assert interval_texts(rows, "kl", ".1f") == ["1.0 [0.5, 2.0]", "–"]
    low, high = error_bars(pd.DataFrame({"value": [1.0, 0.4], "ci_low": [0.5, 0.5], "ci_high": [3.0, 0.6]}))
    assert [*low, *high] == pytest.approx([0.5, 0.0, 2.0, 0.2])  # never negative
    lines = markdown(pd.DataFrame({"a": ["0.10", "1e-4"], "b": [7, "–"]})).replace(" ", "").splitlines()
    assert [lines[0], *lines[2:]] == ["|a|b|", "|0.10|7|", "|1e-4|–|"]  # texts as they are
    arms = [*ARMS, ("mean_rows", False), (UNEDITED, False)]
    assert [Arm(*arm).name for arm in arms] == ["EMBER", "RMU", "EMBER + RMU", "mean rows", "unedited"]
    runs = pd.DataFrame({"concept": ["Ancient Rome"], "method": ["rmu"], "ember": [True], "seed": [42]})
    assert figure_name("loss", runs) == "loss__ancient-rome__rmu-with-ember__seed42"
    assert figure_name("loss", runs.assign(ember=False)) == "loss__ancient-rome__rmu__seed42"
    assert figure_name("loss", runs[["concept", "seed"]]) == "loss__ancient-rome__seed42"
    runs = [("Rome", "ember", False, 2), ("Rome", "ember", False, 1), ("Greece", "ember", False, 1)]
    items = pd.DataFrame([*runs, ("Greece", "rmu", False, 2)], columns=RUN_COLUMNS)
    assert first_seeds(items, (2, 1)).to_dict() == {"Rome": 2, "Greece": 1}  # the first seed that found something


def test_judged_scores_are_in_the_tables_where_they_were_measured_and_nowhere_zero():
    """An arm without them has no rows of theirs and a dash in the overview; with none at all there is no column."""
    judged = {"efficacy_letter": 0.3, "final_judged": 0.2}
    values = (made(0.5, **judged), made(0.5), made(0.6, **judged))
    compared = {("Rome", *arm, 1): value for arm, value in zip(ARMS, values, strict=True)}
    cells = cells_of(dict.fromkeys(compared, "c"))
    main = main_table(compared, cells)
    hits = main[main.metric.isin(judged)]
    assert set(zip(hits.method, hits.ember, strict=True)) == {("ember", False), ("rmu", True)}
    overview = arm_overview(main)
    assert overview["final score (judge)"].tolist() == ["0.20 [0.20, 0.20]", "–", "0.20 [0.20, 0.20]"]
    assert "coherence (judge)" not in overview
    assert set(effect_table(compared).metric) == set(SCORES)
    compared["Rome", "rmu", False, 1] = made(0.1, final_judged=0.1)
    assert row(effect_table(compared), metric="final_judged").value == pytest.approx(0.1)
    plain = arm_overview(main_table(dict.fromkeys(compared, made(0.5)), cells))
    assert not [column for column in plain if "judge" in column or "letter" in column]


def test_the_main_table_has_a_row_for_each_arm_and_score_and_the_overview_one_an_arm():
    """Several seeds of an arm are pooled; a cell that several chose is named once."""
    compared = {("Rome", *arm, 1): made(0.1 * k, noise(k)) for k, arm in enumerate(ARMS, 1)}
    table = main_table(compared, cells_of({run: f"cell of {run[1:3]}" for run in compared}))
    assert table.columns.tolist() == [*ARM_COLUMNS, "runs", "cell", "metric", "value", "ci_low", "ci_high"]
    assert list(zip(table.method, table.ember, table.metric, strict=True)) == [(*a, s) for a in ARMS for s in SCORES]
    for k, (method, ember) in enumerate(ARMS, 1):
        one = row(table, method=method, ember=ember, metric="final_cont")
        assert interval(one) == pytest.approx((0.1 * k, *np.percentile(0.1 * k + noise(k), [2.5, 97.5])))
        assert (one.runs, one.cell) == (1, f"cell of {(method, ember)}")
    compared["Rome", "rmu", True, 1] = made(0.126, specificity_cont=0.987, final=0.5)
    overview = arm_overview(main_table(compared, cells_of(dict.fromkeys(compared, "layer=3"))))
    assert overview.to_dict("records")[2] == {
        "concept": "Rome", "method": "EMBER + RMU", "chosen on train": "layer=3", "runs": 1,
        "efficacy": "0.13 [0.13, 0.13]", "specificity": "0.99 [0.99, 0.99]", "coherence": "0.13 [0.13, 0.13]",
        "final score": "0.13 [0.13, 0.13]",
    }  # fmt: skip
    assert overview.method.tolist() == ["EMBER", "RMU", "EMBER + RMU"]

    alone, after, greece = ("Rome", "rmu", False), ("Rome", "rmu", True, 2), ("Greece", "rmu", False, 1)
    compared = {
        (*alone, 1): made(0.2, efficacy_cont=0.9), (*alone, 2): made(0.4, efficacy_cont=0.7),
        (*alone, 3): made(0.3, efficacy_cont=0.8), after: made(0.8), greece: made(0.3),
    }  # fmt: skip
    chosen = {(*alone, 3): "a", (*alone, 2): "b", (*alone, 1): "a", after: "c", greece: "d"}
    table = main_table(compared, cells_of(chosen, (*alone, 1, "z")))
    pooled = table[table.metric == "final_cont"].set_index(["ember", "concept"])
    for arm, expected in {
        (False, "Rome"): (3, "a; b", 0.3), (True, "Rome"): (1, "c", 0.8), (False, "Greece"): (1, "d", 0.3),
        (False, ALL): (4, "", 0.3), (True, ALL): (1, "", 0.8),
    }.items():  # fmt: skip
        one = pooled.loc[arm]
        assert (one.runs, one.cell, one.value) == (*expected[:2], pytest.approx(expected[2]))
    rome = table[(table.concept == "Rome") & ~table.ember]
    assert interval(row(rome, metric="final_cont")) == pytest.approx((0.3, 0.2, 0.4))
    assert interval(row(rome, metric="efficacy_cont")) == pytest.approx((0.8, 0.7, 0.9))
    assert len(table) == 5 * len(SCORES)


def test_the_effect_is_the_paired_difference_over_the_seeds_of_both_arms_each_concept_and_method_for_itself():
    """The draws of both arms scatter by 0.1, but together: their difference scatters by a tenth of that."""
    shared, own = noise(1), noise(2, spread=0.01)
    arms = [made(0.9), made(0.3, shared, coherence=0.5), made(0.7, shared + own, coherence=0.4)]
    table = effect_table({("Rome", *arm, 1): score for arm, score in zip(ARMS, arms, strict=True)})
    assert table.columns.tolist() == ["concept", "method", "runs", "metric", "value", "ci_low", "ci_high"]
    assert set(table.method) == {"rmu"} and table.metric.tolist() == SCORES
    one = row(table, metric="final_cont")
    assert interval(one) == pytest.approx((0.4, *(0.4 + np.percentile(own, [2.5, 97.5]))))
    assert one.ci_high - one.ci_low < 0.05
    assert row(table, metric="coherence").value == pytest.approx(-0.1)
    values = {True: {3: 0.6, 2: 0.5, 1: 0.9}, False: {1: 0.3, 2: 0.4, 4: 9.0}}
    compared = {("Rome", "rmu", ember, seed): made(v) for ember in values for seed, v in values[ember].items()}
    one = row(effect_table(compared), metric="final_cont")
    assert (one.runs, *interval(one)) == pytest.approx((2, 0.35, 0.1, 0.6))  # 0.6 and 0.1
    values = {("Rome", "rmu"): 0.1, ("Rome", "crisp"): 0.2, ("Greece", "rmu"): -0.3}
    compared = {(c, m, ember, 1): made(0.5 + ember * v) for ember in (True, False) for (c, m), v in values.items()}
    table = effect_table(compared)
    for (concept, method), value in values.items():
        assert row(table, concept=concept, method=method, metric="harmonic").value == pytest.approx(value)
    everywhere = row(table, concept=ALL, method="rmu", metric="harmonic")
    assert (everywhere.runs, everywhere.value) == (2, pytest.approx(-0.1))
    assert len(table) == 5 * len(SCORES)
    for arms in (ARMS[:1], ARMS[:2], [ARMS[0], ARMS[2]], []):  # nothing to compare
        table = effect_table({("Rome", *arm, 1): made(0.5) for arm in arms})
        assert table.empty and "value" in table.columns
    # Controls are set against EMBER run by run.
    draws = noise(1)
    compared = {
        ("Rome", "ember", False, 1): made(0.4, draws), ("Rome", "zero_rows", False, 1): made(0.5, draws),
        ("Rome", "zero_rows", False, 2): made(0.9), ("Rome", "rmu", False, 1): made(0.1),
        ("Greece", "ember", False, 1): made(0.4, draws), ("Greece", "zero_rows", False, 1): made(0.3, draws),
    }  # fmt: skip
    table = control_table(compared, ("zero_rows", "leace"))
    assert set(table.method) == {"zero_rows"}
    rome, everywhere = (row(table, concept=concept, metric="final_cont") for concept in ("Rome", ALL))
    assert (rome.runs, everywhere.runs) == (1, 2)
    assert interval(rome) == pytest.approx((0.1, 0.1, 0.1))  # the same items in every draw
    assert interval(everywhere) == pytest.approx((0.0, -0.1, 0.1))


def items_of(seed: int, drop: float = 0.0, n: int = 12) -> pd.DataFrame:
    """Item scores of a base and an edited model, ``drop`` worse on the concept."""
    random, own = np.random.default_rng(0), np.random.default_rng(seed)
    rows = []
    for set_, k in itertools.product(("concept", "simdom", "general"), range(n)):
        worse = drop if set_ == "concept" else 0.0
        base = random.uniform(0.4, 0.9)
        edited = base - worse + own.normal(0, 0.02)
        rows += [(set_, str(k), "gold_prob", base, edited), (set_, str(k), "gold_logprob", -base, -edited)]
        rows += [(set_, str(k), "correct", float(k % 4 > 0), float(k % 4 > (2 if worse else 0)))]
    for set_, k in itertools.product(("neutral", "instruction"), range(n)):
        rows += [(set_, str(k), "loss", b := random.uniform(3, 4), b + own.uniform(0, 0.1))]
    return pd.DataFrame(rows, columns=["set", "item", "metric", "base", "edited"])


def run_items(*runs: tuple[str, bool, int, float]) -> pd.DataFrame:
    """The items of several runs on one concept: (method, ember, seed, drop)."""
    columns = ["concept", "method", "ember", "seed"]
    parts = {("Rome", *run[:3]): items_of(10 * k, run[3]) for k, run in enumerate(runs)}
    return pd.concat(parts, names=columns).reset_index(columns).reset_index(drop=True)


RUNS = [("ember", False, 1, 0.3), ("rmu", False, 1, 0.2), ("rmu", True, 1, 0.25), ("rmu", False, 2, 0.1)]


def records_of(compared: dict, cell: str = "x") -> pd.DataFrame:
    frames = [c.summary.assign(**dict(zip(RUN_COLUMNS, run, strict=True)), cell=cell) for run, c in compared.items()]
    return pd.concat(frames, ignore_index=True)


def test_items_become_comparisons_with_their_own_base_model_scores_and_effects():
    compared = comparisons(run_items(*RUNS))
    # EMBER first, then each method alone before it runs after EMBER, whatever the order of the records.
    ordered = [("ember", False, 1), ("rmu", False, 1), ("rmu", False, 2), ("rmu", True, 1)]
    assert list(compared) == [("Rome", *arm) for arm in ordered]
    assert list(comparisons(run_items(*reversed(RUNS)))) == list(compared)
    keys, efficacy = ["set", "item", "metric"], {}
    for run, mine in run_items(*RUNS).groupby(["method", "ember", "seed"]):
        expected = compare(mine[keys].assign(value=mine.base), mine[keys].assign(value=mine.edited))
        pd.testing.assert_frame_equal(compared["Rome", *run].summary, expected.summary)
        concept = mine[(mine.set == "concept") & (mine.metric == "gold_prob")]
        efficacy[run] = 1 - (concept.edited.mean() - 0.25) / (concept.base.mean() - 0.25)
    table = main_table(compared, cells_of(dict.fromkeys(compared, "x")))
    both = row(table, method="rmu", ember=False, metric="efficacy_cont")
    assert both.value == pytest.approx((efficacy["rmu", False, 1] + efficacy["rmu", False, 2]) / 2)
    assert both.ci_low < both.value < both.ci_high
    added = row(effect_table(compared), metric="efficacy_cont")
    assert added.runs == 1
    assert added.value == pytest.approx(efficacy["rmu", True, 1] - efficacy["rmu", False, 1])
    # Two arms draw the same items, so that they can be subtracted: with the same scores, to exactly 0 in every draw.
    twice = pd.concat([items_of(3, 0.2).assign(concept="Rome", method="rmu", ember=e, seed=1) for e in (False, True)])
    table = effect_table(comparisons(twice))
    assert (table[["value", "ci_low", "ci_high"]] == 0).all(axis=None)
    alone, after = (compared["Rome", "rmu", ember, 1].draws["efficacy_cont"] for ember in (False, True))
    assert np.std(alone - after) < 0.6 * np.hypot(np.std(alone), np.std(after))
    # Changes are the paired ones.
    table = change_table(records_of(compared))
    assert set(table.metric) == {"delta_accuracy", "delta_gold_prob", "delta_gold_logprob", "delta_loss", "selectivity"}
    assert len(table) == (3 * 3 + 2 + 1) * len(RUNS)
    one = row(table, method="ember", set="concept", metric="delta_gold_prob")
    assert one.value == compared["Rome", "ember", False, 1].value("delta_gold_prob", "concept")


def test_the_grid_table_has_every_cell_in_its_order():
    """Neither by label nor by score, and with a score that no cell has: efficacy of a base model that is at chance."""
    frames, cells = [], []
    for method, labels in (("rmu", ("layer=7 lr=1", "layer=3 lr=1")), ("ember", ("delta=2", "delta=10"))):
        for k, cell in enumerate(labels):
            run = ("Rome", method, False, 1)
            accuracy = pd.DataFrame({"set": ["concept"], "metric": "accuracy", "value": 0.7})
            summary = pd.concat([made(0.1 * k, efficacy=math.nan).summary, accuracy])
            frames.append(records_of({run: Comparison(summary, {})}, cell))
            cells.append(cells_of({run: cell}).assign(chosen=k == 1))
    records = pd.concat(frames, ignore_index=True)
    table = grid_table(records, pd.concat(cells))
    assert table.columns.tolist() == [*RUN_COLUMNS, "cell", *SCORES, "behind", "standard_error", "tie", "chosen"]
    assert table.cell.tolist() == ["layer=7 lr=1", "layer=3 lr=1", "delta=2", "delta=10"]
    assert table.final_cont.tolist() == pytest.approx([0, 0.1, 0, 0.1])
    assert table.chosen.tolist() == [False, True, False, True]
    assert table.efficacy.isna().all() and table.specificity.notna().all()


def test_the_headline_is_of_ember_alone_and_its_first_seed():
    items = run_items(("rmu", False, 1, 0.1), ("ember", False, 5, 0.1), ("ember", False, 2, 0.3), ("rmu", True, 2, 0.2))
    items = pd.concat([items, items[items.set == "neutral"].assign(set="other_sense")], ignore_index=True)
    compared = comparisons(items)
    before = records_of(comparisons(items.assign(edited=items.base))).drop_duplicates(["concept", "set", "metric"])
    table = headline(before, records_of(compared, cell="delta=2"))
    titles = ["concept", "cell", "measure (test split)", "base model", "edited", "change [95 % interval]"]
    assert table.columns.tolist() == titles and len(table) == 7 and set(table.cell) == {"delta=2"}
    change = row(compared["Rome", "ember", False, 2].summary, set="concept", metric="delta_accuracy")
    expected = f"-0.500 [{change.ci_low:+.3f}, {change.ci_high:+.3f}]"
    assert table.iloc[0].tolist()[2:] == ["concept questions, accuracy", "0.750", "0.250", expected]


def frame(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns, index=range(max(len(v) for v in columns.values() if isinstance(v, list))))


def test_a_verdict_needs_an_interval_without_zero():
    areas = frame(
        concept="Rome", edit=["EMBER", "zero rows"], cost="everyday", runs=2, difference=[0.0, -0.3],
        difference_low=[0.0, -0.5], difference_high=[0.0, -0.1],
    )  # fmt: skip
    tables = {
        "main": frame(concept=["Rome"]),
        "controls": frame(
            concept="Rome", method=["mean_rows"] * 2, metric=["final_cont", "final"], runs=3, value=[0.1, 9.0],
            ci_low=0.04, ci_high=0.17,
        ),
        "controls_relearned": frame(
            concept="Rome", method=["mean_rows", "random_direction"], metric="gold_prob", attack="all",
            precision="fp32", lr=1e-4, runs=3, value=[-0.02, 0.05], ci_low=[-0.05, 0.02], ci_high=[0.01, 0.08],
        ),
        "strengths": frame(
            concept="Rome", edit=["EMBER", "random direction", "random direction"], delta=[1.0, 1.0, 10.0], runs=2,
            difference=[0.0, -0.1, 0.1], difference_low=[0.0, -0.2, 0.05], difference_high=[0.0, -0.05, 0.2],
        ),
        "trade": areas, "spared_tokens": areas[1:].assign(edit="EMBER, rare tokens"),
    }  # fmt: skip
    table = verdicts(tables)
    assert set(table.concept) == {"Rome"}
    assert table.measure.tolist()[:2] == ["final score", "probability of the right answer (fp32, lr 0.0001)"]
    assert table.set_index(["question", "beside"]).better.to_dict() == {
        ("scores before relearning", "mean rows"): "mean rows",
        ("left after relearning", "mean rows"): "not shown",
        ("left after relearning", "random direction"): "EMBER",
        ("taken at delta=1", "random direction"): "EMBER",
        ("area under the trade", "zero rows"): "EMBER",
        ("cost at equal erasure", "EMBER, rare tokens"): "EMBER, rare tokens",
    }
    # Over all concepts, where there are several, from what there is.
    of_all = {"main": frame(concept=["Rome", ALL]), "trade": pd.concat([areas, areas.assign(concept=ALL)])}
    assert verdicts(of_all).concept.tolist() == [ALL]
    assert verdicts({"main": tables["main"]}).empty


def test_blocks_of_a_page_are_filled_in_place_and_a_missing_one_is_an_error():
    text = "a <!-- n -->old<!-- /n --> b\n<!-- t -->\nold\nolder\n<!-- /t -->\nc <!-- n -->x<!-- /n -->"
    text += " <!-- o -->1<!-- /o -->"
    blocks = {"n": "7", "t": r"| \d | \1 |" + "\n| - |"}
    filled = fill_blocks(text, blocks)
    assert filled == (
        "a <!-- n -->7<!-- /n --> b\n<!-- t -->\n| \\d | \\1 |\n| - |\n<!-- /t -->\nc <!-- n -->7<!-- /n --> "
        "<!-- o -->1<!-- /o -->"  # not named: stays
    )
    assert fill_blocks(filled, blocks) == filled
    for missing in ("", "<!-- a -->1", "<!-- /a --><!-- a -->"):
        with pytest.raises(EmberError, match="'a'"):
            fill_blocks(missing, {"a": "1"})
