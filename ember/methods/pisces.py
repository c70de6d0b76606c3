"""PISCES: rewrite MLP output vectors through a sparse autoencoder, with the concept's features turned against it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ember.data.types import Concept
from ember.editing import Edit
from ember.errors import require_at_least
from ember.methods.sae import SparseAutoencoder
from ember.methods.selection import SaeConfig, on_record, prepare, select_features
from ember.methods.training import weights_edit
from ember.models.activations import layer_name
from ember.models.loading import LoadedModel


@dataclass(frozen=True)
class PiscesConfig(SaeConfig):
    """Settings of PISCES (paper, appendix; precise in-parameter concept erasure), beside those of its autoencoders.

    These sit on the MLP output. ``tau`` (τ) is the share of the largest projection from which a neuron is edited,
    ``mu`` (μ) the multiple of it that the feature's coefficient is set to. Over the first ``ramp`` layers μ grows from
    a tenth to its full value (10 on Gemma).
    """

    site: ClassVar[str] = "mlp_out"

    layers: tuple[int, ...] = (4, 7)
    features: int = 5
    tau: float = 0.5
    mu: float = 8.0
    ramp: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")
        require_at_least(self, 0, "mu")


def run(loaded: LoadedModel, concept: Concept, config: PiscesConfig, *, seed: int = 42) -> Edit:
    """Edit the MLP output vectors that carry the concept's features; ``seed`` only goes on record."""
    saes = prepare(loaded, concept, config)
    chosen = select_features(loaded, concept, saes, config)
    values = {}
    for sae in saes:
        layer = sae.site.layer
        features = chosen[chosen.layer == layer].feature.tolist()
        if features:
            name = f"{layer_name(loaded, layer, loaded.architecture.mlp_down)}.weight"
            W_out = loaded.model.get_parameter(name).detach().T.float()
            grown = min(1.0, 0.1 + 0.9 * layer / max(1, config.ramp - 1)) if config.ramp else 1.0
            values[name] = turn_against(W_out, sae, features, config.tau, config.mu * grown).T
    return weights_edit(loaded, concept, "pisces", config, values, seed=seed, **on_record(chosen, saes))


def turn_against(
    W_out: torch.Tensor, sae: SparseAutoencoder, features: list[int], tau: float, mu: float
) -> torch.Tensor:
    """New output vectors [d_mlp, d_model] of the neurons.

    For each feature f, the neurons with |W_out · W_enc[:, f]| ≥ τ·max are encoded, in the autoencoder's input scale;
    the coefficient of f becomes ∓ μ·max, against the sign with which the neuron writes f; then they are decoded, and
    what the autoencoder had failed to reconstruct is added back.
    """
    coefficients = sae.encode(W_out)
    residue = W_out - sae.decode(coefficients)
    touched = torch.zeros(len(W_out), dtype=torch.bool, device=W_out.device)
    for f in features:
        projection = sae.scale * (W_out @ sae.W_enc[:, f])
        largest = projection.abs().max()
        rows = projection.abs() >= tau * largest
        coefficients[rows, f] = -torch.sign(projection[rows]) * mu * largest
        touched |= rows
    return torch.where(touched[:, None], sae.decode(coefficients) + residue, W_out)
