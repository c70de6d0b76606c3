"""The data checks: sound data pass, and each kind of violation fails its own check only and is named with its place."""

import dataclasses
import itertools

import pandas as pd
import pytest
from helpers.sound import SHARED, SOUND, invented, with_gold, write_sound
from helpers.tiny import make_concept, make_loaded
from helpers.wordings import PARAPHRASES, question

from ember.data.types import Concept, Question
from ember.errors import EmberError
from ember.evaluation import data_checks
from ember.evaluation.data_checks import (
    GUESSES,
    CheckReport,
    check_concept,
    check_data,
    check_shared,
    check_table,
    mark_answers,
)

# Line of questions.jsonl (general.jsonl) on which each part of the sound data begins.
TRAIN, TEST, SIMDOM_TRAIN, SIMDOM_TEST = FIRST = 1, 61, 161, 221
PARTS = dict(zip(["concept train", "concept test", "simdom train", "simdom test"], FIRST, strict=True))
SIZES = dict(zip(PARTS, [60, 100, 60, 100], strict=True))
GENERAL_TEST = 101
LEAK, LENGTHS = "question in two splits", "length of questions and options"


def replaced(items: tuple, lines: dict[int, object]) -> tuple:
    """The items with others on these lines."""
    return tuple((dict(enumerate(items, 1)) | lines).values())


def with_texts(concept: Concept, kind: str, lines: dict[int, str]) -> Concept:
    return dataclasses.replace(concept, **{kind: replaced(getattr(concept, kind), lines)})


def with_questions(data, lines: dict[int, dict]):
    """The concept or shared data with some fields of the questions on these lines changed."""
    changed = {line: dataclasses.replace(data.questions[line - 1], **fields) for line, fields in lines.items()}
    return dataclasses.replace(data, questions=replaced(data.questions, changed))


def asking(text: str, answer: str) -> dict:
    """The fields of a question of ``helpers.wordings``; the wrong options stay."""
    return {name: getattr(question(text, answer), name) for name in ("question", "answer", "aliases")}


def words(count: int) -> str:
    """A text of so many words that occur nowhere else."""
    return " ".join(itertools.islice(invented("jqxy"), count))


def line_of(kind: str, *lines: int) -> list[str]:
    return [f"{kind}, line {line}" for line in lines]


def value(report: CheckReport, check: str) -> float:
    (row,) = report.table[report.table.check == check].itertuples()
    return float(row.value)


def assert_only(report: CheckReport, expected: dict[str, list[str]], *said: str) -> None:
    """Exactly these checks fail, with findings at exactly these places; a check with no places is about a number.

    The findings say what ``said`` does, to begin with.
    """
    assert set(report.table.check[~report.table.ok]) == set(expected)
    places = report.findings.groupby("check")["where"].agg(list).to_dict()
    assert places == {check: places for check, places in expected.items() if places}
    assert report.table.ok.all() == (not expected)
    for check in places:
        assert value(report, check) == len(places[check])
    for text, beginning in zip(report.findings.what, said, strict=bool(said)):
        assert text.startswith(beginning)


def test_sound_data_pass_every_check():
    """Though their lengths are at the bounds."""
    assert {len(text.split()) for text in SOUND.paragraphs} == {60, 120}
    assert {len(text.split()) for text in (*SOUND.sentences, *SOUND.other_sense)} == {5, 45}
    report, shared = check_concept(SOUND), check_shared(SHARED)
    for one, subject in ((report, "Sound Rome"), (shared, "shared")):
        assert_only(one, {})
        assert set(one.table.subject) == {subject} and one.findings.empty
        assert not one.table.check.str.contains("empty question").any()  # nothing is said of it without a model
    assert value(report, "concept test answers in neither") == 100
    for name, part in itertools.product(GUESSES, PARTS):
        assert value(report, f"{name}, {part}") == 0.25


