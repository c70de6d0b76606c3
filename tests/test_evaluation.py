"""What an evaluation measures: sizes, suites, the sets it yields with and without generations and divergence."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.suites import blank, shared_data, suite_of, talkative, values_of
from helpers.tiny import SENTENCES, make_concept, make_loaded

from ember.evaluation.evaluate import evaluate, question_scores
from ember.evaluation.metrics import compare
from ember.evaluation.suite import Sizes, load_suite
from ember.models.loading import weights_hash

QUESTIONS = {"concept", "simdom", "general"}
TEXTS = {"neutral", "other_sense", "paragraph"}


@pytest.mark.parametrize(
    ("size", "value", "said"),
    [
        *[(name, 0, "greater than 0") for name in ("questions", "texts", "instructions", "new_tokens")],
        *[(name, -1, "greater than or equal to 0") for name in ("other_texts", "generations", "open_answers")],
        *[(name, 1, "a valid boolean") for name in ("letters", "judge", "divergence")],
        ("questions", True, "a valid integer"), ("texts", "many", "a valid integer"),
        ("other_texts", 4, "0 or at least 5"), ("text", 3, "not permitted"),
    ],
)  # fmt: skip
def test_sizes_that_make_no_sense_are_refused_in_one_line(size, value, said):
    with pytest.raises(ValueError, match=rf"^{size} .*{said}.*, got {value!r}$"):
        Sizes(**{size: value})


def test_sizes_are_values():
    """They stand in the keys of caches. What may be left out may be 0, and no size means all."""
    left_out = dict.fromkeys(("other_texts", "generations", "open_answers"), 0)
    everything = dict.fromkeys(("questions", "texts", "other_texts", "instructions", "generations"), None)
    for given in (left_out, everything):
        assert Sizes(**given).model_dump(include=given.keys()) == given
    sizes = Sizes(questions=4)
    assert sizes == Sizes(questions=4) != Sizes() and hash(sizes) == hash(Sizes(questions=4))
    assert repr(sizes) == (
        "Sizes(questions=4, texts=60, other_texts=60, instructions=24, generations=12, new_tokens=40, "
        "divergence=True, letters=False, judge=False, open_answers=0)"
    )
    with pytest.raises(ValueError, match="frozen"):
        sizes.questions = 5


def test_sizes_know_whether_a_judge_is_asked():
    assert not Sizes().judged and not Sizes(letters=True).judged
    assert Sizes(judge=True).judged and Sizes(open_answers=3).judged and Sizes(open_answers=None).judged
    with pytest.raises(ValueError, match="judge grades generations, of which there are 0"):
        Sizes(judge=True, generations=0)


def test_a_suite_has_every_split_of_every_set():
    concept, shared = make_concept(), shared_data()
    unlimited = dict.fromkeys(("train", "test"), Sizes(texts=None, other_texts=None))
    suite = load_suite(concept, unlimited, shared=shared)
    for split, start in (("train", 0), ("test", 1)):
        for name in ("concept", "simdom"):
            wanted = [q for q in concept.questions if (q.set, q.split) == (name, split)]
            assert list(suite.questions[name][split]) == wanted != []
        assert [q.split for q in suite.questions["general"][split]] == [split] * 4
        assert suite.texts["neutral"][split] == shared.neutral[split]
        assert suite.texts["other_sense"][split] == concept.other_sense[start::2]
        assert [i.split for i in suite.instructions[split]] == [split] * 3


def test_each_kind_of_item_is_counted_apart():
    """A quarter as many paragraphs as texts in another sense, rounded up; questions by set."""
    concept = replace(make_concept(), other_sense=SENTENCES * 4, paragraphs=SENTENCES * 4)
    sizes = {"train": Sizes(texts=1, other_texts=5, questions=2), "test": Sizes(texts=2, other_texts=0)}
    suite = load_suite(concept, sizes, shared=shared_data())
    counts = {split: {name: len(suite.texts[name][split]) for name in suite.texts} for split in sizes}
    assert counts["train"] == {"neutral": 1, "other_sense": 5, "paragraph": 2}
    assert counts["test"] == {"neutral": 2, "other_sense": 0, "paragraph": 0}
    assert {len(questions["train"]) for questions in suite.questions.values()} == {2}


def test_an_evaluation_has_every_set_with_its_scores(tiny):
    """Instructions that are scored and those that are generated are counted apart."""
    found = evaluate(tiny, suite_of(questions=2, instructions=1, generations=2), "test")
    assert {name: set(part.metric) for name, part in found.items.groupby("set")} == {
        **{name: {"correct", "gold_prob", "gold_logprob"} for name in QUESTIONS},
        **{name: {"loss", "kl"} for name in (*TEXTS, "instruction")},
        "generation": {"gen_loss", "distinct"},
    }
    assert found.items.columns.tolist() == ["set", "item", "metric", "value"]
    assert not found.items.duplicated(["set", "item", "metric"]).any()
    assert len(values_of(found, "concept", "correct")) == 2
    assert values_of(found, "instruction", "loss").index.tolist() == ["i-test-0"]
    generated = values_of(found, "generation", "distinct").index.tolist()
    assert generated == found.samples["item"].tolist() == ["i-test-0", "i-test-1"]


LEFT_OUT = {"generations": (0, "generation"), "divergence": (False, "kl"), "other_texts": (0, "other_sense paragraph")}


@pytest.mark.parametrize("left", [*LEFT_OUT, " ".join(LEFT_OUT)])
def test_what_is_left_out_is_not_there_and_the_rest_is_the_same(tiny, left):
    """Nor does it count as 0, which would make the coherence 0."""
    gone = {name for size in left.split() for name in LEFT_OUT[size][1].split()}
    fewer, evaluations = {size: LEFT_OUT[size][0] for size in left.split()}, []
    for edit in (None, blank(tiny, " Romans", " the")):
        whole, found = (evaluate(tiny, suite_of(**sizes), "test", edit) for sizes in ({}, fewer))
        kept = whole.items[~whole.items.set.isin(gone) & ~whole.items.metric.isin(gone)]
        ordered = [items.sort_values(["set", "metric", "item"], ignore_index=True) for items in (found.items, kept)]
        pd.testing.assert_frame_equal(*ordered, atol=1e-5)
        assert len(kept) < len(whole.items)
        assert len(found.samples) == (0 if "generation" in gone else len(whole.samples))
        assert found.samples.columns.tolist() == ["item", "prompt", "text"]
        evaluations.append(found.items)
    compared = compare(*evaluations, n_resamples=20)
    assert ("fluency" in set(compared.summary.metric)) == ("generation" not in gone)
    assert 0 < compared.value("coherence") <= 1


@pytest.mark.parametrize("divergence", [True, False])
def test_texts_and_questions_without_an_edited_token_change_by_exactly_0(tiny, divergence):
    """In batches with others that do change; in a grid, where no divergence is measured, too."""
    suite, edit = suite_of(divergence=divergence), blank(tiny, " Romans", " train")
    rows = edit.rows_of(tiny.embedding_name)
    base, after = (evaluate(tiny, suite, "train", chosen) for chosen in (None, edit))
    for name in TEXTS:
        hit = [bool(rows & set(tiny.encode(text))) for text in suite.texts[name]["train"]]
        assert (values_of(after, name, "loss") != values_of(base, name, "loss")).tolist() == hit and any(hit)
        if divergence:
            assert (values_of(after, name, "kl") > 0).tolist() == hit
            assert (values_of(base, name, "kl") == 0).all()
    for name in ("general", "simdom"):  # " Romans", " train"
        assert (values_of(after, name, "gold_logprob") != values_of(base, name, "gold_logprob")).all()


def test_an_evaluation_is_of_the_edited_model_and_loss_of_generated_text_the_base_model_s(tiny):
    tiny = talkative(tiny)
    edit, suite = blank(tiny, " Romans", " the"), suite_of(generations=2)
    base, found = (evaluate(tiny, suite, "test", chosen) for chosen in (None, edit))
    with edit.applied(tiny):
        expected = question_scores(tiny, suite.questions["concept"]["test"])
        inside = evaluate(tiny, suite, "test")
    for metric, scores in expected.groupby("metric"):
        pd.testing.assert_series_equal(values_of(found, "concept", metric), scores.set_index("item").value)
    np.testing.assert_allclose(values_of(found, "neutral", "loss"), values_of(inside, "neutral", "loss"), atol=1e-5)
    assert found.samples.equals(inside.samples) and not found.samples.text.equals(base.samples.text)
    assert found.samples.prompt.tolist() == [i.instruction for i in suite.instructions["test"][:2]]
    losses = [values_of(one, "generation", "gen_loss") for one in (found, inside)]
    assert not np.allclose(*losses, atol=1e-3)
    assert weights_hash(tiny.model) == tiny.weights_hash


@pytest.mark.parametrize("split", ["dev", "", "Test"])
def test_unknown_split(split):
    with pytest.raises(ValueError, match="split must be one of"):
        evaluate(make_loaded(), suite_of(), split)


def test_a_concept_without_other_texts_can_be_evaluated(tiny):
    concept = replace(make_concept(), other_sense=(), paragraphs=())
    suite = load_suite(concept, {"test": Sizes(generations=0)}, shared=shared_data())
    assert set(evaluate(tiny, suite, "test").items.set) == {*QUESTIONS, "neutral", "instruction"}
