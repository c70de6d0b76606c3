"""Data folders in the documented format."""

import json
from pathlib import Path

from helpers.tiny import NEUTRAL, SENTENCES


def question_row(number: int = 1, **changes) -> dict:
    row = {
        "id": f"concept-{number}", "set": "concept", "split": "test", "question": f"Where is the forum {number}?",
        "answer": "Rome", "distractors": ["Gaul", "Athens", "Troy"], "aliases": ["the city"],
    }  # fmt: skip
    return row | changes


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_concept(folder: Path, name: str = "Tiny Rome") -> Path:
    """A whole concept folder of the documented format."""
    folder.mkdir(parents=True)
    (folder / "concept.json").write_text(json.dumps({"name": name, "simdom": "Tiny Greece"}))
    for file in ("sentences", "paragraphs", "other_sense"):
        (folder / f"{file}.txt").write_text("\n".join(SENTENCES) + "\n")
    write_rows(folder / "questions.jsonl", [question_row(1), question_row(2)])
    return folder


def write_shared(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "neutral_fit.jsonl", [{"text": text, "subject": "life"} for text in NEUTRAL])
    held_out = [{"text": f"{text} Again.", "subject": "life", "split": "test"} for text in NEUTRAL]
    write_rows(folder / "neutral_heldout.jsonl", held_out)
    write_rows(folder / "general.jsonl", [question_row(k, set="general") for k in (1, 2)])
    instruction = {"split": "test", "instruction": "Say yes.", "response": "Yes.", "kind": "x"}
    write_rows(folder / "instructions.jsonl", [{"id": f"i-{k}"} | instruction for k in (1, 2)])
    return folder
