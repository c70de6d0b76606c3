"""The invented subject of ``data/invented``, which no model knows until it is taught."""

from dataclasses import replace
from typing import Any, Literal

from ember.data.ours import concept_from_sentences
from ember.data.reading import QuestionRow, checked_rows, read_json, read_lines
from ember.data.types import SPLITS, Concept, Question
from ember.store.paths import data_dir
from ember.store.validated import Loose, Text, validated


class _Subject(Loose):
    name: Text
    facts: list[dict[str, Any]]


def load_invented() -> Concept:
    """The invented subject of ``data/invented``, contrasted with the shared neutral sentences.

    Its facts are the questions, by turns of split ``train`` and ``test``; texts state those of both. A ``DataError``
    names the file, and the fact that breaks the format.
    """
    root = data_dir() / "invented"
    path = root / "facts.json"
    subject = validated(_Subject, read_json(path), str(path))
    facts = [
        (f"{path}, fact {k + 1}", {"set": "concept", "split": SPLITS[k % 2], "aliases": [], **fact})
        for k, fact in enumerate(subject.facts)
    ]
    questions = tuple(Question(**dict(row)) for row in checked_rows(QuestionRow[Literal["concept"]], facts))
    contrasted = concept_from_sentences(subject.name, read_lines(root / "sentences.txt"))
    return replace(contrasted, questions=questions, paragraphs=read_lines(root / "paragraphs.txt"))
