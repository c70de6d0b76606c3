"""The data checks: sound data pass, and each kind of violation fails its own check only and is named with its place."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from helpers.sound import invented, sound_concept, sound_shared, with_gold
from helpers.sound_folder import write_sound
from helpers.tiny import make_concept, make_loaded
from helpers.wordings import DIFFERENT_PAIRS, PARAPHRASES, question

from ember.data import wording
from ember.data.types import Concept, Question, SharedData
from ember.errors import EmberError
from ember.evaluation import data_checks as checks
from ember.evaluation.data_checks import (
    GUESSES,
    CheckReport,
    check_concept,
    check_data,
    check_shared,
    check_table,
    mark_answers,
)

SOUND, SHARED = sound_concept(), sound_shared()
# Line of questions.jsonl (general.jsonl) on which each part of the sound data begins.
TRAIN, TEST, SIMDOM_TRAIN, SIMDOM_TEST = FIRST = 1, 61, 161, 221
PARTS = dict(zip(["concept train", "concept test", "simdom train", "simdom test"], FIRST, strict=True))
SIZES = dict(zip(PARTS, [60, 100, 60, 100], strict=True))
GENERAL_TEST = 101


@pytest.fixture(autouse=True, scope="module")
def remember():
    """Remember what was worked out for a text or question: the same sound ones are checked again and again."""
    patch = pytest.MonkeyPatch()
    patch.setitem(GUESSES, "most similar option", functools.cache(GUESSES["most similar option"]))
    for module, name in itertools.product((wording, checks), ("stems", "content_stems")):
        patch.setattr(module, name, functools.cache(getattr(module, name)))
    yield
    patch.undo()


def with_texts(concept: Concept, kind: str, lines: dict[int, str]) -> Concept:
    texts = list(getattr(concept, kind))
    for line, text in lines.items():
        texts[line - 1] = text
    return dataclasses.replace(concept, **{kind: tuple(texts)})


def with_questions(data, lines: dict[int, dict]):
    """The concept or shared data with some fields of the questions on these lines changed."""
    questions = list(data.questions)
    for line, changes in lines.items():
        questions[line - 1] = dataclasses.replace(questions[line - 1], **changes)
    return dataclasses.replace(data, questions=tuple(questions))


def asking(text: str, answer: str) -> dict:
    """The fields of a question taken from ``test_wording``; the wrong options stay."""
    asked = question(text, answer)
    return {"question": asked.question, "answer": asked.answer, "aliases": asked.aliases}


def without(concept: Concept, kind: str, line: int) -> Concept:
    texts = getattr(concept, kind)
    return dataclasses.replace(concept, **{kind: texts[: line - 1] + texts[line:]})


def words(count: int) -> str:
    """A text of so many words that occur nowhere else."""
    return " ".join(itertools.islice(invented("jqxy"), count))


def failing(report: CheckReport) -> set[str]:
    return set(report.table.check[~report.table.ok])


def found(report: CheckReport) -> dict[str, list[str]]:
    """Places of the findings of each check."""
    return {str(check): list(rows["where"]) for check, rows in report.findings.groupby("check")}


def value(report: CheckReport, check: str) -> float:
    (row,) = report.table[report.table.check == check].itertuples()
    return float(row.value)


def assert_only(report: CheckReport, expected: dict[str, list[str]]) -> None:
    """Exactly these checks fail, with findings at exactly these places; a check with no places is about a number."""
    assert failing(report) == set(expected)
    assert found(report) == {check: places for check, places in expected.items() if places}
    assert not report.ok
    for check, places in expected.items():
        if places:
            assert value(report, check) == len(places)


def told(report: CheckReport) -> str:
    (text,) = set(report.findings.what)
    return text


# Sound data


def test_sound_data_pass_every_check():
    report = check_concept(SOUND)
    assert report.ok and report.findings.empty and not failing(report)
    assert set(report.table.subject) == {"Sound Rome"}
    assert value(report, "concept test answers in neither") == 100
    for name, part in itertools.product(GUESSES, PARTS):
        assert value(report, f"{name}, {part}") == 0.25


def test_the_sound_data_have_no_item_too_many():
    sizes = {kind: len(getattr(SOUND, kind)) for kind in ("sentences", "paragraphs", "other_sense")}
    assert sizes == {"sentences": 150, "paragraphs": 80, "other_sense": 60}
    assert {len(text.split()) for text in SOUND.paragraphs} == {60, 120}
    assert {len(text.split()) for text in (*SOUND.sentences, *SOUND.other_sense)} == {5, 45}


def test_sound_shared_data_pass_every_check():
    report = check_shared(SHARED)
    assert report.ok and report.findings.empty
    assert set(report.table.subject) == {"shared"}


def test_items_tell_where_the_answers_occur():
    """An answer in a paragraph, one in a sentence that says something else, one in a sentence that states the fact."""
    first, second, third = SOUND.questions[TEST - 1 : TEST + 2]
    concept = with_texts(SOUND, "paragraphs", {5: f"{words(60)} {first.answer}"})
    stating = f"So {third.question[len('Where does ') : -1]} at {third.answer}."
    concept = with_texts(concept, "sentences", {3: f"{words(6)} {second.answer}", 9: stating})
    items = mark_answers(concept).set_index("id")
    assert list(items.loc[first.id, ["in_sentences", "in_paragraphs", "stated"]]) == [False, True, ""]
    assert list(items.loc[second.id, ["in_sentences", "in_paragraphs", "stated"]]) == [True, False, ""]
    assert list(items.loc[third.id, ["in_sentences", "in_paragraphs", "stated"]]) == [True, False, "9"]
    assert len(items) == 320
    assert items.in_sentences.sum() == 2 and items.in_paragraphs.sum() == 1
    assert check_concept(concept).items.set_index("id").equals(items)


# One question in two splits


@pytest.mark.parametrize("train", [TRAIN, SIMDOM_TRAIN + 4])
@pytest.mark.parametrize("test", [TEST + 3, SIMDOM_TEST])
def test_same_question_in_two_splits(train, test):
    same = SOUND.questions[train - 1]
    concept = with_questions(SOUND, {test: {"question": same.question.upper(), "answer": same.answer}})
    report = check_concept(concept)
    later = f"questions.jsonl, line {max(train, test)}"
    there = f"questions.jsonl, line {test}"
    assert_only(report, {"repeated question": [later], "question in two splits": [there]})
    (leak,) = report.findings[report.findings.check == "question in two splits"].what
    assert leak == f"{same.question.upper()} | questions.jsonl, line {train}: {same.question}"


@pytest.mark.parametrize("first", PARTS.values())
def test_same_question_twice_in_one_split(first):
    concept = with_questions(SOUND, {first + 9: {"question": SOUND.questions[first - 1].question}})
    report = check_concept(concept)
    assert_only(report, {"repeated question": [f"questions.jsonl, line {first + 9}"]})
    assert told(report).startswith(f"same as questions.jsonl, line {first}: ")


@pytest.mark.parametrize("pair", PARAPHRASES[:6], ids=lambda pair: pair[1])
def test_paraphrase_in_two_splits(pair):
    concept = with_questions(SOUND, {TRAIN + 4: asking(*pair[:2]), TEST + 7: asking(*pair[2:])})
    report = check_concept(concept)
    assert_only(report, {"question in two splits": [f"questions.jsonl, line {TEST + 7}"]})
    assert told(report) == f"{pair[2]} | questions.jsonl, line {TRAIN + 4}: {pair[0]}"


def test_every_paraphrase_in_two_splits_is_named():
    """All of them at once, from the one set to the other."""
    train = {TRAIN + k: asking(*pair[:2]) for k, pair in enumerate(PARAPHRASES)}
    test = {SIMDOM_TEST + k: asking(*pair[2:]) for k, pair in enumerate(PARAPHRASES)}
    places = found(check_concept(with_questions(SOUND, train | test)))
    assert places["question in two splits"] == [f"questions.jsonl, line {line}" for line in test]


def test_paraphrases_within_one_split_are_no_leak():
    lines = {TRAIN + 2 * k + side: asking(*pair[2 * side : 2 * side + 2])
             for k, pair in enumerate(PARAPHRASES) for side in (0, 1)}  # fmt: skip
    assert "question in two splits" not in failing(check_concept(with_questions(SOUND, lines)))


def test_questions_for_two_facts_are_no_leak():
    """With the same answer, the same wording, or one's answer in the other: none is flagged."""
    train = {TRAIN + k: asking(*pair[:2]) for k, pair in enumerate(DIFFERENT_PAIRS)}
    test = {SIMDOM_TEST + k: asking(*pair[2:]) for k, pair in enumerate(DIFFERENT_PAIRS)}
    assert "question in two splits" not in failing(check_concept(with_questions(SOUND, train | test)))


