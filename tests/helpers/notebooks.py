"""Notebooks written for a test."""

import json
import zlib
from pathlib import Path


def cell(source: str, kind: str = "code", **metadata) -> dict:
    """A cell without outputs."""
    out = {"cell_type": kind, "id": f"c{zlib.crc32(source.encode())}", "metadata": metadata, "source": source}
    return out | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def write_notebook(folder: Path, name: str, *cells: dict) -> None:
    """A notebook of these cells for the Python kernel."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": list(cells), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / f"{name}.ipynb").write_text(json.dumps(content), encoding="utf-8")
