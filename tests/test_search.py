"""The search of a grid: which cells are measured, which fail, and which one is chosen."""

import itertools

import numpy as np
import pandas as pd
import pytest
from helpers.items import make_items

from ember.errors import EmberError, NothingFoundError
from ember.evaluation.evaluate import Evaluation
from ember.evaluation.metrics import Comparison, compare
from ember.evaluation.search import choose, search

# The choice of a cell


def cell(value: float, offset: np.ndarray | float = 0.0, **others: float) -> Comparison:
    """A cell whose draws scatter around each score as every other cell's do, plus an ``offset`` of its own."""
    shared = np.random.default_rng(0).normal(0, 0.2, 400)
    scores = {"final_cont": value, **others}
    summary = pd.DataFrame({"set": "", "metric": list(scores), "value": list(scores.values())})
    return Comparison(summary, {score: one + shared + offset for score, one in scores.items()})


OWN = np.random.default_rng(1).normal(0, 0.1, 400)  # the standard error of a difference


@pytest.mark.parametrize("chosen", ["2", "1", "50"])
def test_a_clear_winner_wins_wherever_it_stands(chosen):
    best, table = choose({label: cell(0.6) if label == chosen else cell(0.3, OWN) for label in ("2", "1", "50")})
    assert best == chosen and table.tie.sum() == 1


@pytest.mark.parametrize(("behind", "chosen"), [(0.09, "mild"), (0.11, "strong")])
def test_within_one_standard_error_the_first_listed_wins(behind, chosen):
    best, table = choose({"none": cell(0.2, OWN), "mild": cell(0.6 - behind, OWN), "strong": cell(0.6)})
    assert best == chosen
    assert table.columns.tolist() == ["cell", "final_cont", "behind", "standard_error", "tie"]
    assert table.cell.tolist() == ["none", "mild", "strong"]
    assert table.final_cont.tolist() == [0.2, 0.6 - behind, 0.6]
    assert table.behind.tolist() == pytest.approx([0.4, behind, 0])
    assert table.standard_error.tolist() == pytest.approx([OWN.std(ddof=1)] * 2 + [0])
    assert table.tie.tolist() == [False, chosen == "mild", True]


@pytest.mark.parametrize("order", list(itertools.permutations(["10", "2", "b"])))
def test_only_the_order_decides_among_tied_cells(order):
    """Neither the size of a number in the label nor which of the tied cells is best."""
    cells = {"10": cell(0.6), "2": cell(0.55, OWN), "b": cell(0.52, OWN)}
    best, table = choose({"worst": cell(0.1, OWN), **{label: cells[label] for label in order}})
    assert best == order[0]
    assert table.cell.tolist() == ["worst", *order]
    assert table.tie.tolist() == [False, True, True, True]


def test_the_error_is_that_of_the_difference():
    """The draws scatter by 0.2, but together: a gap of 0.05 is no tie, and none at all is one."""
    assert choose({"1": cell(0.55), "2": cell(0.6)})[0] == "2"
    best, table = choose({label: cell(0.6) for label in "bac"})
    assert best == "b" and table.tie.all()


def test_another_score_and_no_cell():
    """Here the other way round than by the final score."""
    cells = {"a": cell(0.2, OWN, harmonic=0.6), "b": cell(0.7, harmonic=0.3)}
    best, table = choose(cells, score="harmonic")
    assert best == "a" and table.harmonic.tolist() == [0.6, 0.3]
    assert choose(cells)[0] == "b"
    with pytest.raises(ValueError, match="no cell"):
        choose({})


# The grid

BASE = make_items()
GRID = {"none": None, "half": 0.2, "most": 0.38}


def measure(label: str) -> Evaluation:
    """An edit that takes so much of the right answers' probability on the concept, if there is one."""
    if GRID[label] is None:
        raise NothingFoundError(f"no feature in {label}")
    taken = 0.65 - GRID[label] * np.array([0.9, 1.1] * 4)
    return Evaluation(make_items({"concept/gold_prob": taken}), pd.DataFrame())


def test_every_cell_is_compared_and_the_best_is_chosen():
    """Cells without an edit are named."""
    found = search(GRID, measure, BASE)
    assert list(found.cells) == list(found.seconds) == found.curve.cell.unique().tolist() == ["half", "most"]
    assert {label: str(error) for label, error in found.failed.items()} == {"none": "no feature in none"}
    assert found.choice == "most" == choose(found.cells)[0]
    for label in ("half", "most"):
        expected = compare(BASE, measure(label).items).summary
        mine = found.curve[found.curve.cell == label].drop(columns="cell").reset_index(drop=True)
        for one in (found.cells[label].summary, mine):
            pd.testing.assert_frame_equal(one, expected)
        assert found.seconds[label] > 0
    pd.testing.assert_frame_equal(found.table, choose(found.cells)[1])


def test_only_a_cell_without_an_edit_may_fail_and_not_all_of_them():
    """A judge that cannot be reached is no missing edit, nor is a bug."""

    def unreachable(label, evaluation):
        raise EmberError("the judge does not answer")

    with pytest.raises(EmberError, match="the judge does not answer"):
        search(GRID, measure, BASE, items=unreachable)
    with pytest.raises(KeyError):
        search(["other"], measure, BASE)
    with pytest.raises(NothingFoundError, match="no feature in none"):
        search(["none", "none"], measure, BASE)


def test_a_judge_may_add_items():
    judged_items = BASE[BASE.set == "generation"].replace(
        {"gen_loss": "judge_instruction", "distinct": "judge_fluency"}
    )
    extra, seen = judged_items.assign(value=[0.0, 1.0] * 8), []

    def judged(label, evaluation):
        seen.append(label)
        return pd.concat([evaluation.items, extra])

    found = search(GRID, measure, pd.concat([BASE, extra]), items=judged, score="final_judged")
    assert seen == ["half", "most"]
    assert "final_judged" in found.table and found.cells["half"].value("coherence_judged") == 1
