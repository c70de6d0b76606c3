"""Do features come back: planted matchings, fits without a selection, overlaps by hand, precision, figures."""

import itertools
import math
from dataclasses import astuple, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny import make_concept, make_loaded, noise

from ember.evaluation import stability
from ember.evaluation.stability import (
    MEASURES,
    compare_fits,
    concept_mates,
    fit_label,
    fit_table,
    match_features,
    outcome_table,
    pair_table,
    refit,
    selected_features,
    variation_table,
    varied_pairs,
)
from ember.factorization import Factorization
from ember.features import ConceptFeatures, concept_features, scaled_rows, score_features
from ember.reporting import feature_plots

ROWS = [(" Rome", "concept"), (" army", "concept"), (" Roman", "concept"), (" the", "shared"), (" train", "neutral")]
TABLE = pd.DataFrame(
    [(10 + k, token, role, 2.0, role == "concept", False) for k, (token, role) in enumerate(ROWS)],
    columns=["token_id", "token", "role", "keyness", "key", "ordinary"],
)
SMALL = {"rank": 6, "sparsity": 0.1, "max_iter": 30, "patience": 30}


def made(F: torch.Tensor, G: torch.Tensor, seed: int = 1) -> ConceptFeatures:
    settings = {"rank": F.shape[1], "sparsity": 0.01, "seed": seed, "precision": "float64"}
    fit = Factorization(F, G, (4.0, 1.0), True)
    return ConceptFeatures("Rome", "tiny", "abc", TABLE, fit, score_features(TABLE, G), settings)


def activations(*columns: dict[int, float]) -> torch.Tensor:
    G = torch.zeros(len(TABLE), len(columns))
    for k, column in enumerate(columns):
        G[list(column), k] = torch.tensor(list(column.values()))
    return G


# Two features on concept tokens, one on a neutral one; the second fit holds the first two the other way round, of
# other scale and sign, the third moves to other tokens, the last has nothing of the concept.
F = torch.eye(4)[:, :3]
FIRST = made(F, activations({0: 1.0, 1: 1.0}, {2: 2.0}, {4: 1.0}))
TURNED = made(F[:, [1, 0, 2]] * torch.tensor([-2.0, 0.5, 3.0]), activations({2: -1.0}, {0: 2.0, 1: 2.0}, {4: 1.0}), 2)
PARTLY = made(F[:, [0]], activations({0: 1.0}), 3)
ELSEWHERE = made(torch.eye(4)[:, 3:], activations({2: 1.0}), 4)
NOTHING = made(F, activations({4: 1.0}, {3: 1.0}, {4: 2.0}), 5)
FITS = {"a": FIRST, "b": TURNED, "c": PARTLY, "d": NOTHING}


def test_a_planted_permutation_is_found():
    """Whatever scales and signs; also where the other fit holds fewer features, and either way round."""
    F_a = noise(40, 12, seed=1)
    for kept, size in itertools.product((12, 7), (0.0, 0.02)):
        order = np.random.default_rng(2).permutation(12)[:kept]
        scale = torch.tensor([(-1) ** k * 10.0 ** (k % 5 - 2) for k in range(kept)])
        F_b = (F_a[:, order] + size * noise(40, kept, seed=3)) * scale
        found, back = match_features(F_a, F_b), match_features(F_b, F_a)
        for first, second in ((found.first, found.second), (back.second, back.first)):
            assert dict(zip(second, first, strict=True)) == dict(enumerate(order))
        assert found.cosine.min() > (0.99 if size else 1 - 1e-6)
        assert found.cosine.max() < 1 or not size
    # The control: features that are not related.
    assert match_features(noise(400, 12, seed=1), noise(400, 12, seed=2)).cosine.max() < 0.3


def test_the_assignment_is_the_best_in_sum_not_the_greedy_one():
    """The nearest pair of all would leave two features at right angles."""
    F_a, F_b = (torch.tensor([[math.cos(x), math.sin(x)] for x in pair]).T for pair in ((0.45, -0.55), (0.0, 1.02)))
    similar = (F_a.T @ F_b).abs()
    assert similar.argmax() == 0 and similar[1, 1] < 0.01
    found = match_features(F_a, F_b)
    assert found.second.tolist() == [1, 0]
    assert found.cosine.tolist() == pytest.approx([float(similar[0, 1]), float(similar[1, 0])])
    # A feature of zeros is like none; other widths are refused.
    F_a = noise(8, 3)
    assert match_features(F_a, F_a * torch.tensor([1.0, 0.0, 1.0])).cosine.tolist() == pytest.approx([1, 0, 1])
    for shape in ((7, 3), (8,)):
        with pytest.raises(ValueError, match=r"one width d, got \(8, 3\) and \(" + str(shape[0])):
            match_features(F_a, noise(*shape))


