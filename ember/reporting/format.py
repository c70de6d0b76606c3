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


def interval_texts(rows: pd.DataFrame, name: str = "value", ends: str = "ci", form: str = "+.2f") -> list[str]:
    """``interval_text`` of each row, from the columns NAME, ENDS_low and ENDS_high."""
    columns = (rows[name], rows[f"{ends}_low"], rows[f"{ends}_high"])
    return [interval_text(value, low, high, form) for value, low, high in zip(*columns, strict=True)]


def arm_names(rows: pd.DataFrame) -> list[str]:
    """What a reader knows the arm of each row by, from its columns method and ember."""
    return [Arm(method, ember).name for method, ember in zip(rows.method, rows.ember, strict=True)]


def error_bars(rows: pd.DataFrame, name: str = "value", ends: str = "ci") -> list[pd.Series]:
    """Lengths of the lower and upper error bars of the columns NAME, ENDS_low and ENDS_high.

    Never negative: bootstrap percentiles need not hold the value.
    """
    value, low, high = rows[name], rows[f"{ends}_low"], rows[f"{ends}_high"]
    return [(value - low).clip(lower=0), (high - value).clip(lower=0)]


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, its texts as they stand."""
    return str(table.to_markdown(index=False, disable_numparse=True))


def fill_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """``text`` with every block between ``<!-- NAME -->`` and ``<!-- /NAME -->`` replaced by its generated content."""
    for name, block in blocks.items():
        gap = "" if "\n" not in block else "\n"
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        if not pattern.search(text):
            raise EmberError(f"the document has no block named {name!r}")
        filled = f"<!-- {name} -->{gap}{block}{gap}<!-- /{name} -->"
        text = pattern.sub(filled.replace("\\", r"\\"), text)
    return text