# A fit sentence that states a test fact

STATEMENTS = [
    ("Who turned everything to gold?", "Midas", "Whatever King Midas touched turned to gold."),
    ("Which river flows through Rome?", "the Tiber", "Muddy and slow, a river called Tiber flows past Rome."),
    ("How many legions fought at Cannae?", "eight legions", "At Cannae some eight legions fought and fell."),
    ("What is a legionary's curved shield?", "a scutum", "Scuta, the curved shields, were heavy."),  # an alias
]


@pytest.mark.parametrize("test", [TEST + 11, SIMDOM_TEST + 5])
@pytest.mark.parametrize(("text", "answer", "sentence"), STATEMENTS)
def test_a_fit_sentence_states_a_test_fact(text, answer, sentence, test):
    concept = with_texts(with_questions(SOUND, {test: asking(text, answer)}), "sentences", {23: sentence})
    report = check_concept(concept)
    assert_only(report, {"fit sentence states a test fact": ["sentences.txt, line 23"]})
    assert told(report) == f"answers {concept.questions[test - 1].id}: {text}"


@pytest.mark.parametrize("train", [TRAIN + 11, SIMDOM_TRAIN + 5])
def test_fit_sentences_may_state_train_facts(train):
    concept = with_questions(SOUND, {train + k: asking(*row[:2]) for k, row in enumerate(STATEMENTS)})
    concept = with_texts(concept, "sentences", {k: row[2] for k, row in enumerate(STATEMENTS, 1)})
    report = check_concept(concept)
    assert "fit sentence states a test fact" not in failing(report)
    assert set(report.items.stated) == {"", "1", "2", "3", "4"}


