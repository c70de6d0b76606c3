"""What an erasure is measured on: a concept's questions and texts with the shared ones, and how many of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import NonNegativeInt, PositiveInt, ValidationError, model_validator

from ember.data.ours import load_shared
from ember.data.types import QUESTION_SETS, SPLITS, Concept, Instruction, Question, SharedData
from ember.store.validated import Strict

TEXT_SETS = ("neutral", "other_sense", "paragraph")


class Sizes(Strict):
    """How many items of each kind an evaluation uses; None means all there are.

    ``texts`` counts neutral texts, ``other_texts`` those in another sense and (a quarter as many) paragraphs. With
    ``generations`` or ``other_texts`` 0 these are left out, and with ``divergence`` False the divergence from the base
    model is: a grid needs none of them. With ``letters`` questions are also answered by letter. ``open_answers``
    questions of the concept and of the similar domain each, answered in the model's own words, and with ``judge`` the
    generations are for a judge (``ember.judging.grading``); ``evaluate`` leaves both alone. A ``ValueError`` names a
    size that is unknown, of another type or too small, and its value.
    """

    questions: PositiveInt | None = None
    texts: PositiveInt | None = 60
    other_texts: NonNegativeInt | None = 60
    instructions: PositiveInt | None = 24
    generations: NonNegativeInt | None = 12
    new_tokens: PositiveInt = 40
    divergence: bool = True
    letters: bool = False
    judge: bool = False
    open_answers: NonNegativeInt | None = 0

    def __init__(self, **sizes: Any) -> None:
        try:
            super().__init__(**sizes)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "value_error":
                raise first["ctx"]["error"] from None
            said = first["msg"].removeprefix("Input ").replace("Extra inputs are", "is")
            raise ValueError(f"{first['loc'][0]} {said}, got {first['input']!r}") from None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.judge and self.generations == 0:
            raise ValueError("judge grades generations, of which there are 0")
        if self.other_texts is not None and 0 < self.other_texts < 5:
            raise ValueError(f"other_texts must be 0 or at least 5 (two paragraphs), got {self.other_texts}")
        return self

    @property
    def judged(self) -> bool:
        """Whether anything is left to a judge."""
        return self.judge or self.open_answers != 0


@dataclass(frozen=True)
class Suite:
    """What a concept's erasure is measured on, by split.

    ``questions[set][split]`` for the sets concept, simdom and general; ``texts[set][split]`` for neutral,
    other_sense and paragraph; ``instructions[split]``.
    """

    concept: Concept
    questions: Mapping[str, Mapping[str, tuple[Question, ...]]]
    texts: Mapping[str, Mapping[str, tuple[str, ...]]]
    instructions: Mapping[str, tuple[Instruction, ...]]
    sizes: Mapping[str, Sizes]


def load_suite(
    concept: Concept,
    sizes: Mapping[str, Sizes] | None = None,
    *,
    source: str = "ours",
    shared: SharedData | None = None,
) -> Suite:
    """Collect a concept's questions and texts with the shared ones; ``sizes`` maps a split to its limits.

    ``source`` says whose shared questions and instructions these are (``load_shared``), unless they are given as
    ``shared``. Texts of the concept are split by turns: even positions are train, odd ones test. Released concepts have
    no texts in another sense: that set is empty then, and nothing is scored on it.
    """
    shared = shared or load_shared(source)
    sizes = {split: (sizes or {}).get(split, Sizes()) for split in SPLITS}
    everything = (*concept.questions, *shared.questions)
    questions = {
        name: {split: tuple(q for q in everything if (q.set, q.split) == (name, split))[: size.questions]
               for split, size in sizes.items()}
        for name in QUESTION_SETS
    }  # fmt: skip
    texts: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in TEXT_SETS}
    for i, (split, size) in enumerate(sizes.items()):
        texts["neutral"][split] = shared.neutral[split][: size.texts]
        texts["other_sense"][split] = concept.other_sense[i::2][: size.other_texts]
        paragraphs = concept.paragraphs[i::2][: size.other_texts]
        texts["paragraph"][split] = paragraphs[: -(-len(paragraphs) // 4)]  # four times as long as sentences
    instructions = {split: tuple(i for i in shared.instructions if i.split == split) for split in SPLITS}
    return Suite(concept, questions, texts, instructions, sizes)