def test_order_scale_and_sign_make_no_difference_and_overlaps_and_siblings_are_those_by_hand():
    """A fit agrees with itself; TURNED is the same factorization written another way."""
    found = compare_fits(FIRST, FIRST)
    same = {"cosine", "cosine_all", "returned", "rows_jaccard", "edit_cosine", "tokens_jaccard"}
    assert {name: found[name] for name in same} == pytest.approx(dict.fromkeys(same, 1.0))
    assert found["rows_a"] == found["rows_b"] == 3 and tuple(found) == MEASURES
    products = [fit.factorization.G[:, :2] @ fit.factorization.F[:, :2].T for fit in (FIRST, TURNED)]
    torch.testing.assert_close(*products)
    assert compare_fits(FIRST, TURNED) == pytest.approx(found)
    assert concept_mates(FIRST, TURNED).mate.tolist() == [1, 0]
    # By hand: PARTLY keeps one of three rows, its displacement unchanged; the norms are √(1 + 1 + 4) and 1.
    found = compare_fits(FIRST, PARTLY)
    names = ["rows_a", "rows_b", "rows_jaccard", "edit_cosine", "tokens_jaccard", "returned"]
    assert [found[name] for name in names] == pytest.approx([3, 1, 1 / 3, 1 / math.sqrt(6), 1 / 3, 0.5])
    mates = concept_mates(FIRST, PARTLY).set_index("feature")  # the other feature has no mate left, which is not zero
    assert mates.cosine[0] == pytest.approx(1) and math.isnan(mates.cosine[1]) and math.isnan(mates.mate[1])
    assert mates.returned.to_dict() == {0: True, 1: False}
    apart = compare_fits(PARTLY, ELSEWHERE)
    assert [apart[name] for name in ("cosine", "rows_jaccard", "edit_cosine", "tokens_jaccard")] == [0, 0, 0, 0]
    assert apart["returned"] == 1  # the only feature there is, selected but nothing alike: cosine 0 says so
    # The sibling is the nearest other feature of the same fit.
    near = torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    fit = made(near, FIRST.factorization.G)
    assert concept_mates(fit, FIRST).set_index("feature").sibling[[0, 1]].tolist() == pytest.approx([0.6, 0.6])
    assert concept_mates(FIRST, fit).sibling.tolist() == [0, 0]


def test_a_fit_that_selects_nothing_or_what_the_caller_says():
    for a, b in ((FIRST, NOTHING), (NOTHING, FIRST), (NOTHING, NOTHING)):
        found = compare_fits(a, b)
        assert math.isnan(found["edit_cosine"])
        assert (found["rows_a"], found["rows_b"]) == (3 if a is FIRST else 0, 3 if b is FIRST else 0)
        assert math.isnan(found["cosine"]) == math.isnan(found["sibling"]) == (a is NOTHING)
        overlaps = [found["rows_jaccard"], found["tokens_jaccard"]]
        assert overlaps == [0, 0] if a is not b else all(map(math.isnan, overlaps))
        assert found["returned"] == 0 if a is FIRST else math.isnan(found["returned"])
        assert len(concept_mates(a, b)) == (2 if a is FIRST else 0)
    # The selection is the caller's.
    assert selected_features(NOTHING) == [] and selected_features(NOTHING, features=[1]) == [1]
    assert compare_fits(FIRST, TURNED, threshold=99)["rows_a"] == 0
    assert compare_fits(FIRST, FIRST, features=[1])["rows_a"] == 1
    for other in ({"weights_hash": "xyz"}, {"table": TABLE.assign(token_id=TABLE.token_id + 1)}):
        with pytest.raises(ValueError, match="not of the same weights and tokens"):
            compare_fits(FIRST, replace(TURNED, **other))


def test_the_table_of_fits_and_all_pairs_each_way():
    """What a pair shares is the same both ways."""
    table = fit_table(FITS, torch.full((5, 4), 0.5))
    assert table.unexplained.tolist() == pytest.approx([1 / 5] * 4)  # the best loss ÷ ‖X‖²
    columns = ["fit", "selected", "rows", "rank", "seed", "precision"]
    assert table[columns].values.tolist() == [
        ["a", 2, 3, 3, 1, "float64"], ["b", 2, 3, 3, 2, "float64"], ["c", 1, 1, 1, 3, "float64"],
        ["d", 0, 0, 3, 5, "float64"],
    ]  # fmt: skip
    assert table.best_score[[0, 3]].tolist() == [2, 0] and table.top_tokens[2] == "Rome"
    table = pair_table(FITS | {"e": ELSEWHERE})
    assert list(table.columns) == list(pair_table({"a": FIRST}).columns) == ["fit", "other", *MEASURES]
    assert table[["fit", "other"]].agg(tuple, axis=1).tolist() == list(itertools.permutations("abcde", 2))
    shared = ["rows_jaccard", "edit_cosine", "tokens_jaccard"]
    there, back = table.set_index(["fit", "other"]), table.set_index(["other", "fit"])
    np.testing.assert_allclose(there[[*shared, "rows_a"]], back.loc[there.index, [*shared, "rows_b"]])