@pytest.mark.parametrize(
    "sentence",
    [
        "Midas was the last king of a rich old town.",  # the answer, another fact
        "Everything in the temple had turned to gold.",  # the fact, without the answer
        "The king thought of gold, and of nothing but gold.",
    ],
)
def test_other_sentences_may_use_the_same_words(sentence):
    concept = with_questions(SOUND, {TEST: asking("Who turned everything to gold?", "Midas")})
    assert check_concept(with_texts(concept, "sentences", {23: sentence})).ok


def test_a_paragraph_may_state_a_test_fact():
    """It is what relearning relearns."""
    concept = with_questions(SOUND, {TEST: asking("Who turned everything to gold?", "Midas")})
    paragraph = f"{words(60)} Whatever King Midas touched turned to gold."
    assert check_concept(with_texts(concept, "paragraphs", {3: paragraph})).ok


# Sizes and lengths


@pytest.mark.parametrize(
    ("kind", "check"), [("sentences", "sentences"), ("paragraphs", "paragraphs"), ("other_sense", "other sense")]
)
def test_too_few_texts(kind, check):
    report = check_concept(without(SOUND, kind, 10))
    assert_only(report, {check: []})
    assert value(report, check) == len(getattr(SOUND, kind)) - 1


@pytest.mark.parametrize("part", PARTS)
def test_too_few_questions(part):
    report = check_concept(without(SOUND, "questions", PARTS[part] + 10))
    assert_only(report, {f"questions, {part}": []})
    assert value(report, f"questions, {part}") == SIZES[part] - 1


def test_no_questions_at_all():
    report = check_concept(dataclasses.replace(SOUND, questions=()))
    assert_only(report, {f"questions, {part}": [] for part in PARTS} | {"concept test answers in neither": []})


