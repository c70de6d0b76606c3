"""Control edits: other displacements of the very rows that EMBER edits. Is it the rows, or the direction?"""

from functools import partial
from operator import attrgetter

import torch
from torch.nn.functional import normalize

from ember.methods.ember import RowTarget, run
from ember.tokens import background_frequency


def towards_mean(target: RowTarget) -> torch.Tensor:
    """e_i ← e_i − δ (e_i − mean of all rows) for the rows i that EMBER would edit; δ = 1 makes them identical."""
    return target.old - target.matrix.float().mean(0)


def towards_matched_mean(target: RowTarget, *, matched: int = 100) -> torch.Tensor:
    """e_i ← e_i − δ (e_i − mean of the ``matched`` other rows nearest in frequency) for the rows i EMBER would edit.

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
        nearest = ids[(logs - own).abs().argsort(stable=True)[:matched]]
        means.append(target.matrix[nearest.to(target.matrix.device)].float().mean(0))
    return target.old - torch.stack(means)


def aside(target: RowTarget) -> torch.Tensor:
    """e_i ← e_i − δ ‖c_i‖ u_i for the rows i that EMBER would edit: as far, in a direction of their own by the seed."""
    drawn = torch.randn(target.contributions.shape, generator=torch.Generator().manual_seed(target.seed))
    return target.contributions.norm(dim=1, keepdim=True) * normalize(drawn, dim=1)


def concept_subspace(target: RowTarget) -> torch.Tensor:
    """e_i ← e_i − δ (e_i − LEACE(e_i)) for the rows i that EMBER would edit.

    LEACE (Belrose et al. 2023, arXiv 2306.03819) is fitted on the rows of V': after it no linear classifier could tell
    those that EMBER edits, which alone are moved, from the others.
    """
    from concept_erasure import LeaceEraser  # slow to import, and most edits do without

    ids = torch.tensor(target.features.table.token_id.tolist())
    edited, device = torch.isin(ids, target.rows), target.matrix.device
    eraser = LeaceEraser.fit(target.matrix[ids.to(device)].double(), edited.double().to(device))
    return target.old - eraser(target.old.double()).to(target.old)


def other_rows(target: RowTarget) -> torch.Tensor:
    """e_j ← e_j − δ c_i for as many other rows j of V', drawn from the seed: EMBER's displacements, misplaced."""
    ids = torch.tensor(target.features.table.token_id.tolist())
    ids = ids[~torch.isin(ids, target.rows)]
    drawn = torch.randperm(len(ids), generator=torch.Generator().manual_seed(target.seed))[: len(target.rows)]
    return ids[drawn].sort().values


# A control is EMBER's run with another displacement, or of other rows.
CONTROLS = {
    "mean_rows": partial(run, displacement=towards_mean),
    "matched_rows": partial(run, displacement=towards_matched_mean),
    "zero_rows": partial(run, displacement=attrgetter("old")),  # e_i ← (1 − δ) e_i; δ = 1 makes them zero
    "random_direction": partial(run, displacement=aside),
    "leace": partial(run, displacement=concept_subspace),
    "random_rows": partial(run, others=other_rows),
}
