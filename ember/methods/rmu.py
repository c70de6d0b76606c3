"""RMU: steer the hidden state of concept text to a fixed random vector, keep that of neutral text."""

from dataclasses import dataclass

import torch

from ember.data.types import Concept
from ember.editing import Edit
from ember.errors import require_at_least
from ember.methods.selection import contrast_texts
from ember.methods.training import batches, minimize, scored_states, trainable, weights_edit
from ember.models.activations import Site, layer_name, n_layers
from ember.models.loading import LoadedModel


@dataclass(frozen=True)
class RmuConfig:
    """Settings of RMU (paper, appendix; representation misdirection for unlearning).

    The MLP output matrices of ``n_trained`` layers ending at ``layer`` are trained for ``steps`` steps of AdamW so that
    the residual stream after ``layer`` goes to ``steering`` · u on concept text and stays put on neutral text, the
    latter weighted by ``retain_weight`` (the paper's layer, c and α).
    """

    layer: int = 7
    n_trained: int = 3
    steering: float = 100.0
    retain_weight: float = 10.0
    lr: float = 1e-3
    steps: int = 40
    batch_size: int = 4

    def __post_init__(self) -> None:
        require_at_least(self, 1, "n_trained", "steps", "batch_size")
        if self.layer < self.n_trained - 1:
            raise ValueError(f"layer must be at least n_trained - 1 = {self.n_trained - 1}, got {self.layer}")
        require_at_least(self, 0, "steering", "retain_weight", "lr")


def run(loaded: LoadedModel, concept: Concept, config: RmuConfig, *, seed: int = 42) -> Edit:
    """Train MSE(h(forget), c·u) + α MSE(h(retain), h⁰(retain)) but for first positions; u is the seed's unit vector."""
    if config.layer >= n_layers(loaded):
        raise ValueError(f"layer must be 0..{n_layers(loaded) - 1}, got {config.layer}")
    site = Site("residual", config.layer)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(loaded.embedding.shape[1], generator=generator), dim=0)
    target = (config.steering * direction).to(loaded.device)
    layers = range(config.layer - config.n_trained + 1, config.layer + 1)
    names = [f"{layer_name(loaded, k, loaded.architecture.mlp_down)}.weight" for k in layers]
    forget, retain = (batches(loaded, texts, config.batch_size, generator) for texts in contrast_texts(concept))
    with torch.no_grad():  # what neutral text should keep: the states before any step
        kept = [(b, scored_states(loaded, b, [site])[site]) for b, _ in zip(retain, range(config.steps), strict=False)]

    def loss_at(step: int) -> torch.Tensor:
        batch, before = kept[step]
        moved = scored_states(loaded, next(forget), [site])[site] - target
        drift = scored_states(loaded, batch, [site])[site] - before
        return moved.square().mean() + config.retain_weight * drift.square().mean()

    with trainable(loaded, names) as parameters:
        minimize(loss_at, parameters.values(), steps=config.steps, method="RMU", lr=config.lr)
        values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return weights_edit(loaded, concept, "rmu", config, values, seed=seed)
