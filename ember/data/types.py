"""Concepts, questions and texts, whoever wrote them."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ember.errors import UnknownNameError
from ember.store.paths import slug

QUESTION_SETS = ("concept", "simdom", "general")
SPLITS = ("train", "test")
SOURCES = ("ours", "released")
Held = TypeVar("Held")


@dataclass(frozen=True)
class Question:
    """A question with one right answer, three wrong ones, and other accepted forms of the right one."""

    id: str
    set: str
    split: str
    question: str
    answer: str
    distractors: tuple[str, ...]
    aliases: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """The four options in an order fixed by the question's id."""
        shuffled = [self.answer, *self.distractors]
        random.Random(self.id).shuffle(shuffled)
        return tuple(shuffled)

    @property
    def gold(self) -> int:
        """Index of the right answer in ``options``."""
        return self.options.index(self.answer)


@dataclass(frozen=True)
class Instruction:
    """An everyday instruction with a reference response."""

    id: str
    split: str
    instruction: str
    response: str


@dataclass(frozen=True)
class Concept:
    """Everything known about one concept.

    ``sentences`` and ``neutral`` fit the factorization; ``further_neutral`` sentences only tell which tokens are not
    concept-only; ``questions`` hold the concept and similar-domain (``simdom``) sets; ``paragraphs`` are for
    relearning; ``other_sense`` uses the concept's words in another sense; ``source`` is one of ``SOURCES``.
    """

    name: str
    simdom: str
    sentences: tuple[str, ...]
    neutral: tuple[str, ...]
    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]
    other_sense: tuple[str, ...]
    further_neutral: tuple[str, ...] = ()
    source: str = "ours"

    @property
    def slug(self) -> str:
        return slug(self.name)


@dataclass(frozen=True)
class SharedData:
    """General-knowledge questions, held-out neutral sentences by split, instructions, neutral sentences of the fit.

    ``revisions`` pairs data sets that are no part of this project with their commits.
    """

    questions: tuple[Question, ...]
    neutral: Mapping[str, tuple[str, ...]]
    instructions: tuple[Instruction, ...]
    neutral_fit: tuple[str, ...]
    revisions: tuple[tuple[str, str], ...] = ()


def by_name(name: str, known: Mapping[str, Held], kind: str, hint: str = "") -> Held:
    """What is known under a name in any capitalisation. Names are compared, never used as a path.

    An ``UnknownNameError`` of the ``kind`` lists the known ones, also for what has the parts of a path in it.
    """
    slugs = {slug(one): held for one, held in known.items()}
    plain = "" if re.search(r"[/\\]|\.\.", name) else slug(name)
    if plain not in slugs:
        raise UnknownNameError(kind, name, known, hint)
    return slugs[plain]
