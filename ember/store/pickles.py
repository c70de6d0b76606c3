"""Reading pickles without running them: arrays, tensors and plain containers; everything else is refused.

A pickle is a program: it names functions and calls them. Here every name that is admitted leads to a ``Record``, which
keeps what it is called with and does nothing. Arrays and tensors are made of records once all is read, after comparing
what these claim with the bytes that are there. A hostile file may still take time that grows with its size.
"""

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ember.errors import DataError

DEPTH = 20  # of nesting; a path through endless lists would be as long as the file
_NO_VALUES = {"numpy.dtype", "torch.Size", "torch.device", "builtins.set", "builtins.frozenset"}
_NO_VALUES |= {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
_ADMITTED = _NO_VALUES | {
    "numpy.ndarray", "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer", "_codecs.encode", "collections.OrderedDict", "torch.storage._load_from_bytes",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
}  # fmt: skip


def unpickle(path: str | Path, *, classes: Collection[str] = ()) -> dict[str, Any]:
    """The content of a pickle (of protocol 2 or later), or of an archive of ``torch.save``, as flat fields.

    ``classes`` holds full names (``"package.module.Class"``) of objects whose attributes are read; they are not
    imported. The keys are dotted paths of attributes, keys and positions, as in ``nmf._parameters.F_``; the values are
    tensors (of NumPy's numbers too), scalars, lists of scalars, and arrays of text. A container that the file refers to
    twice is opened once. A ``DataError`` says why a file is refused.
    """
    fields: dict[str, Any] = {}
    try:
        data = Path(path).read_bytes()
        left = 10 * len(data)
        for name, value in _leaves(_content(data, classes), (), set()):
            left -= len(value) if isinstance(value, bytes) else getattr(value, "nbytes", 0)
            _require(left >= 0, "its arrays are several times as large as the file")
            if isinstance(value, torch.Tensor):
                fields[name] = value.detach().clone(memory_format=torch.contiguous_format)  # in memory of its own
            elif isinstance(value, str | bytes | int | float | list | tuple | np.ndarray):
                fields[name] = value
    except Exception as error:  # whatever a hostile file makes the readers raise
        cause = error.__context__ if "weights_only" in str(error) else error  # PyTorch advises to run the file
        said = str(cause).partition("\n")[0].partition(". Please use")[0][:500] or type(cause).__name__
        raise DataError(f"{path}: refused: {said}") from error
    return fields


class Record(dict[Any, Any]):
    """What a file says of one object: the class or function that it names, arguments, state, items. No behaviour."""

    __slots__ = ("args", "state")
    name: str

    def __init__(self, *args: Any) -> None:  # a dict would copy its argument
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _content(data: bytes, classes: Collection[str]) -> Any:
    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> type[Record]:
            name = f"{module}.{name}".replace("numpy.core.", "numpy._core.").replace("__builtin__.", "builtins.")
            refused = f"{name!r} is not admitted; for the attributes of a class, name it in classes"
            _require(name in _ADMITTED or name in classes, refused)
            return type("Record", (Record,), {"__slots__": (), "name": name if name in _ADMITTED else "object"})

    if data.startswith(b"PK"):
        return _saved(data)
    stream = io.BytesIO(data)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        # These reach the interpreter's registry of extensions, and it makes room for all numbers up to a PUT's.
        _require(not opcode.name.startswith("EXT"), f"the instruction {opcode.name} is not admitted")
        _require("PUT" not in opcode.name or int(argument or 0) <= count, "it numbers its objects beyond their count")
    _require(not stream.read(1), "something else follows the pickle (torch.save wrote such files before version 1.6)")
    return Reader(io.BytesIO(data)).load()


def _saved(data: bytes) -> Any:
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            held = sum(entry.file_size for entry in archive.infolist())
        _require(held <= len(data), "the archive is compressed, which torch.save does not do")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _leaves(item: Any, path: tuple[str, ...], opened: set[int]) -> Iterator[tuple[str, Any]]:
    """What is no container, or is a list of scalars, under its dotted path."""
    _require(len(path) <= DEPTH, f"it is nested more than {DEPTH} deep")
    value = _made(item)
    whole = isinstance(value, list | tuple) and value and all(isinstance(part, str | int | float) for part in value)
    if whole or not isinstance(value, list | tuple | dict):
        yield ".".join(path) or "value", value
    elif id(value) not in opened:
        opened.add(id(value))
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            _require(isinstance(key, str | int), "a dict has keys that are neither text nor whole numbers")
            yield from _leaves(member, (*path, str(key)), opened)


def _made(item: Any) -> Any:
    """What a record stands for; it looks at one other at a time, or a nest of them would take for ever."""
    match item:
        case Record(name="object"):
            return getattr(item, "state", None) or {}
        case Record(name="_codecs.encode", args=(text, "latin1")):  # bytes, in the protocols that have none
            return text.encode("latin1")
        case Record(name="numpy._core.numeric._frombuffer"):
            return _array(*item.args)
        case Record(name="numpy._core.multiarray.scalar", args=(dtype, raw)):
            return _array(raw, dtype, ())
        case Record(name="numpy._core.multiarray._reconstruct", state=(_, shape, dtype, fortran, raw)):
            return _array(raw, dtype, shape, "F" if fortran else "C")
        case Record(name="torch._utils._rebuild_parameter", args=(tensor, *_)):
            return _made(tensor)
        case Record(name="torch._utils._rebuild_tensor_v2", args=(Record(args=(data,)), offset, size, stride, *_)):
            values = _saved(_made(data))
            return torch.empty(0, dtype=values.dtype).set_(values._untyped_storage).as_strided(size, stride, offset)
        case Record(name=name) if name not in _NO_VALUES | {"collections.OrderedDict"}:
            raise pickle.UnpicklingError(f"{name} does not belong there, or needs other arguments")
    return item


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    """Numbers, and text of fixed width: an array of objects would be a pickle within the pickle."""
    code, endian, raw = dtype.args[0], dtype.state[1] if dtype.state else "|", _made(raw)
    _require(re.fullmatch(r"f[248]|[iu][1248]|b1|U[1-9]\d{0,3}", code), "arrays of this type are not admitted")
    array: np.ndarray[Any, Any] = np.ndarray(shape, np.dtype(code).newbyteorder(endian), raw, order=order)
    _require(array.nbytes == len(raw), f"an array of shape {array.shape} does not have {len(raw)} bytes")
    native = array.astype(array.dtype.newbyteorder("="), "C")
    return native if native.dtype.kind == "U" else torch.from_numpy(native)


def _require(fine: object, message: str) -> None:
    if not fine:
        raise pickle.UnpicklingError(message)
