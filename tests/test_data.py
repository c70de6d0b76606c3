"""The shipped data, and what the reader says about broken data."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers.folders import question_row, write_concept, write_rows, write_shared
from helpers.tiny import NEUTRAL, SENTENCES

from ember.data.ours import NEUTRAL_IN_FIT, concept_from_sentences, list_concepts, load_concept, load_shared
from ember.data.types import SPLITS, Concept, Question, SharedData
from ember.errors import DataError, UnknownNameError
from ember.evaluation.data_checks import CheckReport, check_concept, check_data, check_shared, check_table
from ember.reporting.format import fill_blocks
from ember.store.paths import data_dir

CONCEPTS = list_concepts()
STORED_ORDERS = {"concept-001": ("d", "a", "b", "c"), "x": ("a", "b", "d", "c")}


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


def test_three_concepts_are_shipped():
    assert CONCEPTS == ["Ancient Rome", "Uranium", "World War II"]


def test_both_splits_hold_shared_texts(shared):
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


def test_gold_points_at_the_answer(concept, shared):
    for question in (*concept.questions, *shared.questions):
        assert sorted(question.options) == sorted([question.answer, *question.distractors])
        assert question.options[question.gold] == question.answer


def test_option_order_is_fixed_by_the_id():
    """Stored: another order would change every committed score that depends on it."""
    orders = {id_: Question(id_, "concept", "test", "?", "a", ("b", "c", "d")).options for id_ in ("concept-001", "x")}
    assert orders == STORED_ORDERS


def told(report: CheckReport) -> str:
    """What failed and where, for the message of an assertion."""
    return f"{report.table[~report.table.ok].to_string()}\n{report.findings.to_string()}"


def test_a_shipped_concept_passes_the_checks(concept):
    report = check_concept(concept)
    assert report.ok, told(report)


def test_the_shipped_shared_data_pass_the_checks(shared):
    report = check_shared(shared)
    assert report.ok, told(report)


@pytest.mark.embedded
def test_the_data_card_has_the_check_report(embedded):
    """With the guesses of the embedded model; rendered as ``data/build_questions.py`` does."""
    text = (data_dir() / "README.md").read_text(encoding="utf-8")
    reports = check_data(loaded=embedded)
    assert all(report.ok for report in reports), "\n".join(map(told, reports))
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


@pytest.mark.parametrize("name", CONCEPTS)
@pytest.mark.parametrize("spelling", [str.lower, str.upper, str.swapcase, str])
def test_any_capitalisation_loads(name, spelling):
    assert load_concept(spelling(name)).name == name


def test_unknown_concept_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=re.escape(", ".join(CONCEPTS))):
        load_concept("Atlantis")


@pytest.mark.parametrize(
    "name",
    [
        "../lure", "/etc", "a/b", "", ".", "..", "../data/shared", "../Tiny Rome", "tiny/rome", "tiny\\rome",
        "tiny..rome", "/tiny-rome", "Tiny Rome/",
    ],
)  # fmt: skip
def test_a_name_is_never_a_path(data, monkeypatch, name):
    """A whole concept waits where the name would lead; nothing but the data folder's concept.json files is read."""
    for lure in (data.parent / "lure", data / "a" / "b"):
        write_concept(lure, "Lure")
    read, really = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: read.append(path) or really(path, *a, **k))
    with pytest.raises(UnknownNameError, match="Tiny Rome"):
        load_concept(name)
    assert set(read) == {data / "tiny-rome" / "concept.json"}


@pytest.mark.parametrize("name", ["日本", "Ελλάδα"])
def test_names_in_other_scripts_load_themselves(data, name):
    write_concept(data / "one", "日本")
    write_concept(data / "two", "Ελλάδα")
    assert load_concept(name).name == name


def test_folder_loads_a_concept_of_ones_own(data, tmp_path):
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


def test_data_hash_depends_on_the_texts(data):
    before = load_concept("Tiny Rome").data_hash
    assert load_concept("Tiny Rome").data_hash == before
    (data / "tiny-rome" / "other_sense.txt").write_text("Caesar salad.\n")
    assert load_concept("Tiny Rome").data_hash != before


# Broken data

CONCEPT_FILES = ["concept.json", "sentences.txt", "questions.jsonl", "paragraphs.txt", "other_sense.txt"]
SHARED_FILES = ["neutral_fit.jsonl", "neutral_heldout.jsonl", "general.jsonl", "instructions.jsonl"]
ALL_FILES = [f"tiny-rome/{name}" for name in CONCEPT_FILES] + [f"shared/{name}" for name in SHARED_FILES]


def refusal(data: Path) -> str:
    """What the reader says about a broken data folder."""
    with pytest.raises(DataError) as caught:
        (load_concept(folder=data / "tiny-rome"), load_shared())
    return str(caught.value)


