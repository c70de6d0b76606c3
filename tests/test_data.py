"""The shipped data, and what the reader says about broken data."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers.folders import question_row, write_concept, write_rows, write_shared
from helpers.released import released_files, write_released
from helpers.tiny import NEUTRAL, SENTENCES

from ember.data.ours import NEUTRAL_IN_FIT, concept_from_sentences, list_concepts, load_concept, load_shared
from ember.data.released import SENTENCES as RELEASED_SENTENCES
from ember.data.types import SOURCES, SPLITS, Concept, Question, SharedData
from ember.errors import DataError, UnknownNameError
from ember.evaluation.data_checks import CheckReport, check_concept, check_data, check_shared, check_table
from ember.reporting.format import fill_blocks
from ember.store.paths import data_dir

CONCEPTS = list_concepts()


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A small data folder in place of ours, with the concept "Tiny Rome"."""
    root = tmp_path / "data"
    write_concept(root / "tiny-rome")
    write_shared(root / "shared")
    monkeypatch.setenv("EMBER_DATA", str(root))
    return root


@pytest.fixture(scope="module")
def shared() -> SharedData:
    return load_shared()


@pytest.fixture(scope="module", params=CONCEPTS)
def concept(request) -> Concept:
    return load_concept(request.param)


def repeated(texts) -> list[str]:
    plain = (re.sub(r"\W+", " ", text).strip().casefold() for text in texts)
    return [text for text, count in Counter(plain).items() if count > 1]


# The shipped data: what the checks below do not say


def test_three_concepts_are_shipped_and_both_splits_hold_shared_texts(shared):
    assert CONCEPTS == ["Ancient Rome", "Uranium", "World War II"]
    assert {q.split for q in shared.questions} == {i.split for i in shared.instructions} == set(SPLITS)
    assert all(shared.neutral[split] for split in SPLITS)


def test_nothing_occurs_twice_between_files(concept, shared):
    """This is where a neutral fit sentence in the held-out ones, or a question in two splits, would show."""
    held_out = [text for split in shared.neutral.values() for text in split]
    neutral = [*concept.neutral, *concept.further_neutral, *held_out]
    assert not repeated([*concept.sentences, *neutral, *concept.paragraphs, *concept.other_sense])
    assert not repeated(q.question for q in (*concept.questions, *shared.questions))
    assert not repeated(x.id for x in (*concept.questions, *shared.questions, *shared.instructions))


def test_concepts_do_not_share_texts_or_questions():
    concepts = [load_concept(name) for name in CONCEPTS]
    for kind in ("sentences", "paragraphs", "other_sense"):
        assert not repeated(text for concept in concepts for text in getattr(concept, kind)), kind
    assert not repeated(q.id + q.question for concept in concepts for q in concept.questions)


def test_gold_points_at_the_answer_and_the_id_fixes_the_order(concept, shared):
    """The order is stored: another would change every committed score that depends on it."""
    for question in (*concept.questions, *shared.questions):
        assert sorted(question.options) == sorted([question.answer, *question.distractors])
        assert question.options[question.gold] == question.answer
    for id_, order in {"concept-001": ("d", "a", "b", "c"), "x": ("a", "b", "d", "c")}.items():
        assert Question(id_, "concept", "test", "?", "a", ("b", "c", "d")).options == order


def told(report: CheckReport) -> str:
    """What failed and where, for the message of an assertion."""
    return f"{report.table[~report.table.ok].to_string()}\n{report.findings.to_string()}"


def test_the_shipped_data_pass_the_checks(concept, shared):
    for report in (check_concept(concept), check_shared(shared)):
        assert report.table.ok.all(), told(report)


@pytest.mark.embedded
def test_the_data_card_has_the_check_report(embedded):
    """With the guesses of the embedded model; rendered as ``data/build_questions.py`` does."""
    text = (data_dir() / "README.md").read_text(encoding="utf-8")
    reports = check_data(loaded=embedded)
    assert all(report.table.ok.all() for report in reports), "\n".join(map(told, reports))
    table = check_table(reports).to_markdown(index=False, disable_numparse=True)
    assert fill_blocks(text, {"report": table}) == text, "run: make data"


