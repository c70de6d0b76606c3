"""Relearning: fine-tune an edited model on concept text and watch what comes back."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ember.editing import Edit
from ember.errors import UnknownNameError, require_at_least
from ember.methods.training import shuffled
from ember.models.loading import LoadedModel
from ember.models.scoring import packed_mask
from ember.relearning.attacks import PRECISIONS, Attack, edited_rows, movement, opened, working_copy
from ember.relearning.optimizers import OPTIMIZERS, make_optimizer, require_optimizer, stepping_backward
from ember.store.files import read_sealed, sealed_dir
from ember.store.progress import bar


@dataclass(frozen=True)
class RelearnConfig:
    """Settings of a relearning run (paper: AdamW, lr 1e-5, weight decay 0.01, one paragraph a step, ≤ 256 tokens).

    ``points`` are numbers of training tokens after which knowledge is measured, the last one the whole budget. A step
    packs ``batch_size`` paragraphs without padding; its gradient is the mean of theirs. ``precision`` is one of
    ``PRECISIONS``, ``optimizer`` one of ``OPTIMIZERS``. ``gradient_checkpointing`` keeps only each layer's input for
    the backward pass and computes the rest anew: less memory, the same steps.
    """

    points: tuple[int, ...] = (3000, 6000, 12000)
    lr: float = 1e-5
    weight_decay: float = 0.01
    batch_size: int = 1
    max_tokens: int = 256
    precision: str = "fp32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(self.points))
        if not self.points or list(self.points) != sorted(set(self.points)) or self.points[0] < 1:
            raise ValueError(f"points must be positive numbers of tokens in rising order, got {self.points}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        for setting, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, setting) not in known:
                raise UnknownNameError(setting, getattr(self, setting), known)
        require_at_least(self, 2, "max_tokens")
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 0, "weight_decay")


@dataclass
class Relearning:
    """What a run has shown so far.

    ``steps``: step, tokens (with this step's), loss (nats per token, before the step). ``items``: tokens (0 before
    training), set, item, metric, value. ``moved`` is a ``movement``; ``diverged`` says when and how, or is empty;
    ``seconds`` counts training alone.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    items: pd.DataFrame = field(default_factory=pd.DataFrame)
    moved: list[dict[str, float | str]] = field(default_factory=list)
    diverged: str = ""
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Training tokens seen so far."""
        return int(self.steps[-1]["tokens"]) if self.steps else 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.nan


def relearn(
    loaded: LoadedModel,
    edit: Edit | None,
    texts: Sequence[str],
    attack: Attack,
    config: RelearnConfig,
    measure: Callable[[int], pd.DataFrame],
    *,
    seed: int = 42,
    store: Path | None = None,
) -> Relearning:
    """Attack the model with ``edit`` applied (None: as loaded) and measure before training and at every point.

    ``measure(tokens)`` gives item scores (set, item, metric, value) of the model after so much training; it is in
    float32 then, whatever the precision of the training. ``seed`` orders the texts and starts a LoRA. ``store`` is a
    folder for the state at the last point: an interrupted run goes on there, a finished one is read back.

    The model is left bit-identical. A loss that turns NaN, or exceeds twice that of a uniform guess, ends the run as
    diverged, which is a result; no texts, nothing to train or an optimizer that cannot run here are an ``EmberError``.
    """
    require_optimizer(config.optimizer, loaded.device)
    plan = training_plan(loaded, texts, config, seed)
    edited = edited_rows(loaded, edit)
    result = None
    if store and store.exists():
        result = Relearning(**read_sealed(store), items=pd.read_parquet(store / "items.parquet"))
    if result and (result.diverged or result.tokens >= config.points[-1]):
        return result
    with opened(loaded, edit, attack, config.precision, seed) as trained, torch.enable_grad():
        settings = {"lr": config.lr, "weight_decay": config.weight_decay}
        optimizers = {name: make_optimizer(config.optimizer, [t.leaf], **settings) for name, t in trained.items()}
        # New memory for each gradient would take longer than what is done with it.
        largest = max((t.leaf.numel() for t in trained.values() if t.leaf is not t.live), default=0)
        room = next(iter(trained.values())).leaf.new_empty(largest, requires_grad=False)
        steps = {t.live: partial(t.step, optimizers[name], room) for name, t in trained.items()}
        if result and store:
            state = torch.load(store / "state.pt", map_location="cpu", weights_only=True)
            for name, (value, moments) in state.items():
                trained[name].push(value)
                optimizers[name].load_state_dict(moments)
        else:
            result = Relearning(items=_measured(loaded, measure, 0))
        seen = bar(total=config.points[-1], initial=result.tokens, desc="relearning", unit="token")
        for step, sequences in enumerate(plan[len(result.steps) :], len(result.steps) + 1):
            started, before = time.perf_counter(), result.tokens
            with checkpointed(loaded) if config.gradient_checkpointing else nullcontext(), stepping_backward(steps):
                loss = packed_loss(loaded, sequences)
                value = float(loss.detach())
                if not value <= 2 * math.log(loaded.embedding.shape[0]):  # also if it is NaN
                    result.diverged = f"the loss is {value:.3g} nats per token at step {step}, after {before} tokens"
                    break
                loss.backward()
            tokens = before + sum(map(len, sequences))
            result.steps.append({"step": step, "tokens": tokens, "loss": value})
            result.seconds += time.perf_counter() - started
            seen.update(tokens - before)
            if any(before < point <= tokens for point in config.points):
                result.items = pd.concat([result.items, _measured(loaded, measure, tokens)], ignore_index=True)
                if store and tokens < config.points[-1]:
                    state = {name: (t.leaf.detach(), optimizers[name].state_dict()) for name, t in trained.items()}
                    _write(store, result, state)
        seen.close()
        result.moved = movement(trained, edited)
    if store:
        _write(store, result)
    return result


@contextmanager
def checkpointed(loaded: LoadedModel) -> Iterator[None]:
    """Gradient checkpointing in every layer; nothing else goes into training mode, so dropout stays off."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    # transformers 5 has another name for it, and warns of the old one.
    kind = "activation" if hasattr(loaded.model, "activation_checkpointing_enable") else "gradient"
    getattr(loaded.model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    layers = [m for m in loaded.model.modules() if isinstance(m, GradientCheckpointingLayer) and not m.training]
    try:
        for layer in layers:
            layer.training = True  # of itself alone: checkpoints are kept in training mode only
        yield
    finally:
        for layer in layers:
            layer.training = False
        getattr(loaded.model, f"{kind}_checkpointing_disable")()


def training_plan(loaded: LoadedModel, texts: Sequence[str], config: RelearnConfig, seed: int) -> list[list[list[int]]]:
    """The token ids of every step's texts, in seeded order, until the tokens of the last point are reached."""
    sequences = [ids for ids in (loaded.encode(text)[: config.max_tokens] for text in texts) if len(ids) > 1]
    stream = shuffled(sequences, torch.Generator().manual_seed(seed))
    plan: list[list[list[int]]] = []
    total = 0
    while total < config.points[-1]:
        plan.append(list(islice(stream, config.batch_size)))
        total += sum(map(len, plan[-1]))
    return plan


def packed_loss(loaded: LoadedModel, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean over sequences of their mean next-token loss (nats), in one pass over all, none of which sees another."""
    lengths = torch.tensor([len(s) for s in sequences])
    ids = torch.tensor([i for s in sequences for i in s], device=loaded.device)[None]
    positions = torch.cat([torch.arange(int(n)) for n in lengths]).to(loaded.device)[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(loaded.device)
    if len(sequences) > 1:
        seen = (owner[:, None] == owner[None]) & (positions[0][:, None] >= positions[0][None])
        inputs["attention_mask"] = packed_mask(loaded, seen, positions[0])
    logits = loaded.model(**inputs).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    inside = owner[1:] == owner[:-1]
    weights = 1 / ((lengths - 1) * len(sequences))
    return (losses * weights.to(losses)[owner[1:]])[inside].sum()


def _measured(loaded: LoadedModel, measure: Callable[[int], pd.DataFrame], tokens: int) -> pd.DataFrame:
    """The scores at one point, taken in float32 so that only the training differs between precisions."""
    with nullcontext() if loaded.dtype == "float32" else working_copy(loaded.model, torch.float32):
        return measure(tokens).assign(tokens=tokens)


def _write(store: Path, result: Relearning, state: Mapping[str, Any] | None = None) -> None:
    """``state``, while the run goes on: of each tensor under attack its value and its optimizer's state."""
    about = {key: value for key, value in vars(result).items() if key != "items"}
    with sealed_dir(store, about, ours=True) as target:
        result.items.to_parquet(target / "items.parquet", index=False)
        if state is not None:
            torch.save(state, target / "state.pt")