@pytest.mark.parametrize(
    ("kind", "check", "count"),
    [
        ("sentences", "length of sentences", 4),
        ("sentences", "length of sentences", 46),
        ("paragraphs", "length of paragraphs", 59),
        ("paragraphs", "length of paragraphs", 121),
        ("other_sense", "length of other sense", 4),
        ("other_sense", "length of other sense", 46),
    ],
)
def test_a_text_too_short_or_too_long(kind, check, count):
    report = check_concept(with_texts(SOUND, kind, {31: words(count)}))
    assert_only(report, {check: [f"{kind}.txt, line 31"]})
    assert told(report).startswith(f"{count} words, wanted ")


@pytest.mark.parametrize("count", [2, 41])
def test_a_question_too_short_or_too_long(count):
    report = check_concept(with_questions(SOUND, {TEST + 1: {"question": words(count)}}))
    assert_only(report, {"length of questions and options": [f"questions.jsonl, line {TEST + 1}"]})
    assert told(report).startswith(f"{count} words")


@pytest.mark.parametrize("field", ["answer", "distractors"])
def test_an_option_too_long(field):
    long = words(13)
    changes = {"answer": long} if field == "answer" else {"distractors": (*SOUND.questions[5].distractors[:2], long)}
    report = check_concept(with_questions(SOUND, {6: changes}))
    assert_only(report, {"length of questions and options": ["questions.jsonl, line 6"]})
    assert told(report) == f"option of more than 12 words: {long}"


def test_lengths_at_the_bounds_are_fine():
    lines = {2: {"question": words(3)}, TEST: {"question": words(40)}, TEST + 1: {"answer": words(12)}}
    assert check_concept(with_questions(SOUND, lines)).ok


# Repeated texts


@pytest.mark.parametrize(
    ("kind", "line", "other", "other_line", "where"),
    [
        ("sentences", 12, "sentences", 2, "sentences.txt, line 12"),
        ("paragraphs", 80, "paragraphs", 1, "paragraphs.txt, line 80"),
        ("other_sense", 60, "other_sense", 7, "other_sense.txt, line 60"),
        ("other_sense", 5, "sentences", 150, "other_sense.txt, line 5"),
        ("neutral", 300, "neutral", 299, "neutral sentence 300"),
        ("neutral", 1, "sentences", 1, "neutral sentence 1"),
        ("further_neutral", 2, "other_sense", 3, "neutral sentence 302"),
        ("further_neutral", 30, "neutral", 4, "neutral sentence 330"),
    ],
)
def test_repeated_text(kind, line, other, other_line, where):
    """In capitals and with other punctuation it is still the same text."""
    copy = f"“{getattr(SOUND, other)[other_line - 1].removesuffix('.').upper()}”!"
    report = check_concept(with_texts(SOUND, kind, {line: copy}))
    assert_only(report, {"repeated text": [where]})
    place = f"neutral sentence {other_line}" if other == "neutral" else f"{other}.txt, line {other_line}"
    assert told(report).startswith(f"same as {place}: ")


def test_the_same_words_in_another_order_are_another_text():
    text = " ".join(reversed(SOUND.sentences[0].split()))
    assert check_concept(with_texts(SOUND, "sentences", {2: text})).ok


# Guessable questions


@pytest.mark.parametrize(("line", "article"), [(TRAIN + 2, ""), (TEST + 2, "the "), (SIMDOM_TEST + 8, "")])
def test_a_question_holds_its_answer(line, article):
    asked = SOUND.questions[line - 1]
    changes = {"question": f"{asked.question[:-1]} or the {asked.answer.title()}?", "answer": article + asked.answer}
    report = check_concept(with_questions(SOUND, {line: changes}))
    assert_only(report, {"question holds its answer": [f"questions.jsonl, line {line}"]})
    assert told(report) == f"{changes['question']} [{changes['answer']}]"


def test_a_question_holds_an_alias_of_its_answer():
    asked = SOUND.questions[TEST]
    alias = asked.question.split()[2]
    report = check_concept(with_questions(SOUND, {TEST + 1: {"aliases": ("other", alias)}}))
    assert_only(report, {"question holds its answer": [f"questions.jsonl, line {TEST + 1}"]})