@pytest.mark.embedded
@pytest.mark.parametrize("set_", ["concept", "simdom"])
def test_the_embedded_model_knows_the_material(concept, embedded, set_):
    """Without that nothing can be erased."""
    from ember.evaluation.evaluate import question_scores
    from ember.evaluation.resampling import wilson

    asked = [q for q in concept.questions if (q.set, q.split) == (set_, "test")]
    scores = question_scores(embedded, asked)
    correct = scores[scores.metric == "correct"].value
    assert correct.mean() >= 0.45
    assert wilson(correct.sum(), len(correct))[0] > 0.3


# Names


@pytest.mark.parametrize("name", [
    "Atlantis", "../lure", "/etc", "a/b", "", ".", "..", "lure", "~", "\0", "../data/shared", "../Tiny Rome",
    "tiny/rome", "tiny\\rome", "tiny..rome", "/tiny-rome", "Tiny Rome/",
])  # fmt: skip
@pytest.mark.parametrize("source", SOURCES)
def test_an_unknown_name_lists_the_known_ones_and_is_never_a_path(data, monkeypatch, source, name):
    """Data wait where the name would lead; nothing but the concepts' names is read."""
    places = [data.parent / "lure", data / "a" / "b", data / "lure"]
    if source == "ours":
        for lure in places[:2]:
            write_concept(lure, "Lure")
        known, folder, names = "Tiny Rome", None, data / "tiny-rome" / "concept.json"
    else:
        content = json.loads(json.dumps(released_files()).replace("Jar Town", "Trap"))
        for lure in places:
            write_released(lure, content)
        known, folder = "Jar Town, Élan", write_released(data)
        names = data / RELEASED_SENTENCES
    read, really = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: read.append(path) or really(path, *a, **k))
    with pytest.raises(UnknownNameError, match=rf"{re.escape(repr(name))}; known: {known}\."):
        load_concept(name, source=source, folder=folder)
    assert set(read) == {names}


def test_any_capitalisation_and_script_loads_and_so_does_a_folder_of_ones_own(data, tmp_path):
    names = ("Ancient Rome", "日本", "Ελλάδα")
    for k, name in enumerate(names):
        write_concept(data / f"more-{k}", name)
    for name in names:
        for spelling in (str.lower, str.upper, str.swapcase, str):
            assert load_concept(spelling(name)).name == name
    mine = load_concept(folder=write_concept(tmp_path / "mine", "My Rome"))
    assert (mine.name, mine.simdom, mine.slug) == ("My Rome", "Tiny Greece", "my-rome")
    assert (mine.sentences, mine.neutral) == (SENTENCES, NEUTRAL)
    assert [q.id for q in mine.questions] == ["concept-1", "concept-2"]


def test_shared_data_have_all_neutral_sentences_of_the_fit(data):
    """The first ones contrast with a concept, the others are the concept's further ones."""
    many = tuple(f"It rained on day {k}." for k in range(NEUTRAL_IN_FIT + 2))
    write_rows(data / "shared" / "neutral_fit.jsonl", [{"text": text, "subject": "rain"} for text in many])
    loaded = load_concept("Tiny Rome")
    assert load_shared().neutral_fit == many
    assert (loaded.neutral, loaded.further_neutral) == (many[:NEUTRAL_IN_FIT], many[NEUTRAL_IN_FIT:])


def test_sentences_alone_make_a_concept(data):
    mine = concept_from_sentences("Mine", SENTENCES)
    assert (mine.sentences, mine.neutral, mine.questions) == (SENTENCES, NEUTRAL, ())


# Broken data

CONCEPT_FILES = ["concept.json", "sentences.txt", "questions.jsonl", "paragraphs.txt", "other_sense.txt"]
SHARED_FILES = ["neutral_fit.jsonl", "neutral_heldout.jsonl", "general.jsonl", "instructions.jsonl"]
ALL_FILES = [f"tiny-rome/{name}" for name in CONCEPT_FILES] + [f"shared/{name}" for name in SHARED_FILES]


def refusal(data: Path) -> str:
    """What the reader says about a broken data folder."""
    with pytest.raises(DataError) as caught:
        (load_concept(folder=data / "tiny-rome"), load_shared())
    return str(caught.value)


