"""Concept data: fit sentences, questions, paragraphs, and the texts that are shared by all concepts.

The folder format is documented in ``data/README.md``. Every error names file, line and field.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ember.data.types import SOURCES, SPLITS, Concept, Instruction, Question, SharedData, plain_name
from ember.errors import DataError, UnknownNameError
from ember.store.files import read_utf8
from ember.store.paths import data_dir, slug

NEUTRAL_IN_FIT = 300  # as many as in the paper
_QUESTION_FIELDS = {"id", "set", "split", "question", "answer", "distractors", "aliases"}


def list_concepts() -> list[str]:
    """Display names of the concepts in the data folder."""
    return sorted(_concept_json(path.parent)["name"] for path in data_dir().glob("*/concept.json"))


def concept_from_sentences(name: str, sentences: Iterable[str]) -> Concept:
    """A concept with nothing but fit sentences of your own, contrasted with the shared neutral ones.

    Enough to make an edit; evaluating it needs questions and texts too (``load_concept`` with ``folder``).
    """
    neutral, further = _neutral_fit()
    return Concept(name, "", tuple(sentences), neutral, (), (), (), further_neutral=further)


def load_concept(name: str = "", *, folder: str | Path | None = None, source: str = "ours") -> Concept:
    """Load a concept by its display name, or your own from a ``folder`` of the documented format.

    ``source="released"`` reads the files that the paper's authors published, from ``folder`` or fetched once from
    their repository (``ember.data.released``).

    Raises
    ------
    UnknownNameError
        If no concept of the data folder has this name, or the source is not one of ``SOURCES``.
    DataError
        If a file breaks the format; the message names file, line and field.
    """
    if source not in SOURCES:
        raise UnknownNameError("source", source, SOURCES)
    if source == "released":
        from ember.data.released import load_released

        return load_released(name, folder)
    if folder is None:
        # The name is compared, never used as a path.
        folders = {_concept_json(path.parent)["name"]: path.parent for path in data_dir().glob("*/concept.json")}
        by_slug = {slug(known): path for known, path in folders.items()}
        if plain_name(name) not in by_slug:
            raise UnknownNameError("concept", name, folders, "Your own: load_concept(name, folder=...).")
        root = by_slug[plain_name(name)]
    else:
        root = Path(folder)
    about = _concept_json(root)
    neutral, further = _neutral_fit()
    return Concept(
        name=about["name"],
        simdom=about["simdom"],
        sentences=_lines(root / "sentences.txt"),
        neutral=neutral,
        further_neutral=further,
        questions=_questions(root / "questions.jsonl", ("concept", "simdom")),
        paragraphs=_lines(root / "paragraphs.txt"),
        other_sense=_lines(root / "other_sense.txt"),
    )


def _neutral_fit() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The neutral sentences of the fit, and the further ones. More of them in the fit drown the concept's features."""
    rows = _rows(data_dir() / "shared" / "neutral_fit.jsonl", {"text", "subject"})
    texts = tuple(row["text"] for row in rows)
    return texts[:NEUTRAL_IN_FIT], texts[NEUTRAL_IN_FIT:]


def load_shared(source: str = "ours", *, folder: str | Path | None = None) -> SharedData:
    """Load what all concepts share; errors as in ``load_concept``.

    ``source="released"`` takes questions and instructions from MMLU and AlpacaEval, the rows of the paper
    (``ember.data.mmlu_alpaca``; from ``folder`` or fetched once). Neutral sentences stay ours: none were released
    beside those of the fit.
    """
    if source not in SOURCES:
        raise UnknownNameError("source", source, SOURCES)
    if source == "released":
        from ember.data.mmlu_alpaca import load_shared_sets

        sets = load_shared_sets(folder)
        revisions = tuple(sets.revisions.items())
        return replace(load_shared(), questions=sets.questions, instructions=sets.instructions, revisions=revisions)
    root = data_dir() / "shared"
    neutral: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in _rows(root / "neutral_heldout.jsonl", {"text", "subject", "split"}):
        neutral[row["split"]].append(row["text"])
    path = root / "instructions.jsonl"
    instructions: list[Instruction] = []
    for row in _rows(path, {"id", "split", "instruction", "response", "kind"}):
        if any(row["id"] == known.id for known in instructions):
            raise DataError(f"{path}, line {row['_line']}, field 'id': {row['id']!r} occurs twice")
        instructions.append(Instruction(row["id"], row["split"], row["instruction"], row["response"]))
    questions = _questions(root / "general.jsonl", ("general",))
    held_out = {split: tuple(texts) for split, texts in neutral.items()}
    return SharedData(questions, held_out, tuple(instructions), sum(_neutral_fit(), ()))


def _lines(path: Path) -> tuple[str, ...]:
    lines = read_utf8(path).rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"{path}, line {number}: empty line")
    return tuple(lines)


def _rows(path: Path, fields: set[str]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, each with exactly these fields; ``_line`` tells where it stood."""
    rows = []
    for number, line in enumerate(read_utf8(path).rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        for field in sorted(row.keys() ^ fields):
            kind = "missing" if field in fields else "unknown"
            raise DataError(f"{path}, line {number}: {kind} field {field!r}")
        for field, value in row.items():
            if not isinstance(value, (str, list) if field in ("distractors", "aliases") else str):
                raise DataError(f"{path}, line {number}, field {field!r}: expected text")
            if isinstance(value, str) and not value.strip():
                raise DataError(f"{path}, line {number}, field {field!r}: empty")
        if row.get("split", "train") not in SPLITS:
            raise DataError(f"{path}, line {number}, field 'split': {row['split']!r} is not one of {SPLITS}")
        rows.append(row | {"_line": number})
    return rows


def _questions(path: Path, sets: tuple[str, ...]) -> tuple[Question, ...]:
    questions, seen = [], set()
    for row in _rows(path, _QUESTION_FIELDS):
        where = f"{path}, line {row.pop('_line')}"
        for field in ("id", "set", "question", "answer"):
            if not isinstance(row[field], str):
                raise DataError(f"{where}, field {field!r}: expected text")
        for field in ("distractors", "aliases"):
            if not isinstance(row[field], list) or not all(isinstance(x, str) and x.strip() for x in row[field]):
                raise DataError(f"{where}, field {field!r}: expected a list of texts")
        if len(row["distractors"]) != 3 or len({row["answer"], *row["distractors"]}) != 4:
            raise DataError(f"{where}, field 'distractors': need three, different from each other and the answer")
        if row["set"] not in sets:
            raise DataError(f"{where}, field 'set': {row['set']!r} is not one of {sets}")
        if row["id"] in seen:
            raise DataError(f"{where}, field 'id': {row['id']!r} occurs twice")
        seen.add(row["id"])
        questions.append(Question(**row | {f: tuple(row[f]) for f in ("distractors", "aliases")}))
    return tuple(questions)


def _concept_json(root: Path) -> dict[str, str]:
    path = root / "concept.json"
    try:
        about = json.loads(read_utf8(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    for field in ("name", "simdom"):
        if not isinstance(about, dict) or not isinstance(about.get(field), str) or not about[field].strip():
            raise DataError(f"{path}: field {field!r} must be a non-empty text")
    return {field: about[field] for field in ("name", "simdom")}
