"""The data that the paper's authors published: read from a folder, or fetched once from their repository.

Nothing of it is part of this project (MIT licence; sentences and paragraphs derive from Wikipedia, CC BY-SA).
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, create_model

from ember.data.reading import Some, read_json
from ember.data.types import SPLITS, Concept, Question, by_name
from ember.errors import DamagedFileError, DataError, DownloadError
from ember.store.files import read_sealed, read_utf8, sealed_dir
from ember.store.paths import cache_dir
from ember.store.validated import Listed, Strict, Text, validated

REPOSITORY = "https://github.com/ClarSu/EMBER-Embedding-Erasure.git"
# The whole id: git checks that the content it receives hashes to it.
COMMIT = "14d6f6dc594cb74a0c9d70e567b3162561d2d10b"
SENTENCES, NEUTRAL, CHOICE, OPEN, PARAGRAPHS = FILES = tuple(
    f"{name}.json"
    for name in ("concept_sentences", "neutral_sentences", "mc_questions", "open_questions", "relearn_paragraphs")
)
# Data set and split → the file with the numbers of its rows.
INDICES = {(name, split): f"{name}_{split}_indices.json" for name in ("mmlu", "alpaca") for split in SPLITS}
FETCHED = (*FILES, *INDICES.values())
_SETS = {
    f"{key}_{split}": (set_, split) for key, set_ in (("QA", "concept"), ("SimdomQA", "simdom")) for split in SPLITS
}


def _four(options: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    gold = info.data.get("correct_answer")
    if len(options) != 4 or len({gold, *options}) != 4:
        raise ValueError(f"need four different texts, {gold!r} among them, got {list(options)}")
    return options


_Line = Annotated[Text, AfterValidator(lambda text: " ".join(text.split()))]
_Lines = Annotated[Listed[_Line], Field(min_length=1)]
_Options = Annotated[Listed[Text], AfterValidator(_four)]
_parts: dict[str, Any] = dict.fromkeys(_SETS, Some)
_LISTED: Any = create_model("Listed", __base__=Strict, concept=Text, sentences=Some)
_SENTENCES: Any = create_model("Sentences", __base__=Strict, concept=Text, sentences=_Lines)
_NEUTRAL: Any = create_model("Neutral", __base__=Strict, url=Text, title=Text, sentence=_Line)
_PARAGRAPHS: Any = create_model("Paragraphs", __base__=Strict, RelearnParagraphs=_Lines)
_ASKED: Any = create_model("Asked", __base__=Strict, **_parts)
_CHOICE: Any = create_model("Choice", __base__=Strict, q=Text, correct_answer=Text, options=_Options)
_OPEN: Any = create_model("Open", __base__=Strict, q=Text, a=Text)


def list_released(folder: str | Path | None = None) -> list[str]:
    """Names of the concepts in the released files."""
    return sorted(_listed(_root(folder)))


def load_released(name: str, folder: str | Path | None = None) -> Concept:
    """One concept of the released files in ``folder``, by default of those that ``fetch_released`` caches.

    A question's id is its place in the file, such as ``QA_test[3]``; the open form's answer is an alias. The files name
    no similar domain and hold no texts that use the concept's words in another sense. An ``UnknownNameError`` lists the
    concepts; a ``DataError`` names file, line and field; other errors are those of ``fetch_released``.
    """
    root = _root(folder)
    row = _checked(root / SENTENCES, _SENTENCES, by_name(name, _listed(root), "released concept"), name)
    return Concept(
        name=row.concept,
        simdom=f"the similar domain of {row.concept}",
        sentences=row.sentences,
        neutral=tuple(neutral.sentence for neutral in _rows(root / NEUTRAL, _NEUTRAL)),
        questions=tuple(_questions(root, row.concept)),
        paragraphs=_of_concept(root / PARAGRAPHS, _PARAGRAPHS, row.concept).RelearnParagraphs,
        other_sense=(),
        source="released",
    )


def _questions(root: Path, concept: str) -> Iterator[Question]:
    closed, openly = (dict(_of_concept(path, _ASKED, concept)) for path in (root / CHOICE, root / OPEN))
    for key, (set_, split) in _SETS.items():
        told = [_checked(root / OPEN, _OPEN, row, f"{concept}, {key}[{k}]") for k, row in enumerate(openly[key])]
        answers = {row.q: row.a for row in told}
        for k, raw in enumerate(closed[key]):
            row = _checked(root / CHOICE, _CHOICE, raw, f"{concept}, {key}[{k}]")
            gold = row.correct_answer
            wrong = tuple(option for option in row.options if option != gold)
            yield Question(f"{key}[{k}]", set_, split, row.q, gold, wrong, tuple({answers.get(row.q, gold)} - {gold}))


def fetch_released(*, repository: str = REPOSITORY, commit: str = COMMIT) -> Path:
    """Folder of the released files; fetched with git on first use, at a pinned commit.

    Git verifies that what arrives hashes to the commit's id; the hash of each file is recorded and checked on every
    call: what is not as written is a ``DamagedFileError``, what can not be fetched a ``DownloadError``.
    """
    folder = cache_dir() / "released" / commit[:12]
    if not folder.exists():
        with tempfile.TemporaryDirectory() as clone, sealed_dir(folder, {"commit": commit}, ours=True) as target:
            _git(clone, "init", "--quiet")
            _git(clone, "fetch", "--quiet", "--depth=1", repository, commit)
            for name in FETCHED:
                (target / name).write_bytes(_git(clone, "show", f"{commit}:data/{name}"))
    if read_sealed(folder, mend="Delete the folder").get("commit") != commit:
        raise DamagedFileError(f"{folder} is not of the commit {commit}. Delete the folder")
    return folder


def _git(folder: str, *command: str) -> bytes:
    # Inside a git hook these would name another repository, and a login prompt would wait for ever.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, check=True, env=environment).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        raise DownloadError(
            f"the released data is not in the cache ({cache_dir()}) and git could not fetch it: "
            f"{said.splitlines()[-1]}. Where you have it already: folder=… or --folder"
        ) from error


def _root(folder: str | Path | None) -> Path:
    return fetch_released() if folder is None else Path(folder)


def _listed(root: Path) -> dict[str, dict[str, Any]]:
    return {row.concept: row.model_dump() for row in _rows(root / SENTENCES, _LISTED)}


def _rows(path: Path, kind: Any) -> list[Any]:
    """The objects of a file that holds a list of them."""
    raw = validated(Some, read_json(path), str(path))
    return [_checked(path, kind, row, f"entry {number}") for number, row in enumerate(raw)]


def _of_concept(path: Path, kind: Any, concept: str) -> Any:
    """What a file that maps concepts to objects says of one concept."""
    whole = read_json(path)
    if not isinstance(whole, dict) or concept not in whole:
        raise DataError(f"{path}: no entry for {concept!r}")
    return _checked(path, kind, whole[concept], concept)


def _checked(path: Path, kind: Any, raw: object, place: str) -> Any:
    """``raw`` as a ``kind``; an error names the line, or lines, on which its first text stands, "?" if it has none."""
    try:
        return validated(kind, raw, place)
    except DataError as error:
        values = raw.values() if isinstance(raw, dict) else [raw]
        text = next((value for value in values if isinstance(value, str) and value), None)
        forms = [json.dumps(text), json.dumps(text, ensure_ascii=False)] if text else []
        content = enumerate(read_utf8(path).split("\n"), 1)
        lines = [str(number) for number, line in content if any(form in line for form in forms)]
        raise DataError(f"{path}, line {' or '.join(lines) or '?'}, {error}") from None
