"""What a pickle gets into its hands when it is read without being run (``ember.store.pickles``).

Every object checks what it is given and keeps it; arrays and tensors are made only once all of the file has been read.
"""

import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class StandIn:
    """An object of a class that is not loaded: its attributes, and no behaviour."""

    __slots__ = ("args", "state")
    path = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> "StandIn":
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def attributes(self) -> dict[Any, Any]:
        """What the file says of the object: constructor arguments by position, then attributes."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        if not all(part is None or isinstance(part, dict) for part in parts):
            raise pickle.UnpicklingError(f"the state of {self.path!r} is not a table of attributes")
        return dict(enumerate(self.args)) | {key: value for part in parts for key, value in (part or {}).items()}


class Inert:
    """Whatever a pickle gets into its hands: it has no attributes to set."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes an object that has no state")


class Call(Inert):
    """A function that a pickle may call. No class, no function: those could be altered."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class Constant(Inert):
    """What is only ever handed on: array and storage types."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Dtype(Inert):
    """Type of an array's values."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        # Numbers and text of fixed width: an array of objects would be a pickle within the pickle.
        if not isinstance(code, str) or not re.fullmatch(r"f[248]|[iu][1248]|b1|U[1-9]\d{0,3}", code):
            raise pickle.UnpicklingError(f"arrays of type {code!r} are not admitted")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order, *nested = state[1:5]
        if order not in ("<", ">", "|", "=") or nested != [None] * 3:
            raise pickle.UnpicklingError("arrays of structured types are not admitted")
        self.dtype = self.dtype.newbyteorder(order)


class Array(Inert):
    """A NumPy array still to be made, so that a file that claims many does not fill the memory."""

    __slots__ = ("dtype", "order", "raw", "shape")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: Any, dtype: Any, shape: Any, order: str = "C") -> "Array":
        """Refuse anything but bytes that make up exactly this shape."""
        if not isinstance(dtype, Dtype) or not isinstance(raw, bytes | bytearray) or order not in ("C", "F"):
            raise pickle.UnpicklingError("an array needs bytes and a type")
        if _count(sizes_of(shape)) * dtype.dtype.itemsize != len(raw):
            raise pickle.UnpicklingError(f"an array of shape {shape} does not have {len(raw)} bytes")
        self.raw, self.dtype, self.shape, self.order = raw, dtype.dtype, tuple(shape), order
        return self

    @property
    def nbytes(self) -> int:
        """What ``value`` takes."""
        return len(self.raw)

    def value(self) -> Any:
        """The tensor, or the list of texts."""
        array = np.frombuffer(self.raw, self.dtype).reshape(self.shape, order=self.order)  # type: ignore[call-overload]
        if self.dtype.kind == "U":
            return array.tolist()
        return torch.from_numpy(np.array(array, dtype=self.dtype.newbyteorder("="), order="C"))


class Storage(Inert):
    """The values behind one tensor or several."""

    __slots__ = ("data", "dtype", "flat", "numel")

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        self.dtype, self.numel = dtype, numel
        self.data: bytes | memoryview = b""
        self.flat: torch.Tensor | None = None

    def fill(self, data: bytes | memoryview) -> None:
        """Refuse anything but the bytes of all values."""
        if len(data) != self.numel * self.dtype.itemsize:
            raise pickle.UnpicklingError(f"a storage of {self.numel} values does not have {len(data)} bytes")
        self.data = data

    def values(self) -> torch.Tensor:
        """All values [numel], made once."""
        if self.flat is None:
            self.flat = torch.frombuffer(bytearray(self.data), dtype=self.dtype)
        return self.flat


class Tensor(Inert):
    """A tensor still to be made, because older files hold its values after everything else."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("a tensor needs a storage")
        self.storage, self.size, self.stride = storage, sizes_of(size), sizes_of(stride)
        (self.offset,) = sizes_of((offset,))
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        # Neither beyond the end nor, by a stride of 0, larger than what is there.
        if _count(self.size) > storage.numel or (_count(self.size) and last >= storage.numel):
            raise pickle.UnpicklingError(f"a tensor of shape {self.size} reaches beyond its {storage.numel} values")

    @property
    def nbytes(self) -> int:
        """What ``value`` takes."""
        return _count(self.size) * self.storage.dtype.itemsize

    def value(self) -> torch.Tensor:
        """The tensor, with memory of its own."""
        if not self.nbytes:
            return torch.empty(self.size, dtype=self.storage.dtype)
        view = self.storage.values().as_strided(self.size, self.stride, self.offset)
        return view.clone(memory_format=torch.contiguous_format)


def sizes_of(values: Any) -> tuple[int, ...]:
    """A shape, or strides: at most eight whole numbers from 0."""
    if not isinstance(values, tuple) or len(values) > 8 or not all(type(n) is int and n >= 0 for n in values):
        raise pickle.UnpicklingError("a shape must be a few whole numbers")
    return values


def _count(sizes: tuple[int, ...]) -> int:
    return int(math.prod([*sizes]))


def make_array(kind: Any, shape: Any, code: Any) -> Array:
    """numpy._core.multiarray._reconstruct: an array whose content follows."""
    if not isinstance(kind, Constant) or kind.value != "ndarray":
        raise pickle.UnpicklingError("an array of another class is not admitted")
    return Array()


def parameter(data: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_parameter: the tensor itself."""
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError("a parameter needs a tensor")
    return data


def scalar(dtype: Any, raw: Any) -> Any:
    """numpy._core.multiarray.scalar: a number or text of Python's own."""
    array = Array().fill(raw, dtype, ())
    return np.frombuffer(array.raw, array.dtype)[0].item()


def ordered_dict() -> dict[Any, Any]:
    """collections.OrderedDict, whose items follow."""
    return {}


def plain_list(values: Any = None) -> list[Any]:
    """set and frozenset: the list of what is in it, not a copy."""
    if values is not None and not isinstance(values, list):
        raise pickle.UnpicklingError("a set needs a list")
    return values or []


def size(values: Any) -> tuple[int, ...]:
    """torch.Size: a tuple."""
    return sizes_of(values)


def device_name(kind: Any, index: Any = None) -> str:
    """torch.device: its name."""
    return f"{kind if isinstance(kind, str) else '?'}{'' if index is None else f':{int(index)}'}"
