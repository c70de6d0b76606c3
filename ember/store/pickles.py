"""Reading pickles without running them: arrays, tensors and plain containers; everything else is refused.

A pickle is a program: it names functions and calls them with arguments of its choice. Here every name that is admitted
leads to a ``Record``, which keeps what it is called with and does nothing. Once all of the file is read, arrays and
tensors are made of records, after comparing what these claim with the bytes that are there; ``torch.load`` reads what
``torch.save`` wrote. A hostile file may still take time that grows with its size.
"""

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ember.errors import DataError

DEPTH = 20  # of nesting; a path through endless lists would be as long as the file
_MALFORMED = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, TypeError, AttributeError, LookupError)
_TOO_LARGE = (ArithmeticError, MemoryError, RuntimeError)
_SCALAR = (str, bytes, int, float, type(None))
_TENSOR, _STORAGE = "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"
_CORES, _BUILTINS = ("numpy.core", "numpy._core"), ("builtins", "__builtin__")  # before and after a renaming


def unpickle(path: str | Path, *, classes: Collection[str] = ()) -> dict[str, Any]:
    """The content of a pickle (of protocol 2 or later), or of an archive of ``torch.save``, as flat fields.

    ``classes`` holds full names (``"package.module.Class"``) whose objects are read as bare attributes; they are not
    imported. The keys are dotted paths of attributes, keys and positions, as in ``nmf._parameters.F_``. The values are
    tensors on the CPU (of NumPy arrays too), lists, dicts of scalars, and scalars. None and empty containers are left
    out; a container that the file refers to twice is opened once.

    Raises
    ------
    DataError
        If the file is missing, is none of these, or asks for anything that is not admitted; the message says what.
    """
    try:
        data = Path(path).read_bytes()
        content = _archive(data, classes) if data.startswith(b"PK") else _plain(data, classes)
        return _flatten(content, classes, limit=10 * len(data))
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    except (*_MALFORMED, *_TOO_LARGE) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:500]
        raise DataError(f"{path}: refused: {said}") from error


class Record:
    """What a file says of one object: the class or function that it names, arguments, state. No behaviour."""

    __slots__ = ("args", "state")
    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Record":
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @classmethod
    def called(cls, name: str) -> type["Record"]:
        """Stands for a class or function."""
        return type("Record", (cls,), {"__slots__": (), "name": name})


class Table(dict[Any, Any]):
    """An ordered dict, whose items follow; it has no state to set."""

    __slots__ = ()
    name = "collections.OrderedDict"

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes of a dict")


class _Unpickler(pickle.Unpickler):
    classes: Collection[str]

    def find_class(self, module: str, name: str) -> type:
        wanted = f"{module}.{name}"
        refused = f"it asks for {wanted!r}, which is not admitted; for the attributes of a class, name it in classes"
        _require(wanted in {*self.classes, *_ADMITTED}, refused)
        return Table if wanted == Table.name else Record.called(wanted)


def _plain(data: bytes, classes: Collection[str]) -> Any:
    """One pickle, after a look at its instructions."""
    end = -1
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        # These reach the interpreter's registry of extensions, and it makes room for all numbers up to a PUT's.
        _require(not opcode.name.startswith("EXT"), f"the instruction {opcode.name} is not admitted")
        numbered = not opcode.name.endswith("PUT") or (isinstance(argument, int) and argument <= count)
        _require(numbered, "it numbers its objects beyond their count")
        end = position or 0
    _require(end + 1 == len(data), "something else follows the pickle (torch.save wrote such files before version 1.6)")
    reader = _Unpickler(io.BytesIO(data))
    reader.classes = classes
    return reader.load()


