"""Files in the form in which the paper's authors released theirs."""

import json
import subprocess
from pathlib import Path

from ember.data.released import CHOICE, INDICES, NEUTRAL, OPEN, PARAGRAPHS, SENTENCES
from ember.store.paths import REPOSITORY

PAPER_DATA = REPOSITORY.parent / "shared" / "paper-data"
KEYS = {
    "QA_train": ("concept", "train"), "QA_test": ("concept", "test"),
    "SimdomQA_train": ("simdom", "train"), "SimdomQA_test": ("simdom", "test"),
}  # fmt: skip
OPTIONS = ["clay", "flint", "glass", "amber"]


def choice(key: str, number: int, **changes) -> dict:
    """A question of ``mc_questions.json``; the right option is each in turn."""
    question = f"What is kept in jar {number} of {key}?"
    return {"q": question, "correct_answer": OPTIONS[number], "options": OPTIONS} | changes


def told(row: dict, number: int) -> dict:
    """The open form of a question; every second answer is longer than the option."""
    return {"q": row["q"], "a": f"{'some ' * (number % 2)}{row['correct_answer']}"}


def released_files() -> dict:
    """The content of the released files: two invented concepts."""
    names = ("Jar Town", "Élan")
    asked = {name: {key: [choice(f"{name} {key}", k) for k in range(3)] for key in KEYS} for name in names}
    return {
        SENTENCES: [{"concept": n, "sentences": [f"{n} has  jars.", f"Jars of\n{n} are old."]} for n in names],
        NEUTRAL: [{"url": f"https://x/{k}", "title": "Page", "sentence": f"It rained on day {k}."} for k in (1, 2)],
        CHOICE: asked,
        OPEN: {n: {key: [*map(told, rows, range(3))] for key, rows in asked[n].items()} for n in names},
        PARAGRAPHS: {name: {"RelearnParagraphs": [f"{name} is a town. Its jars are known."]} for name in names},
        **{name: [3 * k, 3 * k + 1] for k, name in enumerate(INDICES.values())},
    }


def write_released(folder: Path, content: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (content or released_files()).items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *command], cwd=folder, capture_output=True, check=True, text=True)
    return done.stdout.strip()


def make_repository(folder: Path) -> str:
    """Make a repository in whose ``data/`` the files lie beside others; its commit."""
    write_released(folder / "data")
    (folder / "data" / "model.bin").write_bytes(bytes(10))
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "data"]):
        git(folder, *command)
    return git(folder, "rev-parse", "HEAD")
