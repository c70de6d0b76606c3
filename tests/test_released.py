"""Reading and fetching the authors' files, with tiny invented ones of the same form."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from helpers.released import KEYS, OPTIONS, PAPER_DATA, choice, git, make_repository, released_files, write_released

from ember.data.ours import list_concepts, load_concept, load_shared
from ember.data.released import COMMIT, FETCHED, FILES, fetch_released, list_released, load_released
from ember.errors import DamagedFileError, DataError, DownloadError, UnknownNameError
from ember.evaluation.data_checks import check_concept

SENTENCES, NEUTRAL, CHOICE, OPEN, PARAGRAPHS = FILES


@pytest.fixture
def released(tmp_path) -> Path:
    return write_released(tmp_path / "released")


def test_a_concept_has_the_texts_of_its_files_under_any_spelling_of_its_name(released):
    (released / "notes.json").write_text("{")  # further files do not matter
    assert list_released(released) == ["Jar Town", "Élan"]
    concept = load_released("Jar Town", released)
    assert (concept.name, concept.slug, concept.source) == ("Jar Town", "jar-town", "released")
    assert concept.sentences == ("Jar Town has jars.", "Jars of Jar Town are old.")  # one line each
    assert concept.neutral == ("It rained on day 1.", "It rained on day 2.")
    assert concept.paragraphs == ("Jar Town is a town. Its jars are known.",)
    assert concept.other_sense == concept.further_neutral == ()
    assert "Jar Town" in concept.simdom
    for name in ("Jar Town", "jar town", "JAR TOWN", "jar-town"):
        assert load_concept(name, source="released", folder=released) == concept
    assert load_concept(list_concepts()[0]).source == "ours"
    for source in ("theirs", "", "Released", "../released"):
        for load in (lambda s: load_concept("Jar Town", source=s, folder=released), load_shared):
            with pytest.raises(UnknownNameError, match=r"unknown source .*; known: ours, released"):
                load(source)


def test_questions_have_the_place_and_the_options_of_the_file(released):
    """Whatever the order of the open questions and the escapes of JSON."""
    content = released_files()
    for name in ("Jar Town", "Élan"):
        questions = load_released(name, released).questions
        assert [q.id for q in questions] == [f"{key}[{k}]" for key in KEYS for k in range(3)]
        for q in questions:
            key, number = q.id.removesuffix("]").split("[")
            row = content[CHOICE][name][key][int(number)]
            assert (q.set, q.split) == KEYS[key]
            assert (q.question, q.answer) == (row["q"], row["correct_answer"]) and q.options[q.gold] == q.answer
            assert sorted(q.options) == sorted(row["options"])
        # An open answer of other words is an alias.
        assert [q.aliases for q in questions] == [(), ("some flint",), ()] * 4
    before = load_released("Élan", released)
    for rows in content[OPEN]["Élan"].values():
        rows.reverse()
    for name, value in content.items():
        (released / name).write_text(json.dumps(value))
    assert load_released("Élan", released) == before


def broken(folder: Path, name: str = "Jar Town") -> str:
    """What the reader says about a broken folder."""
    with pytest.raises(DataError) as caught:
        load_released(name, folder)
    return str(caught.value)


def lines_of(path: Path, text: str) -> list[int]:
    """Numbers of the lines with this text."""
    return [k for k, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if text in line]


@pytest.mark.parametrize(("content", "said"), [
    (None, ": the file is missing"), (b"", ": the file is empty"), (b" \n\n", ": the file is empty"),
    (b'[\n\n"C\xe6sar"]', ", line 3: not UTF-8 (byte 5)"),
    (b'[\n\n"Gaul"', ", line 3: not JSON"),
    *((content, "") for content in (b"[]", b"{}", b"null", b"5", b'"text"', b"[1]", b'{"Jar Town": []}')),
    (b'{"Jar Town": null}', ""),
])  # fmt: skip
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_form(released, file, content, said):
    (released / file).unlink() if content is None else (released / file).write_bytes(content)
    assert broken(released).startswith(f"{released / file}{said}")


def test_a_concept_that_one_file_lacks_and_a_list_without_names(released):
    for file in (CHOICE, OPEN, PARAGRAPHS):
        content = released_files()[file]
        write_released(released, {file: {name: entry for name, entry in content.items() if name != "Jar Town"}})
        assert broken(released) == f"{released / file}: no entry for 'Jar Town'"
        load_released("Élan", released)
        write_released(released, {file: content})
    write_released(released, {SENTENCES: [{"concept": "", "sentences": ["x"]}]})
    with pytest.raises(DataError, match="field 'concept'"):
        list_released(released)


# File, the entry in it, the entry's place, and a text on its line (none in an entry that holds lists only).
ROWS = [
    (SENTENCES, lambda c: c[0], "entry 0", "Jar Town"),
    (NEUTRAL, lambda c: c[1], "entry 1", "https://x/2"),
    (CHOICE, lambda c: c["Jar Town"], "Jar Town", ""),
    (OPEN, lambda c: c["Jar Town"], "Jar Town", ""),
    (PARAGRAPHS, lambda c: c["Jar Town"], "Jar Town", ""),
    *(
        (file, lambda c, n=name, k=key, at=number: c[n][k][at], f"{name}, {key}[{number}]", question)
        for file, name, key, number in (
            (CHOICE, "Jar Town", "QA_test", 2), (OPEN, "Jar Town", "SimdomQA_train", 1), (OPEN, "Élan", "QA_test", 1)
        )
        for question in [choice(f"{name} {key}", number)["q"]]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("file", "row", "place", "text"), ROWS)
def test_a_field_that_is_unknown_missing_of_a_wrong_type_or_blank(released, file, row, place, text):
    path, name = released / file, "Élan" if "Élan" in place else "Jar Town"
    content = released_files()[file]
    row(content)["hint"] = ["Rome"]
    for ascii_ in (True, False):
        path.write_text(json.dumps(content, indent=1, ensure_ascii=ascii_), encoding="utf-8")
        (line,) = lines_of(path, json.dumps(text, ensure_ascii=ascii_)) if text else "?"
        assert broken(released, name) == f"{path}, line {line}, {place}: unknown field 'hint'"
    for field, good in row(released_files()[file]).items():
        content = released_files()[file]
        del row(content)[field]
        write_released(released, {file: content})
        said = broken(released, name)
        assert said.startswith(f"{path}, line ") and said.endswith(f", {place}: missing field {field!r}")
        for value in (None, 5, "", " ", ["x"]) if isinstance(good, str) else (None, True, [], {}, "x"):
            row(content)[field] = value
            write_released(released, {file: content})
            said = broken(released, name)
            assert said.startswith(f"{path}, line ") and f", {place}, field {field!r}: " in said
            assert said.endswith(f"got {value!r}")


def test_texts_that_are_none_and_bad_options_with_the_line_of_the_question(released):
    for file, place, field in ((SENTENCES, 0, "sentences"), (PARAGRAPHS, "Jar Town", "RelearnParagraphs")):
        for value in (None, 5, "", " \n", ["x"], {}):
            content = released_files()[file]
            (texts := content[place][field]).append(value)
            write_released(released, {file: content})
            where = f", Jar Town, field '{field}[{len(texts) - 1}]': "
            assert broken(released).endswith(f"{where}expected text, got {value!r}")
        write_released(released)
    lasts = [[*OPTIONS[:3], last] for last in ("clay", "", " ", 5, None, ["amber"])]
    sizes = [OPTIONS[:3], [*OPTIONS, "jade"], ["clay", "clay", "glass", "flint"]]
    answers = [{"correct_answer": "jade"}, {"correct_answer": "Clay"}]
    for key, changes in product(KEYS, (*({"options": options} for options in lasts + sizes), *answers)):
        content = released_files()[CHOICE]
        row = content["Jar Town"][key][2] = choice(f"Jar Town {key}", 2, **changes)
        path = write_released(released, {CHOICE: content}) / CHOICE
        (line,) = lines_of(path, row["q"])
        said = broken(released)
        assert said.startswith(f"{path}, line {line}, Jar Town, {key}[2], field 'options"), changes
        assert repr(row["options"][-1]) in said
        load_released("Élan", released)


def test_a_text_that_stands_twice_is_named_by_both_lines(released):
    for name, key in (("Jar Town", "QA_test"), ("Élan", "QA_train")):
        content = released_files()[CHOICE]
        content["Jar Town"]["QA_test"][1], content["Élan"]["QA_train"][1] = choice("both", 1), choice("both", 1)
        content[name][key][1]["hint"] = "x"
        path = write_released(released, {CHOICE: content}) / CHOICE
        first, second = lines_of(path, "jar 1 of both")
        assert broken(released, name).startswith(f"{path}, line {first} or {second}, {name}, {key}[1]: unknown field")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str, Path]:
    """A repository, its commit, and a cache after fetching from it."""
    folder, cache = (tmp_path_factory.mktemp(name) for name in ("repository", "cache"))
    commit = make_repository(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBER_CACHE", str(cache))
        fetch_released(repository=str(folder), commit=commit)
    return folder, commit, cache


@pytest.fixture
def repository(made, tmp_path) -> Path:
    """A copy of the repository that a test may change."""
    return shutil.copytree(made[0], tmp_path / "repository")


@pytest.fixture
def again(made, repository) -> Callable[[], Path]:
    """Fetches the commit from the repository."""
    return lambda: fetch_released(repository=str(repository), commit=made[1])


@pytest.fixture
def fetched(made, cache) -> Path:
    """The folder of the fetched files, in a cache that a test may change."""
    shutil.copytree(made[2], cache)
    (folder,) = (cache / "released").iterdir()
    return folder


def commit_all(folder: Path) -> str:
    git(folder, "commit", "--quiet", "-a", "-m", "later")
    return git(folder, "rev-parse", "HEAD")


def test_fetched_files_are_those_of_the_commit(again, repository, cache, tmp_path, monkeypatch):
    """What the branch holds later does not matter, and a git hook does not redirect the fetch."""
    wanted = {name: (repository / "data" / name).read_bytes() for name in FETCHED}
    (repository / "data" / CHOICE).write_text("{}")
    commit_all(repository)
    (other := tmp_path / "other").mkdir()
    git(other, "init", "--quiet")
    before = sorted(other.rglob("*"))
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    fetched = again()
    assert cache in fetched.parents and sorted(other.rglob("*")) == before
    assert {path.name: path.read_bytes() for path in fetched.iterdir() if path.name != "ember.json"} == wanted
    assert list_released(fetched) == ["Jar Town", "Élan"]
    assert list(fetched.parent.iterdir()) == [fetched]


def test_what_was_fetched_needs_no_git_and_load_and_list_find_it(again, repository, fetched, monkeypatch):
    """At last these stand in the cache for the files of the pinned commit."""
    shutil.rmtree(repository)
    monkeypatch.setenv("PATH", "")
    assert again() == fetched
    record = fetched / "ember.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"commit": COMMIT}))
    pinned = fetched.rename(fetched.with_name(COMMIT[:12]))
    assert list_released() == ["Jar Town", "Élan"]
    assert load_concept("Jar Town", source="released") == load_released("Jar Town", pinned)


def refused(cache: Path, repository: Path, commit: str) -> str:
    """What is said where nothing can be fetched: one line, and nothing is left in the cache but empty parents."""
    with pytest.raises(DownloadError) as caught:
        fetch_released(repository=str(repository), commit=commit)
    said = str(caught.value)
    assert f"({cache}) and git could not fetch it: " in said and "folder=" in said and "\n" not in said
    assert not any(path.is_file() or path.parent.name == "released" for path in cache.rglob("*"))
    return said


def test_what_cannot_be_fetched_is_told_and_can_be_tried_again(made, again, repository, cache, tmp_path, monkeypatch):
    for wrong in ("", "0" * 40, "f" * 40, "nope"):
        refused(cache, repository, wrong)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert "'git'" in refused(cache, repository, made[1])
    hidden = repository.rename(tmp_path / "hidden")
    refused(cache, repository, made[1])
    hidden.rename(repository)
    for file in FETCHED:
        path = repository / "data" / file
        content = path.read_bytes()
        path.unlink()
        assert file in refused(cache, repository, commit_all(repository))
        path.write_bytes(content)
        git(repository, "add", "-A")
    assert list_released(again()) == ["Jar Town", "Élan"]


@pytest.mark.parametrize("file", [*FETCHED, "ember.json"])
def test_a_damaged_file_is_noticed(again, fetched, file):
    content = (fetched / file).read_bytes()
    half = len(content) // 2
    records = (b"null", b"[]", b"{}", b'{"sha256": []}', b'{"sha256": {}}', b'{"sha256": null}', b"\xff")
    spoilt = (None, b"", content[:half] + b"\0" + content[half + 1 :], *(records if file == "ember.json" else ()))
    for value in spoilt:
        (fetched / file).unlink() if value is None else (fetched / file).write_bytes(value)
        with pytest.raises(DamagedFileError, match=rf"{fetched}.*Delete the folder"):
            again()
        (fetched / file).write_bytes(content)
    shutil.rmtree(fetched)
    assert list_released(again()) == ["Jar Town", "Élan"]


@pytest.mark.skipif(not PAPER_DATA.is_dir(), reason="the sample of the authors' data is not beside the repository")
@pytest.mark.parametrize("name", ["Ancient Rome", "Golf", "Uranium"])
def test_the_authors_data_leak(name):
    """What made the checks necessary: questions in both splits, and fit sentences that state what is tested."""
    assert name in list_released(PAPER_DATA)
    concept = load_concept(name, source="released", folder=PAPER_DATA)
    assert len(concept.questions) == 200 and len(concept.sentences) == len(concept.neutral) == 300
    report = check_concept(concept)
    places = report.findings.groupby("check")["where"]
    assert places.get_group("question in two splits").str.fullmatch(r"(QA|SimdomQA)_test\[\d+\]").all()
    assert places.get_group("fit sentence states a test fact").str.fullmatch(r"sentences\[\d+\]").all()
    assert not report.table.ok.all()