def _archive(data: bytes, classes: Collection[str]) -> Any:
    """A zip archive of ``torch.save``."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        honest = stored and sum(entry.file_size for entry in entries) <= len(data)
        _require(honest, "the archive is compressed, which torch.save does not do, or claims more than it holds")
        orders = [archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder")]
        _require(all(order == b"little" for order in orders), "it was written by a machine of another byte order")
    ours = {*classes, *(name for name in _ADMITTED if not name.startswith(("torch.", "collections.")))}
    with torch.serialization.safe_globals([(Record.called(name), name) for name in ours]):
        return _saved(data)


def _saved(data: bytes | bytearray) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message advises to run the file
        cause = str(error.__context__ or error).partition(". Please use")[0]
        raise pickle.UnpicklingError(f"{cause}; for the attributes of a class, name it in classes") from error


def _bytes(item: Any) -> bytes | bytearray:
    if isinstance(item, Record):  # how bytes are written by the protocols that have none
        text, encoding = _named(item, "_codecs.encode").args
        _require(isinstance(text, str) and encoding == "latin1", "an encoding other than latin1 is not admitted")
        return bytes(text, "latin1")
    _require(isinstance(item, bytes | bytearray), "an array needs bytes")
    return item


def _dtype(item: Any) -> np.dtype[Any]:
    """Numbers and text of fixed width: an array of objects would be a pickle within the pickle."""
    code, state = _named(item, "numpy.dtype").args[0], item.state or (3, "|", None, None, None)
    plain = isinstance(code, str) and re.fullmatch(r"f[248]|[iu][1248]|b1|U[1-9]\d{0,3}", code)
    _require(plain and state[1] in tuple("<>|=") and state[2:5] == (None,) * 3, "arrays of this type are not admitted")
    return np.dtype(code).newbyteorder(state[1])


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray[Any, Any]:
    """Values of this shape; NumPy refuses one that needs more bytes than there are."""
    raw = _bytes(raw)
    array: np.ndarray[Any, Any] = np.ndarray(shape, _dtype(dtype), raw, order=order)
    _require(array.nbytes == len(raw), f"an array of shape {array.shape} does not have {len(raw)} bytes")
    return array


def _restored(_: Any, shape: Any, dtype: Any, fortran: Any, raw: Any) -> np.ndarray[Any, Any]:
    return _array(raw, dtype, shape, "F" if fortran else "C")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """A view of a storage, which is a file of ``torch.save``; PyTorch refuses one that reaches beyond it."""
    data = _bytes(*_named(storage, _STORAGE).args)
    _require(data.startswith(b"\x80\x02"), "the bytes of a storage are an archive, or something else")
    values = _saved(data)
    _require(isinstance(values, torch.storage.TypedStorage), "the bytes of a storage hold something else")
    return torch.empty(0, dtype=values.dtype).set_(values._untyped_storage).as_strided(size, stride, offset)


def _named(item: Any, name: str) -> Record:
    _require(isinstance(item, Record) and item.name == name, f"it gives something else where {name} belongs")
    return item


# What records stand for. Each looks at one further record at a time, or a nest of them would take for ever.
_MAKERS: dict[str, Callable[[Record], Any]] = {
    "numpy.dtype": lambda record: str(_dtype(record)),
    **{f"{core}.multiarray._reconstruct": lambda record: _restored(*record.state) for core in _CORES},
    **{f"{core}.multiarray.scalar": lambda r: _array(r.args[1], r.args[0], ()).item() for core in _CORES},
    **{f"{core}.numeric._frombuffer": lambda record: _array(*record.args) for core in _CORES},
    _TENSOR: lambda record: _tensor(*record.args),
    "torch._utils._rebuild_parameter": lambda record: _tensor(*_named(record.args[0], _TENSOR).args),
    "torch.Size": lambda record: tuple(*record.args),
    "torch.device": lambda record: ":".join(str(part) for part in record.args if isinstance(part, str | int)),
    "_codecs.encode": _bytes,
    **{f"{module}.{kind}": lambda record: set(*record.args) for module in _BUILTINS for kind in ("set", "frozenset")},
}
_DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
_ADMITTED = {*_MAKERS, *_DTYPES, "numpy.ndarray", _STORAGE, Table.name}


def _flatten(root: Any, classes: Collection[str], *, limit: int) -> dict[str, Any]:
    """Fields by dotted path; what is copied may take ``limit`` bytes in all."""
    fields: dict[str, Any] = {}
    opened: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    while waiting:
        path, item = waiting.pop()
        _require(len(path) <= DEPTH, f"it is nested more than {DEPTH} deep")
        members = _members(item, classes, whole=bool(path))
        if members is None:
            value = _MAKERS[item.name](item) if isinstance(item, Record) else item
            limit -= value.nbytes if hasattr(value, "nbytes") else 8 * len(value) if hasattr(value, "__len__") else 0
            _require(limit >= 0, "its arrays are several times as large as the file")
            fields[".".join(path) or "value"] = _own(value)
        elif id(item) not in opened:
            opened.add(id(item))
            named = all(isinstance(key, str | int) for key, _ in members)
            _require(named, "a dict has keys that are neither text nor whole numbers")
            waiting.extend(reversed([((*path, str(key)), member) for key, member in members]))
    return {path: value for path, value in fields.items() if value is not None}


def _members(item: Any, classes: Collection[str], *, whole: bool) -> list[tuple[Any, Any]] | None:
    """The parts of a container; None for a field, such as a list of scalars and, if ``whole``, a dict of scalars."""
    if isinstance(item, Record) and item.name in classes:
        parts = item.state if isinstance(item.state, tuple) and len(item.state) == 2 else (item.state,)
        return [*enumerate(item.args), *(pair for part in parts if part is not None for pair in part.items())]
    if not isinstance(item, list | tuple | dict):
        return None
    pairs = list(item.items() if isinstance(item, dict) else enumerate(item))
    field = whole or not isinstance(item, dict)
    return None if field and all(isinstance(part, _SCALAR) for pair in pairs for part in pair) else pairs


def _own(value: Any) -> Any:
    """The value with memory of its own, a type by its name; None for what is no field."""
    match value:
        case torch.Tensor() if value.device.type == "cpu" and value.layout == torch.strided:
            return value.detach().clone(memory_format=torch.contiguous_format)
        case np.ndarray():
            native = value.astype(value.dtype.newbyteorder("="), "C")
            return native.tolist() if native.dtype.kind == "U" else torch.from_numpy(native)
        case set() | frozenset():
            return sorted(value, key=repr) if value and all(isinstance(member, _SCALAR) for member in value) else None
        case list() | tuple() | dict():
            return (dict(value) if isinstance(value, dict) else list(value)) or None
        case type() | torch.dtype() | torch.device():
            return getattr(value, "name", None) or str(value)
    return value if isinstance(value, _SCALAR) else None


def _require(fine: object, message: str) -> None:
    if not fine:
        raise pickle.UnpicklingError(message)
