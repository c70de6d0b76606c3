"""The tables of the report against computations by hand, with one seed and with several."""

import math

import numpy as np
import pandas as pd
import pytest

from ember.evaluation.metrics import Comparison, compare
from ember.reporting.tables import (
    ALL,
    ARM,
    KEYS,
    SCORES,
    arm_name,
    arm_overview,
    change_table,
    comparisons,
    control_table,
    effect_table,
    figure_name,
    grid_table,
    headline,
    main_table,
    verdict_table,
)

DRAWS = 400
ARMS = [("ember", False), ("rmu", False), ("rmu", True)]


def noise(seed: int, size: int = DRAWS, spread: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size)


def made(value: float, draws: np.ndarray | float | None = None, **others: float) -> Comparison:
    """A comparison in which every score has this value and these draws, but for ``others``."""
    values = dict.fromkeys(SCORES, value) | others
    around = np.zeros(DRAWS) if draws is None else np.broadcast_to(draws, DRAWS)
    summary = pd.DataFrame({"set": "", "metric": list(values), "value": list(values.values())})
    return Comparison(summary, {metric: v + around for metric, v in values.items()})


def cells_of(*rows: tuple) -> pd.DataFrame:
    """Rows (concept, method, ember, seed, cell, chosen)."""
    return pd.DataFrame(rows, columns=[*KEYS, "cell", "chosen"]).assign(behind=0.0, standard_error=0.1, tie=True)


def row(table: pd.DataFrame, **where) -> pd.Series:
    """The only row with these values."""
    found = table[np.logical_and.reduce([table[key] == value for key, value in where.items()])]
    assert len(found) == 1, where
    return found.iloc[0]


# Pooling


def test_judged_scores_are_in_the_tables_where_they_were_measured_and_nowhere_zero():
    """An arm without them has no rows of theirs and a dash in the overview; with none at all there is no column."""
    judged = {"efficacy_letter": 0.3, "final_judged": 0.2}
    found = {
        ("Rome", "ember", False, 1): made(0.5, **judged), ("Rome", "rmu", False, 1): made(0.5),
        ("Rome", "rmu", True, 1): made(0.6, **judged),
    }  # fmt: skip
    cells = cells_of(*(("Rome", method, ember, 1, "c", True) for method, ember in ARMS))
    main = main_table(found, cells)
    assert set(main[main.metric.isin(judged)].method + main[main.metric.isin(judged)].ember.astype(str)) == {
        "emberFalse", "rmuTrue",
    }  # fmt: skip
    overview = arm_overview(main)
    assert overview["final score (judge)"].tolist() == ["0.20 [0.20, 0.20]", "–", "0.20 [0.20, 0.20]"]
    assert "coherence (judge)" not in overview
    assert set(effect_table(found).metric) == set(SCORES)
    found["Rome", "rmu", False, 1] = made(0.1, final_judged=0.1)
    effects = effect_table(found)
    assert row(effects, metric="final_judged").value == pytest.approx(0.1)
    plain = {arm: made(0.5) for arm in found}
    assert not [column for column in arm_overview(main_table(plain, cells)) if "judge" in column or "letter" in column]


# The main table


def test_the_main_table_has_a_row_for_each_arm_and_score():
    found = {("Rome", method, ember, 1): made(0.1 * k, noise(k)) for k, (method, ember) in enumerate(ARMS, 1)}
    cells = cells_of(*[("Rome", method, ember, 1, f"cell of {method} {ember}", True) for method, ember in ARMS])
    table = main_table(found, cells)
    assert table.columns.tolist() == [*ARM, "runs", "cell", "metric", "value", "ci_low", "ci_high"]
    assert list(zip(table.method, table.ember, table.metric, strict=True)) == [(*a, s) for a in ARMS for s in SCORES]
    assert (table.runs == 1).all()
    for k, (method, ember) in enumerate(ARMS, 1):
        one = row(table, method=method, ember=ember, metric="final_cont")
        assert one.value == pytest.approx(0.1 * k)
        assert (one.ci_low, one.ci_high) == pytest.approx(tuple(np.percentile(0.1 * k + noise(k), [2.5, 97.5])))
        assert one.cell == f"cell of {method} {ember}"


