"""The benchmarks: their plain references do the same work as the package, and their table says what was timed."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny import make_concept, make_loaded, noise

from benchmarks import reference, run
from ember.evaluation.evaluate import PROMPT
from ember.factorization import semi_nmf, sparse_mf
from ember.models.scoring import option_logprobs
from ember.relearning.attacks import ATTACKS
from ember.relearning.train import RelearnConfig, relearn, training_plan


@pytest.mark.parametrize("name", ["sparse_mf", "semi_nmf"])
def test_references_follow_the_same_iteration(name):
    X = (noise(120, 5) @ noise(5, 40, seed=1) + 0.1 * noise(120, 40, seed=2)).abs().double()
    settings = {"sparsity": 0.2, "max_iter": 15, "patience": 500}
    ours = {"sparse_mf": sparse_mf, "semi_nmf": semi_nmf}[name](X, 5, seed=42, **settings)
    F, G, curve = getattr(reference, name)(X, 5, **settings)
    assert curve == pytest.approx(list(ours.loss_curve), rel=1e-6)
    assert float((X - G @ F.T).square().sum()) == pytest.approx(min(curve))


def test_separate_sequences_score_what_one_prefix_pass_scores(tiny):
    questions = make_concept().questions[:4]
    prompts = [PROMPT.format(question=q.question) for q in questions]
    together = option_logprobs(tiny, prompts, [[f" {option}" for option in q.options] for q in questions])
    apart = reference.separate_sequences(tiny, PROMPT, questions)
    assert np.array(apart) == pytest.approx(np.array(together), abs=1e-4)
    assert len(reference.generated_letters(tiny, questions)) == 4


def test_padded_training_takes_the_same_steps():
    loaded, texts = make_loaded("llama"), make_concept().paragraphs[:4]
    config = RelearnConfig((sum(len(loaded.encode(text)) for text in texts),), lr=1e-3)
    nothing = pd.DataFrame({"set": [], "item": [], "metric": [], "value": []})
    ours = relearn(loaded, None, texts, ATTACKS["all"], config, lambda tokens: nothing, seed=0)
    sequences = [ids for step in training_plan(loaded, texts, config, seed=0) for ids in step]
    model = loaded.model.requires_grad_(True)
    losses = reference.train_padded(model, sequences, loaded.pad_id, lr=1e-3, width=64)
    assert losses == pytest.approx([step["loss"] for step in ours.steps], abs=1e-4)
    assert losses[0] != pytest.approx(losses[-1], abs=1e-4)  # it does train


def test_rows_compare_medians_with_the_target_and_are_renewed_in_their_places():
    seconds = [[1.0, 9.0, 2.0], [8.0, 10.0, 90.0]]
    row = run.row("work", "other", seconds, 5, "same")
    assert (row["ours"], row["theirs"], row["ratio"], row["met"]) == (2.0, 10.0, 5.0, True)
    assert not run.row("work", "other", seconds, 5.1, "same")["met"]
    table, rows = (
        pd.DataFrame(rows, columns=["work", "compared_with", "ours"])
        for rows in ([("a", "x", 1), ("a", "y", 2), ("b", "x", 3)], [("a", "y", 20), ("c", "x", 40)])
    )
    found = run.renewed(table, rows)
    assert found.values.tolist() == [["a", "x", 1], ["a", "y", 20], ["b", "x", 3], ["c", "x", 40]]
    assert run.renewed(pd.DataFrame(columns=table.columns), rows).equals(rows)


def test_exponents_are_those_of_power_laws():
    sizes = np.array([10, 20, 40])
    parts = [pd.DataFrame({"work": "w", "varied": v, "size": sizes, "seconds": 3.0 * sizes**p})
             for v, p in (("n", 1.0), ("K", 2.5))]  # fmt: skip
    table = run.with_exponents(pd.concat(parts, ignore_index=True))
    assert table.groupby("varied").exponent.first().to_dict() == pytest.approx({"n": 1.0, "K": 2.5})
    figure = run.growth_figure(table)
    assert [ax.get_xlabel() for ax in figure.axes] == ["n", "K"]


def test_a_different_result_is_not_timed_as_the_same(monkeypatch):
    X = noise(60, 20)
    monkeypatch.setattr(reference, "sparse_mf", lambda X, rank: (X[:, :1], X[:, :1], [1e-9]))
    with pytest.raises(AssertionError, match="loss"):
        run._factorized("work", sparse_mf, X, 2, 1)


def test_the_embedding_like_matrix_has_the_asked_shape(monkeypatch, tiny):
    monkeypatch.setattr(run, "load_model", lambda name: tiny)
    X = run.embedding_like(100, 48)
    assert X.shape == (100, 48) and X.dtype == torch.float32