def test_pairs_that_differ_in_one_thing_are_told_by_it():
    changes = {
        "reference": {}, "seed": {"seed": 2}, "rank": {"rank": 2}, "both": {"seed": 2, "rank": 2},
        "single": {"precision": "float32"}, "turned": {"precision": "float32", "reordered": 1},
    }  # fmt: skip
    fits = {name: replace(FIRST, settings=FIRST.settings | change) for name, change in changes.items()}
    fits["both"] = replace(NOTHING, settings=fits["both"].settings)
    varied = varied_pairs(fit_table(fits, torch.ones(5, 4)), pair_table(fits))
    kinds = varied.set_index(["fit", "other"]).varied
    assert kinds["reference", "seed"] == kinds["rank", "both"] == "seed" and kinds["both", "seed"] == "rank"
    assert kinds["reference", "single"] == "precision" and kinds["turned", "single"] == "rounding in float32"
    assert ("reference", "both") not in kinds.index and ("seed", "turned") not in kinds.index
    table = variation_table(varied).set_index("varied")
    assert table.pairs.to_dict() == {"seed": 4, "rank": 4, "precision": 2, "rounding in float32": 2}
    # Of the four pairs, one sets out from the fit that selects nothing, and one finds nothing there.
    assert table.found["seed"] == 0.75 and table.returned["seed"] == pytest.approx(2 / 3)
    assert table.cosine["precision"] == table.same["precision"] == 1


def probed(*changes: float, set_: str = "concept") -> pd.DataFrame:
    gold = [(set_, f"q{k}", "gold_prob", 0.5, 0.5 + change) for k, change in enumerate(changes)]
    other = [(*row[:2], "correct", 1.0, 0.0) for row in gold]
    return pd.DataFrame(gold + other, columns=["set", "item", "metric", "base", "edited"])


def test_outcomes_and_their_paired_differences():
    """A difference that all items share has no uncertainty, however much the items differ."""
    a, b = [-0.1, 0.0, -0.2, -0.4, 0.3], [0.0, 0.1, -0.1, -0.3, 0.4]
    scores = {name: pd.concat([probed(*x), probed(0, 0, set_="simdom")]) for name, x in (("a", a), ("b", b))}
    table = outcome_table(scores, reference="a").set_index(["fit", "set"])
    differences = ["difference", "difference_low", "difference_high"]
    assert len(table) == 4 and table.change["b", "simdom"] == 0
    first, second = table.loc[("a", "concept")], table.loc[("b", "concept")]
    assert first.change == pytest.approx(np.mean(a)) and first.n == 5
    assert first.ci_low < first.change - 0.05 and first.ci_high > first.change + 0.05
    assert first[differences].tolist() == [0, 0, 0]
    assert second[differences].tolist() == pytest.approx([0.1] * 3)
    alone = outcome_table({"a": probed(-0.1, 0.2)}, reference="d")  # which has no edit
    assert alone.change.item() == pytest.approx(0.05) and alone[differences].isna().all(axis=None)
    empty = outcome_table({}, reference="d")
    assert empty.empty and list(empty.columns) == list(alone.columns)


def test_precisions_agree_where_the_start_is_the_same(cache):
    """Few iterations from the same start: rounding has not grown yet. Another seed is the control."""
    loaded = make_loaded()
    double = concept_features(loaded, make_concept(), cache=False, seed=1, **SMALL)
    single = refit(loaded, double, precision="float32")
    assert double.factorization.loss == pytest.approx(single.factorization.loss, rel=1e-5)
    assert double.factorization.loss != single.factorization.loss
    torch.testing.assert_close(double.factorization.F, single.factorization.F, rtol=1e-2, atol=1e-2)
    assert match_features(single.factorization.F, double.factorization.F).cosine.min() > 0.9999
    other = concept_features(loaded, make_concept(), cache=False, seed=2, **SMALL)
    assert match_features(double.factorization.F, other.factorization.F).cosine.min() < 0.99
    assert fit_label(double) == "rank 6, sparsity 0.1, seed 1, float64"
    assert fit_label(single) == "rank 6, sparsity 0.1, seed 1, float32"
    X = scaled_rows(loaded, single.table)
    assert fit_table({"x": single, "y": double}, X).precision.tolist() == ["float32", "float64"]
    everything = list(single.scores.feature)
    assert compare_fits(single, double, features=everything)["edit_cosine"] == pytest.approx(1, abs=1e-4)