def test_the_main_table_pools_the_seeds_of_an_arm():
    found = {
        ("Rome", "rmu", False, 1): made(0.2, efficacy_cont=0.9),
        ("Rome", "rmu", False, 2): made(0.4, efficacy_cont=0.7),
        ("Rome", "rmu", True, 2): made(0.8),
        ("Greece", "rmu", False, 1): made(0.3),
    }
    cells = cells_of(
        ("Rome", "rmu", False, 2, "b", True),
        ("Rome", "rmu", False, 1, "a", True),
        ("Rome", "rmu", False, 1, "z", False),
        ("Rome", "rmu", True, 2, "c", True),
        ("Greece", "rmu", False, 1, "d", True),
    )
    table = main_table(found, cells)
    both = row(table, concept="Rome", ember=False, metric="final_cont")
    assert (both.runs, both.cell) == (2, "a; b")
    assert (both.value, both.ci_low, both.ci_high) == pytest.approx((0.3, 0.2, 0.4))
    other = row(table, concept="Rome", ember=False, metric="efficacy_cont")
    assert (other.value, other.ci_low, other.ci_high) == pytest.approx((0.8, 0.7, 0.9))
    alone = row(table, concept="Rome", ember=True, metric="final_cont")
    assert (alone.runs, alone.cell, alone.value) == (1, "c", pytest.approx(0.8))
    assert row(table, concept="Greece", metric="final_cont").cell == "d"
    everywhere = row(table, concept=ALL, ember=False, metric="final_cont")
    assert (everywhere.runs, everywhere.cell, everywhere.value) == (3, "", pytest.approx(0.3))
    assert row(table, concept=ALL, ember=True, metric="final_cont").value == pytest.approx(0.8)
    assert len(table) == 5 * len(SCORES)


def test_a_cell_chosen_by_several_seeds_is_named_once():
    found = {("Rome", "rmu", False, seed): made(0.2) for seed in (1, 2, 3)}
    cells = cells_of(*[("Rome", "rmu", False, seed, cell, True) for seed, cell in ((1, "a"), (2, "b"), (3, "a"))])
    assert set(main_table(found, cells).cell) == {"a; b"}


# What EMBER adds


def test_the_effect_is_the_paired_difference():
    """The draws of both arms scatter by 0.1, but together: their difference scatters by a tenth of that."""
    shared, own = noise(1), noise(2, spread=0.01)
    found = {
        ("Rome", "ember", False, 1): made(0.9),
        ("Rome", "rmu", False, 1): made(0.3, shared, coherence=0.5),
        ("Rome", "rmu", True, 1): made(0.7, shared + own, coherence=0.4),
    }
    table = effect_table(found)
    assert table.columns.tolist() == ["concept", "method", "runs", "metric", "value", "ci_low", "ci_high"]
    assert set(table.method) == {"rmu"} and table.metric.tolist() == SCORES
    one = row(table, metric="final_cont")
    assert one.value == pytest.approx(0.4)
    assert (one.ci_low, one.ci_high) == pytest.approx(tuple(0.4 + np.percentile(own, [2.5, 97.5])))
    assert one.ci_high - one.ci_low < 0.05
    assert row(table, metric="coherence").value == pytest.approx(-0.1)


def test_the_effect_is_over_the_seeds_that_both_arms_have():
    found = {
        ("Rome", "rmu", True, 3): made(0.6),
        ("Rome", "rmu", True, 2): made(0.5),
        ("Rome", "rmu", True, 1): made(0.9),
        **{("Rome", "rmu", False, seed): made(value) for seed, value in ((1, 0.3), (2, 0.4), (4, 9.0))},
    }
    one = row(effect_table(found), metric="final_cont")
    assert one.runs == 2
    assert (one.value, one.ci_low, one.ci_high) == pytest.approx((0.35, 0.1, 0.6))  # 0.6 and 0.1


def test_concepts_and_methods_have_effects_of_their_own():
    values = {("Rome", "rmu"): 0.1, ("Rome", "crisp"): 0.2, ("Greece", "rmu"): -0.3}
    found = {(c, m, ember, 1): made(0.5 + ember * v) for ember in (True, False) for (c, m), v in values.items()}
    table = effect_table(found)
    for (concept, method), value in values.items():
        assert row(table, concept=concept, method=method, metric="harmonic").value == pytest.approx(value)
    pooled_effect = row(table, concept=ALL, method="rmu", metric="harmonic")
    assert (pooled_effect.runs, pooled_effect.value) == (2, pytest.approx(-0.1))
    assert len(table) == 5 * len(SCORES)


