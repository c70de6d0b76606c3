"""What the methods share: batches of texts, parameters that are trained and put back, the loop, the edit at the end."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate, islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ember.data.types import Concept
from ember.editing import Edit, Provenance
from ember.errors import EmberError
from ember.models.activations import Batch, Site, activations, layer_name, text_batch
from ember.models.loading import LoadedModel
from ember.store.environment import library_versions
from ember.store.progress import bar

T = TypeVar("T")


def shuffled(items: Sequence[T], generator: torch.Generator) -> Iterator[T]:
    """The items without end, in a new random order each time round; an ``EmberError`` if there are none."""
    if not items:
        raise EmberError("no texts to train on")
    while True:
        yield from (items[k] for k in torch.randperm(len(items), generator=generator).tolist())


def batches(loaded: LoadedModel, texts: Sequence[str], size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches of ``size`` texts, in a new random order each time round."""
    stream = shuffled(texts, generator)
    while True:
        yield text_batch(loaded, list(islice(stream, size)))


def as_many_tokens(loaded: LoadedModel, texts: Sequence[str], tokens: int, *, skip: int = 0) -> tuple[str, ...]:
    """The first texts that together have so many tokens without each text's first ``skip``; all if they have fewer."""
    totals = accumulate(len(loaded.encode(text)) - skip for text in texts)
    return tuple(texts[: next((k for k, total in enumerate(totals, 1) if total >= tokens), len(texts))])


def scored_states(loaded: LoadedModel, batch: Batch, sites: Iterable[Site]) -> dict[Site, Tensor]:
    """Activations [n, d] (float32) of all tokens but padding and each text's first; gradients flow if enabled."""
    found = activations(loaded, batch.ids, batch.mask, list(sites))
    return {site: states[batch.scored].float() for site, states in found.items()}


@contextmanager
def trainable(loaded: LoadedModel, names: Sequence[str]) -> Iterator[dict[str, Parameter]]:
    """Open the named parameters for training, and no other; on exit all are as they were, bit for bit."""
    every = dict(loaded.model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in every.items()}
    before = {name: every[name].detach().clone() for name in names}
    try:
        for name, parameter in every.items():
            parameter.requires_grad_(name in before)
        with torch.enable_grad():
            yield {name: every[name] for name in names}
    finally:
        for name, old in before.items():
            every[name].detach().copy_(old)
            every[name].grad = None
        for name, parameter in every.items():
            parameter.requires_grad_(flags[name])


def linear_modules(loaded: LoadedModel, layers: Iterable[int]) -> list[str]:
    """Module paths of all linear maps in the layers: those of attention and MLP, not embeddings or head."""
    paths = [layer_name(loaded, layer) for layer in layers]
    modules = [part for path in paths for part in loaded.model.get_submodule(path).named_modules(prefix=path)]
    return [name for name, module in modules if isinstance(module, torch.nn.Linear)]


@contextmanager
def adapted(
    loaded: LoadedModel, targets: Sequence[str], *, rank: int, scale: int, seed: int
) -> Iterator[tuple[dict[str, Parameter], Callable[[], dict[str, Tensor]]]]:
    """LoRA on the linear modules named, through ``peft``; its product is multiplied by ``scale``.

    Yields the adapter's parameters by name and a function that gives the merged weights by name. On exit the adapter
    is gone and the model as it was.
    """
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=list(targets))
    original = {name: loaded.model.get_submodule(name) for name in targets}

    def merged() -> dict[str, Tensor]:
        deltas = {name: loaded.model.get_submodule(name).get_delta_weight("default") for name in targets}
        return {f"{name}.weight": (original[name].weight + delta).detach() for name, delta in deltas.items()}

    with trainable(loaded, []):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                inject_adapter_in_model(lora, loaded.model)
            parameters = {name: p for name, p in loaded.model.named_parameters() if "lora_" in name}
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            yield parameters, merged
        finally:
            for name, module in original.items():
                parent, _, child = name.rpartition(".")
                setattr(loaded.model.get_submodule(parent), child, module)
            # peft also leaves a note on the model, and would take the next adapter for a second one.
            vars(loaded.model).pop("peft_config", None)


def minimize(
    loss_at: Callable[[int], Tensor], parameters: Iterable[Parameter], *, steps: int, method: str, **adamw: Any
) -> None:
    """AdamW on the loss of each step (from 0); an ``EmberError`` if it diverges. ``adamw`` are its settings."""
    optimizer = torch.optim.AdamW(parameters, **adamw)
    for step in bar(range(steps), desc=method):
        loss = loss_at(step)
        require_finite(loss, method, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def require_finite(loss: Tensor, method: str, step: int) -> None:
    """Stop a training run that has diverged."""
    if not loss.isfinite():
        raise EmberError(f"{method} diverged at step {step}: the loss is {loss.item()}; lower the learning rate")


def made_edit(
    loaded: LoadedModel, values: Mapping[str, tuple[Tensor, Tensor]], config: Any, extra: Any, **made: Any
) -> Edit:
    """The edit that sets rows of parameters; ``extra`` joins the config on record, ``made`` fills ``Provenance``."""
    base: dict[str, Any] = {"base_model": loaded.name, "base_hash": loaded.weights_hash, "versions": library_versions()}
    return Edit.from_values(loaded, values, Provenance(config=asdict(config) | extra, **base, **made))


def weights_edit(
    loaded: LoadedModel, concept: Concept, method: str, config: Any, values: dict[str, Tensor], seed: int, **extra: Any
) -> Edit:
    """The edit that sets whole parameters, kept to the rows that differ; ``extra`` joins the config on record."""
    changed = {}
    for name, new in values.items():
        old = loaded.model.get_parameter(name).detach()
        new = new.detach().to(old)
        rows = (new != old).flatten(1).any(1).nonzero().squeeze(1)
        if len(rows):
            changed[name] = (rows.cpu(), new[rows])
    return made_edit(loaded, changed, config, extra, method=method, seed=seed, concept=concept.name, side="none")
