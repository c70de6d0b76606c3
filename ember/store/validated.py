"""What users write (rows of data, profiles, settings), checked by pydantic and refused in one line."""

import reprlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from ember.errors import DataError, UnknownNameError

T = TypeVar("T")
Text = Annotated[str, StringConstraints(pattern=r"\S")]  # not blank
Listed = Annotated[tuple[T, ...], Field(strict=False)]  # YAML and JSON know lists only

_WANTED = {"string_type": "text", "string_pattern_mismatch": "text", "tuple_type": "a list", "model_type": "an object"}
_WANTED |= {"list_type": "a list", "dict_type": "an object", "dataclass_type": "an object"}
_WANTED |= {"too_short": "a longer list", "too_long": "a shorter list"}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


class Strict(BaseModel):
    """Base of what users write: exactly these fields, of exactly these types, unchangeable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class Loose(Strict, extra="ignore"):
    """At least these fields."""


def validated(kind: type[T], raw: object, where: str, *, word: str = "field", file: str = "", hint: str = "") -> T:
    """``raw`` as a ``kind``: a ``Strict`` model, a dataclass, or any type that pydantic knows.

    The errors are one line each and begin with ``where`` (file and line). A field, called ``word``, is named by its
    path, such as ``sizes.train.texts[3]``; ``hint`` follows the message about a value of a wrong type. What a validator
    of ``kind`` says by a ``ValueError`` stands alone: it shows the value, or hides it. A missing, unknown or wrong one
    is a ``DataError``; an unknown field an ``UnknownNameError`` with the known ones, if ``file`` names its file.
    """
    try:
        return _adapter(kind).validate_python(raw)
    except ValidationError as error:
        # A misspelt name is unknown and missing at once, and explains more than a value does.
        first = min(error.errors(), key=lambda e: ([*_UNKNOWN, "missing", e["type"]]).index(e["type"]))
    type_, loc, outer = first["type"], first["loc"], _path(raw, first["loc"][:-1])
    if type_ in _UNKNOWN and file:
        raise UnknownNameError(f"{word} in {f'{outer} of ' if outer else ''}{file}", str(loc[-1]), _known(kind, loc))
    if type_ in (*_UNKNOWN, "missing"):
        path = f"{outer}.{loc[-1]}".removeprefix(".")
        raise DataError(f"{where}: {'missing' if type_ == 'missing' else 'unknown'} {word} {path!r}")
    path = _path(raw, loc)
    place = f"{where}, {word} {path!r}" if path else where
    if type_ == "value_error":
        raise DataError(f"{place}: {first['ctx']['error']}")
    wanted = _WANTED.get(type_) or first["msg"].removeprefix("Input should be ")
    hint = f"; {hint}" if hint and type_ != "literal_error" else ""
    raise DataError(f"{place}: expected {wanted}, got {_short.repr(first['input'])}{hint}")


def _path(raw: Any, loc: Sequence[int | str]) -> str:
    """A location as it would be written; without pydantic's names for the alternatives of a type."""
    path = ""
    for part in loc:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            break
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _known(kind: Any, loc: Sequence[int | str]) -> Iterable[str]:
    """The fields of the model in which a location ends."""
    for part in loc[:-1]:
        if part in getattr(kind, "model_fields", {}):
            inside = kind.model_fields[part].annotation
            kind = next((one for one in get_args(inside) if hasattr(one, "__annotations__")), inside)
    return getattr(kind, "model_fields", None) or kind.__annotations__
