"""Shared fixtures: tiny random models of two architectures with a real tokenizer, and the embedded model."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ember.activations import Site, collect
from ember.data import Concept, Instruction, Question, SharedData
from ember.editing import Edit
from ember.models import LoadedModel, load_model, untie
from ember.specs import ARCHITECTURES, ModelSpec

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
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the sentences above; with ``bos`` it puts <s> before raw text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((*SENTENCES, *NEUTRAL), trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
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


# Texts and questions that pass every check: invented words, none used twice. Questions and texts share no letter
# trigram with the options, and all options are equally long, so every guess is exactly at chance.


def invented(consonants: str) -> Iterator[str]:
    """Words of six letters, each once, ending in a vowel that no stemming cuts off."""
    syllables = [c + v for c in consonants for v in "aiou"]
    return map("".join, itertools.permutations(syllables, 3))


def with_gold(question: Question, gold: int) -> Question:
    """The question under an id that puts the right option at position ``gold``."""
    variants = (replace(question, id=f"{question.id}.{k}") for k in itertools.count())
    return next(variant for variant in variants if variant.gold == gold)


def sound_questions(words: Iterator[str], options: Iterator[str], parts: dict[tuple[str, str], int]) -> list[Question]:
    """So many questions of each (set, split); the right option stands at every position equally often."""
    questions = []
    for (set_, split), count in parts.items():
        for k in range(count):
            text = f"Where does the {next(words)} {next(words)} meet the {next(words)}?"
            answer, *wrong = itertools.islice(options, 4)
            question = Question(f"{set_}-{split}-{k}", set_, split, text, answer, tuple(wrong))
            questions.append(with_gold(question, k % 4))
    return questions


def sound_texts(words: Iterator[str], count: int, *lengths: int) -> list[str]:
    """Texts of so many words; several lengths take turns."""
    return [" ".join(itertools.islice(words, lengths[k % len(lengths)])) + "." for k in range(count)]


def sound_concept() -> Concept:
    """A concept that satisfies every check, with no more items than demanded."""
    words, options = invented("cdfhlmnrtw"), invented("bgkpvz")
    parts = {(set_, split): n for set_ in ("concept", "simdom") for split, n in (("train", 60), ("test", 100))}
    return Concept(
        name="Sound Rome",
        simdom="Sound Greece",
        questions=tuple(sound_questions(words, options, parts)),
        sentences=tuple(sound_texts(words, 150, 5, 45)),
        paragraphs=tuple(sound_texts(words, 80, 60, 120)),
        other_sense=tuple(sound_texts(words, 60, 5, 45)),
        neutral=tuple(sound_texts(words, 300, 8)),
        further_neutral=tuple(sound_texts(words, 30, 8)),
    )


def sound_shared() -> SharedData:
    """Shared data that satisfy every check, with no more items than demanded."""
    words, options = invented("cdfhlmnrtw"), invented("bgkpvz")
    parts = {("general", "train"): 100, ("general", "test"): 100}
    return SharedData(
        questions=tuple(sound_questions(words, options, parts)),
        neutral={split: tuple(sound_texts(words, 250, 4, 60)) for split in ("train", "test")},
        instructions=tuple(
            Instruction(f"i-{k}", ("train", "test")[k % 2], text, "Yes.")
            for k, text in enumerate(sound_texts(words, 60, 8))
        ),
        neutral_fit=tuple(sound_texts(words, 500, 4, 60)),
    )


@pytest.fixture(params=["llama", "gemma2"])
def tiny(request) -> LoadedModel:
    """A tiny random model of each architecture, fresh for every test."""
    return make_loaded(request.param)


@pytest.fixture
def tiny_concept() -> Concept:
    return make_concept()


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """The embedded model; shared, so a test must leave it as it was (checked at the end of the session)."""
    from ember.models import weights_hash

    loaded = load_model("smollm2-135m")
    yield loaded
    assert weights_hash(loaded.model) == loaded.weights_hash, "a test changed the shared model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty EMBER_CACHE."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EMBER_CACHE", str(folder))
    return folder


def shrink_saes(patch: pytest.MonkeyPatch) -> None:
    """Autoencoders of 64 features trained on a few texts; a real one takes minutes."""
    from ember import sae

    patch.setitem(sae.load_saes.__kwdefaults__, "training", sae.SaeTraining(width=64, k=4, epochs=2, batch_size=32))
    patch.setitem(sae.measure.__wrapped__.__kwdefaults__, "limit", 4)
    patch.setattr(sae, "training_texts", lambda concept: (*concept.sentences, *concept.neutral))


@pytest.fixture
def small_saes(cache, monkeypatch) -> None:
    """Small autoencoders in an empty cache."""
    shrink_saes(monkeypatch)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(loaded: LoadedModel, texts, site: Site, edit: Edit | None = None) -> torch.Tensor:
    """Activations [n, d] at a site of all tokens but the first ones, with or without an edit."""
    if edit is None:
        return collect(loaded, texts, [site])[0][site]
    with edit.applied(loaded):
        return collect(loaded, texts, [site])[0][site]