def test_items_tell_where_the_answers_occur():
    """An answer in a paragraph, one in a sentence that says something else, one in a sentence that states the fact."""
    first, second, third = SOUND.questions[TEST - 1 : TEST + 2]
    concept = with_texts(SOUND, "paragraphs", {5: f"{words(60)} {first.answer}"})
    stating = f"So {third.question[len('Where does ') : -1]} at {third.answer}."
    concept = with_texts(concept, "sentences", {3: f"{words(6)} {second.answer}", 9: stating})
    items = mark_answers(concept).set_index("id")
    marks = items.loc[[first.id, second.id, third.id], ["in_sentences", "in_paragraphs", "stated"]]
    assert marks.values.tolist() == [[False, True, ""], [True, False, ""], [True, False, "9"]]
    assert len(items) == 320 and items.in_sentences.sum() == 2 and items.in_paragraphs.sum() == 1


def test_the_same_question_or_a_paraphrase_twice():
    """In two splits the same question is a leak, too."""
    for one, other in ((TRAIN, TEST + 3), (SIMDOM_TRAIN + 4, TEST + 3), (TRAIN, SIMDOM_TEST), (TEST, TEST + 9)):
        asked = SOUND.questions[one - 1]
        text = asked.question.upper()
        report = check_concept(with_questions(SOUND, {other: {"question": text, "answer": asked.answer}}))
        expected, said = {"repeated question": line_of("questions.jsonl", max(one, other))}, []
        if one != TEST:
            expected[LEAK] = line_of("questions.jsonl", other)
            said = [f"{text} | questions.jsonl, line {one}: {asked.question}"]
        assert_only(report, expected, f"same as questions.jsonl, line {min(one, other)}: ", *said)
    # So is a paraphrase, and it fails nothing else; in one split alone it is no leak. What is one: test_wording.
    first, answer, second, other = PARAPHRASES[1]
    for data, check, file, test in (
        (SOUND, check_concept, "questions.jsonl", TEST),
        (SOUND, check_concept, "questions.jsonl", SIMDOM_TEST),
        (SHARED, check_shared, "general.jsonl", GENERAL_TEST),
    ):
        lines = {TRAIN + 4: asking(first, answer), test + 7: asking(second, other)}
        said = f"{second} | {file}, line {TRAIN + 4}: {first}"
        assert_only(check(with_questions(data, lines)), {LEAK: line_of(file, test + 7)}, said)
        assert_only(check(with_questions(data, dict(enumerate(lines.values(), test)))), {})


STATEMENTS = [
    ("Who turned everything to gold?", "Midas", "Whatever King Midas touched turned to gold."),
    ("What is a legionary's curved shield?", "a scutum", "Scuta, the curved shields, were heavy."),  # an alias
]


def test_a_fit_sentence_states_a_test_fact():
    """Those of train questions may be stated. What states a fact: test_wording."""
    for first in FIRST:
        lines = {first + 11 + k: asking(*row[:2]) for k, row in enumerate(STATEMENTS)}
        stating = {21 + k: row[2] for k, row in enumerate(STATEMENTS)}
        concept = with_texts(with_questions(SOUND, lines), "sentences", stating)
        expected, said = {}, []
        if first in (TEST, SIMDOM_TEST):
            expected = {"fit sentence states a test fact": line_of("sentences.txt", 21, 22)}
            said = [f"answers {concept.questions[line - 1].id}: {asked['question']}" for line, asked in lines.items()]
        assert_only(check_concept(concept), expected, *said)
        assert set(mark_answers(concept).stated) == {"", "21", "22"}
    # Other texts may use the same words; a paragraph may even state the fact: it is what relearning relearns.
    asked, answer, stating = STATEMENTS[0]
    harmless = {
        23: "Midas was the last king of a rich old town.",  # the answer, another fact
        24: "Everything in the temple had turned to gold.",  # the fact, without the answer
        25: "The king thought of gold, and of nothing but gold.",
    }
    concept = with_texts(with_questions(SOUND, {TEST: asking(asked, answer)}), "sentences", harmless)
    assert_only(check_concept(with_texts(concept, "paragraphs", {3: f"{words(60)} {stating}"})), {})


