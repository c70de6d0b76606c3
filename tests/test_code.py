"""The code hash: what makes a notebook's results stale, and what does not."""

import re
import shutil
from pathlib import Path

import pytest
from helpers.notebooks import cell, write_notebook

from ember.batch import notebooks
from ember.batch.notebooks import code_hash, list_notebooks
from ember.store.paths import REPOSITORY

MARKDOWN = cell("# Words", "markdown")
CODE = cell("from ember.data.ours import load_concept\nx = 1")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Notebooks in place of ours: one that loads data, one that opens a run, one that plots, and a report."""
    monkeypatch.setattr("ember.batch.notebooks.notebooks_dir", lambda: tmp_path)
    write_notebook(tmp_path, "20_x", MARKDOWN, CODE)
    write_notebook(
        tmp_path, "21_run", cell("from ember.batch.run import Run\nfrom ember.reporting.plots import use_theme")
    )
    write_notebook(tmp_path, "22_report", cell("from ember.reporting import plots\nfrom ember.batch.run import Run"))
    return tmp_path


@pytest.fixture
def tree(folder, monkeypatch) -> Path:
    """A copy of the package that the code hash reads instead."""
    shutil.copytree(REPOSITORY / "ember", folder / "ember", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(notebooks, "REPOSITORY", folder)
    return folder / "ember"


def append(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "\nEXTRA = 1\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("cells", "counts"),
    [
        ([cell("# Other words", "markdown"), CODE], False),
        ([CODE], False),
        ([MARKDOWN, CODE, MARKDOWN], False),
        ([cell("from ember.data.ours import load_concept  # why\n\n\nx  =  (1)\n")], False),
        ([{**CODE, "outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]}], False),
        ([{**CODE, "metadata": {"tags": ["x"]}, "id": "other", "execution_count": 7}], False),
        ([cell("from ember.data.ours import load_concept\nx = 2")], True),
        ([CODE, cell("y = 1")], True),
        ([cell("from ember.data.ours import load_shared\nx = 1")], True),
        ([cell("x = 1\nfrom ember.data.ours import load_concept")], True),
        ([], True),
    ],
    ids=str,
)
def test_code_counts_and_what_changes_no_result_does_not(folder, cells, counts):
    before = code_hash("20_x")
    write_notebook(folder, "20_x", *cells)
    assert (code_hash("20_x") != before) is counts


@pytest.mark.parametrize(
    ("name", "module", "counts"),
    [
        *[("20_x", module, True) for module in ("data/ours.py", "store/files.py", "errors.py")],
        *[("20_x", module, False) for module in ("models/scoring.py", "reporting/plots.py")],
        *[("21_run", module, True) for module in ("evaluation/evaluate.py", "models/loading.py", "editing.py")],
        *[("21_run", f"{m}.py", False) for m in ("reporting/plots", "batch/profiles", "batch/run", "batch/planning")],
        ("22_report", "reporting/plots.py", True), ("22_report", "batch/planning.py", False),
    ],
)  # fmt: skip
def test_modules_count_where_they_are_reached_and_left_of_reporting(tree, name, module, counts):
    """What a run opens with counts; looks count for the report only, and nothing of batch for anything."""
    before = code_hash(name)
    append(tree / module)
    assert (code_hash(name) != before) == counts


def test_comments_and_docstrings_of_modules_are_ignored(tree):
    before = code_hash("20_x")
    path = tree / "store" / "files.py"
    text = path.read_text(encoding="utf-8")
    assert '"""SHA-256 of a file, as hexadecimal."""' in text
    path.write_text(text.replace("SHA-256 of a file", "Hash of a file") + "\n\n# A comment.\n", encoding="utf-8")
    assert code_hash("20_x") == before


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from ember import load_concept", "store/files.py"),
        ("from ember.data.ours import load_concept", "store/files.py"),
        ("import ember.data.ours", "store/files.py"),
        ("from ember.data import ours", "store/files.py"),
        ("from ember import METHODS", "methods/ember.py"),
    ],
)
def test_every_form_of_import_is_followed(tree, folder, source, module):
    write_notebook(folder, "20_x", cell(source))
    before = code_hash("20_x")
    append(tree / module)
    assert code_hash("20_x") != before


@pytest.mark.parametrize("name", list_notebooks())
def test_committed_notebooks_have_a_hash(name):
    assert re.fullmatch(r"[0-9a-f]{16}", code_hash(name))
