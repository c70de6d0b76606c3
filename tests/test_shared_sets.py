"""MMLU and AlpacaEval by row number: reading, fetching at a recorded commit, and evaluating with them."""

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pandas as pd
import pytest
from helpers.released import PAPER_DATA, released_files, write_released
from helpers.tiny import make_concept, make_loaded
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from ember.data.mmlu_alpaca import SETS, fetch_shared_sets, load_shared_sets
from ember.data.ours import load_concept, load_shared
from ember.data.released import INDICES
from ember.data.types import SPLITS
from ember.editing import Edit
from ember.errors import DamagedFileError, DataError, DownloadError
from ember.evaluation.evaluate import evaluate
from ember.evaluation.localization import by_exposure, everyday_exposure, token_changes
from ember.evaluation.metrics import compare
from ember.evaluation.suite import Sizes, load_suite
from ember.evaluation.trade_curves import area_table, curves, equal_gain_table, point_table
from ember.evaluation.trade_off import make_probe, probe_edit
from ember.methods import METHODS
from ember.reporting.tables import headline

ROWS = 14  # enough for the row numbers of ``released_files``
COLOURS = ("red", "blue", "grey", "white")
COMMIT = "c0ffee" + "0" * 34
MMLU, ALPACA = (Path(file).name for _, file in SETS.values())


def write_sets(folder: Path, rows: int = ROWS) -> Path:
    """The released files, and the two data sets with so many invented rows."""
    write_released(folder)
    numbers = range(rows)
    table = {
        "question": [f"Which jar holds {k}?" for k in numbers], "subject": "jars", "answer": [k % 4 for k in numbers],
        "choices": [[f"{colour} {k}" for colour in COLOURS] for k in numbers],
    }  # fmt: skip
    pd.DataFrame(table).to_parquet(folder / MMLU)
    entry = {"generator": "x", "dataset": "y"}
    entries = [{"instruction": f"Name jar {k}.", "output": f"Jar {k}.", **entry} for k in numbers]
    (folder / ALPACA).write_text(json.dumps(entries))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_sets(tmp_path / "sets")


def change_mmlu(folder: Path, row: int, column: str, value) -> None:
    table = pd.read_parquet(folder / MMLU)
    table[column] = [value if k == row else old for k, old in enumerate(table[column])]
    table.to_parquet(folder / MMLU)


def test_rows_are_those_of_the_released_numbers_in_their_order_and_files_are_recorded(folder):
    sets, content = load_shared_sets(folder), released_files()
    for name, items in (("mmlu", sets.questions), ("alpaca", sets.instructions)):
        wanted = [(f"{name}[{row}]", split) for split in SPLITS for row in content[INDICES[name, split]]]
        assert [(item.id, item.split) for item in items] == wanted
    for question in sets.questions:
        row = int(question.id.removeprefix("mmlu[").removesuffix("]"))
        assert question.set == "general" and question.question == f"Which jar holds {row}?"
        assert question.answer == f"{COLOURS[row % 4]} {row}"
        assert len({question.answer, *question.distractors}) == 4 and question.options[question.gold] == question.answer
    row = content[INDICES["alpaca", "train"]][0]
    assert (sets.instructions[0].instruction, sets.instructions[0].response) == (f"Name jar {row}.", f"Jar {row}.")
    (folder / INDICES["mmlu", "train"]).write_text("[9, 2, 5]")
    again = load_shared_sets(folder)
    assert [q.id for q in again.questions][:3] == ["mmlu[9]", "mmlu[2]", "mmlu[5]"]
    before = dict(sets.revisions)
    assert before == dict(again.revisions) and before.keys() == SETS.keys()
    (folder / ALPACA).write_text((folder / ALPACA).read_text() + " ")
    after = dict(load_shared_sets(folder).revisions)
    assert after["mmlu"] == before["mmlu"] and after["alpaca"] != before["alpaca"]
    # An option may occur twice, as in MMLU itself: leaving such rows out would change the paper's sample.
    change_mmlu(folder, 9, "choices", ["same", "same", "other", "third"])
    assert load_shared_sets(folder).questions[0].options.count("same") == 2