@pytest.mark.parametrize(
    "arms", [[("ember", False)], [("ember", False), ("rmu", False)], [("ember", False), ("rmu", True)], []]
)
def test_nothing_to_compare_is_an_empty_table(arms):
    table = effect_table({("Rome", *arm, 1): made(0.5) for arm in arms})
    assert table.empty and "value" in table.columns


# From items


def items_of(seed: int, drop: float = 0.0, n: int = 12) -> pd.DataFrame:
    """Item scores of a base and an edited model, ``drop`` worse on the concept."""
    random = np.random.default_rng(0)
    own = np.random.default_rng(seed)
    rows = []
    for set_ in ("concept", "simdom", "general"):
        worse = drop if set_ == "concept" else 0.0
        for k in range(n):
            base = random.uniform(0.4, 0.9)
            edited = base - worse + own.normal(0, 0.02)
            rows += [(set_, str(k), "gold_prob", base, edited), (set_, str(k), "gold_logprob", -base, -edited)]
            rows += [(set_, str(k), "correct", float(k % 4 > 0), float(k % 4 > (2 if worse else 0)))]
    for set_ in ("neutral", "instruction"):
        rows += [(set_, str(k), "loss", b := random.uniform(3, 4), b + own.uniform(0, 0.1)) for k in range(n)]
    return pd.DataFrame(rows, columns=["set", "item", "metric", "base", "edited"])


def run_items(*runs: tuple[str, bool, int, float]) -> pd.DataFrame:
    """The items of several runs on one concept: (method, ember, seed, drop)."""
    frames = [
        items_of(10 * k, drop).assign(concept="Rome", method=method, ember=ember, seed=seed)
        for k, (method, ember, seed, drop) in enumerate(runs)
    ]
    return pd.concat(frames, ignore_index=True)


RUNS = [("ember", False, 1, 0.3), ("rmu", False, 1, 0.2), ("rmu", True, 1, 0.25), ("rmu", False, 2, 0.1)]


@pytest.fixture(scope="module")
def found() -> dict:
    return comparisons(run_items(*RUNS))


def test_a_run_is_compared_with_the_base_model_it_was_measured_with(found):
    items = run_items(*RUNS)
    # EMBER first, then each method alone before it runs after EMBER, whatever the order of the records.
    ordered = [("ember", False, 1), ("rmu", False, 1), ("rmu", False, 2), ("rmu", True, 1)]
    assert list(found) == [("Rome", *arm) for arm in ordered]
    assert list(comparisons(run_items(*reversed(RUNS)))) == list(found)
    for (_, method, ember, seed), comparison in found.items():
        mine = items[(items.method == method) & (items.ember == ember) & (items.seed == seed)]
        keys = ["set", "item", "metric"]
        expected = compare(mine[keys].assign(value=mine.base), mine[keys].assign(value=mine.edited))
        pd.testing.assert_frame_equal(comparison.summary, expected.summary)


def test_two_arms_draw_the_same_items(found):
    """So that they can be subtracted: with the same edited scores, to exactly 0 in every draw."""
    twice = pd.concat([items_of(3, 0.2).assign(concept="Rome", method="rmu", ember=e, seed=1) for e in (False, True)])
    table = effect_table(comparisons(twice))
    assert (table[["value", "ci_low", "ci_high"]] == 0).all(axis=None)
    alone, after = found["Rome", "rmu", False, 1], found["Rome", "rmu", True, 1]
    gap = np.std(alone.draws["efficacy_cont"] - after.draws["efficacy_cont"])
    unpaired = np.hypot(np.std(alone.draws["efficacy_cont"]), np.std(after.draws["efficacy_cont"]))
    assert gap < 0.6 * unpaired


def test_main_and_effects_from_items_by_hand(found):
    cells = cells_of(*[("Rome", method, ember, seed, "x", True) for method, ember, seed, _ in RUNS])
    table = main_table(found, cells)

    def efficacy(method: str, ember: bool, seed: int) -> float:
        items = run_items(*RUNS)
        mine = items[(items.method == method) & (items.ember == ember) & (items.seed == seed)]
        concept = mine[(mine.set == "concept") & (mine.metric == "gold_prob")]
        return 1 - (concept.edited.mean() - 0.25) / (concept.base.mean() - 0.25)

    both = row(table, method="rmu", ember=False, metric="efficacy_cont")
    assert both.value == pytest.approx((efficacy("rmu", False, 1) + efficacy("rmu", False, 2)) / 2)
    assert both.ci_low < both.value < both.ci_high
    added = row(effect_table(found), metric="efficacy_cont")
    assert added.runs == 1
    assert added.value == pytest.approx(efficacy("rmu", True, 1) - efficacy("rmu", False, 1))


