"""Hashes of tensors, by which edits and caches know a model."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, as hexadecimal."""
    running = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    running.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return running.hexdigest()


def parameter_hashes(model: nn.Module) -> dict[str, str]:
    """The hash of each entry of the state dict."""
    return {name: tensor_hash(tensor) for name, tensor in model.state_dict().items()}


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over names and hashes, in whichever order they come."""
    return hashlib.sha256("\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()
