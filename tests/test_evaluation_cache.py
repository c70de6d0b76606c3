"""Evaluations and edits that a search keeps: used again, redone when damaged, given up when large."""

import pandas as pd
import pytest
import torch
from helpers.tiny import make_loaded

from ember.editing import Edit, Provenance
from ember.evaluation.evaluate import Evaluation
from ember.evaluation.search import EvaluationCache, KeptEdits


def an_evaluation(value: float) -> Evaluation:
    items = pd.DataFrame({"set": ["concept"], "item": ["1"], "metric": ["loss"], "value": [value]})
    return Evaluation(items, pd.DataFrame({"item": ["1"], "prompt": ["?"], "text": ["!"]}))


def never() -> Evaluation:
    raise AssertionError("the stored evaluation was not used")


@pytest.mark.parametrize("generations", [1, 0])
def test_a_finished_cell_is_not_run_again(tmp_path, generations):
    value, cache = an_evaluation(0.5), EvaluationCache(tmp_path / "cells")
    cache.get_or_run("k", lambda: Evaluation(value.items, value.samples.head(generations)))
    kept = cache.get_or_run("k", never)
    assert kept.items.value.tolist() == [0.5]
    assert len(kept.samples) == generations and kept.samples.columns.tolist() == ["item", "prompt", "text"]


def test_a_damaged_cell_is_named_and_redone(tmp_path):
    cache = EvaluationCache(tmp_path)
    cache.get_or_run("k", lambda: an_evaluation(0.5))
    (tmp_path / "k" / "items.parquet").write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match=r"items\.parquet"):
        assert cache.get_or_run("k", lambda: an_evaluation(0.7)).items.value.tolist() == [0.7]
    assert cache.get_or_run("k", never).items.value.tolist() == [0.7]


def test_an_interrupted_cell_is_not_stored(tmp_path):
    cache = EvaluationCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.get_or_run("k", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert cache.get_or_run("k", lambda: an_evaluation(0.7)).items.value.tolist() == [0.7]


def test_cells_of_two_models_are_kept_apart():
    """Same name, other weights."""
    assert EvaluationCache.key(make_loaded(), "x") != EvaluationCache.key(make_loaded(seed=1), "x")


@pytest.mark.parametrize(("room", "expected"), [(3, ["1", "2", "3"]), (0.5, ["1", "2", "3", "1"])])
def test_edits_are_made_once_while_they_are_small_and_again_when_they_were_given_up(room, expected):
    loaded, asked = make_loaded(), []

    def make(label: str) -> Edit:
        asked.append(label)
        values = {loaded.embedding_name: (torch.tensor([int(label)]), torch.zeros(1, loaded.embedding.shape[1]))}
        return Edit.from_values(loaded, values, Provenance("m", loaded.base_hash, "x", {}, 1))

    size = 4 * loaded.embedding.shape[1]
    assert make("1").nbytes == size
    asked.clear()
    edits = KeptEdits(make, limit=room * size)
    given = [edits(label) for label in ("1", "2", "2", "3", "1")]
    assert asked == expected
    assert [min(edit.rows_of(loaded.embedding_name)) for edit in given] == [1, 2, 2, 3, 1]
