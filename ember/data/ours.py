"""Concept data: fit sentences, questions, paragraphs, and the texts that are shared by all concepts.

The folder format is documented in ``data/README.md``. Every error names file, line and field.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import create_model

from ember.data.mmlu_alpaca import load_shared_sets
from ember.data.reading import QuestionRow, Split, read_json, read_lines, read_rows
from ember.data.released import load_released
from ember.data.types import SOURCES, SPLITS, Concept, Instruction, Question, SharedData, by_name
from ember.errors import UnknownNameError
from ember.store.paths import data_dir
from ember.store.validated import Loose, Strict, Text, validated

NEUTRAL_IN_FIT = 300  # as many as in the paper


_NEUTRAL: Any = create_model("Neutral", __base__=Strict, text=Text, subject=Text)
_HELD_OUT: Any = create_model("HeldOut", __base__=_NEUTRAL, split=Split)
_ABOUT: Any = create_model("About", __base__=Loose, name=Text, simdom=Text)
_INSTRUCTION: Any = create_model(
    "Instruction", __base__=Strict, split=Split, id=Text, instruction=Text, response=Text, kind=Text
)


def list_concepts() -> list[str]:
    """Display names of the concepts in the data folder."""
    return sorted(_folders())


def concept_from_sentences(name: str, sentences: Iterable[str]) -> Concept:
    """A concept with nothing but fit sentences of your own, contrasted with the shared neutral ones.

    Enough to make an edit; evaluating it needs questions and texts too (``load_concept`` with ``folder``).
    """
    neutral = _neutral_fit()
    return Concept(name, "", tuple(sentences), neutral[:NEUTRAL_IN_FIT], (), (), (), neutral[NEUTRAL_IN_FIT:])


def load_concept(name: str = "", *, folder: str | Path | None = None, source: str = "ours") -> Concept:
    """Load a concept by its display name, or your own from a ``folder`` of the documented format.

    ``source="released"`` reads the files that the paper's authors published, from ``folder`` or fetched once from
    their repository (``ember.data.released``). An ``UnknownNameError`` lists the concepts, or the ``SOURCES``; a
    ``DataError`` names file, line and field.
    """
    if _is_released(source):
        return load_released(name, folder)
    hint = "Your own: load_concept(name, folder=...)."
    root = by_name(name, _folders(), "concept", hint) if folder is None else Path(folder)
    about = _about(root)
    return replace(
        concept_from_sentences(about.name, read_lines(root / "sentences.txt")),
        simdom=about.simdom,
        questions=_questions(root / "questions.jsonl", Literal["concept", "simdom"]),
        paragraphs=read_lines(root / "paragraphs.txt"),
        other_sense=read_lines(root / "other_sense.txt"),
    )


def load_shared(source: str = "ours", *, folder: str | Path | None = None) -> SharedData:
    """Load what all concepts share; errors as in ``load_concept``.

    ``source="released"`` takes questions and instructions from MMLU and AlpacaEval, the rows of the paper
    (``ember.data.mmlu_alpaca``; from ``folder`` or fetched once). Neutral sentences stay ours: none were released
    beside those of the fit.
    """
    released, root = _is_released(source), data_dir() / "shared"
    held_out = read_rows(root / "neutral_heldout.jsonl", _HELD_OUT)
    neutral = {split: tuple(row.text for row in held_out if row.split == split) for split in SPLITS}
    if released:
        return replace(load_shared_sets(folder), neutral=neutral, neutral_fit=_neutral_fit())
    rows = read_rows(root / "instructions.jsonl", _INSTRUCTION)
    instructions = tuple(Instruction(row.id, row.split, row.instruction, row.response) for row in rows)
    return SharedData(_questions(root / "general.jsonl", Literal["general"]), neutral, instructions, _neutral_fit())


def _is_released(source: str) -> bool:
    if source not in SOURCES:
        raise UnknownNameError("source", source, SOURCES)
    return source == "released"


def _questions(path: Path, sets: Any) -> tuple[Question, ...]:
    return tuple(Question(**dict(row)) for row in read_rows(path, QuestionRow[sets]))


def _folders() -> dict[str, Path]:
    """The data folder's concepts by display name."""
    return {_about(path.parent).name: path.parent for path in data_dir().glob("*/concept.json")}


def _about(root: Path) -> Any:
    return validated(_ABOUT, read_json(root / "concept.json"), str(root / "concept.json"))


def _neutral_fit() -> tuple[str, ...]:
    """Neutral sentences of the fit, then further ones: more of them in the fit drown the concept's features."""
    return tuple(row.text for row in read_rows(data_dir() / "shared" / "neutral_fit.jsonl", _NEUTRAL))
