"""Keep the candidate questions that measure something, split them, and write the data card's tables.

    python data/build_questions.py [--check]

Reads ``data/*/candidates_SET.jsonl``, writes ``questions.jsonl`` (concept folders) and ``general.jsonl`` (shared).
The rule is the same for every set and was fixed before any erasure was run:

    Under the wording "Q: …\\nA:" (the evaluation uses another), the embedded model must give the right option at
    least probability 0.1 among the four, and more than after an empty question.

So the question helps, guessable options do not count, and the evaluation's wording has not been selected on. Of two
candidates that ask for the same fact the first is kept; a fact that a fit sentence states goes to train; the rest is
split at random, so that enough test answers occur in no text of the concept. Then single questions are dropped from a
split until guessing by form, or after an empty question, is hardly better than chance.
``--check`` recomputes and fails if the written files differ.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ember.data.ours import concept_from_sentences, list_concepts, load_concept, load_shared
from ember.data.types import Concept, Question
from ember.data.wording import Texts, paraphrases
from ember.evaluation.data_checks import EMPTY_LIMIT, GUESS_MARGIN, GUESSES, check_data, check_table, mark_answers
from ember.evaluation.evaluate import blind_scores, question_scores
from ember.evaluation.metrics import CHANCE, accuracy_table
from ember.models.loading import LoadedModel, load_model
from ember.reporting.format import fill_blocks
from ember.store.files import write_text

SCREEN = "Q: {question}\nA:"
FLOOR = 0.1
TEST_SHARE = 0.6
UNSEEN_TEST = 48  # as many test answers as possible up to this number occur in no text
SLACK = 0.005  # the balance aims a little inside the limits of the checks
TEXTS = ("sentences", "paragraphs")
DATA = Path(__file__).parent


@dataclass(frozen=True)
class Built:
    """The questions kept of one candidate file, and how many each step left."""

    questions: list[Question]
    counts: dict[str, object]


def read_candidates(folder: Path, name: str) -> list[Question]:
    rows = [json.loads(line) for line in (folder / f"candidates_{name}.jsonl").read_text("utf-8").splitlines()]
    return [
        Question(f"{name}-{i:03d}", name, "", row["question"], row["answer"], tuple(row["distractors"]),
                 tuple(row["aliases"]))
        for i, row in enumerate(rows, 1)
    ]  # fmt: skip


def read_texts(folder: Path) -> Concept:
    """The texts of a concept whose questions are still to be made."""
    about = json.loads((folder / "concept.json").read_text("utf-8"))
    sentences, paragraphs = (tuple((folder / f"{name}.txt").read_text("utf-8").splitlines()) for name in TEXTS)
    return replace(concept_from_sentences(about["name"], sentences), paragraphs=paragraphs)


def known(loaded: LoadedModel, questions: list[Question]) -> list[Question]:
    """Those the rule keeps."""
    asked = question_scores(loaded, questions, prompt=SCREEN)
    blind = blind_scores(loaded, questions, prompt=SCREEN)
    screen, empty = (frame[frame.metric == "gold_prob"].set_index("item").value for frame in (asked, blind))
    return [q for q in questions if screen[q.id] >= FLOOR and screen[q.id] > empty[q.id]]


def distinct(questions: list[Question], others: list[Question]) -> list[Question]:
    """Without those that ask for the fact of an earlier one, or of one of ``others``, or hold their own answer."""
    questions = [q for q in questions if not Texts([q.question]).holding(q)]
    pairs = paraphrases(questions, questions)
    later = {max(i, j) for i, j in pairs if i != j} | {i for i, _ in paraphrases(questions, others)}
    return [q for k, q in enumerate(questions) if k not in later]


def split(questions: list[Question], about: Concept | None) -> list[Question]:
    """Assign train and test."""
    shuffled = list(questions)
    random.Random(questions[0].set).shuffle(shuffled)
    unseen: set[str] = set()
    stated: set[str] = set()
    if about is not None:
        marks = mark_answers(replace(about, questions=tuple(questions)))
        unseen = set(marks.id[~marks.in_sentences & ~marks.in_paragraphs])
        stated = set(marks.id[marks.stated != ""])
    target = round(len(shuffled) * TEST_SHARE)
    first = [q for q in shuffled if q.id in unseen]
    test = {q.id for q in first[: max(round(len(first) * TEST_SHARE), min(UNSEEN_TEST, len(first)))]}
    rest = [q.id for q in shuffled if q.id not in unseen and q.id not in stated]
    test |= set(rest[: max(0, target - len(test))])
    return [replace(q, split="test" if q.id in test else "train") for q in questions]


def balance(loaded: LoadedModel, questions: list[Question], spare: Callable[[Question], bool]) -> list[Question]:
    """Drop questions, one at a time, until every guess that ignores the question stays near chance.

    Each time goes the one whose loss helps most; on equal terms not one to ``spare``, and the last of the file.
    """
    blind = blind_scores(loaded, questions).pivot(index="item", columns="metric", values="value")
    scores = np.array([
        [*(guess(q) for guess in GUESSES.values()), blind.gold_prob[q.id], blind.correct[q.id]] for q in questions
    ])  # fmt: skip
    kept = np.arange(len(questions))

    def excess(means: np.ndarray) -> np.ndarray:
        guesses, empty = means[..., : len(GUESSES)], means[..., len(GUESSES) :]
        over = (abs(guesses - CHANCE) - (GUESS_MARGIN - SLACK)).clip(0).sum(-1)
        return over + (empty - (EMPTY_LIMIT - SLACK)).clip(0).sum(-1)

    while excess(scores[kept].mean(0)) > 0:
        without = excess((scores[kept].sum(0) - scores[kept]) / (len(kept) - 1))
        order = np.lexsort((-kept, [spare(questions[k]) for k in kept], without.round(9)))
        kept = np.delete(kept, order[0])
    return [questions[k] for k in kept]


def build(loaded: LoadedModel, folder: Path, name: str, about: Concept | None, others: list[Question]) -> Built:
    """Screened, split and balanced questions of one candidate file."""
    candidates = read_candidates(folder, name)
    kept = known(loaded, candidates)
    different = distinct(kept, others)
    placed = split(different, about)
    unseen: set[str] = set()
    if about is not None:
        marks = mark_answers(replace(about, questions=tuple(placed)))
        unseen = set(marks.id[~marks.in_sentences & ~marks.in_paragraphs])
    parts = [
        balance(loaded, [q for q in placed if q.split == half], lambda q: q.id in unseen) for half in ("train", "test")
    ]
    counts = {
        "data": folder.name, "set": name, "candidates": len(candidates), "known": len(kept),
        "different": len(different), "train": len(parts[0]), "test": len(parts[1]),
    }  # fmt: skip
    print(counts, flush=True)
    return Built(sorted([*parts[0], *parts[1]], key=lambda q: q.id), counts)


def card_tables(loaded: LoadedModel) -> dict[str, str]:
    """The data card's blocks on what is written: the check report, and the base model's accuracy on test questions."""
    asked = {name: load_concept(name).questions for name in list_concepts()} | {"shared": load_shared().questions}
    frames = []
    for name, questions in asked.items():
        test = [q for q in questions if q.split == "test"]
        items = question_scores(loaded, test).assign(set=[q.set for q in test for _ in range(3)])
        frames.append(accuracy_table(items).assign(data=name))
    accuracy = pd.concat(frames)[["data", "set", "accuracy", "ci_low", "ci_high", "n"]]
    return {
        "report": check_table(check_data(loaded=loaded)).to_markdown(index=False, disable_numparse=True),
        "accuracy": accuracy.to_markdown(index=False, floatfmt=".3f"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the written files differ")
    check = parser.parse_args().check
    loaded = load_model("smollm2-135m")
    general = build(loaded, DATA / "shared", "general", None, [])
    targets, counts = {DATA / "shared/general.jsonl": general.questions}, [general.counts]
    for folder in sorted(path.parent for path in DATA.glob("*/concept.json")):
        about = read_texts(folder)
        concept = build(loaded, folder, "concept", about, general.questions)
        simdom = build(loaded, folder, "simdom", about, [*general.questions, *concept.questions])
        targets[folder / "questions.jsonl"] = concept.questions + simdom.questions
        counts += [concept.counts, simdom.counts]
    stale = []
    for path, questions in targets.items():
        text = "".join(json.dumps(vars(q), ensure_ascii=False) + "\n" for q in questions)
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(str(path.relative_to(DATA.parent)))
        elif not check:
            write_text(path, text)
    if not check:
        screening = pd.DataFrame(counts)
        card = DATA / "README.md"
        blocks = card_tables(loaded) | {"screening": screening.to_markdown(index=False)}
        write_text(card, fill_blocks(card.read_text("utf-8"), blocks))
    if stale:
        print(f"stale: {', '.join(stale)}; run python data/build_questions.py", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
