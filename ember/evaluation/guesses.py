"""How far the right option of a question can be guessed from the options' form alone."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from ember.data.types import Question


def _share(question: Question, values: Sequence[float]) -> float:
    """Chance that guessing an option of the greatest value is right; equal ones share."""
    best = max(values)
    return (values[question.gold] == best) / sum(value == best for value in values)


def _likeness(question: Question) -> list[float]:
    """Of each option to the question: cosine of their letter trigrams."""
    asked = _trigrams(question.question)
    return [round(_cosine(asked, _trigrams(option)), 9) for option in question.options]


def _trigrams(text: str) -> Counter[str]:
    plain = " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])
    return Counter(plain[k : k + 3] for k in range(len(plain) - 2))


def _cosine(a: Counter[str], b: Counter[str]) -> float:
    product = sum(count * b[gram] for gram, count in a.items())
    return product / math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values())) if product else 0.0


# How likely each guess is right.
GUESSES: dict[str, Callable[[Question], float]] = {
    "longest option": lambda question: _share(question, [len(option) for option in question.options]),
    "first option": lambda question: float(question.gold == 0),
    "most similar option": lambda question: _share(question, _likeness(question)),
}
