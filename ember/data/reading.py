"""Files of data: JSON, JSON Lines and lines of text, checked as they are read. Errors name file, line and field."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationInfo

from ember.errors import DataError
from ember.store.files import read_utf8
from ember.store.validated import Listed, Strict, Text, validated


def _three_wrong(distractors: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    if len(distractors) != 3 or len({info.data.get("answer"), *distractors}) != 4:
        raise ValueError(f"need three, different from each other and the answer, got {list(distractors)}")
    return distractors


Some = Annotated[list[Any], Field(min_length=1)]
Split = Literal["train", "test"]
Sets = TypeVar("Sets")


class QuestionRow(Strict, Generic[Sets]):
    """A question as our files hold it, in one of the ``Sets``."""

    id: Text
    question: Text
    answer: Text
    set: Sets
    split: Split
    distractors: Annotated[Listed[Text], AfterValidator(_three_wrong)]
    aliases: Listed[Text]


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return _parsed(read_utf8(path), path, 1)


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a file, none of them empty. They end at newlines only: U+2028 is legal inside a JSON text."""
    lines = read_utf8(path).rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"{path}, line {number}: empty line")
    return tuple(lines)


def read_rows(path: Path, kind: Any) -> list[Any]:
    """The objects of a JSON Lines file."""
    lines = enumerate(read_lines(path), 1)
    return checked_rows(kind, ((f"{path}, line {k}", _parsed(line, path, k)) for k, line in lines))


def checked_rows(kind: Any, rows: Iterable[tuple[str, object]]) -> list[Any]:
    """Objects of a kind from pairs of place and content; no id occurs twice."""
    checked: dict[object, Any] = {}
    for number, (where, raw) in enumerate(rows):
        row = validated(kind, raw, where)
        id_ = getattr(row, "id", number)
        if id_ in checked:
            raise DataError(f"{where}, field 'id': {id_!r} occurs twice")
        checked[id_] = row
    return list(checked.values())


def _parsed(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {first_line + error.lineno - 1}: not JSON ({error.msg})") from None
