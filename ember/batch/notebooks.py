"""The numbered notebooks as files: which there are, and the parameters that each takes."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from ember.errors import EmberError, UnknownNameError
from ember.store.paths import notebooks_dir


def list_notebooks() -> list[str]:
    """Names of the numbered notebooks."""
    return sorted(path.stem for path in notebooks_dir().glob("[0-9][0-9]_*.ipynb"))


def read_notebook(name: str) -> dict[str, Any]:
    """The parsed notebook; an unknown name is an error that lists the known ones."""
    if name not in list_notebooks():
        raise UnknownNameError("notebook", name, list_notebooks())
    notebook: dict[str, Any] = json.loads((notebooks_dir() / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def default_parameters(name: str) -> dict[str, Any]:
    """The literals of the notebook's ``parameters`` cell.

    Raises
    ------
    EmberError
        If there is not exactly one such cell, or it holds anything but assignments of literals.
    """
    cells = [c for c in read_notebook(name)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise EmberError(f"{name} needs exactly one cell tagged 'parameters', found {len(cells)}")
    values = {}
    for node in ast.parse("".join(cells[0]["source"])).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise EmberError(f"{name}: the parameters cell may only assign literals, line {node.lineno} does not")
        try:
            values[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError as error:
            raise EmberError(f"{name}: parameter {node.targets[0].id!r} is not a literal") from error
    return values


def check_parameters(name: str, given: Mapping[str, Any]) -> None:
    """Refuse names the notebook does not have and values of another type than its default's (None takes any)."""
    defaults = default_parameters(name)
    for key, value in given.items():
        if key not in defaults:
            raise UnknownNameError(f"parameter of {name}", key, defaults)
        default = defaults[key]
        accepted = (int, float) if isinstance(default, float) else (type(default),)
        if default is not None and (
            not isinstance(value, accepted) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise EmberError(
                f"parameter {key!r} of {name} must be {type(default).__name__}, got {type(value).__name__} {value!r}"
            )