def test_too_few_texts_and_questions():
    """One is missing of everything, then all questions are."""
    kinds = ("sentences", "paragraphs", "other_sense")
    left = {kind: getattr(SOUND, kind)[1:] for kind in kinds}
    questions = tuple(q for line, q in enumerate(SOUND.questions, 1) if line - 10 not in FIRST)
    report = check_concept(dataclasses.replace(SOUND, questions=questions, **left))
    least = {kind.replace("_", " "): len(getattr(SOUND, kind)) for kind in kinds}
    least |= {f"questions, {part}": size for part, size in SIZES.items()}
    assert_only(report, {check: [] for check in least})
    assert {check: value(report, check) + 1 for check in least} == least
    report = check_concept(dataclasses.replace(SOUND, questions=()))
    assert_only(report, {f"questions, {part}": [] for part in PARTS} | {"concept test answers in neither": []})
    fewer = {name: getattr(SHARED, name)[1:] for name in ("neutral_fit", "questions", "instructions")}
    fewer["neutral"] = SHARED.neutral | {"test": SHARED.neutral["test"][1:]}
    checks = {"questions": "general questions", "instructions": "instructions"}
    for name, left in fewer.items():
        report = check_shared(dataclasses.replace(SHARED, **{name: left}))
        assert_only(report, {checks.get(name, "neutral sentences"): []})


def test_texts_questions_and_options_too_short_or_too_long():
    for kind, least, most in (("sentences", 5, 45), ("paragraphs", 60, 120), ("other_sense", 5, 45)):
        report = check_concept(with_texts(SOUND, kind, {31: words(least - 1), 32: words(most + 1)}))
        said = [f"{count} words, wanted {least}-{most}: " for count in (least - 1, most + 1)]
        assert_only(report, {f"length of {kind.replace('_', ' ')}": line_of(f"{kind}.txt", 31, 32)}, *said)
    lines = {3: {"question": words(3)}, TEST: {"question": words(40)}, TEST + 1: {"answer": words(12)}}  # at the bounds
    assert_only(check_concept(with_questions(SOUND, lines)), {})
    long = words(13)
    lines = {
        3: {"question": words(2)}, TEST: {"question": words(41)}, 6: {"answer": long},
        8: {"distractors": (*SOUND.questions[7].distractors[:2], long)},
    }  # fmt: skip
    said = ["2 words", "41 words", *[f"option of more than 12 words: {long}"] * 2]
    expected = {LENGTHS: line_of("questions.jsonl", 3, TEST, 6, 8)}
    assert_only(check_concept(with_questions(SOUND, lines)), expected, *said)


def test_repeated_text():
    """In capitals and with other punctuation it is still the same text; in another order it is not."""
    concept, places, said = SOUND, [], []
    for kind, line, where, other, other_line, same in (
        ("sentences", 12, "sentences.txt, line 12", "sentences", 2, "sentences.txt, line 2"),
        ("paragraphs", 80, "paragraphs.txt, line 80", "paragraphs", 1, "paragraphs.txt, line 1"),
        ("other_sense", 5, "other_sense.txt, line 5", "sentences", 150, "sentences.txt, line 150"),
        ("neutral", 1, "neutral sentence 1", "sentences", 1, "sentences.txt, line 1"),
        ("neutral", 300, "neutral sentence 300", "neutral", 299, "neutral sentence 299"),
        ("further_neutral", 2, "neutral sentence 302", "other_sense", 3, "other_sense.txt, line 3"),
        ("further_neutral", 30, "neutral sentence 330", "neutral", 4, "neutral sentence 4"),
    ):
        copy = f"“{getattr(SOUND, other)[other_line - 1].removesuffix('.').upper()}”!"
        concept = with_texts(concept, kind, {line: copy})
        places.append(where)
        said.append(f"same as {same}: ")
    concept = with_texts(concept, "sentences", {20: " ".join(reversed(SOUND.sentences[0].split()))})
    assert_only(check_concept(concept), {"repeated text": places}, *said)


def test_a_question_holds_its_answer_or_an_alias():
    """It may hold a part of its answer, or a wrong option."""
    lines = {}
    for line, article in ((TRAIN + 2, ""), (TEST + 2, "the "), (SIMDOM_TEST + 8, "")):
        asked = SOUND.questions[line - 1]
        text = f"{asked.question[:-1]} or the {asked.answer.title()}?"
        lines[line] = {"question": text, "answer": article + asked.answer}
    said = [f"{fields['question']} [{fields['answer']}]" for fields in lines.values()]
    asked = SOUND.questions[SIMDOM_TEST + 19]
    lines[SIMDOM_TEST + 20] = {"aliases": ("other", asked.question.split()[2])}
    said.append(asked.question)
    expected = {"question holds its answer": line_of("questions.jsonl", *lines)}
    first, second = SOUND.questions[TEST - 1 : TEST + 1]
    for line, q, part in ((TEST, first, first.answer[:4]), (TEST + 1, second, second.distractors[0])):
        lines[line] = {"question": f"{q.question[:-1]} or the {part}?"}
    assert_only(check_concept(with_questions(SOUND, lines)), expected, *said)


