"""Control edits: other displacements of the very rows that EMBER edits. Is it the rows, or the direction?"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import normalize

from ember.data import Concept
from ember.editing import Edit
from ember.methods.ember import EmberConfig, edit_from_features, fit
from ember.models import LoadedModel


def towards_mean(
    matrix: torch.Tensor, rows: torch.Tensor, contributions: torch.Tensor, *, seed: int
) -> torch.Tensor:  # fmt: skip
    """e_i ← e_i − δ (e_i − mean of all rows) for the rows i that EMBER would edit; δ = 1 makes them identical."""
    return matrix[rows.to(matrix.device)].float() - matrix.float().mean(0)


def aside(matrix: torch.Tensor, rows: torch.Tensor, contributions: torch.Tensor, *, seed: int) -> torch.Tensor:
    """e_i ← e_i − δ ‖c_i‖ u_i for the rows i that EMBER would edit: as far as EMBER goes, in a random direction u_i.

    Each row has a unit vector of its own, drawn from the seed.
    """
    drawn = torch.randn(contributions.shape, generator=torch.Generator().manual_seed(seed))
    return contributions.norm(dim=1, keepdim=True) * normalize(drawn, dim=1)


def control(name: str, displacement: Callable[..., torch.Tensor]) -> Callable[..., Edit]:
    """The method that subtracts δ times a displacement from EMBER's rows; errors are those of ``ember.run``."""

    def run(
        loaded: LoadedModel,
        concept: Concept,
        config: EmberConfig = EmberConfig(),
        *,
        seed: int = 42,
        progress: bool = False,
    ) -> Edit:
        features = fit(loaded, concept, config, seed=seed, progress=progress)
        moved = partial(displacement, seed=seed)
        return edit_from_features(loaded, features, config, seed=seed, method=name, displacement=moved)

    run.__doc__ = displacement.__doc__
    return run


mean_rows = control("mean_rows", towards_mean)
random_direction = control("random_direction", aside)
