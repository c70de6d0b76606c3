"""RMU: steer the hidden state of concept text to a fixed random vector, keep that of neutral text."""

from dataclasses import dataclass

import torch

from ember.data.types import Concept
from ember.editing import Edit
from ember.errors import require_at_least
from ember.methods.selection import forget_texts, retain_texts
from ember.methods.training import batches, require_finite, trainable, weights_edit
from ember.models.activations import Batch, Site, activations, layer_name, n_layers
from ember.models.loading import LoadedModel
from ember.store.progress import bar


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


def run(
    loaded: LoadedModel,
    concept: Concept,
    config: RmuConfig = RmuConfig(),
    *,
    seed: int = 42,
    progress: bool = False,
) -> Edit:
    """Train MSE(h(forget), c·u) + α MSE(h(retain), h⁰(retain)); the model is left bit-identical.

    The first position of every text is left out of both terms. u is a unit vector of the seed.

    Raises
    ------
    ValueError
        If the model has no such layer.
    EmberError
        If training diverges.
    """
    if config.layer >= n_layers(loaded):
        raise ValueError(f"layer must be 0..{n_layers(loaded) - 1}, got {config.layer}")
    site = Site("residual", config.layer)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(loaded.embedding.shape[1], generator=generator), dim=0)
    target = (config.steering * direction).to(loaded.device)
    layers = range(config.layer - config.n_trained + 1, config.layer + 1)
    names = [f"{layer_name(loaded, k, loaded.architecture.mlp_down)}.weight" for k in layers]
    forget = batches(loaded, forget_texts(concept), config.batch_size, generator)
    # What neutral text should keep: the states before any step.
    retained = _frozen(loaded, site, batches(loaded, retain_texts(concept), config.batch_size, generator), config.steps)
    with trainable(loaded, names) as parameters:
        optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr)
        for step in bar(range(config.steps), show=progress, desc="RMU"):
            batch, (kept, before) = next(forget), retained[step]
            moved = _states(loaded, batch, site) - target
            drift = _states(loaded, kept, site) - before
            loss = moved.square().mean() + config.retain_weight * drift.square().mean()
            require_finite(loss, "RMU", step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return weights_edit(loaded, concept, "rmu", config, values, seed=seed)


def _states(loaded: LoadedModel, batch: Batch, site: Site) -> torch.Tensor:
    return activations(loaded, batch.ids, batch.mask, [site])[site][batch.scored].float()


@torch.no_grad()
def _frozen(loaded: LoadedModel, site: Site, source, steps: int) -> list[tuple[Batch, torch.Tensor]]:  # type: ignore[no-untyped-def]
    return [(batch, _states(loaded, batch, site)) for batch, _ in zip(source, range(steps), strict=False)]
