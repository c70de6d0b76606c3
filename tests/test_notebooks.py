"""The committed notebooks, the check of parameters, the code hash, and the runner."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers.tiny import NEUTRAL, make_concept, make_loaded

from ember.batch import runner as notebooks
from ember.batch.planning import Job, frame_path, manifest_path, run_name
from ember.batch.runner import (
    base_evaluation,
    check_parameters,
    code_hash,
    default_parameters,
    list_notebooks,
    read_notebook,
    run_notebook,
)
from ember.data.types import Instruction, SharedData
from ember.errors import EmberError, UnknownNameError
from ember.evaluation.evaluate import Sizes, evaluate, load_suite
from ember.store.paths import REPOSITORY

NAMES = list_notebooks()
CHECKED = "nbval-check-output"
PARAMETERS = 'profile = "smoke"\nvalue = 1.0\n'


def code_cells(name: str) -> list[dict]:
    return [cell for cell in read_notebook(name)["cells"] if cell["cell_type"] == "code"]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def cell(source: str, kind: str = "code", **metadata) -> dict:
    out = {"cell_type": kind, "id": f"c{zlib.crc32(source.encode())}", "metadata": metadata, "source": source}
    return out | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def write_notebook(folder: Path, name: str, *cells: dict) -> None:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": list(cells), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / f"{name}.ipynb").write_text(json.dumps(content), encoding="utf-8")


# The committed notebooks


def test_the_notebooks_are_found():
    """Without this, a broken search would make every test below pass."""
    assert len(NAMES) >= 5


def test_unknown_notebook_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=", ".join(NAMES)):
        read_notebook("../notebooks/00_tour")


@pytest.mark.parametrize("name", NAMES)
def test_one_cell_of_literal_parameters(name):
    assert default_parameters(name)["profile"] == "laptop"


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_widget_state(name):
    """Progress bars leave theirs in the notebook's metadata."""
    assert "widgets" not in read_notebook(name)["metadata"]


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs(name):
    for c in code_cells(name):
        if CHECKED not in tags(c):
            assert not c["outputs"] and c["execution_count"] is None, "".join(c["source"])


@pytest.mark.parametrize("name", NAMES)
def test_checked_cells_have_an_output_to_compare_with(name):
    for c in code_cells(name):
        assert CHECKED not in tags(c) or c["outputs"], "".join(c["source"])


def test_cells_are_checked():
    assert sum(CHECKED in tags(c) for name in NAMES for c in code_cells(name)) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_no_absolute_paths(name):
    text = (REPOSITORY / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"""(?<![\w.~:/])/(home|Users|root|tmp|work|mnt|opt|usr|var|data)/|[A-Z]:\\\\""", text)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_shows(name):
    """The README's table is made from this."""
    assert read_notebook(name)["metadata"]["ember"]["shows"].strip()


@pytest.mark.parametrize("name", NAMES)
def test_narrates_and_calls(name):
    """What a notebook would define belongs in the package."""
    code = "\n".join("".join(c["source"]) for c in code_cells(name))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert sum(isinstance(node, kinds) for node in ast.walk(ast.parse(code))) <= 2


@pytest.mark.parametrize("name", NAMES)
def test_imports_names_not_the_whole_package(name):
    """The code hash does not see what ``import ember; ember.x`` uses."""
    for c in code_cells(name):
        imports = [node for node in ast.walk(ast.parse("".join(c["source"]))) if isinstance(node, ast.Import)]
        assert not any(alias.name == "ember" for node in imports for alias in node.names)


@pytest.mark.parametrize("name", NAMES)
def test_every_default_is_used(name):
    """A parameter that nothing reads would promise what is not done."""
    code = "\n".join("".join(c["source"]) for c in code_cells(name) if "parameters" not in tags(c))
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert default_parameters(name).keys() <= used