# The other tables


def records_of(found: dict, cell: str = "x", split: str = "test") -> pd.DataFrame:
    frames = [
        comparison.summary.assign(**dict(zip(KEYS, keys, strict=True)), cell=cell, split=split)
        for keys, comparison in found.items()
    ]
    return pd.concat(frames, ignore_index=True)


def test_changes_are_the_paired_ones(found):
    records = records_of(found)
    table = change_table(records)
    assert set(table.metric) == {"delta_accuracy", "delta_gold_prob", "delta_gold_logprob", "delta_loss", "selectivity"}
    assert len(table) == (3 * 3 + 2 + 1) * len(RUNS)
    one = row(table, method="ember", set="concept", metric="delta_gold_prob")
    assert one.value == found["Rome", "ember", False, 1].value("delta_gold_prob", "concept")


def grids_of() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two arms with two cells each, listed neither by label nor by score."""
    rows, cells = [], []
    for method, labels in (("rmu", ("layer=7 lr=1", "layer=3 lr=1")), ("ember", ("delta=2", "delta=10"))):
        for k, cell in enumerate(labels):
            rows += [("Rome", method, False, 1, cell, "", metric, 0.1 * k) for metric in SCORES]
            rows.append(("Rome", method, False, 1, cell, "concept", "accuracy", 0.7))
            cells.append(("Rome", method, False, 1, cell, k == 1))
    return pd.DataFrame(rows, columns=[*KEYS, "cell", "set", "metric", "value"]), cells_of(*cells)


def test_the_grid_table_has_every_cell_in_its_order():
    records, cells = grids_of()
    table = grid_table(records, cells)
    assert table.columns.tolist() == [*KEYS, "cell", *SCORES, "behind", "standard_error", "tie", "chosen"]
    assert table.cell.tolist() == ["layer=7 lr=1", "layer=3 lr=1", "delta=2", "delta=10"]
    assert table.final_cont.tolist() == pytest.approx([0, 0.1, 0, 0.1])
    assert table.chosen.tolist() == [False, True, False, True]


def test_a_score_that_is_undefined_in_every_cell_stays_a_column():
    """The paper's efficacy of a base model whose accuracy on the few questions of a short grid is at chance."""
    records, cells = grids_of()
    records.loc[records.metric == "efficacy", "value"] = math.nan
    table = grid_table(records, cells)
    assert len(table) == 4 and table.efficacy.isna().all()


@pytest.mark.parametrize(
    ("method", "ember", "name"), [("ember", False, "EMBER"), ("rmu", False, "RMU"), ("rmu", True, "EMBER + RMU")]
)
def test_names_of_arms(method, ember, name):
    assert arm_name(method, ember) == name


def test_the_overview_has_one_row_an_arm():
    found = {
        ("Rome", "ember", False, 1): made(0.2),
        ("Rome", "rmu", True, 1): made(0.126, specificity_cont=0.987, final=0.5),
    }
    cells = cells_of(("Rome", "ember", False, 1, "delta=2", True), ("Rome", "rmu", True, 1, "layer=3", True))
    table = arm_overview(main_table(found, cells))
    assert table.to_dict("records")[1] == {
        "concept": "Rome", "method": "EMBER + RMU", "chosen on train": "layer=3", "runs": 1,
        "efficacy": "0.13 [0.13, 0.13]", "specificity": "0.99 [0.99, 0.99]", "coherence": "0.13 [0.13, 0.13]",
        "final score": "0.13 [0.13, 0.13]",
    }  # fmt: skip
    assert table.method.tolist() == ["EMBER", "EMBER + RMU"]


def test_the_headline_is_of_ember_alone_and_its_first_seed():
    runs = [("rmu", False, 1, 0.1), ("ember", False, 5, 0.1), ("ember", False, 2, 0.3), ("rmu", True, 2, 0.2)]
    items = run_items(*runs)
    spare = items[(items.set == "neutral")].assign(set="other_sense")
    found = comparisons(pd.concat([items, spare], ignore_index=True))
    edited = records_of(found, cell="delta=2")
    base = items.assign(edited=items.base)
    base = pd.concat([base, base[base.set == "neutral"].assign(set="other_sense")], ignore_index=True)
    before = records_of(comparisons(base)).assign(method="base").drop_duplicates(["concept", "set", "metric"])
    table = headline(before, edited)
    assert table.columns.tolist() == [
        "concept", "cell", "measure (test split)", "base model", "edited", "change [95 % interval]",
    ]  # fmt: skip
    assert len(table) == 7 and set(table.cell) == {"delta=2"}
    mine = found["Rome", "ember", False, 2].summary
    change = row(mine, set="concept", metric="delta_accuracy")
    first = table.iloc[0]
    assert first["measure (test split)"] == "concept questions, accuracy"
    assert (first["base model"], first.edited) == ("0.750", "0.250")
    assert first["change [95 % interval]"] == f"-0.500 [{change.ci_low:+.3f}, {change.ci_high:+.3f}]"