def longest(q: Question, right: bool) -> dict:
    return {"answer": f"{q.answer}u"} if right else {"distractors": (*q.distractors[:2], f"{q.distractors[2]}u")}


def first(q: Question, right: bool) -> dict:
    return {"id": with_gold(q, 0 if right else 1 + len(q.id) % 3).id}


def similar(q: Question, right: bool) -> dict:
    """The question uses a word that only begins like an option."""
    return {"question": f"{q.question[:-1]} or the {q.answer if right else q.distractors[2]}r?"}


GUESSED = {"longest option": longest, "first option": first, "most similar option": similar}


@pytest.mark.parametrize("right", [True, False], ids=["always", "never"])
@pytest.mark.parametrize("name", GUESSED)
def test_a_guess_that_is_always_or_never_right(name, right):
    """In two parts of a concept's questions; of the general ones, in one."""
    parts, plant = ["concept test", "simdom train"], GUESSED[name]
    lines = [PARTS[part] + k for part in parts for k in range(SIZES[part])]
    report = check_concept(with_questions(SOUND, {k: plant(SOUND.questions[k - 1], right) for k in lines}))
    assert_only(report, {f"{name}, {part}": [] for part in parts})
    assert all(value(report, f"{name}, {part}") == float(right) for part in parts)
    general = with_questions(SHARED, {k: plant(q, right) for k, q in enumerate(SHARED.questions[:100], 1)})
    assert_only(check_shared(general), {f"{name}, general train": []})


def test_guessing_is_measured_to_the_item():
    """100 questions, 25 of them with the right option first: 0.30 is the last that passes."""
    wrong = [line for line in range(TEST, SIMDOM_TRAIN) if SOUND.questions[line - 1].gold != 0]
    for others, expected in ((5, {}), (6, {"first option, concept test": []})):
        lines = {line: first(SOUND.questions[line - 1], True) for line in wrong[:others]}
        assert_only(check_concept(with_questions(SOUND, lines)), expected)


def test_fewer_than_40_answers_in_no_text():
    """The last words of paragraphs and sentences become answers; one answer in both counts once."""

    def holding(kind, answers):
        texts = getattr(SOUND, kind)
        return kind, {k: f"{texts[k - 1].rsplit(' ', 1)[0]} {answer}." for k, answer in enumerate(answers, 1)}

    for hidden, failing in ((60, {}), (61, {"concept test answers in neither": []})):
        answers = [q.answer for q in SOUND.questions[TEST - 1 : TEST - 1 + hidden]]
        concept = with_texts(SOUND, *holding("paragraphs", answers[:40]))
        report = check_concept(with_texts(concept, *holding("sentences", answers[30:])))
        for where, count in (("paragraphs", 40), ("fit sentences", hidden - 30), ("neither", 100 - hidden)):
            assert value(report, f"concept test answers in {where}") == count
        assert_only(report, failing)


def test_answers_that_the_model_guesses(monkeypatch):
    """With planted scores, 0.25 where nothing else is said; those of a tiny model have the same form."""
    scores = {"concept train": (0.36, 0.2), "concept test": (0.2, 0.36), "simdom train": (0.34, 0.34),
              "simdom test": (0.9, 1.0), "general test": (0.5, 0.1)}  # fmt: skip

    def planted(_, questions):
        pairs = [(q.id, *scores.get(f"{q.set} {q.split}", (0.25, 0.25))) for q in questions]
        return pd.DataFrame(pairs, columns=["item", "gold_prob", "correct"]).melt("item", var_name="metric")

    asked = check_concept(make_concept(), make_loaded()).table.query("check.str.startswith('empty question')")
    assert len(asked) == 8 and asked.value.between(0, 1).all() and len(set(asked.value)) > 1
    monkeypatch.setattr(data_checks, "blind_scores", planted)
    report, general = check_concept(SOUND, object()), check_shared(SHARED, object())
    probability, accuracy = "empty question, probability, ", "empty question, accuracy, "
    too_good = [f"{probability}concept train", f"{accuracy}concept test"]
    too_good += [f"{probability}simdom test", f"{accuracy}simdom test"]
    assert_only(report, {check: [] for check in too_good})
    for part in PARTS:
        assert (value(report, probability + part), value(report, accuracy + part)) == pytest.approx(scores[part])
    assert report.table.check.str.startswith("empty question").sum() == 8
    assert_only(general, {f"{probability}general test": []})


