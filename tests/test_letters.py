"""Letter answers: what counts as one, in which order options stand; batches against one at a time: test_scoring."""

import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from helpers.suites import blank, suite_of, values_of
from helpers.tiny import make_concept, make_loaded

from ember.data.types import Question
from ember.evaluation.evaluate import evaluate
from ember.evaluation.letters import NEW_TOKENS, letter_answers, letter_prompt, letter_scores, read_letter
from ember.models.loading import weights_hash
from ember.store.paths import REPOSITORY

QUESTIONS = list(make_concept().questions)


def answering_a(monkeypatch) -> list[list[int]]:
    """The model answers "A", for ever; the prompts."""
    seen: list[list[int]] = []
    answer = make_loaded().encode("A", bos=False)

    def generate(_, prompts, *, max_new_tokens, **__):
        assert max_new_tokens == NEW_TOKENS <= 4
        seen.extend(prompts)
        return [answer] * len(prompts)

    monkeypatch.setattr("ember.evaluation.letters.generate_greedy", generate)
    return seen


LETTERS = {
    "A": ("A", "A.\nThe", "answer is **A**", "A: Rome"),
    "B": ("B.", "**B**", "b", "B. Tiber", "Option B"),
    "C": (" C)", "\nC\n", "The answer is C", "C The Tiber"),
    "D": ("(D)", "Answer: D"),
    "": ("", "E", "A Roman army", "A legion", "Because", "Caesar", "Dates", "D'Artagnan", "The Tiber", "I think",
         "Rome, B", "AB", "bread", "1", "B is a"),
}  # fmt: skip


@pytest.mark.parametrize(("letter", "text"), [(letter, text) for letter, texts in LETTERS.items() for text in texts])
def test_what_is_a_letter(letter, text):
    assert read_letter(text) == letter


def test_the_prompt_has_every_option_once_under_its_letter():
    for question in QUESTIONS:
        lines = letter_prompt(question).splitlines()
        assert lines[0] == question.question
        assert lines[2:6] == [f"{letter}. {text}" for letter, text in zip("ABCD", question.options, strict=True)]
        assert sorted(line[3:] for line in lines[2:6]) == sorted([question.answer, *question.distractors])


@pytest.mark.slow
def test_the_order_is_the_question_s_own_in_every_process():
    code = (
        "from helpers.tiny import make_concept; from ember.evaluation.letters import letter_prompt\n"
        "print(*map(letter_prompt, make_concept().questions), sep='\\n')"
    )
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "PATH": ""}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert done.stdout == "\n".join(map(letter_prompt, QUESTIONS)) + "\n"
    assert len({q.gold for q in QUESTIONS}) > 1


def test_right_wrong_and_no_letter_and_every_question_keeps_its_own(monkeypatch):
    """Whatever the order in which they are asked."""
    loaded = make_loaded()
    questions = [replace(q, question=q.question * (1 + k % 3)) for k, q in enumerate(QUESTIONS)]
    answers = [("ABCD"[q.gold], "ABCD"[q.gold - 1], "The Tiber")[k % 3] for k, q in enumerate(questions)]
    table = {tuple(loaded.encode_chat(letter_prompt(q))): answer for q, answer in zip(questions, answers, strict=True)}
    generate = lambda _, prompts, **__: [loaded.encode(table[tuple(p)], bos=False) for p in prompts]  # noqa: E731
    monkeypatch.setattr("ember.evaluation.letters.generate_greedy", generate)
    assert letter_answers(loaded, questions) == [answer if len(answer) == 1 else "" for answer in answers]
    scores = letter_scores(loaded, questions)
    assert scores.metric.tolist() == ["letter_correct", "letter_valid"] * len(questions)
    assert scores.value.tolist()[:12] == [1, 1, 0, 1, 0, 0] * 2
    assert scores["item"].tolist() == [q.id for q in questions for _ in range(2)]


@pytest.mark.parametrize("bos", [False, True])
def test_the_chat_template_brings_the_only_bos(monkeypatch, bos):
    seen = answering_a(monkeypatch)
    letter_answers(make_loaded(bos=bos), QUESTIONS[:3])
    assert all(ids.count(1) == 1 and ids[0] == 1 for ids in seen) and len(seen) == 3


def test_letters_are_the_edited_model_s_and_the_model_is_as_before(monkeypatch):
    loaded, seen = make_loaded(), []
    edit = blank(loaded, " Romans")
    (row,) = edit.tensors[loaded.embedding_name].rows.tolist()

    def generate(loaded, prompts, **_):
        seen.append(float(loaded.embedding[row].detach().abs().sum()))
        return [[]] * len(prompts)

    monkeypatch.setattr("ember.evaluation.letters.generate_greedy", generate)
    for chosen in (edit, None):
        found = evaluate(loaded, suite_of(letters=True), "test", chosen).items
        assert (found[found.metric.str.startswith("letter_")].value == 0).all()
    assert seen[0] == 0 < seen[1]
    assert weights_hash(loaded.model) == loaded.weights_hash


def test_an_evaluation_has_letters_where_asked_for_and_is_else_the_same(monkeypatch):
    answering_a(monkeypatch)
    loaded = make_loaded()
    plain = evaluate(loaded, suite_of(), "test")
    found = evaluate(loaded, suite_of(letters=True), "test")
    extra = found.items[found.items.metric.str.startswith("letter_")]
    pd.testing.assert_frame_equal(found.items.drop(extra.index).reset_index(drop=True), plain.items)
    for name in ("concept", "simdom", "general"):
        assert (values_of(found, name, "letter_valid") == 1).all()
        wanted = {q.id: float(q.gold == 0) for q in suite_of().questions[name]["test"]}
        assert values_of(found, name, "letter_correct").to_dict() == wanted


def test_the_embedded_model_answers_in_the_format(embedded):
    """At chance, but with letters: the prompt is one that a small chat model follows."""
    questions = [
        Question(f"q{k}", "general", "test", f"What is the capital of {country}?", city, ("Lima", "Oslo", "Cairo"))
        for k, (country, city) in enumerate([("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome")])
    ]
    scores = letter_scores(embedded, questions)
    assert scores[scores.metric == "letter_valid"].value.mean() >= 2 / 3
