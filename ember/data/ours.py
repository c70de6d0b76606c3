"""Concept data: fit sentences, questions, paragraphs, and the texts that are shared by all concepts.

The folder format is documented in ``data/README.md``. Every error names file, line and field.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import create_model

from ember.data.mmlu_alpaca import load_shared_sets
from ember.data.reading import Split, question_row, read_json, read_lines, read_rows
from ember.data.released import load_released
from ember.data.types import SPLITS, Concept, Instruction, Question, SharedData, by_name
from ember.errors import UnknownNameError
from ember.store.paths import data_dir
from ember.store.validated import Loose, Strict, Text, validated

NEUTRAL_IN_FIT = 300  # as many as in the paper
_NEUTRAL: Any = create_model("Neutral", __base__=Strict, text=Text, subject=Text)
_HELD_OUT: Any = create_model("HeldOut", __base__=_NEUTRAL, split=Split)
_texts: dict[str, Any] = dict.fromkeys(("id", "instruction", "response", "kind"), Text)
_INSTRUCTION: Any = create_model("Instruction", __base__=Strict, split=Split, **_texts)
_ABOUT: Any = create_model("About", __base__=Loose, name=Text, simdom=Text)


def list_concepts() -> list[str]:
    """Display names of the concepts in the data folder."""
    return sorted(_folders())


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
    return _loaders(source)[0](name, folder)


def load_shared(source: str = "ours", *, folder: str | Path | None = None) -> SharedData:
    """Load what all concepts share; errors as in ``load_concept``.

    ``source="released"`` takes questions and instructions from MMLU and AlpacaEval, the rows of the paper
    (``ember.data.mmlu_alpaca``; from ``folder`` or fetched once). Neutral sentences stay ours: none were released
    beside those of the fit.
    """
    return _loaders(source)[1](folder)


def _our_concept(name: str, folder: str | Path | None) -> Concept:
    if folder is None:
        root = by_name(name, _folders(), "concept", "Your own: load_concept(name, folder=...).")
    else:
        root = Path(folder)
    about = _about(root)
    neutral, further = _neutral_fit()
    return Concept(
        name=about.name,
        simdom=about.simdom,
        sentences=read_lines(root / "sentences.txt"),
        neutral=neutral,
        further_neutral=further,
        questions=_questions(root / "questions.jsonl", "concept", "simdom"),
        paragraphs=read_lines(root / "paragraphs.txt"),
        other_sense=read_lines(root / "other_sense.txt"),
    )


def _our_shared(folder: str | Path | None = None) -> SharedData:
    root = data_dir() / "shared"
    held_out = read_rows(root / "neutral_heldout.jsonl", _HELD_OUT)
    neutral = {split: tuple(row.text for row in held_out if row.split == split) for split in SPLITS}
    rows = read_rows(root / "instructions.jsonl", _INSTRUCTION)
    instructions = tuple(Instruction(row.id, row.split, row.instruction, row.response) for row in rows)
    return SharedData(_questions(root / "general.jsonl", "general"), neutral, instructions, sum(_neutral_fit(), ()))


def _released_shared(folder: str | Path | None) -> SharedData:
    ours = _our_shared()
    return replace(load_shared_sets(folder), neutral=ours.neutral, neutral_fit=ours.neutral_fit)


# Source → how a concept is loaded, and what all concepts share.
_LOADERS: Mapping[str, tuple[Callable[..., Concept], Callable[..., SharedData]]] = {
    "ours": (_our_concept, _our_shared),
    "released": (load_released, _released_shared),
}


def _loaders(source: str) -> tuple[Callable[..., Concept], Callable[..., SharedData]]:
    if source not in _LOADERS:
        raise UnknownNameError("source", source, _LOADERS)
    return _LOADERS[source]


def _questions(path: Path, *sets: str) -> tuple[Question, ...]:
    return tuple(Question(**dict(row)) for row in read_rows(path, question_row(*sets)))


def _folders() -> dict[str, Path]:
    """The data folder's concepts by display name."""
    return {_about(path.parent).name: path.parent for path in data_dir().glob("*/concept.json")}


def _about(root: Path) -> Any:
    return validated(_ABOUT, read_json(root / "concept.json"), str(root / "concept.json"))


def _neutral_fit() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The neutral sentences of the fit, and the further ones. More of them in the fit drown the concept's features."""
    texts = tuple(row.text for row in read_rows(data_dir() / "shared" / "neutral_fit.jsonl", _NEUTRAL))
    return texts[:NEUTRAL_IN_FIT], texts[NEUTRAL_IN_FIT:]
