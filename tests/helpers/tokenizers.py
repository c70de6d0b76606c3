"""Tiny random models of the paper's two architectures with tokenizers of the real classes, as folders to load from."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ember.data.ours import load_concept, load_shared

KINDS = ("gemma2", "llama")
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def texts() -> tuple[str, ...]:
    """What the tokenizers are trained on: a concept of ours, and general text."""
    concept, shared = load_concept("Ancient Rome"), load_shared()
    return (*concept.sentences, *concept.neutral, *concept.paragraphs, *shared.neutral_fit)


def _trained(core: Tokenizer, special: list[str], vocab_size: int, alphabet: Iterable[str] = ()) -> dict:  # type: ignore[type-arg]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    core.train_from_iterator(texts(), trainer)
    return dict(json.loads(core.to_str())["model"])


def gemma_tokenizer(vocab_size: int = 4000) -> GemmaTokenizerFast:
    """Gemma's class: BPE with byte fallback over text whose spaces are "▁", and BOS, padding and turns as in Gemma."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no piece spans two words
    found = _trained(core, [*GEMMA_SPECIAL, "\n", *(f"<0x{k:02X}>" for k in range(256))], vocab_size)
    tokenizer = GemmaTokenizerFast(
        vocab=found["vocab"],
        merges=[tuple(pair) for pair in found["merges"]],
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )
    # As in Gemma's own tokenizer.json.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


def llama_tokenizer(vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """Llama 3's: byte-level BPE, special tokens after the vocabulary, a post-processor that puts BOS, no padding."""
    core = Tokenizer(models.BPE(ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    _trained(core, [], vocab_size - len(LLAMA_SPECIAL), pre_tokenizers.ByteLevel.alphabet())
    core.add_special_tokens(LLAMA_SPECIAL)
    bos = LLAMA_SPECIAL[0]
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token="<|eot_id|>")
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


def planted(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the words of ``WORDS`` that are one token after a space."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    found = [tokenizer(f"a {word}", add_special_tokens=False)["input_ids"][len(before) :] for word in WORDS]
    return sorted(ids[0] for ids in found if len(ids) == 1)


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return gemma_tokenizer() if kind == "gemma2" else llama_tokenizer()


WORDS = (
    "Rome", "Roman", "Romans", "Caesar", "Senate", "emperor", "Augustus", "Republic", "legions", "consul", "senate",
    "Empire", "emperors", "Tiber", "Italy", "Carthage", "magistrates", "provinces", "Forum", "aqueducts",
)  # fmt: skip


def save_tiny(folder: Path, kind: str, *, layers: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> str:
    """Save a random model of real shape relations, Gemma's tied and Llama's not; returns the folder's path.

    The tokens of ``WORDS`` share a direction of the embeddings, so that there is a concept feature to be found.
    """
    tokenizer = tokenizer_of(kind)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    if kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**shape, sliding_window=64, query_pre_attn_scalar=16))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    with torch.no_grad():  # the default initialization is too flat to tell tokens apart
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        rows = planted(tokenizer)
        embedding = model.model.embed_tokens.weight
        embedding[rows] += 4 * embedding.norm(dim=1).mean() * torch.nn.functional.normalize(torch.randn(64), dim=0)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
