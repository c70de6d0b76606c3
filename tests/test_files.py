"""Files appear whole or not at all; hashes and file names."""

import errno
from pathlib import Path

import pytest

from ember.store.files import atomic_dir, atomic_file, digest, sha256_of, write_text
from ember.store.paths import slug

FAILURES = [ValueError("bad"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), SystemExit(1)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half_write(writer, target: Path, failure: BaseException) -> None:
    with writer(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("half")
        raise failure


def test_file_is_in_place_after_the_block(tmp_path):
    target = tmp_path / "deep" / "table.csv"
    with atomic_file(target) as temporary:
        assert temporary.parent == target.parent  # a rename across file systems is not atomic
        assert temporary.suffix == ".csv"  # writers look at it
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["table.csv"]


def test_file_replaces_an_existing_one(tmp_path):
    target = tmp_path / "table.csv"
    write_text(target, "old")
    write_text(target, "δ new")
    assert target.read_text(encoding="utf-8") == "δ new"
    assert names(tmp_path) == ["table.csv"]


def test_others_may_read_the_file(tmp_path):
    """The temporary file is private, as mkstemp makes it."""
    write_text(tmp_path / "table.csv", "x")
    assert (tmp_path / "table.csv").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("old", [None, "old"])
def test_failed_file_leaves_everything_as_it_was(tmp_path, failure, old):
    target = tmp_path / "table.csv"
    if old is not None:
        target.write_text(old)
    with pytest.raises(type(failure)):
        half_write(atomic_file, target, failure)
    assert names(tmp_path) == ([] if old is None else ["table.csv"])
    assert old is None or target.read_text() == old


def test_folder_is_in_place_after_the_block(tmp_path):
    target = tmp_path / "deep" / "edit"
    with atomic_dir(target) as temporary:
        assert temporary.parent == target.parent
        (temporary / "a").write_text("new")
        assert not target.exists()
    assert (target / "a").read_text() == "new"
    assert names(target.parent) == ["edit"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_folder_replaces_an_existing_one_whole(tmp_path):
    target = tmp_path / "edit"
    for name in ("a", "b"):
        with atomic_dir(target) as temporary:
            (temporary / name).write_text(name)
    assert names(target) == ["b"]
    assert names(tmp_path) == ["edit"]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_failed_folder_leaves_everything_as_it_was(tmp_path, failure):
    target = tmp_path / "edit"
    with atomic_dir(target) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(type(failure)):
        half_write(atomic_dir, target, failure)
    assert names(tmp_path) == ["edit"]
    assert (target / "a").read_text() == "old"


def test_digest_is_stable():
    """Stored: other keys would orphan every cache."""
    assert digest("a", 1, b"x", ("b", 0.5)) == "f7d1d365ecf76faa1ce8"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("b", "a")),
        (("ab", "c"), ("a", "bc")),
        ((1,), (1.0,)),
        ((1,), ("1",)),
        ((), ("",)),
        ((b"a",), ("a",)),
    ],
)
def test_digest_tells_apart(one, other):
    assert digest(*one) != digest(*other)


def test_sha256_is_the_published_one(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Ancient Rome", "ancient-rome"), ("smollm2-135m", "smollm2-135m"), (" A/../b ", "a-b"), ("x (y)", "x-y")],
)
def test_slug(name, expected):
    assert slug(name) == expected
    assert slug(expected) == expected


@pytest.mark.parametrize("name", ["日本", "Ελλάδα"])
def test_slug_is_never_empty(name):
    """It names folders and runs."""
    assert slug(name)