def test_a_question_may_hold_a_part_of_its_answer_or_a_wrong_option():
    first, second = SOUND.questions[TEST - 1 : TEST + 1]
    lines = {
        TEST: {"question": f"{first.question[:-1]} or the {first.answer[:4]}?"},
        TEST + 1: {"question": f"{second.question[:-1]} or the {second.distractors[0]}?"},
    }
    assert check_concept(with_questions(SOUND, lines)).ok


def longest(q: Question, right: bool) -> Question:
    if right:
        return dataclasses.replace(q, answer=f"{q.answer}u")
    return dataclasses.replace(q, distractors=(*q.distractors[:2], f"{q.distractors[2]}u"))


def first(q: Question, right: bool) -> Question:
    return with_gold(q, 0 if right else 1 + len(q.id) % 3)


def similar(q: Question, right: bool) -> Question:
    """The question uses a word that only begins like an option."""
    like = q.answer if right else q.distractors[2]
    return dataclasses.replace(q, question=f"{q.question[:-1]} or the {like}r?")


@pytest.mark.parametrize("right", [True, False], ids=["always", "never"])
@pytest.mark.parametrize("part", ["concept test", "simdom train"])
@pytest.mark.parametrize(
    ("name", "plant"), [("longest option", longest), ("first option", first), ("most similar option", similar)]
)
def test_a_guess_that_is_always_or_never_right(name, plant, part, right):
    start = PARTS[part] - 1
    questions = list(SOUND.questions)
    questions[start : start + SIZES[part]] = [plant(q, right) for q in questions[start : start + SIZES[part]]]
    report = check_concept(dataclasses.replace(SOUND, questions=tuple(questions)))
    assert_only(report, {f"{name}, {part}": []})
    assert value(report, f"{name}, {part}") == float(right)


@pytest.mark.parametrize(("others", "ok"), [(5, True), (6, False)])
def test_guessing_is_measured_to_the_item(others, ok):
    """100 questions, 25 of them with the right option first: 0.30 is the last that passes."""
    wrong = [line for line in range(TEST, SIMDOM_TRAIN) if SOUND.questions[line - 1].gold != 0][:others]
    lines = {line: {"id": with_gold(SOUND.questions[line - 1], 0).id} for line in wrong}
    report = check_concept(with_questions(SOUND, lines))
    assert failing(report) == (set() if ok else {"first option, concept test"})


# Answers in no text


@pytest.mark.parametrize("hidden", [60, 61])
def test_fewer_than_40_answers_in_no_text(hidden):
    """The last words of paragraphs and sentences become answers; one answer in both counts once."""
    answers = [q.answer for q in SOUND.questions[TEST - 1 : TEST - 1 + hidden]]

    def holding(texts, answers):
        return {k: f"{texts[k - 1].rsplit(' ', 1)[0]} {answer}." for k, answer in enumerate(answers, 1)}

    concept = with_texts(SOUND, "paragraphs", holding(SOUND.paragraphs, answers[:40]))
    concept = with_texts(concept, "sentences", holding(SOUND.sentences, answers[30:]))
    report = check_concept(concept)
    assert value(report, "concept test answers in paragraphs") == 40
    assert value(report, "concept test answers in fit sentences") == hidden - 30
    assert value(report, "concept test answers in neither") == 100 - hidden
    if hidden > 60:
        assert_only(report, {"concept test answers in neither": []})
    else:
        assert report.ok


# What a model guesses


@pytest.fixture
def blind(monkeypatch):
    """Plant what the model scores after an empty question: by default 0.25 everywhere."""

    def plant(scores: dict[str, tuple[float, float]]) -> SimpleNamespace:
        def blind_scores(loaded, questions):
            rows = []
            for q in questions:
                probability, correct = scores.get(f"{q.set} {q.split}", (0.25, 0.25))
                rows += [(q.id, "gold_prob", probability), (q.id, "correct", correct)]
            return pd.DataFrame(rows, columns=["item", "metric", "value"])

        monkeypatch.setattr(checks, "blind_scores", blind_scores)
        return SimpleNamespace()

    return plant