def broken(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_shared_sets(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_missing_or_no_parquet(folder):
    (folder / MMLU).rename(folder / "kept")
    (folder / MMLU).write_text("question,choices")
    assert broken(folder).startswith(f"{folder / MMLU}: not a parquet file")
    (folder / "kept").rename(folder / MMLU)
    for file in (*INDICES.values(), MMLU, ALPACA):
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        assert broken(folder) == f"{folder / file}: the file is missing"
        (folder / file).write_bytes(content)


@pytest.mark.parametrize("file", INDICES.values())
def test_bad_numbers_and_a_row_in_both_splits(folder, file):
    for content, words in (
        ("[1, 2", ", line 1: not JSON"), ("{}", ": expected a list, got {}"), ("[]", ": expected a longer list"),
        ("[1, -1]", ", entry '[1]': expected greater than or equal to 0, got -1"), ("[1.5]", ", entry '[0]'"),
        ('["1"]', ", entry '[0]': expected a valid integer, got '1'"), ("[true]", ", entry '[0]'"),
        ("[3, 4, 3]", ": row 3 occurs twice"), ("[13, 14]", ", entry 1: row 14, but the data set has 14 rows"),
    ):  # fmt: skip
        (folder / file).write_text(content)
        assert broken(folder).startswith(f"{folder / file}{words}")
    ((name, _),) = (key for key, named in INDICES.items() if named == file)
    train, test = (folder / INDICES[name, split] for split in ("train", "test"))
    train.write_text("[3, 4]")
    test.write_text("[4, 5]")
    said = broken(folder)
    assert said.startswith(str(test)) and "train rows too" in said


def test_bad_questions_and_instructions(folder):
    """A missing column, or a bad value in it."""
    path, alpaca = folder / MMLU, folder / ALPACA
    questions, text = pd.read_parquet(path), alpaca.read_text()
    row = released_files()[INDICES["alpaca", "test"]][0]
    for field, value in product(("instruction", "output"), (None, "", " ", 5)):
        entries = json.loads(text)
        entries[row][field] = value
        alpaca.write_text(json.dumps(entries))
        assert broken(folder) == f"{alpaca}, row {row}, field {field!r}: expected text, got {value!r}"
    bad = {"question": [" ", None], "choices": [["a", "b", "c"], ["a", "b", "c", ""], None], "answer": [4, -1]}
    for column, values in bad.items():
        questions.drop(columns=column).to_parquet(path)
        said = broken(folder)
        assert said.startswith(f"{path}: no column {column!r}") and "subject" in said
        for value in values:
            questions.to_parquet(path)
            change_mmlu(folder, 1, column, value)
            assert broken(folder).startswith(f"{path}, row 1, field '{column}"), value


@pytest.fixture
def hub(folder, tmp_path, monkeypatch, cache) -> list:
    """A Hub that serves the folder's files, laid out as its own cache lays them out; the revisions asked for."""
    asked: list = []

    def download(repository, file, *, repo_type, revision):
        assert (repository, file) in SETS.values() and repo_type == "dataset"
        asked.append(revision)
        target = tmp_path / "hub" / repository.replace("/", "--") / "snapshots" / COMMIT / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / Path(file).name).read_bytes())
        return str(target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_revision_is_asked_for_once_and_its_commit_recorded(hub, folder, monkeypatch, tmp_path):
    places, commits = fetch_shared_sets()
    assert hub == ["main", "main"] and set(commits.values()) == {COMMIT}
    for name, path in places.items():
        assert path.read_bytes() == (folder / Path(SETS[name][1]).name).read_bytes()
        about = json.loads((path.parent / "ember.json").read_text())
        assert (about["repository"], about["revision"], about["commit"]) == (SETS[name][0], "main", COMMIT)
    assert fetch_shared_sets() == (places, commits) == fetch_shared_sets({"mmlu": COMMIT, "alpaca": "main"})
    assert hub == ["main", "main"]
    monkeypatch.setenv("EMBER_CACHE", str(tmp_path / "another"))
    for revisions in ({"mmlu": "v2"}, None):
        fetch_shared_sets(revisions)
    with pytest.raises(DamagedFileError, match=rf"holds v2 at {COMMIT}, not v3"):
        fetch_shared_sets({"mmlu": "v3"})
    with pytest.raises(DataError, match="'mmmlu'"):
        fetch_shared_sets({"mmmlu": "v3"})
    assert hub == ["main", "main", "v2", "main"]


def test_no_connection(cache, monkeypatch):
    for error in (LocalEntryNotFoundError, ConnectionError, ValueError):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=error("no route\nto the Hub")))
        with pytest.raises(DownloadError, match="fetch-data --shared") as caught:
            fetch_shared_sets()
        assert "no route" in str(caught.value) and "\n" not in str(caught.value)
    assert not (cache / "shared_sets").exists() and issubclass(RevisionNotFoundError, OSError)


def test_damage_is_noticed(hub):
    path = fetch_shared_sets()[0]["mmlu"]
    for damaged in (path.with_name("ember.json"), path):
        content = damaged.read_bytes()
        for spoil in (Path.unlink, lambda path: path.write_bytes(b"{}")):
            spoil(damaged)
            with pytest.raises(DamagedFileError, match="Delete the folder"):
                fetch_shared_sets()
        damaged.write_bytes(content)
    fetch_shared_sets()


@pytest.fixture
def cached(hub, folder, monkeypatch) -> None:
    """The released files and the data sets, as if fetched."""
    for room in ("mmlu_alpaca", "released"):
        monkeypatch.setattr(f"ember.data.{room}.fetch_released", lambda: folder)