# Parameters


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder of notebooks in place of ours; results go to a scratch folder."""
    path = tmp_path / "notebooks"
    path.mkdir()
    monkeypatch.setattr(notebooks, "notebooks_dir", lambda: path)
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path / "results"))
    return path


@pytest.fixture
def nothing_runs(monkeypatch):
    import papermill

    def refuse(*args, **kwargs):
        raise AssertionError("the notebook was started")

    monkeypatch.setattr(papermill, "execute_notebook", refuse)


@pytest.fixture
def typed(folder):
    """A notebook with a default of every type."""
    source = 'profile = "p"\ncount = 3\nrate = 0.5\nflag = False\nanything = None\nitems = [1]\n'
    write_notebook(folder, "20_typed", cell(source, tags=["parameters"]))
    return "20_typed"


@pytest.mark.parametrize("cells", [[], [cell(PARAMETERS, tags=["parameters"]), cell("value = 2", tags=["parameters"])]])
def test_exactly_one_parameters_cell(folder, cells):
    write_notebook(folder, "20_x", cell("a = 1"), *cells)
    with pytest.raises(EmberError, match=f"20_x needs exactly one .*found {len(cells)}"):
        default_parameters("20_x")


@pytest.mark.parametrize("source", ["a = 1\nb = a * 2", "a = 1\nprint(a)", "a, b = 1, 2", "a = b = 1", "import os"])
def test_parameters_are_literals(folder, source):
    """A value derived in that cell keeps its default when the parameter changes."""
    write_notebook(folder, "20_x", cell(source, tags=["parameters"]))
    with pytest.raises(EmberError, match="literal"):
        default_parameters("20_x")


def test_unknown_parameter_lists_the_known_ones(typed, nothing_runs):
    with pytest.raises(UnknownNameError, match="'cuont'; known: anything, count, flag, items, profile, rate"):
        run_notebook(typed, {"cuont": 3})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rate", "1e-4"), ("rate", True), ("rate", None), ("count", 3.0), ("count", "3"), ("count", True),
        ("flag", 1), ("flag", "false"), ("profile", 5), ("profile", None), ("items", "1"), ("items", 1),
    ],
)  # fmt: skip
def test_wrong_type_is_refused_before_anything_runs(typed, nothing_runs, key, value):
    with pytest.raises(EmberError, match=f"parameter '{key}' of {typed} must be .*got {type(value).__name__}"):
        run_notebook(typed, {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("rate", 1), ("rate", 0.1), ("count", 4), ("flag", True), ("profile", "q"), ("items", [2, 3])]
    + [("anything", value) for value in (1, 0.5, "x", True, [1], None)],
)
def test_fitting_type_is_accepted(typed, key, value):
    check_parameters(typed, {key: value})


# The code hash

MARKDOWN = cell("# Words", "markdown")
CODE = cell("from ember.data.ours import load_concept\nx = 1")


@pytest.fixture
def tree(folder, monkeypatch) -> Path:
    """A copy of the package that the code hash reads instead, with one notebook and one report that plots."""
    copy = folder.parent / "package"
    shutil.copytree(REPOSITORY / "ember", copy / "ember", ignore=shutil.ignore_patterns("__pycache__"))

    def path_in_copy(module: str) -> Path | None:
        base = copy.joinpath(*module.split("."))
        return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)

    monkeypatch.setattr(notebooks, "_module_path", path_in_copy)
    write_notebook(folder, "20_x", MARKDOWN, CODE)
    write_notebook(folder, "21_plots", cell("from ember.reporting.plots import use_theme"))
    write_notebook(folder, "10_report", cell("from ember import plots"))
    return copy / "ember"


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


@pytest.mark.parametrize(
    "cells",
    [
        [cell("# Other words", "markdown"), CODE],
        [CODE],
        [MARKDOWN, CODE, MARKDOWN],
        [cell("from ember.data.ours import load_concept  # why\n\n\nx  =  (1)\n")],
        [{**CODE, "outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}], "execution_count": 7}],
        [{**CODE, "metadata": {"tags": ["x"]}, "id": "other"}],
    ],
    ids=["markdown", "no markdown", "more markdown", "comment and layout", "outputs", "metadata"],
)
def test_hash_ignores_what_changes_no_result(tree, folder, cells):
    before = code_hash("20_x")
    write_notebook(folder, "20_x", *cells)
    assert code_hash("20_x") == before


@pytest.mark.parametrize(
    "cells",
    [
        [cell("from ember.data.ours import load_concept\nx = 2")],
        [CODE, cell("y = 1")],
        [cell("from ember.data.ours import load_shared\nx = 1")],
        [cell("x = 1\nfrom ember.data.ours import load_concept")],
        [],
    ],
    ids=["value", "cell", "import", "order", "none"],
)
def test_hash_depends_on_the_code(tree, folder, cells):
    before = code_hash("20_x")
    write_notebook(folder, "20_x", *cells)
    assert code_hash("20_x") != before


@pytest.mark.parametrize("module", ["data.py", "files.py", "errors.py"])
def test_hash_depends_on_modules_reached_through_others(tree, module):
    before = code_hash("20_x")
    append(tree / module, "\nEXTRA = 1\n")
    assert code_hash("20_x") != before


def test_hash_ignores_modules_that_are_not_reached(tree):
    before = code_hash("20_x")
    append(tree / "scoring.py", "\nEXTRA = 1\n")
    assert code_hash("20_x") == before


def test_hash_ignores_comments_and_docstrings_of_modules(tree):
    before = code_hash("20_x")
    path = tree / "files.py"
    text = path.read_text(encoding="utf-8")
    assert '"""SHA-256 of a file, as hexadecimal."""' in text
    path.write_text(text.replace("SHA-256 of a file", "Hash of a file") + "\n\n# A comment.\n", encoding="utf-8")
    assert code_hash("20_x") == before


@pytest.mark.parametrize(
    "source",
    [
        "from ember import load_concept",
        "from ember.data.ours import load_concept",
        "import ember.data.ours",
        "from ember import data",
    ],
)
def test_hash_follows_every_form_of_import(tree, folder, source):
    write_notebook(folder, "20_x", cell(source))
    before = code_hash("20_x")
    append(tree / "files.py", "\nEXTRA = 1\n")
    assert code_hash("20_x") != before


def test_hash_follows_the_erasure_methods(tree, folder):
    write_notebook(folder, "20_x", cell("from ember import METHODS"))
    before = code_hash("20_x")
    append(tree / "methods" / "ember.py", "\nEXTRA = 1\n")
    assert code_hash("20_x") != before


@pytest.mark.parametrize(("name", "changes"), [("21_plots", False), ("10_report", True)])
def test_looks_count_for_the_report_only(tree, name, changes):
    before = code_hash(name)
    append(tree / "plots.py", "\nEXTRA = 1\n")
    assert (code_hash(name) != before) == changes


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_have_a_hash(name):
    assert re.fullmatch(r"[0-9a-f]{16}", code_hash(name))


# The base model's evaluation


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A small suite, an empty folder of results, and a count of the evaluations that are run."""
    sizes = {split: Sizes(instructions=1, generations=1, new_tokens=2) for split in ("train", "test")}
    questions = [replace(q, set="general", id=f"g-{q.id}") for q in make_concept().questions if q.set == "concept"]
    neutral = {"train": NEUTRAL, "test": NEUTRAL[:2]}
    instructions = [Instruction(f"i-{split}", split, "Say yes.", "Yes, I do.") for split in ("train", "test")]
    shared = SharedData(tuple(questions), neutral, tuple(instructions), NEUTRAL)
    monkeypatch.setattr("ember.evaluation.evaluate.load_shared", lambda source: shared)
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path / "results"))
    return load_suite(make_concept(), sizes)


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """The splits that are evaluated from now on."""
    done: list[str] = []
    monkeypatch.setattr("ember.evaluation.evaluate", lambda *a, **k: done.append(a[2]) or evaluate(*a, **k))
    return done


