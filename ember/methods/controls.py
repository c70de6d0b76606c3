"""Control edits: other displacements of the very rows that EMBER edits. Is it the rows, or the direction?"""

import torch
from torch.nn.functional import normalize

from ember.data import Concept
from ember.editing import Edit
from ember.methods.ember import EmberConfig, edit_from_features, fit
from ember.models import LoadedModel


def mean_rows(
    loaded: LoadedModel,
    concept: Concept,
    config: EmberConfig = EmberConfig(),
    *,
    seed: int = 42,
    progress: bool = False,
) -> Edit:
    """e_i ← e_i − δ (e_i − mean of all rows) for the rows i that EMBER would edit; δ = 1 makes them identical.

    Errors are those of ``ember.methods.ember.run``.
    """

    def towards_mean(matrix: torch.Tensor, rows: torch.Tensor, contributions: torch.Tensor) -> torch.Tensor:
        return matrix[rows.to(matrix.device)].float() - matrix.float().mean(0)

    features = fit(loaded, concept, config, seed=seed, progress=progress)
    return edit_from_features(loaded, features, config, seed=seed, method="mean_rows", displacement=towards_mean)


def random_direction(
    loaded: LoadedModel,
    concept: Concept,
    config: EmberConfig = EmberConfig(),
    *,
    seed: int = 42,
    progress: bool = False,
) -> Edit:
    """e_i ← e_i − δ ‖c_i‖ u_i for the rows i that EMBER would edit: as far as EMBER goes, in a random direction u_i.

    Each row has a unit vector of its own, drawn from ``seed``. Errors are those of ``ember.methods.ember.run``.
    """

    def aside(matrix: torch.Tensor, rows: torch.Tensor, contributions: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(contributions.shape, generator=torch.Generator().manual_seed(seed))
        return contributions.norm(dim=1, keepdim=True) * normalize(drawn, dim=1)

    features = fit(loaded, concept, config, seed=seed, progress=progress)
    return edit_from_features(loaded, features, config, seed=seed, method="random_direction", displacement=aside)
