"""What an adversary trains to bring erased knowledge back, on which text and in which precision."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ember.data.types import Concept
from ember.editing import Edit, applying
from ember.errors import EmberError, UnknownNameError, require_at_least
from ember.methods.training import adapted, linear_modules
from ember.models.activations import layer_name, n_layers
from ember.models.loading import LoadedModel
from ember.store.files import digest

TRAINED = ("all", "lora", "edited_rows", "mlps")
TEXTS = ("concept", "neutral")
# bf16: weights, gradients and AdamW's moments in bfloat16, as released; bf16_master: the optimizer works on float32
# copies of the weights; fp32: everything in float32.
PRECISIONS = ("fp32", "bf16", "bf16_master")


@dataclass(frozen=True)
class Attack:
    """One way to fine-tune an edited model.

    ``trained``: ``all`` parameters (the paper's), a ``lora`` of ``lora_rank`` and ``lora_scale`` on all linear
    modules, the ``edited_rows`` alone (of whichever parameters the edit changes), or the ``mlps`` with everything else
    frozen. ``texts``: the ``concept``'s relearning paragraphs, or ``neutral`` sentences that say nothing of it.
    """

    trained: str = "all"
    texts: str = "concept"
    lora_rank: int = 8
    lora_scale: int = 2

    def __post_init__(self) -> None:
        if self.trained not in TRAINED:
            raise UnknownNameError("choice of what is trained", self.trained, TRAINED)
        if self.texts not in TEXTS:
            raise UnknownNameError("choice of texts", self.texts, TEXTS)
        require_at_least(self, 1, "lora_rank", "lora_scale")


ATTACKS: dict[str, Attack] = {
    "all": Attack(),
    "lora": Attack("lora"),
    "edited_rows": Attack("edited_rows"),
    "mlps": Attack("mlps"),
    "benign": Attack(texts="neutral"),
}


def attack_texts(concept: Concept, attack: Attack) -> tuple[str, ...]:
    """The texts to train on.

    The neutral ones are the sentences of the fit, which no evaluation uses, put together to paragraphs of at least the
    mean length (words) of the concept's: so as many tokens take about as many steps.
    """
    if attack.texts == "concept":
        return concept.paragraphs
    wanted = sum(len(text.split()) for text in concept.paragraphs) / max(1, len(concept.paragraphs))
    texts: list[str] = []
    pending: list[str] = []
    for sentence in (*concept.neutral, *concept.further_neutral):
        pending.append(sentence)
        if sum(len(part.split()) for part in pending) >= wanted:
            texts.append(" ".join(pending))
            pending = []
    return (*texts, " ".join(pending)) if pending else tuple(texts)


@dataclass
class Trained:
    """A tensor under attack: the parameter the model computes with, and what the optimizer changes.

    ``rows`` restricts the attack to those rows; ``leaf`` is the parameter itself unless there are rows or the leaf has
    another dtype; ``start`` is the value before training, on the CPU.
    """

    live: torch.nn.Parameter
    rows: torch.Tensor | None
    leaf: torch.Tensor
    start: torch.Tensor

    def pull(self, room: torch.Tensor) -> None:
        """Hand the parameter's gradient to a leaf of its own, laid into ``room``, a vector that is long enough."""
        if self.leaf is not self.live and self.live.grad is not None:
            gradient = self.live.grad if self.rows is None else self.live.grad[self.rows]
            self.leaf.grad = room[: gradient.numel()].view_as(gradient).copy_(gradient)

    @torch.no_grad()
    def push(self) -> None:
        """Write the leaf's values into the parameter and forget the gradients."""
        self.live.grad = self.leaf.grad = None
        if self.leaf is self.live:
            return
        if self.rows is None:
            self.live.copy_(self.leaf)
        else:
            self.live[self.rows] = self.leaf.to(self.live.dtype)

    def value(self) -> torch.Tensor:
        """The present value of what is trained, in the model's dtype."""
        return (self.live if self.rows is None else self.live[self.rows]).detach()


@contextmanager
def opened(
    loaded: LoadedModel, edit: Edit | None, attack: Attack, precision: str, seed: int
) -> Iterator[dict[str, Trained]]:
    """The model with the edit applied and opened for an attack: what is trained, by name.

    Training works on copies of the parameters; on exit the model is as it was, bit for bit.

    Raises
    ------
    EmberError
        If nothing is there to be trained: the edited rows of an unedited model, MLPs of an unknown architecture.
    """
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    if attack.trained == "edited_rows" and edit is None:
        raise EmberError("an unedited model has no edited rows to train")
    rows = {name: change.rows for name, change in edit.tensors.items()} if edit is not None else {}
    with (
        applying(loaded, edit),
        _opened(loaded, rows, attack, precision, seed) as trained,
    ):
        yield trained


@contextmanager
def _opened(
    loaded: LoadedModel, edited: Mapping[str, torch.Tensor], attack: Attack, precision: str, seed: int
) -> Iterator[dict[str, Trained]]:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    hashes = loaded.parameter_hashes
    with working_copy(loaded.model, dtype):
        # No cache may take a model in training for the one that was loaded.
        loaded.parameter_hashes = {"in training": digest(loaded.weights_hash, precision, attack, seed)}
        try:
            if attack.trained == "lora":
                targets = linear_modules(loaded, range(n_layers(loaded)))
                with adapted(loaded, targets, rank=attack.lora_rank, scale=attack.lora_scale, seed=seed) as (
                    parameters,
                    _,
                ):
                    yield _trained(parameters, {}, precision)
            else:
                names = _names(loaded, attack, edited)
                rows = edited if attack.trained == "edited_rows" else {}
                yield _trained({name: loaded.model.get_parameter(name) for name in names}, rows, precision)
        finally:
            loaded.parameter_hashes = hashes


def _names(loaded: LoadedModel, attack: Attack, edited: Mapping[str, torch.Tensor]) -> Sequence[str]:
    """The parameters that an attack trains."""
    if attack.trained == "edited_rows":
        return sorted(edited)
    if attack.trained == "all":
        return [name for name, _ in loaded.model.named_parameters()]
    downs = [layer_name(loaded, layer, loaded.architecture.mlp_down) for layer in range(n_layers(loaded))]
    mlps = tuple(f"{down.rpartition('.')[0]}." for down in downs)
    return [name for name, _ in loaded.model.named_parameters() if name.startswith(mlps)]


def _trained(
    parameters: Mapping[str, torch.nn.Parameter], rows: Mapping[str, torch.Tensor], precision: str
) -> dict[str, Trained]:
    found = {}
    for name, live in parameters.items():
        live.requires_grad_(True)
        where = rows[name].to(live.device) if name in rows else None
        start = (live if where is None else live[where]).detach()
        leaf: torch.Tensor = live
        if precision == "bf16_master":
            leaf = start.float().requires_grad_(True)
        elif where is not None:
            leaf = start.clone().requires_grad_(True)
        found[name] = Trained(live, where, leaf, start.to("cpu", copy=True))
    return found


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
