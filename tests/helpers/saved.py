"""Tiny models on disk."""

from pathlib import Path

from helpers.tiny import make_tokenizer


def save(folder: Path, model, *, bos: bool = False) -> str:
    model.save_pretrained(folder)
    make_tokenizer(bos=bos).save_pretrained(folder)
    return str(folder)
