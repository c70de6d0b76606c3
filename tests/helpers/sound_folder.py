"""Sound data on disk."""

import dataclasses
import json
from pathlib import Path

from helpers.folders import write_rows
from helpers.sound import sound_concept, sound_shared

SOUND, SHARED = sound_concept(), sound_shared()


def write_sound(root: Path) -> Path:
    """A data folder of the documented format that holds the sound concept and shared data; the concept's folder."""
    folder = root / SOUND.slug
    for part in (folder, root / "shared"):
        part.mkdir(parents=True)
    (folder / "concept.json").write_text(json.dumps({"name": SOUND.name, "simdom": SOUND.simdom}))
    for kind in ("sentences", "paragraphs", "other_sense"):
        (folder / f"{kind}.txt").write_text("\n".join(getattr(SOUND, kind)) + "\n")
    write_rows(folder / "questions.jsonl", map(dataclasses.asdict, SOUND.questions))
    shared = root / "shared"
    write_rows(shared / "general.jsonl", map(dataclasses.asdict, SHARED.questions))
    write_rows(shared / "neutral_fit.jsonl", [{"text": text, "subject": "x"} for text in SHARED.neutral_fit])
    held_out = [(split, text) for split, texts in SHARED.neutral.items() for text in texts]
    write_rows(shared / "neutral_heldout.jsonl", [{"text": t, "subject": "x", "split": s} for s, t in held_out])
    write_rows(shared / "instructions.jsonl", [dataclasses.asdict(i) | {"kind": "x"} for i in SHARED.instructions])
    return folder