def test_the_base_model_is_evaluated_once_for_all(suite, runs):
    """In whatever process and under whatever profile, but for each split, suite and model anew."""
    loaded = make_loaded()
    first = base_evaluation(loaded, suite, "train")
    again = base_evaluation(make_loaded(), suite, "train")
    assert runs == ["train"]
    expected = evaluate(loaded, suite, "train")
    for found in (first, again):
        pd.testing.assert_frame_equal(found.items, expected.items)
        pd.testing.assert_frame_equal(found.samples, expected.samples)
    base_evaluation(loaded, suite, "test")
    base_evaluation(loaded, replace(suite, sizes=suite.sizes | {"train": Sizes(generations=0)}), "train")
    base_evaluation(make_loaded(seed=1), suite, "train")
    assert runs == ["train", "test", "train", "train"]


def test_the_base_evaluation_depends_on_the_code(suite, runs, monkeypatch):
    loaded = make_loaded()
    base_evaluation(loaded, suite, "test")
    monkeypatch.setattr(notebooks, "code_hash", lambda name: f"another {name}")
    base_evaluation(loaded, suite, "test")
    assert runs == ["test", "test"]


# Running


def given(folder: Path, *sources: str, name: str = "20_x") -> str:
    write_notebook(folder, name, cell(PARAMETERS, tags=["parameters"]), *map(cell, sources))
    return name


def manifest(**parameters) -> Path:
    return manifest_path(parameters.get("profile", "smoke"), run_name("20_x", **parameters))


def printed(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))


def assert_unfinished(path: Path) -> None:
    """No manifest, and no notebook where a finished one would be."""
    assert not path.exists()
    assert not path.with_suffix(".ipynb").exists()


def test_a_good_run_leaves_a_copy_and_a_manifest(folder):
    name = given(folder, "print(profile, value, type(value).__name__)")
    path = run_notebook(name, {"profile": "laptop", "value": 2.5})
    assert path == manifest(profile="laptop", value=2.5)
    about = json.loads(path.read_text())
    assert (about["notebook"], about["parameters"]) == (name, {"profile": "laptop", "value": 2.5})
    assert about["code_hash"] == code_hash(name)
    assert about["wall_seconds"] > 0
    assert about["peak_memory_mb"] > 10
    assert "laptop 2.5 float" in printed(path.with_suffix(".ipynb"))
    assert sorted(p.name for p in path.parent.iterdir()) == [f"{path.stem}.ipynb", path.name]


