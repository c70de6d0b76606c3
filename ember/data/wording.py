"""Comparing wordings: content words, how alike two questions are, whether a text holds an answer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from ember.data.types import Question

_EMPTY_WORDS = """
a an the of in on at to for from by with and or as is are was were be been being do does did has have had it its
this that these those which what who whom whose when where how why many much most more some any than into over after
before during about between their his her he she they them you your we our can could would will may might there one
name named call called known term word kind type sort used use make made often usually
"""
_ENDINGS = re.compile(r"(?:ing|ed|ly|e)$")


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    word = word.removesuffix("'s")
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    return _ENDINGS.sub("", word) if len(word) > 4 else word


def stems(text: str) -> list[str]:
    """The words of a text in order: lower case, plurals and common English endings cut off."""
    return [_stem(word) for word in re.findall(r"[^\W_]+(?:'s)?", text.lower().replace("’", "'"))]


_EMPTY = frozenset(stems(_EMPTY_WORDS))


def content_stems(text: str) -> frozenset[str]:
    """The distinct words of a text that carry content."""
    return frozenset(stems(text)) - _EMPTY


def accepted(question: Question) -> list[tuple[str, ...]]:
    """The words of every accepted answer, without a leading article."""
    forms = [stems(re.sub(r"^(the|an?)\s", "", form, flags=re.I)) for form in (question.answer, *question.aliases)]
    return [tuple(form) for form in dict.fromkeys(map(tuple, forms)) if form]


class Texts:
    """Texts prepared for the question which of them hold an answer."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.content = [content_stems(text) for text in texts]
        self.padded = [f" {' '.join(stems(text))} " for text in texts]

    def holding(self, question: Question) -> list[int]:
        """Positions of the texts in which an accepted answer of the question occurs, as whole words."""
        forms = [f" {' '.join(form)} " for form in accepted(question)]
        return [k for k, text in enumerate(self.padded) if any(form in text for form in forms)]

    def stating(self, question: Question, weight: Mapping[str, float]) -> list[int]:
        """Positions of the texts that hold an accepted answer and at least half of what the question says.

        Content words count by ``weight`` (see ``rarity``); at least two must be there, or all if there are fewer.
        """
        asked = content_stems(question.question)
        total = sum(weight.get(word, 0.0) for word in asked)
        said = {k: asked & self.content[k] for k in self.holding(question)}
        return [
            k
            for k, words in said.items()
            if len(words) >= min(2, len(asked)) and sum(weight.get(word, 0.0) for word in words) >= total / 2
        ]


def rarity(texts: Sequence[frozenset[str]]) -> dict[str, float]:
    """Weight of each content word: log of the number of texts over the number that hold it, at least 0."""
    counts = pd.Series([word for text in texts for word in text], dtype=object).value_counts()
    return {str(word): float(np.log((len(texts) + 1) / (count + 0.5))) for word, count in counts.items()}


def alike(first: Sequence[frozenset[str]], second: Sequence[frozenset[str]]) -> np.ndarray:
    """Weighted Jaccard similarity of content words, [len(first), len(second)], in 0..1; rare words count more."""
    weight = rarity([*first, *second])
    # Which words each text holds, [texts, words].
    first_in, second_in = (
        np.array([[word in text for word in weight] for text in texts], np.float32).reshape(len(texts), len(weight))
        for texts in (first, second)
    )
    weights = np.array(list(weight.values()), np.float32).clip(0)
    both = (first_in * weights) @ second_in.T
    either = (first_in @ weights)[:, None] + (second_in @ weights)[None, :] - both
    return np.where(either > 0, both / np.where(either > 0, either, 1), 0.0)


def paraphrases(first: Sequence[Question], second: Sequence[Question]) -> list[tuple[int, int]]:
    """Pairs (position in ``first``, position in ``second``) of questions that ask for the same fact.

    They do when they accept the same answer and share content words (similarity at least 0.1), when one asks for what
    the other states (the answer of one occurs in the other's question; similarity of question and answer together at
    least 0.3), or when nearly all their words are the same (0.85).
    """
    if not first or not second:
        return []
    asked = [[content_stems(q.question) for q in questions] for questions in (first, second)]
    whole = [[content_stems(f"{q.question} {q.answer}") for q in questions] for questions in (first, second)]
    forms = [[set(accepted(q)) for q in questions] for questions in (first, second)]
    same = np.array([[not a.isdisjoint(b) for b in forms[1]] for a in forms[0]])
    alike_asked, alike_whole = alike(*asked), alike(*whole)
    close = (same & (alike_asked >= 0.1)) | (alike_asked >= 0.85)
    for i, j in zip(*np.nonzero(~close & (alike_whole >= 0.3)), strict=True):
        here, there = first[i], second[j]
        close[i, j] = bool(Texts([there.question]).holding(here) or Texts([here.question]).holding(there))
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(close), strict=True)]
