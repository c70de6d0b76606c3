"""How far the right option of a question can be guessed from the options' form alone."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from ember.data.types import Question


def longest_option(question: Question) -> float:
    """Chance that guessing the longest option is right; equally long ones share."""
    return _share(question, [len(option) for option in question.options])


def first_option(question: Question) -> float:
    """Whether the first option as shown is right."""
    return float(question.gold == 0)


def similar_option(question: Question) -> float:
    """Chance that guessing the option most like the question is right (cosine of letter trigrams); ties share."""
    asked = _trigrams(question.question)
    return _share(question, [round(_cosine(asked, _trigrams(option)), 9) for option in question.options])


def _share(question: Question, values: Sequence[float]) -> float:
    best = max(values)
    return (values[question.gold] == best) / sum(value == best for value in values)


def _trigrams(text: str) -> Counter[str]:
    plain = " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])
    return Counter(plain[k : k + 3] for k in range(len(plain) - 2))


def _cosine(a: Counter[str], b: Counter[str]) -> float:
    product = sum(count * b[gram] for gram, count in a.items())
    return product / math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values())) if product else 0.0


GUESSES: dict[str, Callable[[Question], float]] = {
    "longest option": longest_option,
    "first option": first_option,
    "most similar option": similar_option,
}