def test_a_run_leaves_source_and_environment_as_they_were(folder):
    name = given(folder, "print(1)")
    source, environment = (folder / f"{name}.ipynb").read_bytes(), dict(os.environ)
    run_notebook(name, {})
    assert (folder / f"{name}.ipynb").read_bytes() == source
    assert dict(os.environ) == environment


def test_a_failing_cell_is_named_and_its_copy_is_kept_apart(folder):
    name = given(folder, "print('so far')", "raise ValueError('too cold')", "print('never')")
    with pytest.raises(EmberError, match=r"20_x__value=2\.0 failed in cell \d+: ValueError: too cold"):
        run_notebook(name, {"value": 2.0})
    path = manifest(value=2.0)
    assert_unfinished(path)
    assert "so far" in printed(path.with_name(f"{path.stem}.failed.ipynb"))


NOTHING = "from ember.errors import NothingFoundError\nraise NothingFoundError('no feature of Rome')"


def test_a_run_that_finds_nothing_to_edit_says_so_in_its_manifest(folder, monkeypatch):
    name = given(folder, "print('so far')", NOTHING, "print('never')")
    monkeypatch.setattr("ember.batch.runner.FRAMES", {name: ("scores",)})
    path = run_notebook(name, {"value": 2.0})
    assert "no feature of Rome" in json.loads(path.read_text())["nothing_found"]
    assert "so far" in printed(path.with_suffix(".ipynb"))
    assert frame_path("smoke", path.stem, "scores").read_bytes() == b""
    given(folder, "print('found')")
    assert "nothing_found" not in json.loads(run_notebook(name, {"value": 2.0}).read_text())


@pytest.mark.parametrize("found", [True, False])
def test_a_run_that_needs_one_that_found_nothing_does_not_start(folder, monkeypatch, found):
    first, second = {"profile": "smoke", "value": 1.0}, {"profile": "smoke", "value": 2.0}
    jobs = [Job("20_x", first), Job("20_x", second, (run_name("20_x", **first),))]
    monkeypatch.setattr("ember.batch.runner.plan", lambda profile: jobs)
    monkeypatch.setattr("ember.batch.runner.FRAMES", {"20_x": ()})
    given(folder, "print('ran')" if found else NOTHING)
    run_notebook("20_x", first)
    given(folder, "print('ran')")
    path = run_notebook("20_x", second)
    assert ("nothing_found" in json.loads(path.read_text())) is not found
    assert path.with_suffix(".ipynb").exists() is found


def test_a_failure_takes_away_what_an_earlier_run_left(folder):
    given(folder, "print('first')")
    path = run_notebook("20_x", {})
    given(folder, "1 / 0")
    with pytest.raises(EmberError, match="ZeroDivisionError"):
        run_notebook("20_x", {})
    assert_unfinished(path)


def test_a_stale_manifest_goes_before_anything_runs(folder, monkeypatch):
    import papermill

    given(folder, "print(1)")
    path = manifest()
    path.parent.mkdir(parents=True)
    path.write_text("{}")

    def interrupted(*args, **kwargs):
        assert not path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_notebook("20_x", {})
    assert_unfinished(path)


def test_a_killed_kernel_is_an_error(folder):
    """Papermill's copy says "completed" then."""
    given(folder, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "print('never')")
    with pytest.raises(EmberError, match="20_x"):
        run_notebook("20_x", {})
    assert_unfinished(manifest())


@pytest.mark.parametrize("source", ["import sys\nsys.exit()", "raise SystemExit(0)"])
def test_stopping_halfway_is_an_error(folder, source):
    """Papermill takes an exit with status 0 for success and leaves the remaining cells unrun."""
    given(folder, source, "print('never')")
    with pytest.raises(EmberError, match="20_x"):
        run_notebook("20_x", {})
    assert_unfinished(manifest())


@pytest.mark.parametrize("profile", ["../outside", "nope"])
def test_unknown_profile_is_refused_before_anything_runs(folder, nothing_runs, profile):
    given(folder, "print(1)")
    with pytest.raises(EmberError, match="profile"):
        run_notebook("20_x", {"profile": profile})


def test_eight_at_once(folder, tmp_path):
    """Kernels race for the folders that Jupyter and IPython share."""
    given(folder, "print('value', value)")
    script = tmp_path / "one.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom ember import notebooks\n"
        "notebooks.notebooks_dir = lambda: Path(sys.argv[1])\n"
        "notebooks.run_notebook('20_x', {'value': float(sys.argv[2])})\n"
    )
    running = [
        subprocess.Popen([sys.executable, script, folder, str(k)], stderr=subprocess.PIPE, text=True) for k in range(8)
    ]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * 8, "\n".join(errors)
    for k in range(8):
        path = manifest(value=float(k))
        assert json.loads(path.read_text())["parameters"] == {"value": float(k)}
        assert f"value {float(k)}" in printed(path.with_suffix(".ipynb"))
