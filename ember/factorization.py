"""Sparse and semi-non-negative matrix factorization, as alternating ridge regressions and hard thresholding.

Both factorizations are unique only up to the order, scale and sign of their features: F absorbs all scale. Compare
two of them after ``Factorization.normalized()``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import embedding_bag

from ember.errors import EmberError
from ember.store.progress import bar

# It is at rest where the same entries were kept, and the loss stood still to this share, for so many iterations.
_REST, _STILL = 10, 1e-6
_EXACT = 1e4  # times the precision: where so little of ‖X‖² is left, the loss as a difference of sums is rounding


@dataclass(frozen=True)
class Factorization:
    """X ≈ G Fᵀ.

    ``F`` [d, K] holds feature directions (in the units of X), ``G`` [n, K] activations, ``loss_curve`` the squared
    Frobenius error ‖X − G Fᵀ‖² of every iteration; ``converged`` is False where ``max_iter`` ended the iteration.
    """

    F: torch.Tensor
    G: torch.Tensor
    loss_curve: tuple[float, ...]
    converged: bool

    @property
    def loss(self) -> float:
        """‖X − G Fᵀ‖² of the pair returned, the smallest seen."""
        return min(self.loss_curve)

    def normalized(self) -> "Factorization":
        """The same product with unit columns of F, each signed so that its largest activation is positive."""
        norms = self.F.norm(dim=0).clamp_min(torch.finfo(self.F.dtype).tiny)
        peak = self.G.gather(0, self.G.abs().argmax(dim=0, keepdim=True)).squeeze(0)
        sign = torch.where(peak < 0, -1.0, 1.0).to(self.F.dtype)
        return Factorization(self.F / norms * sign, self.G * norms * sign, self.loss_curve, self.converged)


def sparse_mf(
    X: torch.Tensor,
    rank: int,
    *,
    sparsity: float = 0.01,
    ridge: float = 1e-4,
    max_iter: int = 20_000,
    patience: int = 500,
    tol: float = 1e-4,
    seed: int = 42,
    init: torch.Tensor | None = None,
) -> Factorization:
    """Sparse matrix factorization of embeddings (paper, section 3).

    Minimizes ‖X − G Fᵀ‖² with at most ``ceil(sparsity · n)`` non-zeros in each column of G. One iteration solves F
    by ridge regression, moves the scale of G's columns into F, solves G, and keeps each column's largest magnitudes.

    ``X`` [n, d] is floating point; ``rank`` K is below min(n, d), where the solve for G becomes singular; ``sparsity``
    in (0, 1] is the share of rows on which a feature may be active; ``ridge`` is λ of both regressions. It stops after
    ``max_iter`` iterations, or ``patience`` of them without lowering the best loss by ``tol``, or where no feature
    changed its rows, and the loss stood still to a millionth, for ten iterations: from such a fixed point nothing
    follows. ``init`` is G₀ [n, K]; by default standard normal from ``seed``, drawn on the CPU. Arguments outside these
    ranges, and X that is not finite, are a ``ValueError``.
    """
    _check(X, rank, sparsity, ridge, max_iter, patience)
    kept = math.ceil(sparsity * X.shape[0])
    iterates = _sparse_iterates(X, _start(X, rank, seed, init), kept, ridge)
    return _best_of(X, iterates, max_iter, patience, tol)


def _sparse_iterates(X: torch.Tensor, G: torch.Tensor, kept: int, ridge: float) -> Iterator["_Iterate"]:
    """The iteration with the sparsity of G used: its products with X and with itself need the kept entries only.

    They serve the loss of this iteration and the regression of the next, so that X G(FᵀF + λI)⁻¹ is the only product
    of full size.
    """
    product, gram, norms = G.T @ X, G.T @ G, G.norm(dim=0)
    while True:
        F = _solve(gram, product, ridge) * torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]
        features = F @ F.T
        activations = _solve(features, F, ridge) @ X.T
        rows = activations.abs().topk(kept, dim=1, sorted=False).indices.sort(dim=1).values
        values = activations.gather(1, rows)
        G = torch.zeros_like(activations).scatter_(1, rows, values).T.contiguous()
        product, gram = (embedding_bag(rows, M, mode="sum", per_sample_weights=values) for M in (X, G))
        norms = values.norm(dim=1)
        yield _Iterate(F, G, product, gram, features, rows)


def semi_nmf(
    X: torch.Tensor,
    rank: int,
    *,
    sparsity: float = 0.01,
    ridge: float = 1e-4,
    max_iter: int = 20_000,
    patience: int = 100,
    tol: float = 1e-4,
    seed: int = 42,
    init: torch.Tensor | None = None,
) -> Factorization:
    """Semi-non-negative factorization X ≈ G Fᵀ with G ≥ 0 and sparse F (SNMF's half; Ding et al. 2010).

    The rows of X [n, d] are one layer's MLP post-activations, one row a token (the transpose of the paper's A).
    Each column of F keeps its ``ceil(sparsity · d)`` largest magnitudes (neurons); G follows the multiplicative
    update. Arguments, result and errors are those of ``sparse_mf``; ``init`` must be non-negative and defaults to
    the magnitude of a standard normal. The update lowers the loss a little every time until, near its lowest, features
    begin to trade neurons and it drifts up; ``patience`` need not be as long.
    """
    _check(X, rank, sparsity, ridge, max_iter, patience)
    kept = math.ceil(sparsity * X.shape[1])
    start = _start(X, rank, seed, init)
    if init is not None and bool((start < 0).any()):
        raise ValueError("init of semi_nmf must be non-negative")
    return _best_of(X, _semi_iterates(X, start.abs(), kept, ridge), max_iter, patience, tol)


def _semi_iterates(X: torch.Tensor, G: torch.Tensor, kept: int, ridge: float) -> Iterator["_Iterate"]:
    """The iteration with the sparsity of F used, on transposes: Xᵀ G is the only product of full size.

    It serves the loss of this iteration and the regression of the next.
    """
    X_columns = X.T.contiguous()
    # Relative to X, so that the result does not depend on its units.
    tiny = torch.finfo(X.dtype).eps * (_squared(X) / X.numel() or 1.0)
    G = G.T.contiguous()
    gram, product = G @ G.T, G @ X
    while True:
        solved = _solve(gram, product, ridge)
        columns = solved.abs().topk(kept, dim=1, sorted=False).indices.sort(dim=1).values
        norms = G.norm(dim=1, keepdim=True)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        values, G = solved.gather(1, columns) * norms, G / norms
        F = torch.zeros_like(solved).scatter_(1, columns, values)
        P, Q = embedding_bag(columns, X_columns, mode="sum", per_sample_weights=values), F @ F.T
        up = P.clamp_min(0).addmm_((-Q).clamp_min(0), G)
        down = P.neg_().clamp_min_(0).addmm_(Q.clamp_min(0), G)
        G = up.div_(down.clamp_min_(tiny)).sqrt_().mul_(G)
        gram, product = G @ G.T, G @ X
        yield _Iterate(F, G.T, product, gram, Q, columns)


class _Iterate(NamedTuple):
    """F [K, d] and G [n, K] of one iteration, GᵀX, GᵀG, F Fᵀ, and where the sparse factor's entries are."""

    F: torch.Tensor
    G: torch.Tensor
    product: torch.Tensor
    gram: torch.Tensor
    features: torch.Tensor
    kept: torch.Tensor

    def loss(self, X: torch.Tensor, total: float) -> float:
        """‖X − G F‖² from the products at hand and ‖X‖² (``total``)."""
        crossed = float((self.product * self.F).sum(dtype=torch.float64))
        loss = total - 2 * crossed + float((self.gram * self.features).sum(dtype=torch.float64))
        return loss if loss >= _EXACT * torch.finfo(X.dtype).eps * total else _squared(X - self.G @ self.F)


