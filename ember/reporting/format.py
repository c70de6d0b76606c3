"""How things are written, in tables, pages and figures alike: intervals, shares, arms, what is missing, Markdown."""

import math
import re
from collections.abc import Mapping

import pandas as pd

from ember.data.arms import Arm
from ember.errors import EmberError

MISSING = "–"


def interval_text(value: float, low: float = math.nan, high: float = math.nan, form: str = "+.2f") -> str:
    """``+0.10 [+0.04, +0.17]``, in per cent with the form ``.0%``; "–" for no value, no brackets for no interval."""
    if pd.isna(value):
        return MISSING
    return f"{value:{form}}" + ("" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]")


def interval_texts(rows: pd.DataFrame, name: str = "value", form: str = "+.2f") -> list[str]:
    """``interval_text`` of each row, from its column NAME."""
    return [interval_text(value, low, high, form) for value, low, high in zip(*_with_ends(rows, name), strict=True)]


def arm_names(rows: pd.DataFrame) -> list[str]:
    """What a reader knows the arm of each row by, from its columns method and ember."""
    return [Arm(method, ember).name for method, ember in zip(rows.method, rows.ember, strict=True)]


def error_bars(rows: pd.DataFrame, name: str = "value") -> list[pd.Series]:
    """Lengths of a column's lower and upper error bars, never negative: percentiles need not hold the value."""
    value, low, high = _with_ends(rows, name)
    return [(value - low).clip(lower=0), (high - value).clip(lower=0)]


def _with_ends(rows: pd.DataFrame, name: str) -> list[pd.Series]:
    """A measure, and NAME_low and NAME_high or, of what rows are mainly about, ci_low and ci_high; NaN without ends."""
    ends = name if f"{name}_low" in rows else "ci"
    ends = rows.reindex(columns=[f"{ends}_low", f"{ends}_high"])
    return [rows[name], *(ends[column] for column in ends)]


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, its texts as they stand."""
    return str(table.to_markdown(index=False, disable_numparse=True))


def fill_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """``text`` with every block between ``<!-- NAME -->`` and ``<!-- /NAME -->`` replaced by its generated content."""
    for name, block in blocks.items():
        gap = "\n" if "\n" in block else ""
        filled = f"<!-- {name} -->{gap}{block}{gap}<!-- /{name} -->".replace("\\", r"\\")
        text, found = re.subn(rf"(?s)<!-- {name} -->.*?<!-- /{name} -->", filled, text)
        if not found:
            raise EmberError(f"the document has no block named {name!r}")
    return text
