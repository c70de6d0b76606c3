"""Hidden states of a model on texts: the residual stream, MLP neurons and MLP outputs of chosen layers.

Models of the Llama kind put a few massive activations at the first position. Everything here leaves that position out
of masks and collected activations, or they would drown everything else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ember.errors import EmberError
from ember.models.loading import LoadedModel
from ember.store.progress import bar

# residual: the stream after the layer [d_model]; neurons: what the MLP's output matrix reads [d_mlp]; mlp_out: what it
# writes [d_model].
SITES = ("residual", "neurons", "mlp_out")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network: one of ``SITES`` at a layer (from 0)."""

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in SITES:
            raise ValueError(f"kind must be one of {', '.join(SITES)}, got {self.kind!r}")


class _Reached(Exception):
    """Ends a forward pass at the deepest layer that is needed."""


def n_layers(loaded: LoadedModel) -> int:
    """Number of transformer layers; an ``EmberError`` if the architecture is not in ``ARCHITECTURES``."""
    if not loaded.architecture.layers:
        raise EmberError(f"{loaded.name}: only edits of embeddings are known for this architecture")
    return len(loaded.model.get_submodule(loaded.architecture.layers))


def layer_name(loaded: LoadedModel, layer: int, part: str = "") -> str:
    """Module path of a layer or of a part of it, such as ``architecture.mlp_down``."""
    depth = n_layers(loaded)
    if not 0 <= layer < depth:
        raise ValueError(f"layer must be 0..{depth - 1}, got {layer}")
    return ".".join(p for p in (loaded.architecture.layers, str(layer), part) if p)


@contextmanager
def tapped(
    loaded: LoadedModel,
    sites: Sequence[Site],
    replace: Callable[[Site, torch.Tensor], torch.Tensor | None] | None = None,
) -> Iterator[dict[Site, torch.Tensor]]:
    """Keep each site's activations [batch, time, d] of the latest pass; ``replace(site, x)`` may give others."""
    kept: dict[Site, torch.Tensor] = {}

    def tap(site: Site, value: torch.Tensor) -> torch.Tensor:
        kept[site] = value
        new = replace(site, value) if replace else None
        return value if new is None else new

    def on_input(site: Site, _: nn.Module, args: Any) -> Any:
        return (tap(site, args[0]), *args[1:])

    def on_output(site: Site, _: nn.Module, args: Any, output: Any) -> Any:
        return (tap(site, output[0]), *output[1:]) if isinstance(output, tuple) else tap(site, output)

    with ExitStack() as hooks:
        for site in sites:
            part = "" if site.kind == "residual" else loaded.architecture.mlp_down
            module = loaded.model.get_submodule(layer_name(loaded, site.layer, part))
            if site.kind == "neurons":
                hooks.enter_context(module.register_forward_pre_hook(partial(on_input, site)))
            else:
                hooks.enter_context(module.register_forward_hook(partial(on_output, site)))
        yield kept


def activations(
    loaded: LoadedModel, ids: torch.Tensor, mask: torch.Tensor, sites: Sequence[Site]
) -> dict[Site, torch.Tensor]:
    """Activations [batch, time, d] at the sites; the pass ends after the deepest one. Gradients flow if enabled."""

    def stop(*_: object) -> None:
        raise _Reached

    last = loaded.model.get_submodule(layer_name(loaded, max(site.layer for site in sites)))
    with tapped(loaded, sites) as kept, last.register_forward_hook(stop), suppress(_Reached):
        loaded.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return kept


@dataclass(frozen=True)
class Batch:
    """Padded token ids and masks [batch, time]; ``scored`` leaves out padding and the first position."""

    ids: torch.Tensor
    mask: torch.Tensor
    scored: torch.Tensor


def text_batch(loaded: LoadedModel, texts: Sequence[str], *, max_tokens: int = 256) -> Batch:
    """Texts as one right-padded batch, each cut to ``max_tokens``."""
    ids, mask = loaded.pad([loaded.encode(text)[:max_tokens] for text in texts])
    scored = mask.bool()
    scored[:, 0] = False
    return Batch(ids, mask, scored)


@torch.no_grad()
def collect(
    loaded: LoadedModel, texts: Sequence[str], sites: Sequence[Site], *, batch_size: int = 16, max_tokens: int = 256
) -> tuple[dict[Site, torch.Tensor], torch.Tensor]:
    """Activations of all tokens but each text's first: site → [n, d] (float32, CPU), and the token ids [n]."""
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    parts: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    tokens = []
    chunks = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    for chunk in bar(chunks, desc="activations"):
        batch = text_batch(loaded, [texts[k] for k in chunk], max_tokens=max_tokens)
        for site, states in activations(loaded, batch.ids, batch.mask, sites).items():
            parts[site].append(states[batch.scored].float().cpu())
        tokens.append(batch.ids[batch.scored].cpu())
    return {site: torch.cat(rows) for site, rows in parts.items()}, torch.cat(tokens)
