"""Checks of concept data: leaks between splits and from the fit texts, guessable answers, sizes, duplicates."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ember.data.ours import list_concepts, load_concept, load_shared
from ember.data.released import list_released
from ember.data.types import QUESTION_SETS, SPLITS, Concept, Question, SharedData
from ember.data.wording import Texts, content_stems, paraphrases, rarity, stems
from ember.errors import EmberError
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
Located = list[tuple[str, str]]  # where a text stands, as its reader would look for it, and the text


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


# How likely a guess by the options' form alone is right.
GUESSES: dict[str, Callable[[Question], float]] = {
    "longest option": lambda question: _share(question, [len(option) for option in question.options]),
    "first option": lambda question: float(question.gold == 0),
    "most similar option": lambda question: _share(question, _likeness(question)),
}


@dataclass(frozen=True)
class CheckReport:
    """What the checks found.

    ``table``: subject, check, value, wanted, ok, one row a check. ``findings``: subject, check, where, what, one row
    for each single thing to mend.
    """

    table: pd.DataFrame
    findings: pd.DataFrame


@dataclass
class _Ledger:
    """Collects the rows of a report."""

    subject: str
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    findings: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, check: str, value: float, wanted: str = "", ok: bool = True) -> None:
        self.rows.append((self.subject, check, value, wanted, ok))

    def at_least(self, check: str, value: int, least: int) -> None:
        self.add(check, value, f"≥ {least}", value >= least)

    def none(self, check: str, findings: Iterable[tuple[str, str]]) -> None:
        found = [(self.subject, check, where, what) for where, what in findings]
        self.findings += found
        self.add(check, len(found), "0", not found)

    def report(self) -> CheckReport:
        # As objects, so that counts stay whole numbers.
        table = pd.DataFrame(self.rows, columns=["subject", "check", "value", "wanted", "ok"], dtype=object)
        findings = pd.DataFrame(self.findings, columns=["subject", "check", "where", "what"])
        return CheckReport(table.astype({"ok": bool}), findings)


def check_concept(concept: Concept, loaded: LoadedModel | None = None) -> CheckReport:
    """Check one concept's data; with a model, also how well it guesses answers without the question.

    Sizes, lengths and duplicates; no question or paraphrase in two splits (``wording.paraphrases``); no fit sentence
    that states what a test question asks for; at least 40 test questions on the concept whose answer occurs in neither
    fit sentences nor paragraphs; guessing by form within 0.05 of chance; the mean probability and the accuracy of the
    right option after an empty question at most 0.35.
    """
    ledger = _Ledger(concept.name)
    released = concept.source == "released"
    texts: dict[str, Located] = {}
    for name in ("sentences", "paragraphs", "other_sense"):
        place, start = (f"{name}[{{}}]", 0) if released else (f"{name}.txt, line {{}}", 1)
        texts[name] = _located(getattr(concept, name), place, start)
        ledger.at_least(name.replace("_", " "), len(texts[name]), MINIMUM[name])
        ledger.none(f"length of {name.replace('_', ' ')}", _out_of_bounds(texts[name], WORDS[name]))
    neutral = _located([*concept.neutral, *concept.further_neutral], "neutral sentence {}")
    ledger.none("repeated text", _repeated([*itertools.chain(*texts.values()), *neutral]))
    for set_, split in itertools.product(("concept", "simdom"), SPLITS):
        count = sum((q.set, q.split) == (set_, split) for q in concept.questions)
        ledger.at_least(f"questions, {set_} {split}", count, MINIMUM[split])
    lines = {q.id: q.id if released else f"questions.jsonl, line {k}" for k, q in enumerate(concept.questions, 1)}
    _check_questions(ledger, concept.questions, lines, loaded)
    marks = mark_answers(concept)
    test = marks[marks.split == "test"]
    answers = test[test.stated != ""].itertuples()
    stating = [(texts["sentences"][int(a.stated) - 1][0], f"answers {a.id}: {a.question}") for a in answers]
    ledger.none("fit sentence states a test fact", stating)
    asked = test[test.set == "concept"]
    ledger.add("concept test answers in fit sentences", int(asked.in_sentences.sum()))
    ledger.add("concept test answers in paragraphs", int(asked.in_paragraphs.sum()))
    ledger.at_least("concept test answers in neither", int((~asked.in_sentences & ~asked.in_paragraphs).sum()), UNSEEN)
    return ledger.report()


def check_shared(shared: SharedData, loaded: LoadedModel | None = None) -> CheckReport:
    """Check what all concepts share, by the same rules."""
    ledger = _Ledger("shared")
    neutral = _located([*itertools.chain(*shared.neutral.values()), *shared.neutral_fit], "neutral sentence {}")
    ledger.at_least("neutral sentences", len(neutral), MINIMUM["neutral"])
    ledger.at_least("general questions", len(shared.questions), MINIMUM["general"])
    ledger.at_least("instructions", len(shared.instructions), MINIMUM["instructions"])
    ledger.none("length of neutral", _out_of_bounds(neutral, WORDS["neutral"]))
    instructions = [(f"instructions.jsonl, {i.id}", i.instruction) for i in shared.instructions]
    ledger.none("repeated text", _repeated([*neutral, *instructions]))
    lines = {q.id: f"general.jsonl, line {k}" for k, q in enumerate(shared.questions, 1)}
    _check_questions(ledger, shared.questions, lines, loaded)
    return ledger.report()


def check_data(
    folder: str | None = None, *, source: str = "ours", loaded: LoadedModel | None = None
) -> list[CheckReport]:
    """Check every concept and what they share; or one folder of your own; or the released data (in a folder)."""
    if source == "released":
        concepts = [load_concept(name, source=source, folder=folder) for name in list_released(folder)]
    else:
        concepts = [load_concept(folder=folder)] if folder is not None else list(map(load_concept, list_concepts()))
    if not concepts:
        raise EmberError("the data folder holds no concept")
    reports = [check_concept(concept, loaded) for concept in concepts]
    return reports if folder is not None or source == "released" else [*reports, check_shared(load_shared(), loaded)]


def check_table(reports: Sequence[CheckReport]) -> pd.DataFrame:
    """One row a check, one column a subject; what fails is marked with "!"."""
    rows = pd.concat([report.table for report in reports], ignore_index=True)
    digits = rows.value.map(lambda v: f"{v:.2f}" if isinstance(v, float) else str(v))
    rows["shown"] = digits + rows.ok.map({True: "", False: " !"})
    wide = rows.pivot(index="check", columns="subject", values="shown").fillna("")
    order = rows.drop_duplicates("check")[["check", "wanted"]]
    return order.merge(wide[rows.subject.unique()], left_on="check", right_index=True)


def mark_answers(concept: Concept) -> pd.DataFrame:
    """Where each question's answer occurs: id, set, split, question, in_sentences, in_paragraphs, stated.

    ``stated`` is the number (from 1) of the first fit sentence that states the fact, or "".
    """
    sentences, paragraphs = Texts(concept.sentences), Texts(concept.paragraphs)
    weight = rarity([*sentences.content, *(content_stems(q.question) for q in concept.questions)])
    rows = []
    for q in concept.questions:
        stated = [str(k + 1) for k in sentences.stating(q, weight)] or [""]
        found = bool(sentences.holding(q)), bool(paragraphs.holding(q))
        rows.append((q.id, q.set, q.split, q.question, *found, stated[0]))
    columns = ["id", "set", "split", "question", "in_sentences", "in_paragraphs", "stated"]
    return pd.DataFrame(rows, columns=columns)


def _check_questions(
    ledger: _Ledger, questions: Sequence[Question], where: Mapping[str, str], loaded: LoadedModel | None
) -> None:
    """``where`` maps ids to places."""
    ledger.none("repeated question", _repeated([(where[q.id], q.question) for q in questions]))
    train, test = ([q for q in questions if q.split == split] for split in SPLITS)
    pairs = [(train[i], test[j]) for i, j in paraphrases(train, test)]
    leaks = [(where[b.id], f"{b.question} | {where[a.id]}: {a.question}") for a, b in pairs]
    ledger.none("question in two splits", leaks)
    least, most = WORDS["question"]
    counted = [(q, len(q.question.split())) for q in questions]
    unfit = [(where[q.id], f"{n} words: {q.question}") for q, n in counted if not least <= n <= most]
    long = [(q, option) for q in questions for option in q.options if len(option.split()) > OPTION_WORDS]
    unfit += [(where[q.id], f"option of more than {OPTION_WORDS} words: {option}") for q, option in long]
    ledger.none("length of questions and options", unfit)
    given = [(where[q.id], f"{q.question} [{q.answer}]") for q in questions if Texts([q.question]).holding(q)]
    ledger.none("question holds its answer", given)
    blind = blind_scores(loaded, questions).pivot(index="item", columns="metric", values="value") if loaded else None
    near = f"{CHANCE - GUESS_MARGIN:.2f}-{CHANCE + GUESS_MARGIN:.2f}"
    for set_, split in itertools.product(QUESTION_SETS, SPLITS):
        if not (part := [q for q in questions if (q.set, q.split) == (set_, split)]):
            continue
        for name, guess in GUESSES.items():
            value = float(np.mean([guess(q) for q in part]))
            ledger.add(f"{name}, {set_} {split}", value, near, abs(value - CHANCE) <= GUESS_MARGIN + 1e-9)
        if blind is not None:
            means = blind.loc[[q.id for q in part]].mean()
            for name, value in (("probability", means.gold_prob), ("accuracy", means.correct)):
                check = f"empty question, {name}, {set_} {split}"
                ledger.add(check, value, f"≤ {EMPTY_LIMIT}", value <= EMPTY_LIMIT)


def _located(texts: Sequence[str], place: str, start: int = 1) -> Located:
    return [(place.format(k), text) for k, text in enumerate(texts, start)]


def _out_of_bounds(texts: Located, bounds: tuple[int, int]) -> Iterable[tuple[str, str]]:
    for where, text in texts:
        if not bounds[0] <= len(text.split()) <= bounds[1]:
            yield where, f"{len(text.split())} words, wanted {bounds[0]}-{bounds[1]}: {text[:60]}"


def _repeated(texts: Located) -> Iterable[tuple[str, str]]:
    """Texts whose words stood in an earlier one in the same order."""
    seen: dict[tuple[str, ...], str] = {}
    for where, text in texts:
        key = tuple(stems(text))
        if key in seen:
            yield where, f"same as {seen[key]}: {text[:80]}"
        seen.setdefault(key, where)
