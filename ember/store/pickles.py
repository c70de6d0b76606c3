"""Reading pickles without running them: arrays, tensors and plain containers; everything else is refused.

A pickle is a program: it names functions and calls them with arguments of its choice. Here no name leads to what it
names. The few that are admitted stand for functions of this module, which check their arguments and keep them;
objects of classes that the caller names become a ``StandIn``, which holds attributes. Nothing is imported, nothing of
the file's choosing runs, and nothing is allocated that the file does not hold. What remains in a hostile file's power
is to take time that grows with its size.
"""

import io
import itertools
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from ember.errors import DataError
from ember.store.inert import (
    Array,
    Call,
    Constant,
    Dtype,
    StandIn,
    Storage,
    Tensor,
    device_name,
    make_array,
    ordered_dict,
    parameter,
    plain_list,
    scalar,
    size,
    sizes_of,
)

DEPTH = 20  # of nesting; a path through endless lists would be as long as the file
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files of torch.save began before they were archives
# Python 3 writes none of these into a file. The first three reach the interpreter's registry of extensions.
_OPCODES = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_MALFORMED = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, TypeError, AttributeError, LookupError,
    ArithmeticError, MemoryError, RuntimeError,
)  # fmt: skip


def unpickle(path: str | Path, *, classes: Collection[str] = ()) -> dict[str, Any]:
    """The content of a pickle, or of a file of ``torch.save``, as flat fields.

    Parameters
    ----------
    path
        A plain pickle of any protocol, a ``torch.save`` archive, or a ``torch.save`` file from before the archives.
    classes
        Full names (``"package.module.Class"``) whose objects are read as bare attributes. They are not imported.

    Returns
    -------
    fields
        Dotted path → value: tensors (NumPy arrays too; on the CPU), lists, dicts of scalars, scalars. Attributes,
        keys and positions make up the path, as in ``nmf._parameters.F_``. None and empty containers are left out; a
        container that the file refers to twice is opened once.

    Raises
    ------
    DataError
        If the file is missing, is none of these, or asks for anything that is not admitted; the message says what.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    try:
        root = _archive(data, classes) if zipfile.is_zipfile(io.BytesIO(data)) else _stream(data, classes)
        return _flatten(root, limit=10 * len(data))
    except _MALFORMED as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: refused: {said}") from error


class _Unpickler(pickle.Unpickler):
    """One pickle of ``length`` bytes.

    ``storages`` maps keys to those met so far; ``read`` gives the bytes of one, if they are at hand.
    """

    def __init__(
        self,
        stream: io.BytesIO,
        classes: Collection[str] = (),
        *,
        length: int = 0,
        storages: dict[str, Storage] | None = None,
        read: Callable[[str], bytes] | None = None,
        nested: bool = False,
    ) -> None:
        super().__init__(stream)
        self._storages, self._read, self._left = storages, read, length
        self._classes: dict[str, Any] = {
            name: type("StandIn", (StandIn,), {"__slots__": (), "path": name}) for name in classes
        }
        numpy_calls: dict[str, Callable[..., Any]] = {"multiarray._reconstruct": make_array}
        numpy_calls |= {"multiarray.scalar": scalar, "numeric._frombuffer": lambda *args: Array().fill(*args)}
        calls: dict[str, Callable[..., Any]] = {
            f"numpy.{core}.{name}": call for core in ("core", "_core") for name, call in numpy_calls.items()
        }
        calls |= {
            "numpy.dtype": Dtype, "torch._utils._rebuild_tensor_v2": Tensor, "torch.Size": size,
            "torch._utils._rebuild_parameter": parameter, "torch.device": device_name,
            "collections.OrderedDict": ordered_dict, "_codecs.encode": self._encode,
        }  # fmt: skip
        calls |= {
            f"{module}.{kind}": plain_list for module in ("builtins", "__builtin__") for kind in ("set", "frozenset")
        }
        if not nested:  # the bytes of a storage hold no further storages
            calls["torch.storage._load_from_bytes"] = _load_from_bytes
        self._names: dict[str, Any] = {name: Call(call) for name, call in calls.items()}
        self._names["numpy.ndarray"] = Constant("ndarray")
        for name, dtype in _DTYPES.items():
            self._names |= {f"{part}.{name}Storage": Constant(dtype) for part in ("torch", "torch.cuda")}
            self._names[str(dtype)] = str(dtype)

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted in self._classes:
            return self._classes[wanted]
        # A dot within the name would walk from one object to its parts.
        if "." in name or wanted not in self._names:
            raise pickle.UnpicklingError(
                f"it asks for {wanted!r}, which is not admitted. If that is a class of which you want the attributes, "
                "name it in classes"
            )
        return self._names[wanted]

    def persistent_load(self, key: Any) -> Storage:
        if self._storages is None or not isinstance(key, tuple) or len(key) not in (5, 6):
            raise pickle.UnpicklingError("it refers to something other than a storage")
        kind, type_, name, _, numel, *view = key
        if kind != "storage" or not isinstance(type_, Constant) or not isinstance(type_.value, torch.dtype):
            raise pickle.UnpicklingError("it refers to something of another kind than storages")
        if not isinstance(name, str) or view not in ([], [None]):
            raise pickle.UnpicklingError("it names a storage in an unknown way")
        sizes_of((numel,))
        if name not in self._storages:
            self._storages[name] = Storage(type_.value, numel)
            if self._read is not None:
                self._storages[name].fill(self._read(name))
        return self._storages[name]

    def _encode(self, text: Any, encoding: Any) -> bytes:
        """How bytes are written by the protocols that have none."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("an encoding other than latin1 is not admitted")
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("it holds more bytes than the file")
        return text.encode("latin1")