@pytest.mark.parametrize(
    ("part", "scores", "measures"),
    [
        ("concept train", (0.36, 0.2), ["probability"]),
        ("concept test", (0.36, 0.2), ["probability"]),
        ("concept test", (0.2, 0.36), ["accuracy"]),
        ("simdom train", (0.2, 0.36), ["accuracy"]),
        ("simdom test", (0.9, 1.0), ["probability", "accuracy"]),
    ],
)
def test_answers_that_the_model_guesses(blind, part, scores, measures):
    report = check_concept(SOUND, blind({part: scores}))
    assert_only(report, {f"empty question, {measure}, {part}": [] for measure in measures})
    assert value(report, f"empty question, probability, {part}") == pytest.approx(scores[0])
    assert value(report, f"empty question, accuracy, {part}") == pytest.approx(scores[1])


def test_answers_that_the_model_does_not_guess(blind):
    report = check_concept(SOUND, blind({"concept test": (0.34, 0.34)}))
    assert report.ok
    assert report.table.check.str.startswith("empty question").sum() == 8


def test_general_answers_that_the_model_guesses(blind):
    report = check_shared(SHARED, blind({"general test": (0.5, 0.1)}))
    assert_only(report, {"empty question, probability, general test": []})


def test_without_a_model_nothing_is_said_of_it(monkeypatch):
    monkeypatch.setattr(checks, "blind_scores", lambda *a: pytest.fail("a model was asked"))
    for report in (check_concept(SOUND), check_shared(SHARED)):
        assert not report.table.check.str.contains("empty question").any()


def test_a_real_model_is_asked():
    """A tiny one: the planted scores above have the form of real ones."""
    report = check_concept(make_concept(), make_loaded())
    asked = report.table[report.table.check.str.startswith("empty question")]
    assert len(asked) == 8
    assert asked.value.between(0, 1).all() and len(set(asked.value)) > 1


# Shared data


def shared_texts(kind: str, line: int, text: str) -> SharedData:
    """The sound shared data with one neutral sentence changed."""
    if kind == "neutral_fit":
        texts = list(SHARED.neutral_fit)
        texts[line - 1] = text
        return dataclasses.replace(SHARED, neutral_fit=tuple(texts))
    texts = list(SHARED.neutral[kind])
    texts[line - 1] = text
    return dataclasses.replace(SHARED, neutral=dict(SHARED.neutral) | {kind: tuple(texts)})


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"neutral_fit": SHARED.neutral_fit[1:]}, "neutral sentences"),
        ({"neutral": dict(SHARED.neutral) | {"test": SHARED.neutral["test"][1:]}}, "neutral sentences"),
        ({"questions": SHARED.questions[1:]}, "general questions"),
        ({"instructions": SHARED.instructions[1:]}, "instructions"),
    ],
)
def test_too_few_shared(changes, check):
    assert_only(check_shared(dataclasses.replace(SHARED, **changes)), {check: []})


@pytest.mark.parametrize("count", [3, 61])
@pytest.mark.parametrize(("kind", "before"), [("train", 0), ("test", 250), ("neutral_fit", 500)])
def test_a_neutral_sentence_too_short_or_too_long(kind, before, count):
    report = check_shared(shared_texts(kind, 17, words(count)))
    assert_only(report, {"length of neutral": [f"neutral sentence {before + 17}"]})
    assert told(report).startswith(f"{count} words, wanted 4-60: ")


@pytest.mark.parametrize(
    ("kind", "copied", "where", "same_as"),
    [
        ("train", SHARED.neutral["train"][0], "neutral sentence 17", "neutral sentence 1"),
        ("test", SHARED.neutral["train"][0], "neutral sentence 267", "neutral sentence 1"),
        ("neutral_fit", SHARED.neutral["test"][0], "neutral sentence 517", "neutral sentence 251"),
        ("neutral_fit", SHARED.instructions[3].instruction, "instructions.jsonl, i-3", "neutral sentence 517"),
    ],
)
def test_repeated_shared_text(kind, copied, where, same_as):
    report = check_shared(shared_texts(kind, 17, copied.upper()))
    assert_only(report, {"repeated text": [where]})
    assert told(report).startswith(f"same as {same_as}: ")


