"""Keep the candidate questions that measure something, and split them.

    python data/build_questions.py [--check]

Reads ``data/*/candidates_SET.jsonl``, writes ``questions.jsonl`` (concept folders) and ``general.jsonl`` (shared).
The rule is the same for every set and was fixed before any erasure was run:

    Under the wording "Q: …\\nA:" (the evaluation uses another), the embedded model must give the right option at
    least probability 0.1 among the four, and more than after an empty question.

So the question helps, guessable options do not count, and the evaluation's wording has not been selected on. Then,
in each split, questions whose answer is the longest option are dropped until guessing "the longest option" is hardly
better than chance (28 %).
``--check`` recomputes and fails if the written files differ.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import pandas as pd

from ember.data import Question
from ember.evaluation import question_scores
from ember.files import write_text
from ember.models import LoadedModel, load_model

SCREEN = "Q: {question}\nA:"
EMPTY = "Q:\nA:"
FLOOR = 0.1
TEST_SHARE = 0.6
DATA = Path(__file__).parent


def screen(loaded: LoadedModel, questions: list[Question]) -> pd.DataFrame:
    """Probability of the right option after the question and after none, and whether the rule keeps it."""
    scores = {
        name: question_scores(loaded, questions, prompt=prompt, progress=True)
        .query("metric == 'gold_prob'")
        .set_index("item")
        .value
        for name, prompt in (("screen", SCREEN), ("empty", EMPTY))
    }
    frame = pd.DataFrame(scores)
    frame["keep"] = (frame.screen >= FLOOR) & (frame.screen > frame["empty"])
    return frame


def leaks(question: Question, sentences: list[str]) -> bool:
    """Whether a fit sentence holds the answer together with half of the question's content words."""
    words = {w.strip("?.,'\"").lower() for w in question.question.split()}
    content = {w for w in words if len(w) > 3} - {"which", "what", "were", "that", "with", "from", "this", "called"}
    for sentence in sentences:
        text = sentence.lower()
        shared = sum(word in text for word in content)
        if question.answer.lower() in text and shared >= max(2, len(content) / 2):
            return True
    return False


def longest_wins(question: Question) -> float:
    """How often "the longest option" is right; equally long options share."""
    lengths = [len(option) for option in question.options]
    return (len(question.answer) == max(lengths)) / lengths.count(max(lengths))


def balance(questions: list[Question]) -> list[Question]:
    """Drop questions that "the longest option" answers, the last ones first, until it is right in 28 % at most."""
    kept, pending = list(questions), [q for q in questions if longest_wins(q) == 1]
    while sum(map(longest_wins, kept)) > 0.28 * len(kept):
        kept.remove(pending.pop())
    return kept


def build(loaded: LoadedModel, folder: Path, name: str, sentences: list[str]) -> list[Question]:
    """Screened questions of one candidate file, split at random; those that a fit sentence answers go to train."""
    candidates = []
    for line in (folder / f"candidates_{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = Question(
            "", name, "", row["question"], row["answer"], tuple(row["distractors"]), tuple(row["aliases"])
        )
        candidates.append(question)
    numbered = [Question(**{**vars(q), "id": f"{name}-{i:03d}"}) for i, q in enumerate(candidates, 1)]
    verdict = screen(loaded, numbered)
    kept = [q for q in numbered if verdict.keep[q.id]]
    random.Random(name).shuffle(kept)
    kept.sort(key=lambda q: not leaks(q, sentences))
    known, cut = len(kept), round(len(kept) * (1 - TEST_SHARE))
    parts = {"train": balance(kept[:cut]), "test": balance(kept[cut:])}
    sizes = ", ".join(f"{len(part)} {split}" for split, part in parts.items())
    print(f"{folder.name}/{name}: {len(numbered)} candidates, {known} known, balanced {sizes}")
    placed = [Question(**{**vars(q), "split": split}) for split, part in parts.items() for q in part]
    return sorted(placed, key=lambda q: q.id)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the written files differ")
    check = parser.parse_args().check
    loaded = load_model("smollm2-135m")
    targets = {DATA / "shared/general.jsonl": build(loaded, DATA / "shared", "general", [])}
    for folder in sorted(path.parent for path in DATA.glob("*/concept.json")):
        sentences = (folder / "sentences.txt").read_text(encoding="utf-8").splitlines()
        targets[folder / "questions.jsonl"] = [
            question for name in ("concept", "simdom") for question in build(loaded, folder, name, sentences)
        ]
    stale = []
    for path, questions in targets.items():
        text = "".join(json.dumps(vars(q), ensure_ascii=False) + "\n" for q in questions)
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(str(path.relative_to(DATA.parent)))
        elif not check:
            write_text(path, text)
    if stale:
        print(f"stale: {', '.join(stale)}; run python data/build_questions.py", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
