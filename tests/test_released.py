"""Reading and fetching the authors' files, with tiny invented ones of the same form."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.released import (
    KEYS,
    OPTIONS,
    PAPER_DATA,
    choice,
    git,
    make_repository,
    released_files,
    write_released,
)

from ember.data.ours import list_concepts, load_concept, load_shared
from ember.data.released import (
    CHOICE,
    COMMIT,
    FETCHED,
    FILES,
    NEUTRAL,
    OPEN,
    PARAGRAPHS,
    SENTENCES,
    fetch_released,
    list_released,
    load_released,
)
from ember.errors import DamagedFileError, DataError, DownloadError, UnknownNameError
from ember.evaluation.data_checks import check_concept


@pytest.fixture
def released(tmp_path) -> Path:
    return write_released(tmp_path / "released")


# Reading


def test_a_concept_has_the_texts_of_its_files(released):
    (released / "notes.json").write_text("{")  # further files do not matter
    assert list_released(released) == ["Jar Town", "Élan"]
    concept = load_released("Jar Town", released)
    assert (concept.name, concept.slug, concept.source) == ("Jar Town", "jar-town", "released")
    assert concept.sentences == ("Jar Town has jars.", "Jars of Jar Town are old.")  # one line each
    assert concept.neutral == ("It rained on day 1.", "It rained on day 2.")
    assert concept.paragraphs == ("Jar Town is a town. Its jars are known.",)
    assert concept.other_sense == concept.further_neutral == ()
    assert "Jar Town" in concept.simdom


@pytest.mark.parametrize("name", ["Jar Town", "Élan"])
def test_questions_have_the_place_and_the_options_of_the_file(released, name):
    questions = load_released(name, released).questions
    assert [q.id for q in questions] == [f"{key}[{k}]" for key in KEYS for k in range(3)]
    for q in questions:
        key, number = q.id.removesuffix("]").split("[")
        row = released_files()[CHOICE][name][key][int(number)]
        assert (q.set, q.split) == KEYS[key]
        assert (q.question, q.answer) == (row["q"], row["correct_answer"]) and q.options[q.gold] == q.answer
        assert sorted(q.options) == sorted(row["options"])
    # An open answer of other words is an alias.
    assert [q.aliases for q in questions] == [(), ("some flint",), ()] * 4


def test_order_of_open_questions_and_escapes_of_json_do_not_matter(tmp_path, released):
    content = released_files()
    for rows in content[OPEN]["Élan"].values():
        rows.reverse()
    other = write_released(tmp_path / "other", content)
    for name, value in content.items():
        (other / name).write_text(json.dumps(value))
    assert load_released("Élan", other) == load_released("Élan", released)


# Names


@pytest.mark.parametrize("name", ["Jar Town", "jar town", "JAR TOWN", "jar-town"])
def test_load_concept_reads_released_data(released, name):
    concept = load_concept(name, source="released", folder=released)
    assert concept == load_released("Jar Town", released)
    assert (concept.source, load_concept(list_concepts()[0]).source) == ("released", "ours")


def test_unknown_concept_lists_the_known_ones(released):
    with pytest.raises(UnknownNameError, match=r"'Atlantis'; known: Jar Town, Élan\."):
        load_concept("Atlantis", source="released", folder=released)


@pytest.mark.parametrize("source", ["theirs", "", "Released", "../released"])
def test_unknown_source(released, source):
    for load in (lambda: load_concept("Jar Town", source=source, folder=released), lambda: load_shared(source)):
        with pytest.raises(UnknownNameError, match=r"unknown source .*; known: ours, released"):
            load()


@pytest.mark.parametrize(
    "name",
    [
        "../lure", "a/b", "", ".", "..", "/etc", "lure", "~", "\0", "../Jar Town", "jar/town", "jar\\town", "jar..town",
        "/jar-town", "Jar Town/",
    ],
)  # fmt: skip
def test_a_name_is_never_a_path(released, monkeypatch, name):
    """A whole set of files waits where the name would lead; nothing but the list of concepts is read."""
    content = json.loads(json.dumps(released_files()).replace("Jar Town", "Trap"))
    for lure in (released.parent / "lure", released / "a" / "b", released / "lure"):
        write_released(lure, content)
    read, really = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: read.append(path) or really(path, *a, **k))
    with pytest.raises(UnknownNameError, match="Jar Town"):
        load_concept(name, source="released", folder=released)
    assert set(read) == {released / SENTENCES}


# Broken files


def broken(folder: Path, name: str = "Jar Town") -> str:
    """What the reader says about a broken folder."""
    with pytest.raises(DataError) as caught:
        load_released(name, folder)
    return str(caught.value)


def line_of(path: Path, text: str) -> int:
    """Number of the only line with this text."""
    (number,) = [k for k, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if text in line]
    return number


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ": the file is missing"),
        (b"", ": the file is empty"),
        (b" \n\n", ": the file is empty"),
        (b'[\n\n"C\xe6sar"]', ", line 3: not UTF-8 (byte 5)"),
        (b'[\n\n"Gaul"', ", line 3: not JSON"),
        *((content, "") for content in (b"[]", b"{}", b"null", b"5", b'"text"', b"[1]", b'{"Jar Town": []}')),
        (b'{"Jar Town": null}', ""),
    ],
)
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_form(released, file, content, said):
    (released / file).unlink() if content is None else (released / file).write_bytes(content)
    assert broken(released).startswith(f"{released / file}{said}")


@pytest.mark.parametrize("file", [CHOICE, OPEN, PARAGRAPHS])
def test_a_concept_that_one_file_lacks(released, file):
    content = released_files()[file]
    del content["Jar Town"]
    write_released(released, {file: content})
    assert broken(released) == f"{released / file}: no entry for 'Jar Town'"
    load_released("Élan", released)


# File, the entry in it, the entry's place, and a text on its line (none in an entry that holds lists only).
ROWS = [
    (SENTENCES, lambda c: c[0], "entry 0", "Jar Town"),
    (NEUTRAL, lambda c: c[1], "entry 1", "https://x/2"),
    (CHOICE, lambda c: c["Jar Town"], "Jar Town", ""),
    (CHOICE, lambda c: c["Jar Town"]["QA_test"][2], "Jar Town, QA_test[2]", choice("Jar Town QA_test", 2)["q"]),
    (OPEN, lambda c: c["Jar Town"], "Jar Town", ""),
    (
        OPEN,
        lambda c: c["Jar Town"]["SimdomQA_train"][1],
        "Jar Town, SimdomQA_train[1]",
        choice("Jar Town SimdomQA_train", 1)["q"],
    ),
    (OPEN, lambda c: c["Élan"]["QA_test"][1], "Élan, QA_test[1]", choice("Élan QA_test", 1)["q"]),
    (PARAGRAPHS, lambda c: c["Jar Town"], "Jar Town", ""),
]
FIELDS = [(*row, field) for row in ROWS for field in row[1](released_files()[row[0]])]
BAD_VALUES = {str: (None, 5, "", " ", ["x"]), list: (None, True, [], {}, "x")}
BAD_FIELDS = [(*f, value) for f in FIELDS for value in BAD_VALUES[type(f[1](released_files()[f[0]])[f[4]])]]


@pytest.mark.parametrize(("file", "row", "place", "text", "field"), FIELDS)
def test_missing_field(released, file, row, place, text, field):
    content = released_files()[file]
    del row(content)[field]
    write_released(released, {file: content})
    said = broken(released, "Élan" if "Élan" in place else "Jar Town")
    assert said.startswith(f"{released / file}, line ") and said.endswith(f", {place}: missing field {field!r}")


@pytest.mark.parametrize("ascii_", [True, False])
@pytest.mark.parametrize(("file", "row", "place", "text"), ROWS)
def test_unknown_field_and_its_line(released, file, row, place, text, ascii_):
    content = released_files()[file]
    row(content)["hint"] = ["Rome"]
    path = released / file
    path.write_text(json.dumps(content, indent=1, ensure_ascii=ascii_), encoding="utf-8")
    line = line_of(path, json.dumps(text, ensure_ascii=ascii_)) if text else "?"
    said = broken(released, "Élan" if "Élan" in place else "Jar Town")
    assert said == f"{path}, line {line}, {place}: unknown field 'hint'"


@pytest.mark.parametrize(("file", "row", "place", "text", "field", "value"), BAD_FIELDS)
def test_wrong_type_or_blank(released, file, row, place, text, field, value):
    content = released_files()[file]
    row(content)[field] = value
    write_released(released, {file: content})
    said = broken(released, "Élan" if "Élan" in place else "Jar Town")
    assert said.startswith(f"{released / file}, line ")
    assert f", {place}, field {field!r}: " in said and said.endswith(f"got {value!r}")


@pytest.mark.parametrize(("file", "field", "row"), [
    (SENTENCES, "sentences", lambda c: c[0]),
    (PARAGRAPHS, "RelearnParagraphs", lambda c: c["Jar Town"]),
])  # fmt: skip
@pytest.mark.parametrize("value", [None, 5, "", " \n", ["x"], {}])
def test_a_text_that_is_none(released, file, field, row, value):
    content = released_files()[file]
    row(content)[field].append(value)
    number = len(row(content)[field]) - 1
    write_released(released, {file: content})
    assert broken(released).endswith(f", Jar Town, field '{field}[{number}]': expected text, got {value!r}")


@pytest.mark.parametrize(
    "changes",
    [
        *({"options": [*OPTIONS[:3], last]} for last in ("clay", "", " ", 5, None, ["amber"])),
        {"options": OPTIONS[:3]},
        {"options": [*OPTIONS, "jade"]},
        {"options": ["clay", "clay", "glass", "flint"]},
        {"correct_answer": "jade"},
        {"correct_answer": "Clay"},
    ],
)
@pytest.mark.parametrize("key", KEYS)
def test_bad_options(released, key, changes):
    """The message names the line on which the question stands."""
    content = released_files()[CHOICE]
    row = choice(f"Jar Town {key}", 2) | changes
    content["Jar Town"][key][2] = row
    path = write_released(released, {CHOICE: content}) / CHOICE
    said = broken(released)
    assert said.startswith(f"{path}, line {line_of(path, row['q'])}, Jar Town, {key}[2], field 'options")
    assert repr(row["options"][-1]) in said
    load_released("Élan", released)


@pytest.mark.parametrize("broken_one", [0, 1])
def test_a_text_that_stands_twice_is_named_by_both_lines(released, broken_one):
    content = released_files()[CHOICE]
    places = [content["Jar Town"]["QA_test"], content["Élan"]["QA_train"]]
    for rows in places:
        rows[1] = choice("both", 1)
    places[broken_one][1]["hint"] = "x"
    path = write_released(released, {CHOICE: content}) / CHOICE
    lines = [k for k, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if "jar 1 of both" in line]
    name, key = [("Jar Town", "QA_test[1]"), ("Élan", "QA_train[1]")][broken_one]
    assert len(lines) == 2
    assert broken(released, name).startswith(f"{path}, line {lines[0]} or {lines[1]}, {name}, {key}: unknown field")


def test_a_list_without_names_cannot_be_listed(released):
    write_released(released, {SENTENCES: [{"concept": "", "sentences": ["x"]}]})
    with pytest.raises(DataError, match="field 'concept'"):
        list_released(released)


# Fetching


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
def repository(made, tmp_path) -> tuple[Path, str]:
    """A copy of the repository that a test may change, and its commit."""
    return shutil.copytree(made[0], tmp_path / "repository"), made[1]


@pytest.fixture
def fetched(made, cache) -> Path:
    """The folder of the fetched files, in a cache that a test may change."""
    shutil.copytree(made[2], cache)
    (folder,) = (cache / "released").iterdir()
    return folder


def again(repository) -> Path:
    return fetch_released(repository=str(repository[0]), commit=repository[1])


def left_over(cache: Path) -> list[Path]:
    """Whatever is in the cache, except empty parent folders."""
    return [path for path in cache.rglob("*") if path.is_file() or path.parent.name == "released"]


def test_fetched_files_are_those_of_the_commit(repository, cache):
    fetched = again(repository)
    assert cache in fetched.parents
    for name in FETCHED:
        assert (fetched / name).read_bytes() == (repository[0] / "data" / name).read_bytes()
    assert {path.name for path in fetched.iterdir()} == {*FETCHED, "ember.json"}
    assert list_released(fetched) == ["Jar Town", "Élan"]
    assert list(fetched.parent.iterdir()) == [fetched]


def test_fetched_again_needs_no_git(repository, fetched, monkeypatch):
    shutil.rmtree(repository[0])
    monkeypatch.setenv("PATH", "")
    assert again(repository) == fetched


def test_what_the_repository_holds_later_does_not_matter(repository, cache):
    """The commit's files are fetched, not the branch's."""
    folder, _ = repository
    (folder / "data" / CHOICE).write_text("{}")
    git(folder, "commit", "--quiet", "-a", "-m", "later")
    assert json.loads((again(repository) / CHOICE).read_text()) == released_files()[CHOICE]


def test_load_and_list_fetch_by_themselves(fetched):
    """From the cache, in which these stand for the files of the pinned commit."""
    record = fetched / "ember.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"commit": COMMIT}))
    pinned = fetched.rename(fetched.with_name(COMMIT[:12]))
    assert list_released() == ["Jar Town", "Élan"]
    assert load_concept("Jar Town", source="released") == load_released("Jar Town", pinned)


@pytest.mark.parametrize("commit", ["0" * 40, "f" * 40, "nope", ""])
def test_wrong_commit(repository, cache, commit):
    with pytest.raises(DownloadError, match=r"git could not fetch it: .*folder="):
        fetch_released(repository=str(repository[0]), commit=commit)
    assert left_over(cache) == []


@pytest.mark.parametrize("file", FETCHED)
def test_a_commit_that_lacks_a_file(repository, cache, file):
    folder, _ = repository
    (folder / "data" / file).unlink()
    git(folder, "commit", "--quiet", "-a", "-m", "lacks one")
    with pytest.raises(DownloadError, match=file):
        fetch_released(repository=str(folder), commit=git(folder, "rev-parse", "HEAD"))
    assert left_over(cache) == []


def test_without_git(repository, cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DownloadError, match="git"):
        again(repository)
    assert left_over(cache) == []


def test_an_unreachable_repository_is_one_line_and_can_be_tried_again(repository, cache, tmp_path):
    hidden = repository[0].rename(tmp_path / "hidden")
    with pytest.raises(DownloadError) as caught:
        again(repository)
    assert str(cache) in str(caught.value) and "\n" not in str(caught.value)
    assert left_over(cache) == []
    hidden.rename(repository[0])
    assert list_released(again(repository)) == ["Jar Town", "Élan"]


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\0" + content[len(content) // 2 + 1 :])


@pytest.mark.parametrize(
    "spoil", [damage, Path.unlink, lambda path: path.write_bytes(b"")], ids=["byte", "gone", "empty"]
)
@pytest.mark.parametrize("file", [*FETCHED, "ember.json"])
def test_a_damaged_file_is_noticed(repository, fetched, file, spoil):
    spoil(fetched / file)
    with pytest.raises(DamagedFileError, match=str(fetched)) as caught:
        again(repository)
    assert "Delete the folder" in str(caught.value)
    shutil.rmtree(fetched)
    assert list_released(again(repository)) == ["Jar Town", "Élan"]


@pytest.mark.parametrize(
    "content", ["null", "[]", "{}", '{"sha256": []}', '{"sha256": {}}', '{"sha256": null}', "\xff"]
)
def test_a_damaged_record_is_noticed(repository, fetched, content):
    (fetched / "ember.json").write_text(content, encoding="latin-1")
    with pytest.raises(DamagedFileError, match=str(fetched)):
        again(repository)


def test_a_git_hook_does_not_redirect_the_fetch(repository, cache, tmp_path, monkeypatch):
    (other := tmp_path / "other").mkdir()
    git(other, "init", "--quiet")
    before = sorted(other.rglob("*"))
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    again(repository)
    assert sorted(other.rglob("*")) == before


# The authors' data


@pytest.mark.skipif(not PAPER_DATA.is_dir(), reason="the sample of the authors' data is not beside the repository")
@pytest.mark.parametrize("name", ["Ancient Rome", "Golf", "Uranium"])
def test_the_authors_data_leak(name):
    """What made the checks necessary: questions in both splits, and fit sentences that state what is tested."""
    assert name in list_released(PAPER_DATA)
    concept = load_concept(name, source="released", folder=PAPER_DATA)
    assert len(concept.questions) == 200 and len(concept.sentences) == len(concept.neutral) == 300
    report = check_concept(concept)
    counts = report.table.set_index("check").value
    assert counts["question in two splits"] > 0
    assert counts["fit sentence states a test fact"] > 0
    assert not report.ok
    places = report.findings.groupby("check")["where"]
    assert places.get_group("question in two splits").str.fullmatch(r"(QA|SimdomQA)_test\[\d+\]").all()
    assert places.get_group("fit sentence states a test fact").str.fullmatch(r"sentences\[\d+\]").all()
