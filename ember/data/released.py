"""The data that the paper's authors published: read from a folder, or fetched once from their repository.

Nothing of it is part of this project (MIT licence; sentences and paragraphs derive from Wikipedia, CC BY-SA).
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ember.data.types import Concept, Question, plain_name
from ember.errors import DataError, DownloadError, UnknownNameError
from ember.store.files import read_sealed, read_utf8, sealed_dir
from ember.store.paths import cache_dir, slug

REPOSITORY = "https://github.com/ClarSu/EMBER-Embedding-Erasure.git"
# The whole id: git checks that the content it receives hashes to it.
COMMIT = "14d6f6dc594cb74a0c9d70e567b3162561d2d10b"
SENTENCES, NEUTRAL, CHOICE, OPEN, PARAGRAPHS = FILES = (
    "concept_sentences.json",
    "neutral_sentences.json",
    "mc_questions.json",
    "open_questions.json",
    "relearn_paragraphs.json",
)
INDICES = tuple(f"{name}_{split}_indices.json" for name in ("mmlu", "alpaca") for split in ("train", "test"))
FETCHED = (*FILES, *INDICES)
_SETS = {
    "QA_train": ("concept", "train"),
    "QA_test": ("concept", "test"),
    "SimdomQA_train": ("simdom", "train"),
    "SimdomQA_test": ("simdom", "test"),
}


def list_released(folder: str | Path | None = None) -> list[str]:
    """Names of the concepts in the released files."""
    root = fetch_released() if folder is None else Path(folder)
    return sorted(row["concept"] for row in _objects(root / SENTENCES, {"concept": str, "sentences": list}))


def load_released(name: str, folder: str | Path | None = None) -> Concept:
    """One concept of the released files in ``folder``, by default of those that ``fetch_released`` caches.

    A question's id is its place in the file, such as ``QA_test[3]``; the open form's answer is an alias. The files name
    no similar domain and hold no texts that use the concept's words in another sense.

    Raises
    ------
    UnknownNameError
        If the files hold no such concept.
    DataError
        If a file breaks the format; the message names file, line and field.
    DownloadError, DamagedFileError
        As in ``fetch_released``.
    """
    root = fetch_released() if folder is None else Path(folder)
    rows = {slug(row["concept"]): row for row in _objects(root / SENTENCES, {"concept": str, "sentences": list})}
    if plain_name(name) not in rows:
        raise UnknownNameError("released concept", name, [row["concept"] for row in rows.values()])
    row = rows[plain_name(name)]
    neutral = _objects(root / NEUTRAL, {"url": str, "title": str, "sentence": str})
    stated = _entry(root / PARAGRAPHS, row["concept"], {"RelearnParagraphs": list})["RelearnParagraphs"]
    return Concept(
        name=row["concept"],
        simdom=f"the similar domain of {row['concept']}",
        sentences=_texts(root / SENTENCES, "sentences", row["sentences"]),
        neutral=_texts(root / NEUTRAL, "sentence", [r["sentence"] for r in neutral]),
        questions=tuple(_questions(root, row["concept"])),
        paragraphs=_texts(root / PARAGRAPHS, "RelearnParagraphs", stated),
        other_sense=(),
        source="released",
    )


def _questions(root: Path, concept: str) -> Iterable[Question]:
    keys = dict.fromkeys(_SETS, list)
    choice, open_ = _entry(root / CHOICE, concept, keys), _entry(root / OPEN, concept, keys)
    for key, (set_, split) in _SETS.items():
        answers = {}
        for row in open_[key]:
            _fields(root / OPEN, f"{concept}, {key}", row, {"q": str, "a": str})
            answers[row["q"]] = row["a"]
        for number, row in enumerate(choice[key]):
            place = f"{key}[{number}]"
            _fields(root / CHOICE, f"{concept}, {place}", row, {"q": str, "correct_answer": str, "options": list})
            gold, options = row["correct_answer"], row["options"]
            texts = all(isinstance(option, str) and option.strip() for option in options)
            if not texts or len(options) != 4 or len(set(options)) != 4 or gold not in options:
                where = f"{root / CHOICE}, line {_line(root / CHOICE, row)}, {concept}, {place}"
                raise DataError(f"{where}, field 'options': need four different texts, {gold!r} among them")
            alias = answers.get(row["q"], gold)
            wrong = tuple(option for option in options if option != gold)
            yield Question(place, set_, split, row["q"], gold, wrong, () if alias == gold else (alias,))


def fetch_released(*, repository: str = REPOSITORY, commit: str = COMMIT) -> Path:
    """Folder of the released files; fetched with git on first use, at a pinned commit.

    Git verifies that what arrives hashes to the commit's id; the hash of each file is recorded and checked on every
    call.

    Raises
    ------
    DownloadError
        If the files are not in the cache and cannot be fetched.
    DamagedFileError
        If a cached file is not what was written.
    """
    folder = cache_dir() / "released" / commit[:12]
    if not folder.exists():
        with tempfile.TemporaryDirectory() as clone, sealed_dir(folder, {"commit": commit}, ours=True) as target:
            _git(clone, "init", "--quiet")
            _git(clone, "fetch", "--quiet", "--depth=1", repository, commit)
            for name in FETCHED:
                (target / name).write_bytes(_git(clone, "show", f"{commit}:data/{name}"))
    read_sealed(folder, mend="Delete the folder")
    return folder


def _git(folder: str, *command: str) -> bytes:
    # Inside a git hook these would name another repository, and a login prompt would wait for ever.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        raise DownloadError(
            f"the released data is not in the cache ({cache_dir()}) and git could not fetch it: "
            f"{said.splitlines()[-1]}. Where you have it already: folder=… or --folder"
        ) from error
    return done.stdout


def _load(path: Path) -> Any:
    try:
        return json.loads(read_utf8(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None


def _objects(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    rows = _load(path)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: expected a list of objects")
    for number, row in enumerate(rows):
        _fields(path, f"entry {number}", row, fields)
    return rows


def _entry(path: Path, concept: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """What a file that maps concepts to objects says of one concept."""
    whole = _load(path)
    if not isinstance(whole, dict) or concept not in whole:
        raise DataError(f"{path}: no entry for {concept!r}")
    _fields(path, concept, whole[concept], fields)
    return dict(whole[concept])


def _fields(path: Path, place: str, row: object, fields: Mapping[str, type]) -> None:
    """Exactly these fields with these types, none of them blank."""
    if not isinstance(row, dict):
        raise DataError(f"{path}, {place}: expected an object")
    for field in sorted(row.keys() ^ fields):
        kind = "missing" if field in fields else "unknown"
        raise DataError(f"{path}, line {_line(path, row)}, {place}: {kind} field {field!r}")
    for field, type_ in fields.items():
        value = row[field]
        if not isinstance(value, type_) or not value or (isinstance(value, str) and not value.strip()):
            wanted = "text" if type_ is str else "a list that is not empty"
            raise DataError(f"{path}, line {_line(path, row)}, {place}, field {field!r}: expected {wanted}")


def _line(path: Path, row: Mapping[str, Any]) -> str:
    """Line, or lines, on which the first text of an entry stands in its file; "?" if it has none."""
    raw = read_utf8(path)
    text = next((value for value in row.values() if isinstance(value, str) and value), None)
    if text is None:
        return "?"
    forms = {json.dumps(text, ensure_ascii=ascii_) for ascii_ in (True, False)}
    starts = sorted(match.start() for form in forms for match in re.finditer(re.escape(form), raw))
    return " or ".join(dict.fromkeys(str(1 + raw.count("\n", 0, start)) for start in starts)) or "?"


def _texts(path: Path, field: str, values: list[Any]) -> tuple[str, ...]:
    for number, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{path}, field {field!r}, number {number}: expected text")
    return tuple(" ".join(value.split()) for value in values)
