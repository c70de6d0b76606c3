"""What an evaluation measures: sizes, suites, the sets it yields with and without generations and divergence."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.suites import blank, shared_data, suite_of, talkative, values_of
from helpers.tiny import SENTENCES, make_concept, make_loaded

from ember.evaluation.evaluate import Evaluation, evaluate, question_scores
from ember.evaluation.metrics import compare, harmonic_mean
from ember.evaluation.suite import Sizes, load_suite
from ember.models.loading import weights_hash

QUESTIONS = {"concept", "simdom", "general"}
TEXTS = {"neutral", "other_sense", "paragraph"}


def metrics_of(evaluation: Evaluation) -> dict[str, set[str]]:
    items = evaluation.items
    return {name: set(part.metric) for name, part in items.groupby("set")}


# Sizes


@pytest.mark.parametrize(
    ("size", "value", "said"),
    [
        *[
            (name, value, "greater than 0")
            for name in ("questions", "texts", "instructions", "new_tokens")
            for value in (0, -1)
        ],
        *[(name, -1, "greater than or equal to 0") for name in ("other_texts", "generations", "open_answers")],
        *[(name, 1, "a valid boolean") for name in ("letters", "judge", "divergence")],
        ("questions", True, "a valid integer"),
        ("texts", "many", "a valid integer"),
        ("other_texts", 4, "0 or at least 5"),
        ("text", 3, "not permitted"),
    ],
)
def test_sizes_that_make_no_sense_are_refused_in_one_line(size, value, said):
    with pytest.raises(ValueError, match=rf"^{size} .*{said}.*, got {value!r}$"):
        Sizes(**{size: value})


def test_what_may_be_left_out_may_be_0_and_no_size_means_all():
    left_out = dict.fromkeys(("other_texts", "generations", "open_answers"), 0)
    everything = dict.fromkeys(("questions", "texts", "other_texts", "instructions", "generations"), None)
    for sizes in (left_out, everything):
        assert {name: getattr(Sizes(**sizes), name) for name in sizes} == sizes


def test_sizes_are_values():
    """They stand in the keys of caches."""
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


# Suites


def test_a_suite_has_every_split_of_every_set():
    concept, shared = make_concept(), shared_data()
    unlimited = dict.fromkeys(("train", "test"), Sizes(texts=None, other_texts=None))
    suite = load_suite(concept, unlimited, shared=shared)
    for split, half in (("train", slice(0, None, 2)), ("test", slice(1, None, 2))):
        for name in ("concept", "simdom"):
            wanted = [q for q in concept.questions if (q.set, q.split) == (name, split)]
            assert list(suite.questions[name][split]) == wanted != []
        assert [q.split for q in suite.questions["general"][split]] == [split] * 4
        assert suite.texts["neutral"][split] == shared.neutral[split]
        assert suite.texts["other_sense"][split] == concept.other_sense[half]
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


# Evaluations


def test_an_evaluation_has_every_set_with_its_scores(tiny):
    found = evaluate(tiny, suite_of(questions=2, instructions=2, generations=3), "test")
    assert metrics_of(found) == {
        **{name: {"correct", "gold_prob", "gold_logprob"} for name in QUESTIONS},
        **{name: {"loss", "kl"} for name in (*TEXTS, "instruction")},
        "generation": {"gen_loss", "distinct"},
    }
    assert found.items.columns.tolist() == ["set", "item", "metric", "value"]
    assert not found.items.duplicated(["set", "item", "metric"]).any()
    assert len(values_of(found, "concept", "correct")) == len(values_of(found, "instruction", "loss")) == 2
    assert len(values_of(found, "generation", "distinct")) == len(found.samples) == 3


@pytest.mark.parametrize(
    ("sizes", "sets", "metrics"),
    [
        ({"generations": 0}, {"generation"}, set()),
        ({"divergence": False}, set(), {"kl"}),
        ({"other_texts": 0}, {"other_sense", "paragraph"}, set()),
        ({"generations": 0, "divergence": False, "other_texts": 0}, {"generation", "other_sense", "paragraph"}, {"kl"}),
    ],
)
def test_what_is_left_out_is_not_there_and_the_rest_is_the_same(tiny, sizes, sets, metrics):
    edit = blank(tiny, " Romans")
    for chosen in (None, edit):
        whole, found = (evaluate(tiny, suite_of(**given), "test", chosen) for given in ({}, sizes))
        kept = whole.items[~whole.items.set.isin(sets) & ~whole.items.metric.isin(metrics)]
        keys = ["set", "metric", "item"]
        pd.testing.assert_frame_equal(
            found.items.sort_values(keys, ignore_index=True), kept.sort_values(keys, ignore_index=True), atol=1e-5
        )
        assert len(kept) < len(whole.items)
        assert len(found.samples) == (0 if "generation" in sets else len(whole.samples))
        assert found.samples.columns.tolist() == ["item", "prompt", "text"]


def test_instructions_that_are_scored_and_generated_are_counted_apart(tiny):
    found = evaluate(tiny, suite_of(instructions=1, generations=2), "train")
    assert values_of(found, "instruction", "loss").index.tolist() == ["i-train-0"]
    assert values_of(found, "generation", "distinct").index.tolist() == ["i-train-0", "i-train-1"]


@pytest.mark.parametrize("divergence", [True, False])
def test_texts_and_questions_without_an_edited_token_change_by_exactly_0(tiny, divergence):
    """In batches with others that do change; in a grid, where no divergence is measured, too."""
    suite = suite_of(divergence=divergence)
    edit = blank(tiny, " Romans", " train")
    rows = set(edit.tensors[tiny.embedding_name].rows.tolist())
    base, after = (evaluate(tiny, suite, "train", chosen) for chosen in (None, edit))
    for name in TEXTS:
        hit = np.array([bool(rows & set(tiny.encode(text))) for text in suite.texts[name]["train"]])
        change = (values_of(after, name, "loss") - values_of(base, name, "loss")).to_numpy()
        np.testing.assert_array_equal(change != 0, hit)
        assert hit.any()
        if divergence:
            np.testing.assert_array_equal(values_of(after, name, "kl") > 0, hit)
            assert (values_of(base, name, "kl") == 0).all()
    general, simdom = (
        values_of(after, name, "gold_logprob") - values_of(base, name, "gold_logprob") for name in ("general", "simdom")
    )
    assert (general != 0).all() and (simdom != 0).all()  # " Romans", " train"


def test_an_evaluation_is_of_the_edited_model(tiny):
    edit, suite = blank(tiny, " Romans"), suite_of()
    found = evaluate(tiny, suite, "test", edit)
    with edit.applied(tiny):
        expected = question_scores(tiny, suite.questions["concept"]["test"])
        inside = evaluate(tiny, suite, "test")
    for metric in ("correct", "gold_prob", "gold_logprob"):
        wanted = expected[expected.metric == metric].set_index("item").value
        pd.testing.assert_series_equal(values_of(found, "concept", metric), wanted)
    assert found.samples.equals(inside.samples)
    np.testing.assert_allclose(values_of(found, "neutral", "loss"), values_of(inside, "neutral", "loss"), atol=1e-5)
    assert weights_hash(tiny.model) == tiny.weights_hash


def test_generated_text_is_the_edited_models_and_its_loss_the_base_models(tiny):
    tiny = talkative(tiny)
    edit = blank(tiny, " Romans", " the")
    suite = suite_of(generations=2)
    base, after = (evaluate(tiny, suite, "test", chosen) for chosen in (None, edit))
    assert not base.samples.text.equals(after.samples.text)
    asked = [i.instruction for i in suite.instructions["test"][:2]]
    assert after.samples.prompt.tolist() == asked
    losses = values_of(after, "generation", "gen_loss")
    with edit.applied(tiny):
        own = evaluate(tiny, suite, "test")
    assert own.samples.equals(after.samples)
    assert not np.allclose(losses, values_of(own, "generation", "gen_loss"), atol=1e-3)


@pytest.mark.parametrize("split", ["dev", "", "Test"])
def test_unknown_split(split):
    with pytest.raises(ValueError, match="split must be one of"):
        evaluate(make_loaded(), suite_of(), split)


# Coherence


def coherence_by_hand(base: Evaluation, after: Evaluation, *, fluency: bool) -> float:
    def mean(evaluation: Evaluation, set_: str, metric: str) -> float:
        return values_of(evaluation, set_, metric).mean()

    def ratio(set_: str, metric: str) -> float:
        return min(1.0, np.exp(mean(base, set_, metric) - mean(after, set_, metric)))

    terms = [ratio("instruction", "loss"), ratio("neutral", "loss")]
    if fluency:
        variety = min(1.0, mean(after, "generation", "distinct") / mean(base, "generation", "distinct"))
        terms.append(ratio("generation", "gen_loss") * variety)
    return float(harmonic_mean(*terms))


@pytest.mark.parametrize("divergence", [True, False])
@pytest.mark.parametrize("generations", [0, 2])
def test_coherence_is_that_of_the_parts_measured(tiny, divergence, generations):
    """With none of them measured as 0, which would make every score 0."""
    edit, suite = blank(tiny, " Romans", " the", " and"), suite_of(generations=generations, divergence=divergence)
    base, after = (evaluate(tiny, suite, "test", chosen) for chosen in (None, edit))
    found = compare(base.items, after.items, n_resamples=20)
    assert ("fluency" in set(found.summary.metric)) == bool(generations)
    assert found.value("coherence") == pytest.approx(coherence_by_hand(base, after, fluency=bool(generations)))
    assert found.value("coherence") > 0
    assert compare(base.items, base.items, n_resamples=20).value("coherence") == pytest.approx(1)


def test_a_concept_without_other_texts_can_be_evaluated(tiny):
    concept = replace(make_concept(), other_sense=(), paragraphs=())
    suite = load_suite(concept, {"test": Sizes(generations=0)}, shared=shared_data())
    assert set(evaluate(tiny, suite, "test").items.set) == {*QUESTIONS, "neutral", "instruction"}