def _next(stream: io.BytesIO, classes: Collection[str] = (), **options: Any) -> Any:
    """The pickle that begins where the stream stands, after a look at its instructions."""
    start = stream.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name in _OPCODES:
            raise pickle.UnpicklingError(f"the instruction {opcode.name} is not admitted")
        # The interpreter makes room for all numbers up to the one that it is told.
        if opcode.name.endswith("PUT") and (not isinstance(argument, int) or argument > count):
            raise pickle.UnpicklingError("it numbers its objects beyond their count")
    length = stream.tell() - start
    stream.seek(start)
    return _Unpickler(stream, classes, length=length, **options).load()


def _stream(data: bytes, classes: Collection[str], *, nested: bool = False) -> Any:
    """A plain pickle, or what ``torch.save`` wrote before the archives."""
    stream = io.BytesIO(data)
    first = _next(stream, classes, nested=nested)
    if first != _MAGIC or isinstance(first, bool):
        if nested or stream.tell() != len(data):
            raise pickle.UnpicklingError("something else follows the pickle")
        return first
    protocol, about = _next(stream), _next(stream)
    if protocol != _PROTOCOL or not isinstance(about, dict) or about.get("little_endian") is not True:
        raise pickle.UnpicklingError("it was written by an unknown version, or a machine of another byte order")
    storages: dict[str, Storage] = {}
    root, keys = _next(stream, classes, storages=storages, nested=nested), _next(stream)
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise pickle.UnpicklingError("its storages are not those that it lists")
    for key in keys:
        if int.from_bytes(stream.read(8), "little") != storages[key].numel:
            raise pickle.UnpicklingError("a storage is not as long as it claims")
        start, length = stream.tell(), storages[key].numel * storages[key].dtype.itemsize
        storages[key].fill(memoryview(data)[start : start + length])
        stream.seek(start + length)
    return root


def _load_from_bytes(data: Any) -> Storage:
    """A tensor within a plain pickle is a file of ``torch.save`` within it."""
    storage = _stream(data, (), nested=True) if isinstance(data, bytes) else None
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("the bytes of a storage hold something else")
    return storage


def _archive(data: bytes, classes: Collection[str]) -> Any:
    """A zip archive of ``torch.save``: ``data.pkl`` and, beside it, the storages."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickle.UnpicklingError("the archive is compressed; torch.save does not do that")
        if sum(entry.file_size for entry in entries) > len(data):
            raise pickle.UnpicklingError("the archive claims more than it holds")
        names = [entry.filename for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(names) != 1:
            raise pickle.UnpicklingError("the archive does not come from torch.save: it holds no data.pkl, or several")
        folder = names[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise pickle.UnpicklingError("it was written by a machine of another byte order")
        return _next(
            io.BytesIO(archive.read(names[0])),
            classes,
            storages={},
            read=lambda key: archive.read(f"{folder}data/{key}"),
        )


def _flatten(root: Any, *, limit: int) -> dict[str, Any]:
    """Fields by dotted path; what is copied may take ``limit`` bytes in all."""
    fields: dict[str, Any] = {}
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    while waiting:
        path, item = waiting.pop()
        if len(path) > DEPTH:
            raise pickle.UnpicklingError(f"it is nested more than {DEPTH} deep")
        members = _members(item, whole=bool(path))
        if members is None:
            limit -= 8 * len(item) if isinstance(item, tuple) else getattr(item, "nbytes", 0)
            if limit < 0:
                raise pickle.UnpicklingError("its arrays are several times as large as the file")
            value = _leaf(item)
            if value is not None:
                fields[".".join(path) or "value"] = value
        elif id(item) not in seen:
            seen.add(id(item))
            waiting.extend(reversed([((*path, str(key)), member) for key, member in members]))
    return fields


def _members(item: Any, *, whole: bool) -> list[tuple[Any, Any]] | None:
    """The parts of a container; None for a field, such as a list of scalars and, if ``whole``, a dict of scalars."""
    if isinstance(item, StandIn):
        item = item.attributes()
    elif isinstance(item, list | tuple):
        if all(map(_is_scalar, item)):
            return None if item else []
        return list(enumerate(item))
    elif not isinstance(item, dict) or (item and whole and all(map(_is_scalar, itertools.chain(*item.items())))):
        return None
    if not all(isinstance(key, str | int) for key in item):
        raise pickle.UnpicklingError("a table has keys that are neither text nor whole numbers")
    return list(item.items())


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bytes | int | float)


def _leaf(item: Any) -> Any:
    if isinstance(item, Array | Tensor):
        return item.value()
    if isinstance(item, tuple):
        return list(item)
    if isinstance(item, set | frozenset):
        return sorted(filter(_is_scalar, item), key=repr) or None
    return item if _is_scalar(item) or isinstance(item, list | dict) else None
