"""Files and folders appear whole or not at all, and nothing of a user's goes; hashes and file names."""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ember.errors import DamagedFileError, EmberError
from ember.store.files import MANIFEST, atomic_file, digest, read_sealed, sealed_dir, sha256_of, write_text
from ember.store.paths import slug

FAILURES = [ValueError("bad"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), SystemExit(1)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half_write(writer, target: Path, failure: BaseException) -> None:
    with writer(target) as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("half")
        raise failure


def test_a_file_or_folder_is_in_place_after_the_block(tmp_path):
    file, folder = tmp_path / "deep" / "table.csv", tmp_path / "deeper" / "edit"
    with atomic_file(file) as temporary, sealed_dir(folder) as other:
        assert (temporary.parent, other.parent) == (file.parent, folder.parent)  # no rename across file systems
        assert temporary.suffix == ".csv"  # writers look at it
        temporary.write_text("new")
        (other / "a").write_text("new")
        (other / "a").chmod(0o600)
        assert not file.exists() and not folder.exists()
    assert file.read_text() == (folder / "a").read_text() == "new"
    modes = [path.stat().st_mode & 0o777 for path in (file, folder / "a", folder / MANIFEST, folder)]
    assert modes == [0o644, 0o644, 0o644, 0o755]  # others may read it; temporary files are private
    write_text(file, "δ newer")  # a file replaces an existing one
    assert file.read_text(encoding="utf-8") == "δ newer"
    assert names(file.parent) == ["table.csv"] and names(folder.parent) == ["edit"]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_leaves_everything_as_it_was(tmp_path, failure, old):
    file, folder = tmp_path / "table.csv", tmp_path / "edit"
    if old is not None:
        file.write_text(old)
        sealed(folder, a=old)
    for writer, target in ((atomic_file, file), (sealed_dir, folder)):
        with pytest.raises(type(failure)):
            half_write(writer, target, failure)
    assert names(tmp_path) == ([] if old is None else ["edit", "table.csv"])
    assert old is None or file.read_text() == (folder / "a").read_text() == old


def sealed(folder: Path, about: dict[str, Any] | None = None, **files: str) -> Path:
    """A sealed folder with these files; a double underscore is a slash."""
    with sealed_dir(folder, about) as target:
        for name, text in files.items():
            path = target / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return folder


def test_an_intact_folder_of_ours_is_replaced_whole_and_a_file_is_not(tmp_path):
    """Subfolders and all; so is an empty folder."""
    (tmp_path / "edit").mkdir()
    for files in ({"a": "a", "deep__b": "b"}, {"c": "c"}):
        sealed(tmp_path / "edit", **files)
    assert names(tmp_path / "edit") == ["c", MANIFEST]
    assert names(tmp_path) == ["edit"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EmberError, match="file is a file"):
        sealed(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_was_said_of_a_folder_comes_back(tmp_path):
    """Also what the block adds, and NumPy's numbers."""
    about: dict[str, Any] = {"rank": np.int64(3)}
    with sealed_dir(tmp_path / "edit", about):
        about["late"] = [np.float64(0.5)]
    assert read_sealed(tmp_path / "edit") == {"rank": 3, "late": [0.5]}
    with pytest.raises(AttributeError, match="set"):  # has no JSON form
        sealed(tmp_path / "other", {"x": {1}})
    assert names(tmp_path) == ["edit"]


FOREIGN = {
    "a further file": (lambda folder: (folder / "mine.txt").write_text("mine"), "mine.txt"),
    "a changed file": (lambda folder: (folder / "a").write_text("mine"), "a"),
    "a further file in a subfolder": (lambda folder: (folder / "deep" / "mine.txt").write_text("mine"), "mine.txt"),
    "an empty subfolder": (lambda folder: (folder / "notes").mkdir(), "notes"),
    "a link": (lambda folder: (folder / "mine").symlink_to(folder.parent), "mine"),
    "a file of ours behind a link": (lambda folder: relink(folder / "a"), "a"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "a, deep"),
    "a manifest of another form": (lambda folder: (folder / MANIFEST).write_text("[]"), MANIFEST),
    "a manifest without hashes": (lambda folder: (folder / MANIFEST).write_text('{"sha256": "x"}'), MANIFEST),
}


def relink(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


@pytest.mark.parametrize(("change", "named"), FOREIGN.values(), ids=FOREIGN)
def test_what_was_not_written_here_is_never_replaced(tmp_path, change, named):
    folder = sealed(tmp_path / "edit", a="a", deep__b="b")
    change(folder)
    before = {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}
    with pytest.raises(EmberError, match="nothing was replaced") as caught, sealed_dir(folder):
        pytest.fail("the block began")
    assert str(folder) in str(caught.value) and named in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")} == before
    with sealed_dir(folder, ours=True):  # as in the cache
        pass
    assert names(folder) == [MANIFEST]


@pytest.mark.parametrize(("damage", "named"), [
    (lambda folder: (folder / "deep" / "b").write_text("x"), "deep/b"), (lambda folder: (folder / "a").unlink(), "a"),
    (lambda folder: (folder / "a").write_bytes(b"\x60"), "a is damaged"),  # one bit
    (lambda folder: (folder / "a").write_bytes(b""), "a is damaged"),
    (lambda folder: folder.rename(folder.with_name("moved")), MANIFEST),
    (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    *((lambda folder, text=text: (folder / MANIFEST).write_bytes(text), named) for text, named in (
        (b"{", "incomplete or damaged"), (b'{"sha256": {"a": "0"}}', "a is damaged"), (b"{}", "sha256"),
        (b"\xff\xfe\x00", "incomplete or damaged"), (b"[1]", "incomplete or damaged"), (b'{"sha256": "0"}', MANIFEST),
    )),
])  # fmt: skip
def test_reading_names_the_damaged_file_and_what_to_do(tmp_path, damage, named):
    folder = sealed(tmp_path / "edit", a="a", deep__b="b")
    assert read_sealed(folder) == {}
    damage(folder)
    with pytest.raises(DamagedFileError, match=r"Fetch it again$") as caught:
        read_sealed(folder, mend="Fetch it again")
    assert str(folder) in str(caught.value) and named in str(caught.value)


def test_digest_is_stable_and_tells_apart():
    """Stored: other keys would orphan every cache."""
    assert digest("a", 1, b"x", ("b", 0.5)) == "198f64587224657f741a"
    for one, other in (
        (("a", "b"), ("b", "a")), (("ab", "c"), ("a", "bc")), ((1,), (1.0,)), ((1,), ("1",)), ((), ("",)),
        ((b"a",), ("a",)), ((np.float64(1 / 3),), (np.float64(0.333333),)),
    ):  # fmt: skip
        assert digest(*one) != digest(*other)


@dataclass(frozen=True)
class Setting:
    value: object


@pytest.mark.parametrize("part", [
    torch.zeros(2000), np.zeros(2000), pd.DataFrame({"a": [1]}), torch.tensor(0.123456789), [1, (torch.zeros(1),)],
    {"a": torch.zeros(1)}, Setting(({1: torch.zeros(1)},)),
], ids=lambda part: type(part).__name__)  # fmt: skip
def test_digest_refuses_what_repr_abridges(part):
    """Two tensors of 2000 values look alike."""
    with pytest.raises(TypeError, match="tensor_hash"):
        digest("a", part)


def test_sha256_is_the_published_one(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_slug_names_folders_and_runs_and_is_never_empty():
    known = {"Ancient Rome": "ancient-rome", "smollm2-135m": "smollm2-135m", " A/../b ": "a-b", "x (y)": "x-y"}
    assert {name: slug(slug(name)) for name in known} == {name: slug(name) for name in known} == known
    assert slug("日本") and slug("Ελλάδα")
