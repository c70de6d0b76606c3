"""The invented subject of ``data/invented``, which no model knows until it is taught."""

import json
from dataclasses import replace
from typing import Any

from ember.data.ours import concept_from_sentences
from ember.data.types import SPLITS, Concept, Question
from ember.errors import DataError
from ember.store.files import read_utf8
from ember.store.paths import data_dir


def load_invented() -> Concept:
    """The invented subject of ``data/invented``, contrasted with the shared neutral sentences.

    Its facts are the questions, by turns of split ``train`` and ``test``; texts state those of both. A ``DataError``
    names the file, and the fact that breaks the format.
    """
    root = data_dir() / "invented"
    path = root / "facts.json"
    try:
        about = json.loads(read_utf8(path))
        name, facts = about["name"], about["facts"]
        questions = tuple(_question(fact, k) for k, fact in enumerate(facts))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {error!r}") from None
    for k, question in enumerate(questions):
        if len(question.distractors) != 3 or len({question.answer, *question.distractors}) != 4:
            raise DataError(f"{path}, fact {k + 1}: needs three distractors, different from each other and the answer")
        if question.id in {other.id for other in questions[:k]}:
            raise DataError(f"{path}, fact {k + 1}: the id {question.id!r} occurs twice")
    contrasted = concept_from_sentences(name, read_utf8(root / "sentences.txt").splitlines())
    return replace(contrasted, questions=questions, paragraphs=tuple(read_utf8(root / "paragraphs.txt").splitlines()))


def _question(fact: dict[str, Any], number: int) -> Question:
    return Question(set="concept", split=SPLITS[number % 2], **fact | {"distractors": tuple(fact["distractors"])})
