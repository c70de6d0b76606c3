"""The data that the paper's authors published: read from a folder, or fetched once from their repository.

Nothing of it is part of this project (MIT licence; sentences and paragraphs derive from Wikipedia, CC BY-SA).
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo, create_model

from ember.data.reading import Some, Texts, read_json
from ember.data.types import Concept, Question, by_name
from ember.errors import DamagedFileError, DataError, DownloadError
from ember.store.files import read_sealed, read_utf8, sealed_dir
from ember.store.paths import cache_dir
from ember.store.validated import Listed, Strict, Text, validated

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


def _four(options: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    gold = info.data.get("correct_answer")
    if len(options) != 4 or len({gold, *options}) != 4:
        raise ValueError(f"need four different texts, {gold!r} among them, got {list(options)}")
    return options


_Options = Annotated[Listed[Text], AfterValidator(_four)]
_parts: dict[str, Any] = dict.fromkeys(_SETS, Some)
_LISTED: Any = create_model("Listed", __base__=Strict, concept=Text, sentences=Some)
_SENTENCES: Any = create_model("Sentences", __base__=Strict, concept=Text, sentences=Texts)
_NEUTRAL: Any = create_model("Neutral", __base__=Strict, url=Text, title=Text, sentence=Text)
_PARAGRAPHS: Any = create_model("Paragraphs", __base__=Strict, RelearnParagraphs=Texts)
_ASKED: Any = create_model("Asked", __base__=Strict, **_parts)
_CHOICE: Any = create_model("Choice", __base__=Strict, q=Text, correct_answer=Text, options=_Options)
_OPEN: Any = create_model("Open", __base__=Strict, q=Text, a=Text)


def list_released(folder: str | Path | None = None) -> list[str]:
    """Names of the concepts in the released files."""
    return sorted(row.concept for row in _rows(_root(folder) / SENTENCES, _LISTED))


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
    root = _root(folder)
    listed = {row.concept: row.model_dump() for row in _rows(root / SENTENCES, _LISTED)}
    row = _checked(root / SENTENCES, _SENTENCES, by_name(name, listed, "released concept"), name)
    paragraphs = _of_concept(root / PARAGRAPHS, _PARAGRAPHS, row.concept).RelearnParagraphs
    return Concept(
        name=row.concept,
        simdom=f"the similar domain of {row.concept}",
        sentences=_one_line(*row.sentences),
        neutral=_one_line(*(neutral.sentence for neutral in _rows(root / NEUTRAL, _NEUTRAL))),
        questions=tuple(_questions(root, row.concept)),
        paragraphs=_one_line(*paragraphs),
        other_sense=(),
        source="released",
    )


def _questions(root: Path, concept: str) -> Iterator[Question]:
    closed, openly = (dict(_of_concept(path, _ASKED, concept)) for path in (root / CHOICE, root / OPEN))
    for key, (set_, split) in _SETS.items():
        told = [_checked(root / OPEN, _OPEN, row, f"{concept}, {key}[{k}]") for k, row in enumerate(openly[key])]
        answers = {row.q: row.a for row in told}
        for number, raw in enumerate(closed[key]):
            row = _checked(root / CHOICE, _CHOICE, raw, f"{concept}, {key}[{number}]")
            gold = row.correct_answer
            wrong = tuple(option for option in row.options if option != gold)
            aliases = tuple({answers.get(row.q, gold)} - {gold})
            yield Question(f"{key}[{number}]", set_, split, row.q, gold, wrong, aliases)


def _root(folder: str | Path | None) -> Path:
    return fetch_released() if folder is None else Path(folder)


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
    if read_sealed(folder, mend="Delete the folder").get("commit") != commit:
        raise DamagedFileError(f"{folder} is not of the commit {commit}. Delete the folder")
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
    try:
        return validated(kind, raw, place)
    except DataError as error:
        raise DataError(f"{path}, line {_line(path, raw)}, {error}") from None


def _line(path: Path, row: object) -> str:
    """Line, or lines, on which the first text of an entry stands in its file; "?" if it has none."""
    values = row.values() if isinstance(row, dict) else [row]
    text = next((value for value in values if isinstance(value, str) and value), None)
    if text is None:
        return "?"
    content = read_utf8(path)
    forms = {json.dumps(text, ensure_ascii=ascii_) for ascii_ in (True, False)}
    starts = sorted(match.start() for form in forms for match in re.finditer(re.escape(form), content))
    return " or ".join(dict.fromkeys(str(1 + content.count("\n", 0, start)) for start in starts)) or "?"


def _one_line(*texts: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()) for text in texts)
