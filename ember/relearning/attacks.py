"""What an adversary trains to bring erased knowledge back, on which text and in which precision."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from ember.data.types import Concept
from ember.editing import Edit, applying
from ember.errors import EmberError, UnknownNameError
from ember.methods.training import adapted, linear_modules
from ember.models.activations import layer_name, n_layers
from ember.models.loading import LoadedModel

TRAINED = ("all", "lora", "edited_rows", "mlps")
TEXTS = ("concept", "neutral")
# bf16: weights, gradients and AdamW's moments in bfloat16, as released; bf16_master: the optimizer works on float32
# copies of the weights; fp32: everything in float32.
PRECISIONS = ("fp32", "bf16", "bf16_master")


@dataclass(frozen=True)
class Attack:
    """One way to fine-tune an edited model.

    ``trained``: ``all`` parameters (the paper's), a ``lora`` of rank 8 and scale 2 on all linear modules, the
    ``edited_rows`` alone (of whichever parameters the edit changes), or the ``mlps`` with everything else frozen.
    ``texts``: the ``concept``'s relearning paragraphs, or ``neutral`` sentences that say nothing of it.
    """

    trained: str = "all"
    texts: str = "concept"

    def __post_init__(self) -> None:
        for what, choice, known in (("what is trained", self.trained, TRAINED), ("texts", self.texts, TEXTS)):
            if choice not in known:
                raise UnknownNameError(f"choice of {what}", choice, known)


ATTACKS = {**{trained: Attack(trained) for trained in TRAINED}, "benign": Attack(texts="neutral")}


def attack_texts(concept: Concept, attack: Attack) -> tuple[str, ...]:
    """The texts to train on: the concept's paragraphs, or neutral sentences of the fit, which no evaluation uses.

    Those are joined to paragraphs of at least the concept's mean length (words), so steps take about as many tokens.
    """
    if attack.texts == "concept":
        return concept.paragraphs
    wanted = sum(len(text.split()) for text in concept.paragraphs) / max(1, len(concept.paragraphs))
    texts: list[str] = []
    pending = ""
    for sentence in (*concept.neutral, *concept.further_neutral):
        pending = f"{pending} {sentence}".lstrip()
        if len(pending.split()) >= wanted:
            texts.append(pending)
            pending = ""
    return (*texts, pending) if pending else tuple(texts)


class Trained:
    """A tensor under attack: the parameter the model computes with, ``live``, and what the optimizer changes.

    ``rows`` restricts the attack to those rows; ``leaf`` is the parameter itself unless there are rows or the leaf has
    another dtype; ``start`` is the value before training, on the CPU.
    """

    def __init__(self, live: torch.nn.Parameter, rows: torch.Tensor | None, precision: str) -> None:
        self.live = live
        live.requires_grad_(True)
        self.rows = None if rows is None else rows.to(live.device)
        self.start = self.value().to("cpu", copy=True)
        self.leaf: torch.Tensor = live
        if precision == "bf16_master":
            self.leaf = self.value().float().requires_grad_(True)
        elif rows is not None:
            self.leaf = self.value().requires_grad_(True)

    def step(self, optimizer: torch.optim.Optimizer, room: torch.Tensor) -> None:
        """One step of the leaf's optimizer; a gradient that has to be copied goes to ``room``, a long enough vector."""
        if self.leaf is not self.live and self.live.grad is not None:
            gradient = self.live.grad if self.rows is None else self.live.grad[self.rows]
            self.leaf.grad = room[: gradient.numel()].view_as(gradient).copy_(gradient)
        optimizer.step()
        self.push()

    @torch.no_grad()
    def push(self, value: torch.Tensor | None = None) -> None:
        """Write the leaf's values, or a new one of it, into the parameter and forget the gradients."""
        self.live.grad = self.leaf.grad = None
        if value is not None:
            self.leaf.copy_(value)
        if self.rows is not None:
            self.live[self.rows] = self.leaf.to(self.live.dtype)
        elif self.leaf is not self.live:
            self.live.copy_(self.leaf)

    def value(self) -> torch.Tensor:
        """The present value of what is trained, in the model's dtype."""
        return (self.live if self.rows is None else self.live[self.rows]).detach()


@contextmanager
def opened(
    loaded: LoadedModel, edit: Edit | None, attack: Attack, precision: str, seed: int
) -> Iterator[dict[str, Trained]]:
    """The edited model, opened for an attack: what is trained, by name; on exit the model is as it was, bit for bit.

    Nothing to be trained (edited rows of an unedited model, MLPs of an unknown architecture) is an ``EmberError``.
    """
    if attack.trained == "edited_rows" and edit is None:
        raise EmberError("an unedited model has no edited rows to train")
    with ExitStack() as stack:
        stack.enter_context(applying(loaded, edit))
        stack.enter_context(working_copy(loaded.model, torch.float32 if precision == "fp32" else torch.bfloat16))
        stack.enter_context(loaded.in_training(precision, attack, seed))
        parameters, rows = dict(loaded.model.named_parameters()), {}
        if attack.trained == "edited_rows" and edit:
            rows = {name: change.rows for name, change in edit.tensors.items()}
            parameters = {name: parameters[name] for name in sorted(rows)}
        elif attack.trained == "mlps":
            mlp = loaded.architecture.mlp_down.rpartition(".")[0]
            mlps = tuple(f"{layer_name(loaded, layer, mlp)}." for layer in range(n_layers(loaded)))
            parameters = {name: live for name, live in parameters.items() if name.startswith(mlps)}
        elif attack.trained == "lora":
            targets = linear_modules(loaded, range(n_layers(loaded)))
            parameters, _ = stack.enter_context(adapted(loaded, targets, rank=8, scale=2, seed=seed))
        yield {name: Trained(live, rows.get(name), precision) for name, live in parameters.items()}


@contextmanager
def working_copy(model: torch.nn.Module, dtype: torch.dtype, *, parked: bool | None = None) -> Iterator[None]:
    """Parameters that hold copies in ``dtype``, all closed to gradients; on exit they hold what they held before.

    ``parked`` moves what they held to the host meanwhile, by default where the model is on a GPU. Their storage is
    emptied and filled again, not replaced, so that tensors which share it, such as those of an edit, stay true.
    """
    before = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    aside: dict[int, torch.Tensor] = {}
    try:
        for k, (parameter, data, _) in enumerate(before):
            parameter.requires_grad_(False)
            storage = data.untyped_storage()
            # A storage that holds more than this parameter stays where it is.
            if (data.is_cuda if parked is None else parked) and storage.nbytes() == data.nbytes:
                aside[k] = data.to("cpu", copy=True)
            parameter.data = data.to(dtype, copy=True)
            if k in aside:
                storage.resize_(0)
        yield
    finally:
        for k, (parameter, data, flag) in enumerate(before):
            parameter.data = data
            parameter.grad = None
            if k in aside:
                data.untyped_storage().resize_(aside[k].nbytes)
                data.copy_(aside.pop(k))
            parameter.requires_grad_(flag)


def edited_rows(loaded: LoadedModel, edit: Edit | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each embedding matrix that the edit changes: the rows, and their values before the edit."""
    return {
        name: (change.rows, loaded.model.get_parameter(name).detach()[change.rows.to(loaded.device)].clone())
        for name, change in (edit.tensors.items() if edit else ())
        if name in (loaded.embedding_name, loaded.head_name)
    }


@torch.no_grad()
def movement(
    trained: Mapping[str, Trained], edited: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> list[dict[str, float | str]]:
    """How far training moved all that was trained, and the rows in ``edited`` (``edited_rows``) of each matrix.

    Of how many ``values`` which share ``changed`` at all; and for edited rows the share of their displacement by the
    edit that they ``travelled`` back, (after − edited)·(base − edited) / ‖base − edited‖².
    """
    values = sum(t.start.numel() for t in trained.values())
    changed = sum(int((t.value().to(t.start.device) != t.start).sum()) for t in trained.values())
    moved: list[dict[str, float | str]] = [
        {"part": "all that is trained", "values": values, "changed": changed / values, "travelled": math.nan}
    ]
    for name in (name for name in edited if name in trained):
        (rows, base), t = edited[name], trained[name]
        # An attack on the edited rows alone trains just these, in this order.
        inside = rows if t.rows is None else torch.arange(len(rows))
        start, after = (v[inside.to(v.device)].float().to(t.start.device) for v in (t.start, t.value()))
        back = base.to(start) - start
        travelled = float(((after - start) * back).sum() / back.square().sum())
        about = {"values": start.numel(), "changed": float((after != start).float().mean()), "travelled": travelled}
        moved.append({"part": f"edited rows of {name}", **about})
    return moved
