"""The code that a notebook's results depend on, as a hash: a change of it makes them stale, and nothing else does."""

import ast
import hashlib
from functools import cache
from pathlib import Path

from ember import _EXPORTS
from ember.batch.notebooks import read_notebook
from ember.store.paths import REPOSITORY

# What a notebook opens and saves with. It computes nothing, but what it opens is computed by what it imports.
_OPENS = "ember.batch.run"
_BATCH, _LOOKS = "ember.batch", "ember.reporting"


def code_hash(name: str) -> str:
    """Hash of a notebook's code cells and of the ``ember`` modules they reach in the rooms left of ``reporting``.

    Markdown, comments, docstrings and layout do not count, nor does anything of ``batch``: another profile or page
    leaves results as they are. The report draws the figures, so for it ``reporting`` counts too.
    """
    sources = ["".join(c["source"]) for c in read_notebook(name)["cells"] if c["cell_type"] == "code"]
    skipped = (_BATCH,) if name.endswith("_report") else (_BATCH, _LOOKS)
    pending = {module for source in sources for module in _imports(source)}
    seen: dict[str, str] = {}
    while pending:
        module = pending.pop()
        path = _module_path(module)
        passed = module != _OPENS and f"{module}.".startswith(tuple(f"{room}." for room in skipped))
        if module in seen or path is None or passed:
            continue
        text = path.read_text(encoding="utf-8")
        seen[module] = "" if module == _OPENS else _canonical(text)
        pending |= _imports(text)
    running = hashlib.sha256()
    for part in [*map(_canonical, sources), *(f"{k}\n{seen[k]}" for k in sorted(seen))]:
        running.update(part.encode() + b"\0")
    return running.hexdigest()[:16]


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


def _module_path(module: str) -> Path | None:
    # Without importing anything: what imports torch takes seconds, and every job on a cluster comes through here.
    path = REPOSITORY.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def _canonical(source: str) -> str:
    """The syntax tree without docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
