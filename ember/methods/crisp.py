"""CRISP: train a LoRA that lowers the concept's autoencoder features on concept text and leaves neutral text alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ember.data.ours import load_shared
from ember.data.types import Concept
from ember.editing import Edit
from ember.errors import require_at_least
from ember.methods.sae import SparseAutoencoder, load_saes, quality_table
from ember.methods.selection import forget_texts, retain_texts, select_features
from ember.methods.training import adapted, batches, linear_modules, require_finite, weights_edit
from ember.models.activations import Batch, Site, activations, n_layers
from ember.models.loading import LoadedModel
from ember.store.progress import bar

COHERENCE_TEXTS = 20


@dataclass(frozen=True)
class CrispConfig:
    """Settings of CRISP (paper, appendix).

    ``layers`` have autoencoders on the residual stream, of which the ``features`` most active on concept text are
    lowered, if their mean there is at least ``min_ratio`` times that on neutral text. LoRA matrices of ``lora_rank``
    and scale ``lora_scale`` sit on all linear modules of the layers ``first_layer`` to the last of ``layers``.
    ``margin`` is the paper's α, ``beta`` and ``gamma`` its β and γ; ``steps`` batches of ``batch_size`` sentences are
    seen. The paper's β of 0.99 leaves the embedded model as it is: its residual stream is large, and so is MSE there.
    """

    layers: tuple[int, ...] = (6, 10)
    first_layer: int = 4
    features: int = 10
    min_ratio: float = 3.0
    margin: float = 10.0
    beta: float = 0.5
    gamma: float = 0.01
    lora_rank: int = 4
    lora_scale: int = 2
    lr: float = 2e-3
    steps: int = 30
    batch_size: int = 4
    sae: str = "trained"

    site: ClassVar[str] = "residual"  # where the autoencoders sit

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or not 0 <= self.first_layer <= max(self.layers):
            raise ValueError("layers must name at least one layer, and first_layer be at most the last of them")
        require_at_least(self, 1, "features", "lora_rank", "steps", "batch_size")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")


def prepare(loaded: LoadedModel, concept: Concept, config: CrispConfig, *, progress: bool = False) -> None:
    """Have the autoencoders in the cache, made on the unedited model."""
    load_saes(loaded, concept, config.site, config.layers, source=config.sae, progress=progress)


def run(
    loaded: LoadedModel,
    concept: Concept,
    config: CrispConfig = CrispConfig(),
    *,
    seed: int = 42,
    progress: bool = False,
) -> Edit:
    """Train (1−β)·forget + β·retain + γ·coherence and merge the LoRA; the model is left bit-identical.

    forget: mean of the selected features' activation on concept text wherever the unedited model activates them, raised
    by α times the magnitude of their mean pre-activation so that they are pushed below zero and not just to it. retain:
    MSE(h, h⁰) of the autoencoders' layers on neutral text. coherence: MSE of the last layer on 20 train instructions.
    The first position is left out of all three.

    Raises
    ------
    EmberError
        If no feature carries the concept, or training diverges.
    """
    depth = n_layers(loaded)
    if max(config.layers) >= depth:
        raise ValueError(f"layers must be 0..{depth - 1}, got {config.layers}")
    saes = load_saes(loaded, concept, config.site, config.layers, source=config.sae, progress=progress)
    chosen = select_features(loaded, concept, saes, config.features, config.min_ratio, progress=progress)
    kept = {sae.site: (sae, chosen[chosen.layer == sae.site.layer].feature.tolist()) for sae in saes}
    generator = torch.Generator().manual_seed(seed)
    sources = [
        batches(loaded, texts, size, generator)
        for texts, size in (
            (forget_texts(concept), config.batch_size),
            (retain_texts(concept), config.batch_size),
            ([i.instruction for i in load_shared().instructions if i.split == "train"][:COHERENCE_TEXTS], 1),
        )
    ]
    plan = [tuple(next(source) for source in sources) for _ in range(config.steps)]
    sites, last = list(kept), [Site("residual", depth - 1)]
    # What the model does before any step; inference only, so it is done once.
    with torch.no_grad():
        before = [(_states(loaded, f, sites), _states(loaded, r, sites), _states(loaded, c, last)) for f, r, c in plan]
    targets = linear_modules(loaded, range(config.first_layer, max(config.layers) + 1))
    with adapted(loaded, targets, rank=config.lora_rank, scale=config.lora_scale, seed=seed) as (parameters, merged):
        optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, amsgrad=True)
        for step in bar(range(config.steps), show=progress, desc="CRISP"):
            (forget, retain, coherence), (forget0, retain0, coherence0) = plan[step], before[step]
            now = _states(loaded, forget, sites)
            lowered = torch.stack([_activity(*kept[s], now[s], forget0[s], config.margin) for s in sites]).mean()
            drift = _distance(_states(loaded, retain, sites), retain0)
            spoiled = _distance(_states(loaded, coherence, last), coherence0)
            loss = (1 - config.beta) * lowered + config.beta * drift + config.gamma * spoiled
            require_finite(loss, "CRISP", step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        values = merged()
    found = {"selected": chosen.to_dict("records"), "autoencoders": quality_table(saes)}
    return weights_edit(loaded, concept, "crisp", config, values, seed=seed, **found)


def _states(loaded: LoadedModel, batch: Batch, sites: list[Site]) -> dict[Site, torch.Tensor]:
    found = activations(loaded, batch.ids, batch.mask, sites)
    return {site: found[site][batch.scored].float() for site in sites}


def _distance(now: dict[Site, torch.Tensor], before: dict[Site, torch.Tensor]) -> torch.Tensor:
    return torch.stack([(now[site] - before[site]).square().mean() for site in now]).mean()


def _activity(
    sae: SparseAutoencoder, features: list[int], now: torch.Tensor, before: torch.Tensor, margin: float
) -> torch.Tensor:
    """Mean positive activation of the features, raised by the margin, where they were active before."""
    if not features:
        return now.new_zeros(())
    original = sae.pre(before)
    active = sae.encode(before)[:, features] > 0
    raised = sae.pre(now)[:, features] + margin * original[:, features].mean().abs()
    values = raised.clamp_min(0)[active]
    return values.mean() if len(values) else now.new_zeros(())
