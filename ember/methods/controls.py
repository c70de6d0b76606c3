"""Control edits: other displacements of the very rows that EMBER edits. Is it the rows, or the direction?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from ember.data.types import Concept
from ember.editing import Edit
from ember.methods.ember import EmberConfig, RowTarget, edit_from_features, fit, own_contributions
from ember.models.loading import LoadedModel
from ember.tokens import background_frequency

if TYPE_CHECKING:
    from concept_erasure import LeaceEraser

MATCHED = 100  # tokens of about the same frequency whose mean stands in for a row


def towards_mean(target: RowTarget, *, seed: int) -> torch.Tensor:
    """e_i ← e_i − δ (e_i − mean of all rows) for the rows i that EMBER would edit; δ = 1 makes them identical."""
    return target.old - target.matrix.float().mean(0)


def towards_matched_mean(target: RowTarget, *, seed: int) -> torch.Tensor:
    """e_i ← e_i − δ (e_i − mean of the 100 other rows nearest to i in frequency) for the rows i that EMBER would edit.

    Frequencies are those of general English (``background_frequency``); a tie goes to the smaller token id.
    """
    frequency = background_frequency(target.loaded)
    edited = set(target.rows.tolist())
    ids = torch.tensor(sorted(frequency.keys() - edited - target.loaded.special_ids))
    logs = torch.tensor([frequency[i] for i in ids.tolist()], dtype=torch.float64).log()
    rarest = float(logs.min())
    means = []
    for i in target.rows.tolist():
        own = torch.tensor(frequency[i], dtype=torch.float64).log() if i in frequency else rarest
        nearest = ids[(logs - own).abs().argsort(stable=True)[:MATCHED]]
        means.append(target.matrix[nearest.to(target.matrix.device)].float().mean(0))
    return target.old - torch.stack(means)


def towards_zero(target: RowTarget, *, seed: int) -> torch.Tensor:
    """e_i ← (1 − δ) e_i for the rows i that EMBER would edit; δ = 1 makes them zero."""
    return target.old


def aside(target: RowTarget, *, seed: int) -> torch.Tensor:
    """e_i ← e_i − δ ‖c_i‖ u_i for the rows i that EMBER would edit: as far as EMBER goes, in a random direction u_i.

    Each row has a unit vector of its own, drawn from the seed.
    """
    drawn = torch.randn(target.contributions.shape, generator=torch.Generator().manual_seed(seed))
    return target.contributions.norm(dim=1, keepdim=True) * normalize(drawn, dim=1)


def concept_subspace(target: RowTarget, *, seed: int) -> torch.Tensor:
    """e_i ← e_i − δ (e_i − LEACE(e_i)) for the rows i that EMBER would edit.

    LEACE (Belrose et al. 2023, arXiv 2306.03819) is fitted on the rows of V' to tell those that EMBER edits from the
    others: after it, over all of V', no linear classifier could. Only EMBER's rows are moved.
    """
    return target.old - leace_eraser(target)(target.old.double()).to(target.old)


def leace_eraser(target: RowTarget) -> LeaceEraser:
    """LEACE on the rows of V' (float64), the rows that EMBER edits against the others."""
    from concept_erasure import LeaceEraser  # slow to import, and most edits do without

    ids = torch.tensor(target.features.table.token_id.tolist())
    edited = torch.isin(ids, target.rows)
    return LeaceEraser.fit(
        target.matrix[ids.to(target.matrix.device)].double(), edited.double().to(target.matrix.device)
    )


def other_rows(target: RowTarget, *, seed: int) -> torch.Tensor:
    """e_j ← e_j − δ c_i for as many other rows j of V', drawn from the seed: EMBER's displacements, misplaced."""
    ids = torch.tensor(target.features.table.token_id.tolist())
    ids = ids[~torch.isin(ids, target.rows)]
    drawn = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[: len(target.rows)]
    return ids[drawn].sort().values


def control(
    name: str,
    displacement: Callable[..., torch.Tensor] | None = None,
    others: Callable[..., torch.Tensor] | None = None,
) -> Callable[..., Edit]:
    """The method that subtracts δ times a displacement from EMBER's rows; errors are those of ``ember.run``.

    Without a ``displacement`` it is EMBER's own, and ``others`` says which rows are moved instead.
    """

    def run(
        loaded: LoadedModel,
        concept: Concept,
        config: EmberConfig = EmberConfig(),
        *,
        seed: int = 42,
        progress: bool = False,
    ) -> Edit:
        features = fit(loaded, concept, config, seed=seed, progress=progress)
        return edit_from_features(
            loaded, features, config, seed=seed, method=name,
            displacement=partial(displacement, seed=seed) if displacement else own_contributions,
            others=partial(others, seed=seed) if others else None,
        )  # fmt: skip

    run.__doc__ = (displacement or others).__doc__
    return run


mean_rows = control("mean_rows", towards_mean)
matched_rows = control("matched_rows", towards_matched_mean)
zero_rows = control("zero_rows", towards_zero)
random_direction = control("random_direction", aside)
leace = control("leace", concept_subspace)
random_rows = control("random_rows", others=other_rows)
