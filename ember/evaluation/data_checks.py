"""Checks of concept data: leaks between splits and from the fit texts, guessable answers, sizes, duplicates."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ember.data.types import SPLITS, Concept, Question, SharedData
from ember.data.wording import Texts, content_stems, paraphrases, rarity, stems
from ember.evaluation.evaluate import blind_scores
from ember.evaluation.metrics import CHANCE
from ember.models.loading import LoadedModel

# What our own data must satisfy, and what a user's folder is compared with.
MINIMUM = {
    "sentences": 150, "paragraphs": 80, "other_sense": 60, "train": 60, "test": 100,
    "general": 200, "neutral": 1000, "instructions": 60,
}  # fmt: skip
WORDS = {"sentences": (5, 45), "neutral": (4, 60), "paragraphs": (60, 120), "other_sense": (5, 45), "question": (3, 40)}
OPTION_WORDS = 12
UNSEEN = 40  # test questions whose answer occurs in no text of the concept
GUESS_MARGIN = 0.05
EMPTY_LIMIT = 0.35
FILES = {
    "sentences": "sentences.txt",
    "paragraphs": "paragraphs.txt",
    "other_sense": "other_sense.txt",
    "questions": "questions.jsonl",
}


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


GUESSES: dict[str, Callable[[Question], float]] = {
    "longest option": longest_option,
    "first option": first_option,
    "most similar option": similar_option,
}


def _share(question: Question, values: Sequence[float]) -> float:
    best = max(values)
    return (values[question.gold] == best) / sum(value == best for value in values)


def _trigrams(text: str) -> pd.Series:
    plain = " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])
    return pd.Series([plain[k : k + 3] for k in range(len(plain) - 2)], dtype=object).value_counts()


def _cosine(a: pd.Series, b: pd.Series) -> float:
    shared = a.index.intersection(b.index)
    return float((a[shared] * b[shared]).sum() / np.sqrt((a**2).sum() * (b**2).sum())) if len(shared) else 0.0


@dataclass(frozen=True)
class CheckReport:
    """What the checks found.

    ``table``: subject, check, value, wanted, ok, one row a check. ``findings``: subject, check, where, what, one row
    for each single thing to mend. ``items``: one row a question with id, set, split and ``in_sentences``,
    ``in_paragraphs`` (its answer occurs there) and ``stated`` (a fit sentence states the fact).
    """

    table: pd.DataFrame
    findings: pd.DataFrame
    items: pd.DataFrame

    @property
    def ok(self) -> bool:
        return bool(self.table.ok.all())


@dataclass
class _Ledger:
    """Collects the rows of a report."""

    subject: str
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    found: list[tuple[str, ...]] = field(default_factory=list)

    def count(self, check: str, value: int) -> None:
        """For the record; nothing is demanded."""
        self.rows.append((self.subject, check, value, "", True))

    def at_least(self, check: str, value: float, least: float) -> None:
        self.rows.append((self.subject, check, value, f"≥ {least}", value >= least))

    def at_most(self, check: str, value: float, most: float) -> None:
        self.rows.append((self.subject, check, value, f"≤ {most}", value <= most))

    def near(self, check: str, value: float, target: float, margin: float) -> None:
        ok = abs(value - target) <= margin + 1e-9
        self.rows.append((self.subject, check, value, f"{target - margin:.2f}-{target + margin:.2f}", ok))

    def none(self, check: str, findings: Iterable[tuple[str, str]]) -> None:
        found = list(findings)
        self.rows.append((self.subject, check, len(found), "0", not found))
        self.found += [(self.subject, check, where, what) for where, what in found]

    def report(self, items: pd.DataFrame) -> CheckReport:
        # As objects, so that counts stay whole numbers.
        table = pd.DataFrame(self.rows, columns=["subject", "check", "value", "wanted", "ok"], dtype=object)
        table["ok"] = table.ok.astype(bool)
        return CheckReport(table, pd.DataFrame(self.found, columns=["subject", "check", "where", "what"]), items)


def check_concept(concept: Concept, loaded: LoadedModel | None = None) -> CheckReport:
    """Check one concept's data; with a model, also how well it guesses answers without the question.

    Sizes, lengths and duplicates; no question or paraphrase in two splits (``wording.paraphrases``); no fit sentence
    that states what a test question asks for; at least 40 test questions on the concept whose answer occurs in neither
    fit sentences nor paragraphs; guessing by form within 0.05 of chance; the mean probability and the accuracy of the
    right option after an empty question at most 0.35.
    """
    ledger = _Ledger(concept.name)
    where = _Places(concept)
    for name in ("sentences", "paragraphs", "other_sense"):
        texts = getattr(concept, name)
        ledger.at_least(name.replace("_", " "), len(texts), MINIMUM[name])
        ledger.none(f"length of {name.replace('_', ' ')}", _out_of_bounds(texts, WORDS[name], where.text(name)))
    sources = [(where.text(name)(k), text) for name in FILES if name != "questions"
               for k, text in enumerate(getattr(concept, name))]  # fmt: skip
    sources += [
        (f"neutral sentence {k}", text) for k, text in enumerate([*concept.neutral, *concept.further_neutral], 1)
    ]
    ledger.none("repeated text", _repeated(sources))
    for set_ in ("concept", "simdom"):
        for split in SPLITS:
            count = sum((q.set, q.split) == (set_, split) for q in concept.questions)
            ledger.at_least(f"questions, {set_} {split}", count, MINIMUM[split])
    _check_questions(ledger, concept.questions, ("concept", "simdom"), where.question, loaded)
    items = mark_answers(concept)
    test = items[items.split == "test"]
    stated = test[test.stated != ""]
    ledger.none(
        "fit sentence states a test fact",
        [
            (where.text("sentences")(int(row.stated) - 1), f"answers {row.id}: {row.question}")
            for row in stated.itertuples()
        ],
    )
    asked = test[test.set == "concept"]
    ledger.count("concept test answers in fit sentences", int(asked.in_sentences.sum()))
    ledger.count("concept test answers in paragraphs", int(asked.in_paragraphs.sum()))
    ledger.at_least("concept test answers in neither", int((~asked.in_sentences & ~asked.in_paragraphs).sum()), UNSEEN)
    return ledger.report(items)


def check_shared(shared: SharedData, loaded: LoadedModel | None = None) -> CheckReport:
    """Check what all concepts share, by the same rules."""
    ledger = _Ledger("shared")
    neutral = [text for texts in shared.neutral.values() for text in texts]
    neutral += list(shared.neutral_fit)
    ledger.at_least("neutral sentences", len(neutral), MINIMUM["neutral"])
    ledger.at_least("general questions", len(shared.questions), MINIMUM["general"])
    ledger.at_least("instructions", len(shared.instructions), MINIMUM["instructions"])
    ledger.none("length of neutral", _out_of_bounds(neutral, WORDS["neutral"], lambda k: f"neutral sentence {k + 1}"))
    texts = [(f"neutral sentence {k}", text) for k, text in enumerate(neutral, 1)]
    texts += [(f"instructions.jsonl, {i.id}", i.instruction) for i in shared.instructions]
    ledger.none("repeated text", _repeated(texts))
    numbers = {q.id: k for k, q in enumerate(shared.questions, 1)}
    _check_questions(ledger, shared.questions, ("general",), lambda q: f"general.jsonl, line {numbers[q.id]}", loaded)
    return ledger.report(pd.DataFrame())


class _Places:
    """Where a text or question stands, as an editor or a reader of the file would look for it."""

    def __init__(self, concept: Concept) -> None:
        self.released = concept.source == "released"
        self.lines = {q.id: number for number, q in enumerate(concept.questions, 1)}

    def text(self, name: str) -> Callable[[int], str]:
        if self.released:
            return lambda k: f"{name}[{k}]"
        return lambda k: f"{FILES[name]}, line {k + 1}"

    def question(self, question: Question) -> str:
        return question.id if self.released else f"{FILES['questions']}, line {self.lines[question.id]}"


def mark_answers(concept: Concept) -> pd.DataFrame:
    """Where each question's answer occurs: id, set, split, question, in_sentences, in_paragraphs, stated.

    ``stated`` is the number (from 1) of the first fit sentence that states the fact, or "".
    """
    sentences, paragraphs = Texts(concept.sentences), Texts(concept.paragraphs)
    weight = rarity([*sentences.content, *(content_stems(q.question) for q in concept.questions)])
    rows = []
    for q in concept.questions:
        stating = sentences.stating(q, weight)
        rows.append((q.id, q.set, q.split, q.question, bool(sentences.holding(q)), bool(paragraphs.holding(q)),
                     str(stating[0] + 1) if stating else ""))  # fmt: skip
    columns = ["id", "set", "split", "question", "in_sentences", "in_paragraphs", "stated"]
    return pd.DataFrame(rows, columns=columns)


def _check_questions(
    ledger: _Ledger,
    questions: Sequence[Question],
    sets: Sequence[str],
    where: Callable[[Question], str],
    loaded: LoadedModel | None,
) -> None:
    ledger.none("repeated question", _repeated([(where(q), q.question) for q in questions]))
    train, test = ([q for q in questions if q.split == split] for split in SPLITS)
    ledger.none(
        "question in two splits",
        [
            (where(test[j]), f"{test[j].question} | {where(train[i])}: {train[i].question}")
            for i, j in paraphrases(train, test)
        ],
    )
    bounds = [(where(q), f"{len(q.question.split())} words: {q.question}") for q in questions
              if not WORDS["question"][0] <= len(q.question.split()) <= WORDS["question"][1]]  # fmt: skip
    bounds += [(where(q), f"option of more than {OPTION_WORDS} words: {option}") for q in questions
               for option in q.options if len(option.split()) > OPTION_WORDS]  # fmt: skip
    ledger.none("length of questions and options", bounds)
    given = [(where(q), f"{q.question} [{q.answer}]") for q in questions if Texts([q.question]).holding(q)]
    ledger.none("question holds its answer", given)
    blind = (
        None
        if loaded is None
        else blind_scores(loaded, questions).pivot(index="item", columns="metric", values="value")
    )
    for set_ in sets:
        for split in SPLITS:
            part = [q for q in questions if (q.set, q.split) == (set_, split)]
            if not part:
                continue
            for name, guess in GUESSES.items():
                ledger.near(f"{name}, {set_} {split}", float(np.mean([guess(q) for q in part])), CHANCE, GUESS_MARGIN)
            if blind is not None:
                scores = blind.loc[[q.id for q in part]]
                ledger.at_most(f"empty question, probability, {set_} {split}", scores.gold_prob.mean(), EMPTY_LIMIT)
                ledger.at_most(f"empty question, accuracy, {set_} {split}", scores.correct.mean(), EMPTY_LIMIT)


def _out_of_bounds(
    texts: Sequence[str], bounds: tuple[int, int], where: Callable[[int], str]
) -> Iterable[tuple[str, str]]:
    for k, text in enumerate(texts):
        if not bounds[0] <= len(text.split()) <= bounds[1]:
            yield where(k), f"{len(text.split())} words, wanted {bounds[0]}-{bounds[1]}: {text[:60]}"


def _repeated(texts: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """Texts whose words stood in an earlier one in the same order."""
    seen: dict[tuple[str, ...], str] = {}
    for where, text in texts:
        key = tuple(stems(text))
        if key in seen:
            yield where, f"same as {seen[key]}: {text[:80]}"
        seen.setdefault(key, where)
