"""Multiple choice by a generated letter, as in the paper; next to the likelihood of the options, which needs no format.

A model that cannot follow the format answers "A" to everything or no letter at all: ``letter_valid`` tells.
"""

import re
from collections.abc import Sequence

import pandas as pd

from ember.data.types import Question
from ember.models.loading import LoadedModel
from ember.models.scoring import generate_greedy

LETTERS = "ABCD"
NEW_TOKENS = 4
_LEAD = r"\W*(?i:(?:the )?(?:(?:correct|right) )?(?:answer|option|letter)(?: is)?\W*)?"
# "A" before another word is an article, and the others before a lower-case word are part of a sentence.
_ANSWER = re.compile(rf"{_LEAD}(A(?!['’]?\w|[ \t]+\w)|[B-D](?!['’]?\w|[ \t]+[a-z]))")


def letter_prompt(question: Question) -> str:
    """The question with its four options, lettered in the order that its id fixes (``Question.options``)."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True))
    return f"{question.question}\n\n{options}\n\nAnswer with one letter only: A, B, C or D."


def read_letter(text: str) -> str:
    """The letter that an answer starts with, alone or after words such as "Answer:"; empty if it gives none."""
    answer = re.fullmatch(r"\W*([a-d])\W*", text) or _ANSWER.match(text)
    return answer[1].upper() if answer else ""


def letter_answers(loaded: LoadedModel, questions: Sequence[Question]) -> list[str]:
    """The letter given to each question, greedily in at most four tokens after the chat template; empty for none."""
    prompts = [loaded.encode_chat(letter_prompt(question)) for question in questions]
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))  # little padding
    outputs = generate_greedy(loaded, [prompts[k] for k in order], max_new_tokens=NEW_TOKENS)
    letters = dict(zip(order, (read_letter(loaded.decode(output)) for output in outputs), strict=True))
    return [letters[k] for k in range(len(prompts))]


def letter_scores(loaded: LoadedModel, questions: Sequence[Question]) -> pd.DataFrame:
    """Item scores of letter answers: item, metric, value; a question's two rows stand together.

    ``letter_correct`` is 1 for the right option's letter (paper, section 4), ``letter_valid`` for any letter. No letter
    is a wrong answer.
    """
    rows = []
    for question, letter in zip(questions, letter_answers(loaded, questions), strict=True):
        rows.append((question.id, "letter_correct", float(letter == LETTERS[question.gold])))
        rows.append((question.id, "letter_valid", float(letter != "")))
    return pd.DataFrame(rows, columns=["item", "metric", "value"])
