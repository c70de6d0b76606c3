"""New values for rows of one tensor: checked, written, composed. ``ember.editing`` makes edits of a model of them."""

from dataclasses import dataclass

import torch

from ember.errors import WrongWeightsError


@dataclass(frozen=True)
class TensorEdit:
    """New values of one parameter.

    ``rows`` [r] are indices along its first dimension, ``values`` [r, …] the new rows, and ``before`` [r] int64
    fingerprints of the rows they replace.
    """

    rows: torch.Tensor
    values: torch.Tensor
    before: torch.Tensor

    @classmethod
    def of(cls, name: str, data: torch.Tensor, rows: torch.Tensor | None, new: torch.Tensor) -> "TensorEdit":
        """New values for these rows (None for all) of ``data``; ``ValueError`` for rows and shapes that do not fit."""
        where = torch.arange(len(data)) if rows is None else rows.detach().cpu().clone()
        if where.dtype != torch.int64:
            raise ValueError(f"{name}: rows must be int64 indices, got {where.dtype}")
        if len(where) and not 0 <= int(where.min()) <= int(where.max()) < len(data):
            raise ValueError(f"{name}: rows must be 0..{len(data) - 1}")
        old = data[where.to(data.device)]
        if old.shape != new.shape:
            raise ValueError(f"{name}: new values have shape {tuple(new.shape)}, the rows {tuple(old.shape)}")
        if len(where.unique()) != len(where):
            raise ValueError(f"{name}: a row occurs twice")
        return cls(where, new.detach().to("cpu", old.dtype).clone(), fingerprints(old))

    def fits(self, data: torch.Tensor) -> bool:
        """Whether the rows of ``data`` are those that it was made for."""
        old = data[self.rows.to(data.device)]
        same_kind = old.shape == self.values.shape and old.dtype == self.values.dtype
        return same_kind and torch.equal(fingerprints(old), self.before)

    def then(self, later: "TensorEdit", name: str) -> "TensorEdit":
        """Rows of both; values of the later one where they meet, fingerprints of the earlier one."""
        left = dict(zip(self.rows.tolist(), fingerprints(self.values).tolist(), strict=True))
        for row, expected in zip(later.rows.tolist(), later.before.tolist(), strict=True):
            if left.get(row, expected) != expected:
                raise WrongWeightsError(f"{name}, row {row}: the later edit was not made with the earlier one applied")
        values = {int(r): v for change in (self, later) for r, v in zip(change.rows, change.values, strict=True)}
        before = {int(r): b for change in (later, self) for r, b in zip(change.rows, change.before, strict=True)}
        rows = sorted(values)
        return TensorEdit(
            torch.tensor(rows), torch.stack([values[r] for r in rows]), torch.stack([before[r] for r in rows])
        )


def write(data: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Put values [r, …] into rows [r] of a parameter's data."""
    with torch.no_grad():
        data[rows.to(data.device)] = values.to(data)


def fingerprints(values: torch.Tensor) -> torch.Tensor:
    """One int64 for each row, from its bytes; catches accidents, not forgery (that is ``weights_hash``'s work)."""
    flat = values.detach().cpu().reshape(len(values), -1).contiguous()
    words = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).long()
    limit = 2**62
    weights = torch.randint(-limit, limit, (words.shape[1],), generator=torch.Generator().manual_seed(0))
    return (words * weights).sum(1)