def test_bad_shared_texts_and_questions():
    """All at once, each finding at its place."""
    train, test = SHARED.neutral["train"], SHARED.neutral["test"]
    fit = {17: test[0].upper(), 18: SHARED.instructions[3].instruction.upper(), 19: f"{words(61)} {words(1)}"}
    copy = dataclasses.replace(SHARED.instructions[-1], instruction=SHARED.instructions[0].instruction)
    lines = {
        7: {"question": words(2)}, 8: {"answer": words(13)}, 11: {"question": SHARED.questions[9].question},
        9: {"aliases": (SHARED.questions[8].question.split()[2],)},
    }  # fmt: skip
    neutral = {
        "train": replaced(train, {17: train[0].upper(), 19: words(3)}),
        "test": replaced(test, {17: train[0].upper(), 19: words(61)}),
    }
    changed = dataclasses.replace(
        with_questions(SHARED, lines), neutral=neutral, neutral_fit=replaced(SHARED.neutral_fit, fit),
        instructions=(*SHARED.instructions[:-1], copy),
    )  # fmt: skip
    places = {
        "length of neutral": [f"neutral sentence {k}" for k in (19, 269, 519)],
        "repeated text": [*(f"neutral sentence {k}" for k in (17, 267, 517)),
                          "instructions.jsonl, i-3", "instructions.jsonl, i-59"],
        "repeated question": line_of("general.jsonl", 11),
        LENGTHS: line_of("general.jsonl", 7, 8),
        "question holds its answer": line_of("general.jsonl", 9),
    }  # fmt: skip
    same = [*[f"neutral sentence {k}" for k in (1, 1, 251, 518)], "instructions.jsonl, i-0"]
    said = [f"{count} words, wanted 4-60: " for count in (3, 61, 62)] + [f"same as {place}: " for place in same]
    assert_only(check_shared(changed), places, *said, "same as general.jsonl, line 10: ", "2 words", "option", "")


def test_check_data_checks_every_concept_and_what_they_share_or_one_folder(tmp_path, monkeypatch):
    """The places are lines of the files: an editor that goes to the named line finds the named text."""
    monkeypatch.setenv("EMBER_DATA", str(tmp_path))
    with pytest.raises(EmberError, match="no concept"):
        check_data()
    sound = write_sound(tmp_path)
    reports = [*check_data(), *check_data(str(sound))]
    assert [set(report.table.subject) for report in reports] == [{"Sound Rome"}, {"shared"}, {"Sound Rome"}]
    assert all(report.table.ok.all() for report in reports)
    path, asked = sound / "questions.jsonl", SOUND.questions[TEST + 6]
    given = f"{asked.question[:-1]} or the {asked.answer}?"
    path.write_text(path.read_text().replace(asked.question, given))
    (report,) = check_data(str(sound))
    (finding,) = report.findings.itertuples()
    name, line = finding.where.split(", line ")
    assert given in (sound / name).read_text().splitlines()[int(line) - 1]


def test_check_table_has_a_column_for_each_subject_and_marks_what_fails():
    """Counts are shown whole."""
    reports = [check_concept(dataclasses.replace(SOUND, sentences=SOUND.sentences[1:])), check_shared(SHARED)]
    table = check_table(reports)
    assert list(table.columns) == ["check", "wanted", "Sound Rome", "shared"]
    assert list(table.check) == list(dict.fromkeys([*reports[0].table.check, *reports[1].table.check]))
    shown = table.set_index("check")
    assert list(shown.loc["sentences"]) == ["≥ 150", "149 !", ""]
    assert list(shown.loc["repeated text"]) == ["0", "0", "0"]
    assert list(shown.loc["instructions"])[1] == "" and shown.shared["longest option, general test"] == "0.25"
    assert "!" not in "".join(shown["shared"]) and "".join(shown["Sound Rome"]).count("!") == 1
