"""Writing files and folders whole or not at all, sealing them with hashes, and the cache of derived tensors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ember.errors import DamagedFileError, DataError, EmberError
from ember.store.paths import cache_dir

if TYPE_CHECKING:  # files are read without it
    from torch import Tensor

MANIFEST = "ember.json"
LAYOUT = b"2\0"  # of cached folders; in every key, so that those of an older layout are left alone


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it into place only if the block succeeds, or leave all as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def sealed_dir(
    folder: Path, about: Mapping[str, Any] | None = None, *, manifest: str = MANIFEST, ours: bool = False
) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that replaces it, whole or not at all, if the block succeeds.

    Written last, ``manifest`` holds ``about`` (JSON; the block may still add to it) and, under ``sha256``, the hash of
    every file, which ``read_sealed`` verifies. A ``folder`` that is a file, or holds anything that was not written here
    or was changed since, is an ``EmberError``: nothing is replaced. ``ours`` is for the cache, where whatever is there
    goes.
    """
    if not ours:
        _refuse_foreign(folder, manifest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        for path in files:
            path.chmod(0o644)  # some writers' files are private
        hashes = {str(path.relative_to(temporary)): sha256_of(path) for path in files}
        sealed = {**(about or {}), "sha256": hashes}
        text = json.dumps(sealed, indent=1, default=lambda value: value.item())  # NumPy's numbers
        (temporary / manifest).write_text(text + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_sealed(folder: Path, *, manifest: str = MANIFEST, mend: str = "Delete it") -> dict[str, Any]:
    """What the manifest of a sealed folder says, once every file has proved to be what was written.

    A ``DamagedFileError`` names a manifest or file that is missing or damaged, and ends with ``mend``.
    """
    try:
        about = json.loads((folder / manifest).read_text(encoding="utf-8"))
        hashes = dict(about.pop("sha256"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{folder / manifest} is incomplete or damaged ({error!r}). {mend}") from error
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFileError(f"{path} is missing. {mend}")
        if sha256_of(path) != expected:
            raise DamagedFileError(f"{path} is damaged: its SHA-256 is not the one in {manifest}. {mend}")
    return dict(about)


def _refuse_foreign(folder: Path, manifest: str) -> None:
    """An error that names what ``folder`` holds beside the files that its manifest lists, as they were written."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise EmberError(f"{folder} is a file; name a folder")
    try:
        sealed = dict(json.loads((folder / manifest).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        foreign = [path.name for path in folder.iterdir()]
    else:
        files = {folder / name: sha256 for name, sha256 in sealed.items()}
        same = {path for path, sha256 in files.items() if path.is_file() and sha256_of(path) == sha256}
        ours = {path for path in (folder / manifest, *same) if not path.is_symlink()}
        ours |= {parent for path in ours for parent in path.parents}
        foreign = [str(path.relative_to(folder)) for path in folder.rglob("*") if path not in ours]
    if foreign:
        what = f"{folder} holds other files, or changed ones ({', '.join(sorted(foreign)[:5])})"
        raise EmberError(f"{what}; nothing was replaced. Name a folder of its own")


def cached_tensors(
    kind: str, key: str, compute: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON facts kept in the user cache under ``kind/key``, which names everything that they depend on."""
    from safetensors.torch import load_file, save_file

    folder = cache_dir() / kind / key
    if not folder.exists():
        tensors, about = compute()
        with sealed_dir(folder, {"about": dict(about)}, ours=True) as target:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "tensors.safetensors")
    about = read_sealed(folder)["about"]
    return load_file(folder / "tensors.safetensors"), about


def read_utf8(path: Path) -> str:
    """The text of a data file; a missing, empty or wrongly encoded one is a ``DataError`` that names it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(*parts: object) -> str:
    """Short SHA-256 over the representations of ``parts``; for cache keys.

    A part that is or holds an array, a tensor or a table, whose representation leaves much out, is a ``TypeError``.
    """
    running = hashlib.sha256(LAYOUT)
    for part in parts:
        _refuse_abridged(part)
        running.update(part if isinstance(part, bytes) else repr(part).encode())
        running.update(b"\0")
    return running.hexdigest()[:20]


def _refuse_abridged(part: Any) -> None:
    import numpy

    if hasattr(part, "__array__") and not isinstance(part, numpy.generic):
        raise TypeError(f"{type(part).__name__}: its repr leaves values out; give ember.models.weights.tensor_hash")
    if isinstance(part, Mapping):
        part = (*part.keys(), *part.values())
    elif is_dataclass(part) and not isinstance(part, type):
        part = [getattr(part, field.name) for field in fields(part)]
    for member in part if isinstance(part, list | tuple | set | frozenset) else ():
        _refuse_abridged(member)