def test_shared_data_and_suites_have_their_questions_and_instructions_without_a_folder_from_the_cache(cached, folder):
    ours, theirs, found = load_shared(), load_shared("released", folder=folder), load_shared("released")
    assert theirs == replace(load_shared_sets(folder), neutral=ours.neutral, neutral_fit=ours.neutral_fit)
    assert ours.revisions == () and dict(theirs.revisions).keys() == SETS.keys()
    assert found.questions == theirs.questions and dict(found.revisions) == {"mmlu": COMMIT, "alpaca": COMMIT}
    # And so has a suite of their source.
    concept = load_concept("Jar Town", source="released")
    theirs, ours = load_suite(concept, source="released"), load_suite(concept)
    for split in SPLITS:
        numbers = {name: released_files()[INDICES[name, split]] for name in SETS}
        assert [q.id for q in theirs.questions["general"][split]] == [f"mmlu[{k}]" for k in numbers["mmlu"]]
        assert [i.id for i in theirs.instructions[split]] == [f"alpaca[{k}]" for k in numbers["alpaca"]]
        assert theirs.questions["concept"] == ours.questions["concept"]
        assert theirs.texts == ours.texts and theirs.texts["other_sense"][split] == ()
    assert ours.questions["general"] == load_suite(make_concept()).questions["general"]


def test_an_empty_set_is_missing_and_not_0(cached):
    """A concept without other-sense texts in a suite of released sets: everything else is scored, and the trade tells
    one cost, what the neighbour loses.
    """
    assert not load_concept("Jar Town", source="released").other_sense
    loaded, ours = make_loaded(), make_concept()
    concept = replace(ours, other_sense=(), paragraphs=ours.paragraphs * 3, source="released")
    sizes = Sizes(questions=2, texts=3, other_texts=5, instructions=2, generations=2, new_tokens=3)
    suite = load_suite(concept, dict.fromkeys(SPLITS, sizes), source="released")
    configs = [METHODS["ember"].config(delta=d, rank=6, sparsity=0.1, features=tuple(range(6))) for d in (1.0, 5.0)]
    edits = {
        (name, config.delta): METHODS[method].run(loaded, concept, config, seed=1)
        for name, method in (("EMBER", "ember"), ("mean rows", "mean_rows"))
        for config in configs
    }
    edit: Edit = edits["EMBER", 1.0]
    base, after = evaluate(loaded, suite, "test"), evaluate(loaded, suite, "test", edit)
    assert set(base.items.set) == {"concept", "simdom", "general", "neutral", "paragraph", "instruction", "generation"}
    summary = compare(base.items, after.items).summary
    assert "other_sense" not in set(summary.set) and summary[summary.set == "general"].value.notna().all()
    labels = {"concept": "Tiny Rome", "method": "ember", "ember": False, "seed": 1, "cell": "delta=1"}
    unedited = compare(base.items, base.items).summary
    lines = headline(unedited.assign(**labels), summary.assign(**labels))
    assert len(lines) == 6 and not lines["measure (test split)"].str.contains("other-sense").any()

    marked = edit.rows_of(loaded.embedding_name)
    texts = {name: suite.texts[name]["test"] for name in suite.texts}
    everyday = everyday_exposure(loaded, marked, texts).set_index("set")
    assert everyday.n["other_sense"] == 0 and everyday.loc["other_sense", ["share", "per_thousand"]].isna().all()
    assert everyday.loc[["neutral", "paragraph"], ["share", "per_thousand"]].notna().all(axis=None)
    changes = token_changes(loaded, edit, {name: chosen for name, chosen in texts.items() if chosen}, marked)
    assert set(by_exposure(changes).set) == {"neutral", "paragraph"}

    probe = make_probe(loaded, suite)
    assert probe.texts.keys() == {"neutral"}
    items = pd.concat(
        [probe_edit(loaded, probe, edit).assign(edit=name, delta=delta) for (name, delta), edit in edits.items()]
    )
    assert items.edited.notna().all()
    found = curves(items, n_resamples=20)
    assert list(found.cost) == ["neighbour"]
    assert set(point_table(found).cost) == {"neighbour"} == set(area_table({("Tiny Rome", 1): found}).cost)
    assert list(equal_gain_table({("Tiny Rome", 1): found}, "mean rows").cost) == ["neighbour"]


@pytest.mark.skipif(not PAPER_DATA.is_dir(), reason="the sample of the authors' data is not beside the repository")
def test_the_authors_numbers(tmp_path):
    """As many as in the paper, none in two splits, all within the data sets' sizes."""
    folder = write_sets(tmp_path / "sets", rows=14_042)
    for name in INDICES.values():
        (folder / name).write_bytes((PAPER_DATA / name).read_bytes())
    entries = json.loads((folder / ALPACA).read_text())[:805]
    (folder / ALPACA).write_text(json.dumps(entries))
    sets = load_shared_sets(folder)
    assert Counter(question.split for question in sets.questions) == {"train": 50, "test": 1000}
    assert Counter(instruction.split for instruction in sets.instructions) == {"train": 150, "test": 150}
    concept = load_concept("Ancient Rome", source="released", folder=PAPER_DATA)
    assert concept.other_sense == () and len(concept.paragraphs) > 4
