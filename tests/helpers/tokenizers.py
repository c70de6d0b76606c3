"""Tiny random models of the paper's two architectures with tokenizers of the real classes, as folders to load from."""

import json
from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ember.data.ours import load_concept, load_shared

KINDS, VOCABULARY = ("gemma2", "llama"), 4000
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


def gemma_tokenizer() -> transformers.GemmaTokenizerFast:
    """Gemma's class: BPE with byte fallback over text whose spaces are "▁", and BOS, padding and turns as in Gemma."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no piece spans two words
    special = [*GEMMA_SPECIAL, "\n", *(f"<0x{k:02X}>" for k in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    core.train_from_iterator(texts(), trainer)
    found = json.loads(core.to_str())["model"]
    vocab, merges = found["vocab"], [tuple(pair) for pair in found["merges"]]
    tokenizer = transformers.GemmaTokenizerFast(vocab=vocab, merges=merges, extra_special_tokens=GEMMA_SPECIAL[-2:])
    # As in Gemma's own tokenizer.json.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


def llama_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Llama 3's: byte-level BPE, special tokens after the vocabulary, a post-processor that puts BOS, no padding."""
    core = Tokenizer(models.BPE(ignore_merges=True))
    split, level = pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated"), pre_tokenizers.ByteLevel
    core.pre_tokenizer = pre_tokenizers.Sequence([split, level(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    size = VOCABULARY - len(LLAMA_SPECIAL)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=level.alphabet(), show_progress=False)
    core.train_from_iterator(texts(), trainer)
    core.add_special_tokens(LLAMA_SPECIAL)
    bos = LLAMA_SPECIAL[0]
    start = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token="<|eot_id|>")
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


def planted(tokenizer: transformers.PreTrainedTokenizerFast) -> list[int]:
    """Ids of the words of ``WORDS`` that are one token after a space."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    found = [tokenizer(f"a {word}", add_special_tokens=False)["input_ids"][len(before) :] for word in WORDS]
    return sorted(ids[0] for ids in found if len(ids) == 1)


def tokenizer_of(kind: str) -> transformers.PreTrainedTokenizerFast:
    return gemma_tokenizer() if kind == "gemma2" else llama_tokenizer()


WORDS = (
    "Rome", "Roman", "Romans", "Caesar", "Senate", "emperor", "Augustus", "Republic", "legions", "consul", "senate",
    "Empire", "emperors", "Tiber", "Italy", "Carthage", "magistrates", "provinces", "Forum", "aqueducts",
)  # fmt: skip


def save_tiny(folder: Path, kind: str) -> str:
    """Save a random model of real shape relations, Gemma's tied and Llama's not; returns the folder's path.

    The tokens of ``WORDS`` share a direction of the embeddings, so that there is a concept feature to be found.
    """
    tokenizer = tokenizer_of(kind)
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    if kind == "gemma2":
        model = transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**shape, sliding_window=64, query_pre_attn_scalar=16)
        )
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=False))
    with torch.no_grad():  # the default initialization is too flat to tell tokens apart
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        rows = planted(tokenizer)
        embedding = model.model.embed_tokens.weight
        embedding[rows] += 4 * embedding.norm(dim=1).mean() * torch.nn.functional.normalize(torch.randn(64), dim=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
