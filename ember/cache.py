"""Derived tensors in the user cache, under keys that name everything they depend on."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ember.errors import DamagedFileError
from ember.files import atomic_dir, sha256_of
from ember.paths import cache_dir

Stored = tuple[dict[str, torch.Tensor], dict[str, Any]]


def cached_tensors(
    kind: str, key: str, compute: Callable[[], tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]]
) -> Stored:
    """Tensors and JSON facts stored under ``kind/key``, or computed and stored.

    Raises
    ------
    DamagedFileError
        If an entry is not what was written; the message names it.
    """
    folder = cache_dir() / kind / key
    if not folder.exists():
        tensors, about = compute()
        with atomic_dir(folder) as target:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "tensors.safetensors")
            facts = {"about": dict(about), "sha256": sha256_of(target / "tensors.safetensors")}
            (target / "about.json").write_text(json.dumps(facts), encoding="utf-8")
    try:
        facts = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if sha256_of(folder / "tensors.safetensors") != facts["sha256"]:
            raise DamagedFileError(f"{folder} is damaged. Delete it")
        return load_file(folder / "tensors.safetensors"), facts["about"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{folder} is incomplete ({error}). Delete it") from error