def test_the_data_folder_of_these_tests_is_sound(data):
    load_concept(folder=data / "tiny-rome")
    load_shared()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ": the file is missing"),
        (b"", ": the file is empty"),
        (b"\n \n", ": the file is empty"),
        (b"C\xe6sar", ", line 1: not UTF-8 (byte 1)"),
    ],
)
@pytest.mark.parametrize("file", ALL_FILES)
def test_a_file_that_is_missing_or_holds_no_text(data, file, content, said):
    (data / file).unlink() if content is None else (data / file).write_bytes(content)
    assert refusal(data) == f"{data / file}{said}"


def test_not_utf8_names_the_line(data):
    path = data / "tiny-rome" / "sentences.txt"
    path.write_bytes(b"Rome\nGaul\nC\xe6sar\n")
    assert refusal(data) == f"{path}, line 3: not UTF-8 (byte 11)"


@pytest.mark.parametrize("file", ["sentences.txt", "paragraphs.txt", "other_sense.txt", "questions.jsonl"])
def test_blank_line(data, file):
    path = data / "tiny-rome" / file
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, "", *rest]) + "\n")
    assert f"{path}, line 2" in refusal(data)


@pytest.mark.parametrize("line", ['{"id": "x",', "[1]", "null", '"text"'])
@pytest.mark.parametrize("file", [f for f in ALL_FILES if f.endswith("jsonl")])
def test_a_line_that_is_no_json_object(data, file, line):
    path = data / file
    path.write_text(path.read_text().splitlines()[0] + f"\n{line}\n")
    assert f"{path}, line 2: " in refusal(data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"name": "x"', ", line 1: not JSON"),
        ("[]", ": expected an object, got []"),
        ('{"name": "x"}', ": missing field 'simdom'"),
        ('{"name": "x", "simdom": 5}', ", field 'simdom': expected text, got 5"),
        ('{"name": " ", "simdom": "y"}', ", field 'name': expected text, got ' '"),
    ],
)
def test_broken_concept_json(data, content, said):
    path = data / "tiny-rome" / "concept.json"
    path.write_text(content)
    assert refusal(data).startswith(f"{path}{said}")


@pytest.mark.parametrize("field", question_row())
def test_missing_question_field(data, field):
    row = question_row(2)
    del row[field]
    path = write_rows(data / "tiny-rome" / "questions.jsonl", [question_row(1), row])
    assert refusal(data) == f"{path}, line 2: missing field {field!r}"


def test_unknown_question_field(data):
    path = write_rows(data / "tiny-rome" / "questions.jsonl", [question_row(1), question_row(2, hint="Rome")])
    assert refusal(data) == f"{path}, line 2: unknown field 'hint'"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("question", " "),
        ("answer", ""),
        ("answer", 5),
        ("answer", None),
        ("id", 2),
        ("id", "concept-1"),
        ("set", "general"),
        ("set", "concepts"),
        ("split", "dev"),
        ("split", None),
        ("distractors", ["Gaul", "Athens"]),
        ("distractors", ["Gaul", "Athens", "Rome"]),
        ("distractors", ["Gaul", "Athens", "Gaul"]),
        ("distractors", ["Gaul", "Athens", "Troy", "Rome"]),
        ("distractors", ["Gaul", "Athens", " "]),
        ("distractors", "Gaul"),
        ("aliases", [5]),
        ("aliases", None),
    ],
)
def test_bad_question_value(data, field, value):
    """The value that was typed is in the message."""
    rows = [question_row(1), question_row(2, **{field: value})]
    path = write_rows(data / "tiny-rome" / "questions.jsonl", rows)
    said = refusal(data)
    assert said.startswith(f"{path}, line 2, field '{field}")
    assert repr(value) in said or repr(value[-1]) in said


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("neutral_fit.jsonl", "text", ""),
        ("neutral_fit.jsonl", "text", 5),
        ("neutral_heldout.jsonl", "text", None),
        ("neutral_heldout.jsonl", "split", "dev"),
        ("instructions.jsonl", "response", ["Yes."]),
        ("instructions.jsonl", "instruction", 5),
        ("instructions.jsonl", "id", "i-1"),
        ("general.jsonl", "set", "concept"),
    ],
)
def test_bad_shared_value(data, file, field, value):
    path = data / "shared" / file
    first, second = map(json.loads, path.read_text().splitlines()[:2])
    write_rows(path, [first, second | {field: value}])
    assert refusal(data).startswith(f"{path}, line 2, field {field!r}: ")


def test_a_line_ends_at_a_newline_only(data):
    """U+2028 is legal inside a JSON text, and editors do not count it as a line."""
    write_rows(data / "tiny-rome" / "questions.jsonl", [question_row(1, question="Where\u2028is it?")])
    assert load_concept("Tiny Rome").questions[0].question == "Where\u2028is it?"
