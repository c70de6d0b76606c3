"""The repository as a whole: pins, import direction, README, files that must not be there."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from docs.pages import PAGES, render_page
from ember.store.paths import REPOSITORY


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines) -> dict[str, str]:
    return {normalized(name): version for name, version in (line.strip().split("==") for line in lines if "==" in line)}


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    return pins((REPOSITORY / "requirements.lock").read_text().splitlines())


@pytest.fixture(scope="module")
def requirements() -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + project["optional-dependencies"]["test"]


def test_lock_satisfies_the_ranges(lock, requirements):
    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        assert requirement.specifier.contains(lock[normalized(requirement.name)]), text


def test_lock_is_what_is_installed(lock):
    from importlib.metadata import version

    different = {name: version(name) for name in lock if version(name).removesuffix("+cpu") != lock[name]}
    assert not different


def test_environment_yml_has_the_lock_file_s_pins(lock, requirements):
    listed = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert listed[-1] == "-e ."
    conda = pins(listed)
    wanted = {normalized(re.split(r"[<>=]", text)[0]) for text in requirements}
    assert set(conda) == wanted
    assert conda == {name: lock[name] for name in wanted}


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has loaded after some code."""
    code += "\nimport sys\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_contracts_name_every_room():
    """`make lint` checks the direction of imports, lazy ones included; an exception would hollow it out."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]
    rooms = {path.parent.name for path in (REPOSITORY / "ember").glob("*/__init__.py")}
    layers = settings["contracts"][0]["layers"]
    assert rooms <= set(layers) and settings["contracts"][0]["exhaustive"]
    assert not any("ignore_imports" in contract for contract in settings["contracts"])


@pytest.mark.parametrize(
    ("code", "spared"),
    [
        ("import ember", {"torch", "pandas", "numpy"}),
        ("from ember import Edit, sparse_mf", {"pandas", "matplotlib", "transformers", "papermill", "ember.batch"}),
        ("import ember.tokens, ember.features", {"matplotlib", "seaborn", "transformers", "papermill", "ember.batch"}),
        ("import ember.batch.cli, ember.batch.planning, ember.batch.notebooks", {"torch", "papermill", "matplotlib"}),
    ],
)
def test_what_is_asked_for_loads_no_more_than_it_needs(code, spared):
    assert not modules_after(code) & spared


def test_public_names_load_and_rooms_state_their_charter():
    import ember

    assert set(ember.__all__) == {
        "load_model", "load_concept", "concept_from_sentences", "sparse_mf", "semi_nmf", "concept_features", "preview",
        "Edit", "METHODS", "erase", "load_suite", "evaluate", "compare", "ATTACKS", "relearn", "__version__",
    }  # fmt: skip
    assert all(getattr(ember, name) for name in ember.__all__)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for path in (REPOSITORY / "ember").glob("*/__init__.py"):
        charter = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert charter, path
        assert f"| `{path.parent.name}/` | {charter.splitlines()[0].rstrip('.')} |" in readme


def test_no_test_file_imports_another():
    for path in (REPOSITORY / "tests").rglob("*.py"):
        assert not re.search(r"^(from|import) (test_|conftest)", path.read_text(encoding="utf-8"), re.M), path


def test_modules_can_be_read_in_one_sitting_and_ask_for_no_model_name_by_substring():
    pattern = re.compile(r"""["'](gemma|llama|smollm)[^"']*["']\s+in\s""", re.I)
    for path in (REPOSITORY / "ember").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 250 and not pattern.search(text), path


def test_readme_quickstart_runs_as_it_stands(tmp_path, monkeypatch, embedded):
    """At most ten statements; run from the repository root as a reader would."""
    text = (REPOSITORY / "README.md").read_text()
    block = re.search(r"## Erase your own concept.*?```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(ast.parse(block).body) <= 10
    (tmp_path / "data").symlink_to(REPOSITORY / "data")
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(compile(block, "README.md", "exec"), variables)
    assert len(variables["edit"].changed()) > 0
    assert (tmp_path / "my-edit" / "edit.safetensors").exists()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_s_tables_are_those_of_the_results_and_its_links_lead_somewhere(page):
    path = REPOSITORY / page
    text = path.read_text(encoding="utf-8")
    assert render_page(page, text) == text, "run: make readme"
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert links
    for link in links:
        file, _, section = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not section or section in anchors(target.read_text(encoding="utf-8")), link


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tracked_files() -> list[str]:
    done = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def test_no_pickles_or_large_files_are_tracked():
    for name in tracked_files():
        path = REPOSITORY / name
        assert not name.endswith((".pkl", ".pickle", ".pt", ".bin", ".gguf", ".safetensors")), name
        assert not path.is_file() or path.stat().st_size < 1_000_000, name


def test_the_readme_shows_pictures_and_ci_runs_its_test_command():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert re.search(r"!\[[^\]]+\]\([^)]+\.png\)", readme) and re.search(r"^make test", readme, re.M)
    assert (REPOSITORY / ".ci" / "run").read_text().strip().endswith("make test")