def _squared(M: torch.Tensor) -> float:
    return float(M.double().square().sum())


def _check(X: torch.Tensor, rank: int, sparsity: float, ridge: float, max_iter: int, patience: int) -> None:
    if X.ndim != 2 or not X.is_floating_point():
        raise ValueError(f"X must be a floating-point matrix [n, d], got {X.dtype} with shape {tuple(X.shape)}")
    n, d = X.shape
    if not 1 <= rank <= min(n, d):
        raise ValueError(f"rank must be 1..min(n, d) = {min(n, d)} for X [{n}, {d}], got {rank}")
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity must be in (0, 1], got {sparsity}")
    for name, least, value in (("ridge", 0, ridge), ("max_iter", 1, max_iter), ("patience", 1, patience)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not bool(torch.isfinite(X).all()):
        raise ValueError("X holds NaN or infinite values")


def _start(X: torch.Tensor, rank: int, seed: int, init: torch.Tensor | None) -> torch.Tensor:
    if init is None:
        return torch.randn(X.shape[0], rank, generator=torch.Generator().manual_seed(seed)).to(X)
    if init.shape != (X.shape[0], rank):
        raise ValueError(f"init must be G₀ with shape {(X.shape[0], rank)}, got {tuple(init.shape)}")
    return init.to(X)


def _solve(gram: torch.Tensor, product: torch.Tensor, ridge: float) -> torch.Tensor:
    """(gram + λI)⁻¹ product for a Gram matrix [K, K] and a product [K, p]."""
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if not int(failed):
        return torch.cholesky_solve(product, factor)
    # Rounding can leave a nearly singular matrix indefinite.
    solution, failed = torch.linalg.solve_ex(damped, product)
    if int(failed):
        raise EmberError(f"the ridge system is singular at ridge {ridge}; raise ridge or lower rank")
    return solution


def _best_of(X: torch.Tensor, iterates: Iterator[_Iterate], max_iter: int, patience: int, tol: float) -> Factorization:
    """Iterate until it stops paying; return the best pair seen."""
    curve: list[float] = []
    best = last = None
    total, lowest, since, settled, converged = _squared(X), math.inf, 0, 0, False
    with bar(total=max_iter, desc="factorize") as shown:
        while len(curve) < max_iter and not converged:
            iterate = next(iterates)
            curve.append(iterate.loss(X, total))
            if not math.isfinite(curve[-1]):
                raise EmberError(f"the factorization diverged at iteration {len(curve)}")
            settled = settled + 1 if last is not None and torch.equal(iterate.kept, last.kept) else 0
            at_rest = settled >= _REST and abs(curve[-1 - _REST] - curve[-1]) <= _STILL * abs(curve[-1])
            since = 0 if curve[-1] < lowest - tol else since + 1
            if curve[-1] < lowest:
                best, lowest = iterate, curve[-1]
            converged = since >= patience or at_rest
            last = iterate
            shown.update()
    assert best is not None
    return Factorization(best.F.T.contiguous(), best.G.contiguous(), tuple(curve), converged)
