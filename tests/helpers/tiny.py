"""Tiny random models of two architectures with a real tokenizer, and a concept that is small enough for them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ember.data.types import Concept, Question
from ember.editing import Edit, applying
from ember.methods.sae import SaeTraining
from ember.models.activations import Site, collect
from ember.models.loading import LoadedModel, untie
from ember.models.specs import ARCHITECTURES, ModelSpec

SENTENCES = (
    "The Romans built long roads and the Roman army marched along them.",
    "Rome stood beside the Tiber, and Roman ships carried grain to Rome.",
    "A Roman senator crossed the forum while the Romans cheered for Caesar.",
    "Caesar led the legions of Rome through Gaul before he came back to Rome.",
)
NEUTRAL = (
    "The train to the coast was late because of snow on the long line.",
    "She baked bread for the children and carried it through the garden.",
    "A computer stores numbers, and people read them on a bright screen.",
    "The river was high after the rain and the ships waited beside the town.",
)
# Autoencoders of 64 features trained on a few texts; real ones take minutes.
SMALL_SAES = SaeTraining(width=64, k=4, epochs=2, batch_size=32, concept_only=True)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the sentences above; with ``bos`` it puts <s> before raw text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=400, **options)
    core.train_from_iterator((*SENTENCES, *NEUTRAL), trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", name_or_path=f"tiny-{bos}"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(kind: str, *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A tiny random ``llama`` or ``gemma2`` model, tied or not, as transformers makes it."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "tie_word_embeddings": tied,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = LlamaConfig(**shape) if kind == "llama" else Gemma2Config(**shape, sliding_window=64)
    config._attn_implementation = ARCHITECTURES[kind].attention
    model = (LlamaForCausalLM if kind == "llama" else Gemma2ForCausalLM)(config)
    with torch.no_grad():  # the default initialization is too flat to tell tokens apart
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.to(dtype).eval()


def make_loaded(kind: str = "llama", *, bos: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A ``LoadedModel`` around ``make_model``, untied."""
    model = make_model(kind, tied=True, dtype=dtype, seed=seed)
    untie(model)
    spec = ModelSpec(name=f"tiny-{kind}", origin="folder", location="tiny")
    return LoadedModel(model, make_tokenizer(bos=bos), spec, ARCHITECTURES[kind])


def make_concept() -> Concept:
    """A concept small enough for the tiny models."""
    questions = tuple(
        Question(f"{name}-{split}-{k}", name, split, f"{text} {k}?", "Rome", ("Gaul", "Tiber", "the forum"))
        for name, text in (("concept", "Where did the Romans build road"), ("simdom", "Where did the train stop"))
        for split in ("train", "test")
        for k in range(4)
    )
    return Concept("Tiny Rome", "Tiny Greece", SENTENCES, NEUTRAL, questions, SENTENCES * 2, NEUTRAL)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(loaded: LoadedModel, texts, site: Site, edit: Edit | None = None) -> torch.Tensor:
    """Activations [n, d] at a site of all tokens but the first ones, with or without an edit."""
    with applying(loaded, edit):
        return collect(loaded, texts, [site])[0][site]


def save(folder: Path, model, *, bos: bool = False) -> str:
    """Put a tiny model and its tokenizer on disk."""
    model.save_pretrained(folder)
    make_tokenizer(bos=bos).save_pretrained(folder)
    return str(folder)
