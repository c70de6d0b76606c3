"""What an evaluation measures: sizes, suites, the sets it yields with and without generations and divergence."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.suites import blank, shared_data, suite_of, talkative, values_of
from helpers.tiny import SENTENCES, make_concept, make_loaded

from ember.data.types import Concept, SharedData
from ember.evaluation.evaluate import Evaluation, Sizes, evaluate, load_suite, question_scores
from ember.evaluation.metrics import compare, harmonic_mean
from ember.models.loading import weights_hash

QUESTIONS = {"concept", "simdom", "general"}
TEXTS = {"neutral", "other_sense", "paragraph"}


@pytest.fixture(autouse=True)
def shared(monkeypatch) -> SharedData:
    """Small shared data in place of ours."""
    data = shared_data()
    monkeypatch.setattr("ember.evaluation.evaluate.load_shared", lambda source="ours": data)
    return data


def metrics_of(evaluation: Evaluation) -> dict[str, set[str]]:
    items = evaluation.items
    return {name: set(part.metric) for name, part in items.groupby("set")}


# Sizes


@pytest.mark.parametrize("name", ["questions", "texts", "instructions", "new_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_that_would_measure_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        Sizes(**{name: value})


@pytest.mark.parametrize("name", ["other_texts", "generations"])
def test_what_may_be_left_out_may_be_0(name):
    assert getattr(Sizes(**{name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        Sizes(**{name: -1})


@pytest.mark.parametrize("name", ["questions", "texts", "other_texts", "instructions", "generations"])
def test_no_size_means_all(name):
    assert getattr(Sizes(**{name: None}), name) is None


# Suites


def test_a_suite_has_every_split_of_every_set(shared):
    concept = make_concept()
    suite = load_suite(concept, {split: Sizes(texts=None, other_texts=None) for split in ("train", "test")})
    for split, half in (("train", slice(0, None, 2)), ("test", slice(1, None, 2))):
        for name in ("concept", "simdom"):
            wanted = [q for q in concept.questions if (q.set, q.split) == (name, split)]
            assert list(suite.questions[name][split]) == wanted != []
        assert [q.split for q in suite.questions["general"][split]] == [split] * 4
        assert suite.texts["neutral"][split] == shared.neutral[split]
        assert suite.texts["other_sense"][split] == concept.other_sense[half]
        assert [i.split for i in suite.instructions[split]] == [split] * 3


def test_texts_and_other_texts_are_counted_apart():
    """A quarter as many paragraphs as texts in another sense, rounded up."""
    concept = replace(make_concept(), other_sense=SENTENCES * 4, paragraphs=SENTENCES * 4)
    sizes = {"train": Sizes(texts=1, other_texts=5), "test": Sizes(texts=2, other_texts=0)}
    texts = load_suite(concept, sizes).texts
    assert {name: len(texts[name]["train"]) for name in texts} == {"neutral": 1, "other_sense": 5, "paragraph": 2}
    assert {name: len(texts[name]["test"]) for name in texts} == {"neutral": 2, "other_sense": 0, "paragraph": 0}


def test_questions_are_limited_by_set():
    suite = suite_of(questions=2)
    assert {len(split) for questions in suite.questions.values() for split in questions.values()} == {2}


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


def test_without_generations_there_are_no_samples_but_their_columns(tiny):
    found = evaluate(tiny, suite_of(generations=0), "test")
    assert found.samples.empty and found.samples.columns.tolist() == ["item", "prompt", "text"]


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


def coherence_by_hand(base: Evaluation, after: Evaluation, *parts: str) -> float:
    def ratio(set_: str, metric: str) -> float:
        return min(1.0, np.exp(values_of(base, set_, metric).mean() - values_of(after, set_, metric).mean()))

    terms = {
        "instruction": ratio("instruction", "loss"),
        "neutral": ratio("neutral", "loss"),
        "fluency": ratio("generation", "gen_loss")
        * min(1.0, values_of(after, "generation", "distinct").mean() / values_of(base, "generation", "distinct").mean())
        if "fluency" in parts
        else 0.0,
    }
    return float(harmonic_mean(*(terms[part] for part in parts)))


@pytest.mark.filterwarnings("ignore:The BCa", "ignore:All-NaN slice")
@pytest.mark.parametrize("divergence", [True, False])
@pytest.mark.parametrize(
    ("generations", "parts"), [(0, ("instruction", "neutral")), (2, ("instruction", "neutral", "fluency"))]
)
def test_coherence_is_that_of_the_parts_measured(tiny, divergence, generations, parts):
    """With none of them measured as 0, which would make every score 0."""
    edit, suite = blank(tiny, " Romans", " the", " and"), suite_of(generations=generations, divergence=divergence)
    base, after = (evaluate(tiny, suite, "test", chosen) for chosen in (None, edit))
    found = compare(base.items, after.items, n_resamples=20)
    assert ("fluency" in set(found.summary.metric)) == ("fluency" in parts)
    assert found.value("coherence") == pytest.approx(coherence_by_hand(base, after, *parts))
    assert found.value("coherence") > 0
    same = compare(base.items, base.items, n_resamples=20)
    assert same.value("coherence") == pytest.approx(1)


def test_a_concept_without_other_texts_can_be_evaluated(tiny):
    concept: Concept = replace(make_concept(), other_sense=(), paragraphs=())
    found = evaluate(tiny, load_suite(concept, {"test": Sizes(generations=0)}), "test")
    assert set(found.items.set) == {*QUESTIONS, "neutral", "instruction"}
