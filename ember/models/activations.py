"""Hidden states of a model on texts: the residual stream, MLP neurons and MLP outputs of chosen layers.

Models of the Llama kind put a few massive activations at the first position. Everything here leaves that position out
of masks and collected activations, or they would drown everything else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
    """Number of transformer layers.

    Raises
    ------
    EmberError
        If the architecture is not in ``ember.models.specs.ARCHITECTURES``, so that its layers are unknown.
    """
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
    """Hooks that keep each site's activations [batch, time, d] of the latest forward pass.

    ``replace(site, x)`` may return other activations for the rest of the pass to use.
    """
    kept: dict[Site, torch.Tensor] = {}

    def record(site: Site, value: torch.Tensor) -> torch.Tensor | None:
        kept[site] = value
        return replace(site, value) if replace else None

    def on_output(site: Site):  # type: ignore[no-untyped-def]
        def hook(module, args, output):  # type: ignore[no-untyped-def]
            plain = not isinstance(output, tuple)
            new = record(site, output if plain else output[0])
            return None if new is None else new if plain else (new, *output[1:])

        return hook

    def on_input(site: Site):  # type: ignore[no-untyped-def]
        def hook(module, args):  # type: ignore[no-untyped-def]
            new = record(site, args[0])
            return None if new is None else (new, *args[1:])

        return hook

    handles = []
    try:
        for site in sites:
            down = layer_name(loaded, site.layer, loaded.architecture.mlp_down)
            path = layer_name(loaded, site.layer) if site.kind == "residual" else down
            module = loaded.model.get_submodule(path)
            if site.kind == "neurons":
                handles.append(module.register_forward_pre_hook(on_input(site)))
            else:
                handles.append(module.register_forward_hook(on_output(site)))
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def activations(
    loaded: LoadedModel, ids: torch.Tensor, mask: torch.Tensor, sites: Sequence[Site]
) -> dict[Site, torch.Tensor]:
    """Activations [batch, time, d] at the sites; the pass ends after the deepest one. Gradients flow if enabled."""
    deepest = max(site.layer for site in sites)

    def stop(module: nn.Module, args: object, output: object) -> None:
        raise _Reached

    with tapped(loaded, sites) as kept:
        handle = loaded.model.get_submodule(layer_name(loaded, deepest)).register_forward_hook(stop)
        try:
            loaded.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        except _Reached:
            pass
        finally:
            handle.remove()
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
    loaded: LoadedModel,
    texts: Sequence[str],
    sites: Sequence[Site],
    *,
    batch_size: int = 16,
    max_tokens: int = 256,
    progress: bool = False,
) -> tuple[dict[Site, torch.Tensor], torch.Tensor]:
    """Activations of all tokens but each text's first: site → [n, d] (float32, CPU), and the token ids [n]."""
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    parts: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    tokens = []
    chunks = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    for chunk in bar(chunks, show=progress, desc="activations"):
        batch = text_batch(loaded, [texts[k] for k in chunk], max_tokens=max_tokens)
        found = activations(loaded, batch.ids, batch.mask, sites)
        for site in sites:
            parts[site].append(found[site][batch.scored].float().cpu())
        tokens.append(batch.ids[batch.scored].cpu())
    return {site: torch.cat(rows) for site, rows in parts.items()}, torch.cat(tokens)
