"""Data that satisfy every check, as objects and on disk."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from ember.data.types import Concept, Instruction, Question, SharedData
from helpers.folders import write_rows

# Texts and questions that pass every check: invented words, none used twice. Questions and texts share no letter
# trigram with the options, and all options are equally long, so every guess is exactly at chance.


def invented(consonants: str) -> Iterator[str]:
    """Words of six letters, each once, ending in a vowel that no stemming cuts off."""
    syllables = [c + v for c in consonants for v in "aiou"]
    return map("".join, itertools.permutations(syllables, 3))


def with_gold(question: Question, gold: int) -> Question:
    """The question under an id that puts the right option at position ``gold``."""
    variants = (dataclasses.replace(question, id=f"{question.id}.{k}") for k in itertools.count())
    return next(variant for variant in variants if variant.gold == gold)


def sound_questions(words: Iterator[str], options: Iterator[str], parts: dict[tuple[str, str], int]) -> list[Question]:
    """So many questions of each (set, split); the right option stands at every position equally often."""
    questions = []
    for (set_, split), count in parts.items():
        for k in range(count):
            text = f"Where does the {next(words)} {next(words)} meet the {next(words)}?"
            answer, *wrong = itertools.islice(options, 4)
            question = Question(f"{set_}-{split}-{k}", set_, split, text, answer, tuple(wrong))
            questions.append(with_gold(question, k % 4))
    return questions


def sound_texts(words: Iterator[str], count: int, *lengths: int) -> list[str]:
    """Texts of so many words; several lengths take turns."""
    return [" ".join(itertools.islice(words, lengths[k % len(lengths)])) + "." for k in range(count)]


def sound_concept() -> Concept:
    """A concept that satisfies every check, with no more items than demanded."""
    words, options = invented("cdfhlmnrtw"), invented("bgkpvz")
    parts = {(set_, split): n for set_ in ("concept", "simdom") for split, n in (("train", 60), ("test", 100))}
    return Concept(
        name="Sound Rome",
        simdom="Sound Greece",
        questions=tuple(sound_questions(words, options, parts)),
        sentences=tuple(sound_texts(words, 150, 5, 45)),
        paragraphs=tuple(sound_texts(words, 80, 60, 120)),
        other_sense=tuple(sound_texts(words, 60, 5, 45)),
        neutral=tuple(sound_texts(words, 300, 8)),
        further_neutral=tuple(sound_texts(words, 30, 8)),
    )


def sound_shared() -> SharedData:
    """Shared data that satisfy every check, with no more items than demanded."""
    words, options = invented("cdfhlmnrtw"), invented("bgkpvz")
    parts = {("general", "train"): 100, ("general", "test"): 100}
    return SharedData(
        questions=tuple(sound_questions(words, options, parts)),
        neutral={split: tuple(sound_texts(words, 250, 4, 60)) for split in ("train", "test")},
        instructions=tuple(
            Instruction(f"i-{k}", ("train", "test")[k % 2], text, "Yes.")
            for k, text in enumerate(sound_texts(words, 60, 8))
        ),
        neutral_fit=tuple(sound_texts(words, 500, 4, 60)),
    )


SOUND, SHARED = sound_concept(), sound_shared()


def write_sound(root: Path) -> Path:
    """A data folder of the documented format that holds the sound concept and shared data; the concept's folder."""
    folder = root / SOUND.slug
    for part in (folder, root / "shared"):
        part.mkdir(parents=True)
    (folder / "concept.json").write_text(json.dumps({"name": SOUND.name, "simdom": SOUND.simdom}))
    for kind in ("sentences", "paragraphs", "other_sense"):
        (folder / f"{kind}.txt").write_text("\n".join(getattr(SOUND, kind)) + "\n")
    write_rows(folder / "questions.jsonl", map(dataclasses.asdict, SOUND.questions))
    shared = root / "shared"
    write_rows(shared / "general.jsonl", map(dataclasses.asdict, SHARED.questions))
    write_rows(shared / "neutral_fit.jsonl", [{"text": text, "subject": "x"} for text in SHARED.neutral_fit])
    held_out = [(split, text) for split, texts in SHARED.neutral.items() for text in texts]
    write_rows(shared / "neutral_heldout.jsonl", [{"text": t, "subject": "x", "split": s} for s, t in held_out])
    write_rows(shared / "instructions.jsonl", [dataclasses.asdict(i) | {"kind": "x"} for i in SHARED.instructions])
    return folder