def test_figures_are_named_by_their_run():
    frame = pd.DataFrame({"concept": ["Ancient Rome"], "method": ["rmu"], "ember": [True], "seed": [42]})
    assert figure_name("loss", frame) == "loss__ancient-rome__rmu-with-ember__seed42"
    assert figure_name("loss", frame.assign(ember=False)) == "loss__ancient-rome__rmu__seed42"
    assert figure_name("loss", frame[["concept", "seed"]]) == "loss__ancient-rome__seed42"


def test_controls_are_set_against_ember_run_by_run():
    draws = noise(1)
    found = {
        ("Rome", "ember", False, 1): made(0.4, draws), ("Rome", "zero_rows", False, 1): made(0.5, draws),
        ("Rome", "zero_rows", False, 2): made(0.9), ("Rome", "rmu", False, 1): made(0.1),
        ("Greece", "ember", False, 1): made(0.4, draws), ("Greece", "zero_rows", False, 1): made(0.3, draws),
    }  # fmt: skip
    table = control_table(found, ("zero_rows", "leace"))
    assert set(table.method) == {"zero_rows"}
    rome = row(table, concept="Rome", metric="final_cont")
    assert (rome.runs, rome.value) == (1, pytest.approx(0.1))
    assert (rome.ci_low, rome.ci_high) == pytest.approx((0.1, 0.1))  # the same items in every draw
    everywhere = row(table, concept=ALL, metric="final_cont")
    assert (everywhere.runs, everywhere.value) == (2, pytest.approx(0.0))
    assert (everywhere.ci_low, everywhere.ci_high) == pytest.approx((-0.1, 0.1))


def test_a_verdict_needs_an_interval_without_zero():
    def made(**columns):
        rows = max(len(value) for value in columns.values() if isinstance(value, list))
        return pd.DataFrame(columns, index=range(rows))

    scores = made(
        method=["mean_rows"] * 2, metric=["final_cont", "final"], runs=3, value=[0.1, 9.0], ci_low=0.04, ci_high=0.17
    )
    left = made(
        method=["mean_rows", "random_direction"], metric="gold_prob", attack="all", precision="fp32", lr=1e-4, runs=3,
        value=[-0.02, 0.05], ci_low=[-0.05, 0.02], ci_high=[0.01, 0.08],
    )  # fmt: skip
    areas = made(
        edit=["EMBER", "zero rows"], cost="everyday", runs=2, difference=[0.0, -0.3], difference_low=[0.0, -0.5],
        difference_high=[0.0, -0.1],
    )  # fmt: skip
    spared = made(
        edit=["EMBER, rare tokens"], cost="everyday", runs=2, difference=-0.3, difference_low=-0.5, difference_high=-0.1
    )
    strengths = made(
        edit=["EMBER", "random direction", "random direction"], delta=[1.0, 1.0, 10.0], runs=2,
        difference=[0.0, -0.1, 0.1], difference_low=[0.0, -0.2, 0.05], difference_high=[0.0, -0.05, 0.2],
    )  # fmt: skip
    table = verdict_table(scores, strengths, areas, left, spared, concept="Rome")
    assert table.measure.tolist()[0] == "final score" and len(table) == 6
    named = table.set_index(["question", "beside"]).better
    assert named["scores before relearning", "mean rows"] == "mean rows"
    assert named["left after relearning", "mean rows"] == "not shown"
    assert named["left after relearning", "random direction"] == "EMBER"
    assert named["taken at delta=1", "random direction"] == "EMBER"
    assert named["area under the trade", "zero rows"] == "EMBER"
    assert named["cost at equal erasure", "EMBER, rare tokens"] == "EMBER, rare tokens"
    nothing = pd.DataFrame()
    assert verdict_table(nothing, nothing, nothing, nothing, nothing, concept="Rome").empty
