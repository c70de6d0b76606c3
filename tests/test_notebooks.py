"""The committed notebooks, the check of parameters, and the runner."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.notebooks import cell, write_notebook

from ember.batch.code import code_hash
from ember.batch.notebooks import check_parameters, default_parameters, list_notebooks, read_notebook
from ember.batch.planning import Job, frame_path, manifest_path, run_name
from ember.batch.runner import run_notebook
from ember.errors import EmberError, UnknownNameError
from ember.store.paths import REPOSITORY

NAMES = list_notebooks()
CHECKED = "nbval-check-output"
PARAMETERS = 'profile = "smoke"\nvalue = 1.0\n'


def code_cells(name: str) -> list[dict]:
    return [cell for cell in read_notebook(name)["cells"] if cell["cell_type"] == "code"]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


# The committed notebooks


def test_the_notebooks_are_found():
    """Without this, a broken search would make every test below pass."""
    assert len(NAMES) >= 10
    assert NAMES[-1] == "10_report", "the report reads what all others write"


def test_unknown_notebook_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=", ".join(NAMES)):
        read_notebook("../notebooks/00_tour")


@pytest.mark.parametrize("name", NAMES)
def test_one_cell_of_literal_parameters_all_of_them_used(name):
    """A parameter that nothing reads would promise what is not done."""
    defaults = default_parameters(name)
    assert defaults["profile"] == "laptop"
    code = "\n".join("".join(c["source"]) for c in code_cells(name) if "parameters" not in tags(c))
    assert defaults.keys() <= {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs_but_for_checked_cells(name):
    assert "widgets" not in read_notebook(name)["metadata"], "progress bars leave their state there"
    for c in code_cells(name):
        if CHECKED in tags(c):
            assert c["outputs"], "".join(c["source"])
        else:
            assert not c["outputs"] and c["execution_count"] is None, "".join(c["source"])


def test_cells_are_checked():
    assert sum(CHECKED in tags(c) for name in NAMES for c in code_cells(name)) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_text_of_a_notebook(name):
    """No path of a machine; what it shows is said (the README's table is made from this)."""
    text = (REPOSITORY / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"""(?<![\w.~:/])/(home|Users|root|tmp|work|mnt|opt|usr|var|data)/|[A-Z]:\\\\""", text)
    assert read_notebook(name)["metadata"]["ember"]["shows"].strip()


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_one_run_and_defines_little(name):
    """What a notebook would define belongs in the package; the code hash does not see ``import ember; ember.x``."""
    tree = ast.parse("\n".join("".join(c["source"]) for c in code_cells(name)))
    nodes = list(ast.walk(tree))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert sum(isinstance(node, kinds) for node in nodes) <= 2
    assert not any(alias.name == "ember" for node in nodes if isinstance(node, ast.Import) for alias in node.names)
    calls = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert calls.count("Run") == 1


# Parameters


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder of notebooks in place of ours; results go to a scratch folder."""
    path = tmp_path / "notebooks"
    path.mkdir()
    for module in ("notebooks", "runner"):
        monkeypatch.setattr(f"ember.batch.{module}.notebooks_dir", lambda: path)
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
        "import sys\nfrom pathlib import Path\nfrom ember.batch import notebooks, runner\n"
        "notebooks.notebooks_dir = runner.notebooks_dir = lambda: Path(sys.argv[1])\n"
        "runner.run_notebook('20_x', {'value': float(sys.argv[2])})\n"
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
