"""Where a model's weights go: ``$EMBER_DEVICE``, or a GPU where there is one."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ember.errors import EmberError, UnknownNameError

if TYPE_CHECKING:  # what is asked for can be told without it
    import torch

VARIABLE = "EMBER_DEVICE"
DEVICES = ("auto", "cpu", "cuda", "cuda:N")


def choose_device(name: str | None = None) -> torch.device:
    """The device called ``name``; by default the one ``$EMBER_DEVICE`` names, or ``auto``: a GPU where there is one.

    A name that is none of ``DEVICES`` is an ``UnknownNameError``, a GPU that is not there an ``EmberError``.
    """
    import torch

    wanted = name or asked_device()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise UnknownNameError("device", wanted, DEVICES, f"Name it in {VARIABLE}.")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device(wanted)
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else " (this PyTorch is built without CUDA: install one that is)"
        raise EmberError(f"device {wanted!r}: PyTorch finds no GPU{build}. Set {VARIABLE}=cpu to do without")
    device, count = torch.device(wanted), torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise EmberError(f"device {wanted!r}: the GPUs are cuda:0 to cuda:{count - 1}. Name one of them in {VARIABLE}")
    return device


def asked_device() -> str:
    """What ``$EMBER_DEVICE`` says, ``auto`` if nothing."""
    return os.environ.get(VARIABLE, "").strip() or "auto"