@pytest.mark.parametrize("file", ALL_FILES)
def test_a_file_that_is_missing_or_holds_no_text_and_a_line_that_is_none(data, file):
    path = data / file
    whole = path.read_text()
    for content, said in (
        (b"", ": the file is empty"), (b"\n \n", ": the file is empty"), (b"C\xe6sar", ", line 1: not UTF-8 (byte 1)"),
        (b"Rome\nGaul\nC\xe6sar\n", ", line 3: not UTF-8 (byte 11)"),
    ):  # fmt: skip
        path.write_bytes(content)
        assert refusal(data) == f"{path}{said}"
    path.unlink()
    assert refusal(data) == f"{path}: the file is missing"
    first, *rest = whole.splitlines()
    for line in () if file == ALL_FILES[0] else ("", '{"id": "x",', "[1]", "null", '"text"'):
        if not line or file.endswith("jsonl"):
            path.write_text("\n".join([first, line, *rest]) + "\n")
            assert f"{path}, line 2: " in refusal(data)
    path.write_text(whole)
    load_concept(folder=data / "tiny-rome")
    load_shared()  # the folder of these tests is sound


@pytest.mark.parametrize(("content", "said"), [
    ('{"name": "x"', ", line 1: not JSON"),
    ("[]", ": expected an object, got []"), ('{"name": "x"}', ": missing field 'simdom'"),
    ('{"name": "x", "simdom": 5}', ", field 'simdom': expected text, got 5"),
    ('{"name": " ", "simdom": "y"}', ", field 'name': expected text, got ' '"),
])  # fmt: skip
def test_broken_concept_json(data, content, said):
    path = data / "tiny-rome" / "concept.json"
    path.write_text(content)
    assert refusal(data).startswith(f"{path}{said}")


QUESTIONS = "tiny-rome/questions.jsonl"
BAD_VALUES = {
    "question": [" "],
    "answer": ["", 5, None],
    "id": [2, "concept-1"],
    "set": ["general", "concepts"],
    "split": ["dev", None],
    "distractors": [
        ["Gaul", "Athens"], ["Gaul", "Athens", "Rome"], ["Gaul", "Athens", "Gaul"], ["Gaul", "Athens", "Troy", "Rome"],
        ["Gaul", "Athens", " "], "Gaul",
    ],
    "aliases": [[5], None],
}  # fmt: skip
BAD_SHARED = [
    ("neutral_fit", "text", ""), ("neutral_fit", "text", 5), ("neutral_heldout", "text", None),
    ("neutral_heldout", "split", "dev"), ("instructions", "response", ["Yes."]), ("instructions", "instruction", 5),
    ("instructions", "id", "i-1"), ("general", "set", "concept"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "field", "value"), [
    *((QUESTIONS, field, value) for field, values in BAD_VALUES.items() for value in values),
    *((f"shared/{name}.jsonl", field, value) for name, field, value in BAD_SHARED),
])  # fmt: skip
def test_a_bad_value_is_in_the_message(data, file, field, value):
    path = data / file
    first, second = map(json.loads, path.read_text().splitlines()[:2])
    write_rows(path, [first, second | {field: value}])
    said = refusal(data)
    assert said.startswith(f"{path}, line 2, field '{field}")
    assert repr(value) in said or repr(value[-1]) in said


@pytest.mark.parametrize("field", [*question_row(), "hint"])
def test_a_question_field_that_is_missing_or_unknown(data, field):
    row = question_row(2)
    kind = "missing" if row.pop(field, None) is not None else "unknown"
    path = write_rows(data / QUESTIONS, [question_row(1), row if kind == "missing" else row | {"hint": "Rome"}])
    assert refusal(data) == f"{path}, line 2: {kind} field {field!r}"


def test_a_line_ends_at_a_newline_only(data):
    """U+2028 is legal inside a JSON text, and editors do not count it as a line."""
    write_rows(data / "tiny-rome" / "questions.jsonl", [question_row(1, question="Where\u2028is it?")])
    assert load_concept("Tiny Rome").questions[0].question == "Where\u2028is it?"