def test_a_refit_in_the_same_precision_is_the_same_to_the_bit(cache):
    """So it factorizes the same rows, scale included, from the same start."""
    for kind, precision in (("llama", "float64"), ("llama", "float32"), ("gemma2", "float64")):
        loaded = make_loaded(kind)
        features = concept_features(loaded, make_concept(), seed=3, precision=precision, **SMALL)
        again = refit(loaded, features)
        (F_one, G_one, *one), (F_two, G_two, *two) = (astuple(fit.factorization) for fit in (features, again))
        assert torch.equal(F_one, F_two) and torch.equal(G_one, G_two) and one == two
        pd.testing.assert_frame_equal(again.scores, features.scores)


def test_refits_are_kept_by_precision_order_and_setting(cache, monkeypatch):
    """Columns in another order are the same problem: in float64 the features come back, though rounded otherwise."""
    loaded = make_loaded()
    features = [concept_features(loaded, make_concept(), seed=seed, **SMALL) for seed in (3, 2)]
    turned, other = (refit(loaded, one, reordered=1) for one in features)
    assert fit_label(turned) == "rank 6, sparsity 0.1, seed 3, float64, order 1"
    assert turned.factorization.loss_curve != features[0].factorization.loss_curve
    torch.testing.assert_close(turned.factorization.F, features[0].factorization.F)
    measured = compare_fits(features[0], turned, features=list(features[0].scores.feature))
    assert measured["same"] == 1 and measured["rows_jaccard"] == 1
    single, double = (refit(loaded, features[0], precision=precision) for precision in ("float32", "float64"))
    for one, another in ((turned, other), (single, double)):
        assert not torch.equal(one.factorization.F, another.factorization.F)
    monkeypatch.setattr(stability, "sparse_mf", lambda *_, **__: pytest.fail("fitted again"))
    assert torch.equal(refit(loaded, features[0], reordered=1).factorization.G, turned.factorization.G)
    with pytest.raises(ValueError, match="other weights"):
        refit(make_loaded(seed=1), features[0])


def texts(labels) -> list[str]:
    labels[0].figure.canvas.draw()
    return [label.get_text() for label in labels]


def test_the_figures_name_every_fit_and_set():
    """Fits on both axes of the grid; rows beside their overlap; mates beside siblings; one colour a set."""
    pairs = pair_table(FITS)
    ax = feature_plots.pair_grid(pairs)
    assert texts(ax.get_xticklabels()) == texts(ax.get_yticklabels()) == list(FITS)
    assert texts(ax.texts)[:4] == ["–", "1.00", "1.00", "1.00"]
    assert texts(ax.texts)[-4:] == ["–"] * 4  # d selects nothing
    left, right = feature_plots.row_overlap(fit_table(FITS, torch.ones(5, 4)), pairs).axes[:2]
    assert texts(left.get_yticklabels()) == texts(right.get_xticklabels()) == list(FITS)
    assert [bar.get_width() for bar in left.patches] == [3, 3, 1, 0]
    assert texts(left.texts) == [" 3 (2 features)", " 3 (2 features)", " 1 (1 feature)", " 0 (nothing selected)"]
    assert texts(right.texts)[1:3] == ["1.00", "0.33"]
    kinds = {"a": "seed", "b": "seed", "c": "rank", "d": "rounding in float32"}
    varied = pairs[(pairs.fit != "d") | (pairs.other == "a")]
    ax = feature_plots.variation_points(varied.assign(varied=varied.fit.map(kinds)))
    assert texts(ax.get_yticklabels()) == ["another seed", "another rank", "rounding in float32"]
    assert len(ax.figure.legends[0].get_texts()) == 3 and "cosine" in ax.get_xlabel()
    assert texts(ax.texts) == ["nothing selected"]
    assert [len(dots.get_offsets()) for dots in ax.collections] == [5, 3]
    scores = {name: pd.concat([probed(-0.1, 0.2), probed(0.0, 0.1, set_="simdom")]) for name in ("a", "b")}
    ax = feature_plots.outcome_points(outcome_table(scores, reference="a"))
    assert texts(ax.get_yticklabels()) == ["a", "b"]
    legend = ["base model", "concept questions", "similar domain questions"]
    assert sorted(texts(ax.figure.legends[0].get_texts())) == legend and len(ax.containers) == 2
    plt.close("all")