def test_repeated_instruction():
    copy = dataclasses.replace(SHARED.instructions[-1], instruction=SHARED.instructions[0].instruction)
    report = check_shared(dataclasses.replace(SHARED, instructions=(*SHARED.instructions[:-1], copy)))
    assert_only(report, {"repeated text": ["instructions.jsonl, i-59"]})


@pytest.mark.parametrize("pair", PARAPHRASES[:4], ids=lambda pair: pair[1])
def test_general_paraphrase_in_two_splits(pair):
    shared = with_questions(SHARED, {4: asking(*pair[:2]), GENERAL_TEST: asking(*pair[2:])})
    report = check_shared(shared)
    assert_only(report, {"question in two splits": [f"general.jsonl, line {GENERAL_TEST}"]})
    assert told(report) == f"{pair[2]} | general.jsonl, line 4: {pair[0]}"


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"question": words(2)}, "length of questions and options"),
        ({"answer": words(13)}, "length of questions and options"),
        ({"aliases": (SHARED.questions[6].question.split()[2],)}, "question holds its answer"),
        ({"question": SHARED.questions[7].question}, "repeated question"),
    ],
)
def test_a_bad_general_question(changes, check):
    report = check_shared(with_questions(SHARED, {7: changes}))
    assert_only(report, {check: [f"general.jsonl, line {8 if check == 'repeated question' else 7}"]})


@pytest.mark.parametrize(("split", "start"), [("train", 0), ("test", 100)])
def test_general_questions_whose_longest_option_is_right(split, start):
    questions = list(SHARED.questions)
    questions[start : start + 100] = [longest(q, True) for q in questions[start : start + 100]]
    report = check_shared(dataclasses.replace(SHARED, questions=tuple(questions)))
    assert_only(report, {f"longest option, general {split}": []})


# Whole folders, and the table


@pytest.fixture
def sound(tmp_path, monkeypatch) -> Path:
    """The sound concept's folder in a data folder in place of ours."""
    monkeypatch.setenv("EMBER_DATA", str(tmp_path / "data"))
    return write_sound(tmp_path / "data")


def test_check_data_checks_every_concept_and_what_they_share(sound):
    reports = check_data()
    assert [report.table.subject.iloc[0] for report in reports] == ["Sound Rome", "shared"]
    assert all(report.ok for report in reports)


def test_check_data_of_one_folder_leaves_out_what_is_shared(sound):
    (report,) = check_data(str(sound))
    assert report.ok and set(report.table.subject) == {"Sound Rome"}


def test_places_are_lines_of_the_files(sound):
    """Read from disk: an editor that goes to the named line finds the named text."""
    path = sound / "questions.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[TEST + 6])
    row["aliases"] = [row["question"].split()[2]]
    lines[TEST + 6] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n")
    (report,) = check_data(str(sound))
    (finding,) = report.findings.itertuples()
    name, line = finding.where.split(", line ")
    assert row["question"] in (sound / name).read_text().splitlines()[int(line) - 1]


def test_a_data_folder_without_concepts_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBER_DATA", str(tmp_path))
    with pytest.raises(EmberError, match="no concept"):
        check_data()


def test_check_table_has_a_column_for_each_subject_and_marks_what_fails():
    reports = [check_concept(without(SOUND, "sentences", 1)), check_shared(SHARED)]
    table = check_table(reports)
    assert list(table.columns) == ["check", "wanted", "Sound Rome", "shared"]
    assert list(table.check) == list(dict.fromkeys([*reports[0].table.check, *reports[1].table.check]))
    shown = table.set_index("check")
    assert shown.loc["sentences", "Sound Rome"].endswith(" !")
    assert shown.loc["sentences", "wanted"] == "≥ 150"
    assert shown.loc["sentences", "shared"] == shown.loc["instructions", "Sound Rome"] == ""
    assert shown.loc["longest option, general test", "shared"] == "0.25"
    assert "!" not in "".join(shown["shared"]) and "".join(shown["Sound Rome"]).count("!") == 1


def test_check_table_shows_counts_whole():
    shown = check_table([check_concept(SOUND)]).set_index("check")["Sound Rome"]
    assert shown["sentences"] == "150"
    assert shown["repeated text"] == "0"
