"""CRISP: train a LoRA that lowers the concept's autoencoder features on concept text and leaves neutral text alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ember.data.ours import load_shared
from ember.data.types import Concept
from ember.editing import Edit
from ember.errors import require_at_least
from ember.methods.sae import SparseAutoencoder
from ember.methods.selection import SaeConfig, contrast_texts, on_record, prepare, select_features
from ember.methods.training import adapted, batches, linear_modules, minimize, scored_states, weights_edit
from ember.models.activations import Site, n_layers
from ember.models.loading import LoadedModel


@dataclass(frozen=True)
class CrispConfig(SaeConfig):
    """Settings of CRISP (paper, appendix), beside those of its autoencoders on the residual stream.

    The selected features are lowered. LoRA matrices of ``lora_rank`` and scale ``lora_scale`` sit on all linear modules
    of the layers ``first_layer`` to the last of ``layers``. ``margin`` is the paper's α, ``beta`` and ``gamma`` its β
    and γ; ``steps`` batches of ``batch_size`` sentences are seen. The paper's β of 0.99 leaves the embedded model as it
    is: its residual stream is large, and so is MSE there.
    """

    site: ClassVar[str] = "residual"

    layers: tuple[int, ...] = (6, 10)
    features: int = 10
    first_layer: int = 4
    margin: float = 10.0
    beta: float = 0.5
    gamma: float = 0.01
    lora_rank: int = 4
    lora_scale: int = 2
    lr: float = 2e-3
    steps: int = 30
    batch_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first_layer <= max(self.layers):
            raise ValueError(f"first_layer must be 0..{max(self.layers)}, the last of layers, got {self.first_layer}")
        require_at_least(self, 1, "lora_rank", "steps", "batch_size")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")


def run(loaded: LoadedModel, concept: Concept, config: CrispConfig, *, seed: int = 42) -> Edit:
    """Train (1−β)·forget + β·retain + γ·coherence and merge the LoRA.

    forget: mean of the selected features' activation on concept text wherever the unedited model activates them, raised
    by α times the magnitude of their mean pre-activation so that they are pushed below zero and not just to it. retain:
    MSE(h, h⁰) of the autoencoders' layers on neutral text. coherence: MSE of the last layer on 20 train instructions.
    The first position is left out of all three.
    """
    saes = prepare(loaded, concept, config)
    chosen = select_features(loaded, concept, saes, config)
    read = {sae.site: (sae, chosen[chosen.layer == sae.site.layer].feature.tolist()) for sae in saes}
    sites, last = list(read), [Site("residual", n_layers(loaded) - 1)]
    instructions = [i.instruction for i in load_shared().instructions if i.split == "train"][:20]
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (batches(loaded, texts, config.batch_size, generator) for texts in contrast_texts(concept))
    coherence = batches(loaded, instructions, 1, generator)
    plan = [((next(forget), sites), (next(retain), sites), (next(coherence), last)) for _ in range(config.steps)]

    def states_at(step: int) -> list[dict[Site, torch.Tensor]]:
        return [scored_states(loaded, batch, at) for batch, at in plan[step]]

    def loss_at(step: int) -> torch.Tensor:
        (concept_now, *kept_now), (concept_then, *kept_then) = states_at(step), before[step]
        activities = [_activity(*read[s], concept_now[s], concept_then[s], config.margin) for s in sites]
        drift, spoiled = map(_distance, kept_now, kept_then)
        return (1 - config.beta) * torch.stack(activities).mean() + config.beta * drift + config.gamma * spoiled

    with torch.no_grad():  # what the model does before any step
        before = [states_at(step) for step in range(config.steps)]
    targets = linear_modules(loaded, range(config.first_layer, max(config.layers) + 1))
    with adapted(loaded, targets, rank=config.lora_rank, scale=config.lora_scale, seed=seed) as (parameters, merged):
        adamw = {"lr": config.lr, "amsgrad": True}
        minimize(loss_at, parameters.values(), steps=config.steps, method="CRISP", **adamw)
        values = merged()
    return weights_edit(loaded, concept, "crisp", config, values, seed=seed, **on_record(chosen, saes))


def _distance(now: dict[Site, torch.Tensor], before: dict[Site, torch.Tensor]) -> torch.Tensor:
    return torch.stack([(now[site] - before[site]).square().mean() for site in now]).mean()


def _activity(
    sae: SparseAutoencoder, features: list[int], now: torch.Tensor, before: torch.Tensor, margin: float
) -> torch.Tensor:
    """Mean positive activation of the features, raised by the margin, where they were active before."""
    active = sae.encode(before)[:, features] > 0
    raised = sae.pre(now)[:, features] + margin * sae.pre(before)[:, features].mean().abs()
    values = raised.clamp_min(0)[active]
    return values.mean() if len(values) else now.new_zeros(())
