"""What a result was made with: library versions, git commit, device."""

import subprocess
from functools import cache
from importlib.metadata import version
from shutil import which

import torch

from ember.store.paths import REPOSITORY


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    return {name: version(name) for name in ("torch", "transformers", "numpy", "scipy", "pandas", "wordfreq")}


@cache
def git_commit() -> str:
    """Commit of the working tree, with ``-dirty`` if it has changes; empty outside a repository."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() if which("git") else ""


def device_name(device: torch.device) -> str:
    """Kind of device, with its name where it has one."""
    threads = f"{device.type} ({torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else threads
