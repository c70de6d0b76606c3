"""The numbered notebooks as files: the parameters that each takes, and the code that its results depend on."""

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import create_model

from ember import _EXPORTS
from ember.errors import EmberError, UnknownNameError
from ember.store.paths import REPOSITORY, notebooks_dir
from ember.store.validated import Strict, validated

# What a notebook opens and saves with. It computes nothing, but what it opens is computed by what it imports.
_OPENS = "ember.batch.run"


def list_notebooks() -> list[str]:
    """Names of the numbered notebooks."""
    return sorted(path.stem for path in notebooks_dir().glob("[0-9][0-9]_*.ipynb"))


def read_notebook(name: str) -> dict[str, Any]:
    """The parsed notebook; an unknown name is an error that lists the known ones."""
    if name not in list_notebooks():
        raise UnknownNameError("notebook", name, list_notebooks())
    return dict(json.loads((notebooks_dir() / f"{name}.ipynb").read_text(encoding="utf-8")))


def default_parameters(name: str) -> dict[str, Any]:
    """The notebook's one ``parameters`` cell; an ``EmberError`` if it does more than assign literals to names."""
    cells = [c for c in read_notebook(name)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise EmberError(f"{name} needs exactly one cell tagged 'parameters', found {len(cells)}")
    values = {}
    body: Any = ast.parse("".join(cells[0]["source"])).body
    for node in body:
        try:
            (target,) = node.targets
            values[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):  # no assignment, not to one name, or no literal
            raise EmberError(
                f"{name}: the parameters cell may only assign literals, not {ast.unparse(node)!r}"
            ) from None
    return values


def check_parameters(name: str, given: Mapping[str, Any]) -> None:
    """Refuse names the notebook does not have and values of another type than its default's (None takes any)."""
    kinds = {key: (Any if value is None else type(value), value) for key, value in default_parameters(name).items()}
    model = create_model("Parameters", __base__=Strict, **kinds)  # type: ignore[call-overload]
    validated(model, given, name, word="parameter", file=name)


def code_hash(name: str) -> str:
    """Hash of a notebook's code cells and of the ``ember`` modules they reach in the rooms left of ``reporting``.

    A change of it makes the results stale, and nothing else does. Markdown, comments, docstrings and layout do not
    count, nor does anything of ``batch``: another profile or page leaves results as they are. The report draws the
    figures, so for it ``reporting`` counts too.
    """
    sources = ["".join(c["source"]) for c in read_notebook(name)["cells"] if c["cell_type"] == "code"]
    skipped = ("ember.batch.",) if name.endswith("_report") else ("ember.batch.", "ember.reporting.")
    pending = {module for source in sources for module in _imports(source)}
    seen: dict[str, str] = {}
    while pending:
        module = pending.pop()
        # Without importing anything: what imports torch takes seconds, and every job on a cluster comes through here.
        place = REPOSITORY.joinpath(*module.split("."))
        path = next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)
        if module in seen or path is None or (module != _OPENS and f"{module}.".startswith(skipped)):
            continue
        text = path.read_text(encoding="utf-8")
        seen[module] = "" if module == _OPENS else _canonical(text)
        pending |= _imports(text)
    parts = [*map(_canonical, sources), *(f"{k}\n{seen[k]}" for k in sorted(seen))]
    return hashlib.sha256("".join(f"{part}\0" for part in parts).encode()).hexdigest()[:16]


@cache
def _imports(source: str) -> frozenset[str]:
    """Dotted names of ``ember`` modules that a source imports; names that load lazily stand for where they live."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    lazy = {_EXPORTS[name.removeprefix("ember.")] for name in names if name.removeprefix("ember.") in _EXPORTS}
    return frozenset(name for name in names | lazy if name.split(".")[0] == "ember")


@cache
def _canonical(source: str) -> str:
    """The syntax tree without docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
