"""Sparse and semi-non-negative matrix factorization, as alternating ridge regressions and hard thresholding.

Both factorizations are unique only up to the order, scale and sign of their features: F absorbs all scale. Compare
two of them after ``Factorization.normalized()``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ember.errors import EmberError
from ember.progress import bar


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
    progress: bool = False,
) -> Factorization:
    """Sparse matrix factorization of embeddings (paper, section 3).

    Minimizes ‖X − G Fᵀ‖² with at most ``ceil(sparsity · n)`` non-zeros in each column of G. One iteration solves F
    by ridge regression, moves the scale of G's columns into F, solves G, and keeps each column's largest magnitudes.

    Parameters
    ----------
    X
        [n, d] rows to factorize, floating point.
    rank
        K, the number of features; below min(n, d), where the solve for G becomes singular.
    sparsity
        Share of rows on which a feature may be active, in (0, 1].
    ridge
        λ of both regressions.
    max_iter, patience, tol
        Stop after ``max_iter`` iterations, or ``patience`` of them without lowering the best loss by ``tol``.
    seed, init
        ``init`` is G₀ [n, K]; by default standard normal from ``seed``, drawn on the CPU.
    progress
        Show a progress bar.

    Raises
    ------
    ValueError
        For arguments outside these ranges, and for X that is not finite.
    """
    _check(X, rank, sparsity, ridge, max_iter, patience)
    kept = math.ceil(sparsity * X.shape[0])

    def step(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        F = _ridge_solve(X.T @ G, G, ridge)
        F, G = _scale_into_first(F, G)
        G = _keep_largest(_ridge_solve(X @ F, F, ridge), kept)
        return F, G

    return _iterate(X, step, _start(X, rank, seed, init), max_iter, patience, tol, progress)


def semi_nmf(
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
    progress: bool = False,
) -> Factorization:
    """Semi-non-negative factorization X ≈ G Fᵀ with G ≥ 0 and sparse F (SNMF's half; Ding et al. 2010).

    The rows of X [n, d] are one layer's MLP post-activations, one row a token (the transpose of the paper's A).
    Each column of F keeps its ``ceil(sparsity · d)`` largest magnitudes (neurons); G follows the multiplicative
    update. Arguments, result and errors are those of ``sparse_mf``; ``init`` must be non-negative and defaults to
    the magnitude of a standard normal.
    """
    _check(X, rank, sparsity, ridge, max_iter, patience)
    kept = math.ceil(sparsity * X.shape[1])
    # Relative to X, so that the result does not depend on its units.
    tiny = torch.finfo(X.dtype).eps * (float(X.square().mean()) or 1.0)
    start = _start(X, rank, seed, init)
    if init is None:
        start = start.abs()
    elif bool((start < 0).any()):
        raise ValueError("init of semi_nmf must be non-negative")

    def step(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        F = _keep_largest(_ridge_solve(X.T @ G, G, ridge), kept)
        F, G = _scale_into_first(F, G)
        P, Q = X @ F, F.T @ F
        up = P.clamp_min(0) + G @ (-Q).clamp_min(0)
        down = (-P).clamp_min(0) + G @ Q.clamp_min(0)
        return F, G * torch.sqrt(up / down.clamp_min(tiny))

    return _iterate(X, step, start, max_iter, patience, tol, progress)


def _check(X: torch.Tensor, rank: int, sparsity: float, ridge: float, max_iter: int, patience: int) -> None:
    if X.ndim != 2 or not X.is_floating_point():
        raise ValueError(f"X must be a floating-point matrix [n, d], got {X.dtype} with shape {tuple(X.shape)}")
    n, d = X.shape
    if not 1 <= rank <= min(n, d):
        raise ValueError(f"rank must be 1..min(n, d) = {min(n, d)} for X [{n}, {d}], got {rank}")
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity must be in (0, 1], got {sparsity}")
    if ridge < 0:
        raise ValueError(f"ridge must be at least 0, got {ridge}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    if not bool(torch.isfinite(X).all()):
        raise ValueError("X holds NaN or infinite values")


def _start(X: torch.Tensor, rank: int, seed: int, init: torch.Tensor | None) -> torch.Tensor:
    if init is None:
        noise = torch.randn(X.shape[0], rank, generator=torch.Generator().manual_seed(seed))
        return noise.to(X)
    if init.shape != (X.shape[0], rank):
        raise ValueError(f"init must be G₀ with shape {(X.shape[0], rank)}, got {tuple(init.shape)}")
    return init.to(X)


def _ridge_solve(product: torch.Tensor, regressors: torch.Tensor, ridge: float) -> torch.Tensor:
    """product (RᵀR + λI)⁻¹ for regressors R [m, K] and product [p, K]."""
    gram = regressors.T @ regressors
    gram.diagonal().add_(ridge)
    solution, failed = torch.linalg.solve_ex(gram, product.T)
    if int(failed):
        raise EmberError(f"the ridge system is singular at ridge {ridge}; raise ridge or lower rank")
    return solution.T


def _scale_into_first(F: torch.Tensor, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit columns of G, their norms moved into F; a column that is all zero stays zero."""
    norms = G.norm(dim=0)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return F * norms, G / norms


def _keep_largest(M: torch.Tensor, kept: int) -> torch.Tensor:
    """Keep the ``kept`` largest magnitudes in each column of M, zero the rest."""
    top = M.abs().topk(kept, dim=0).indices
    return torch.zeros_like(M).scatter_(0, top, M.gather(0, top))


def _iterate(
    X: torch.Tensor,
    step: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    G: torch.Tensor,
    max_iter: int,
    patience: int,
    tol: float,
    progress: bool,
) -> Factorization:
    """Run ``step: G → (F, G)`` until it stops paying; return the best pair seen."""
    curve: list[float] = []
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    best_loss, since = math.inf, 0
    shown = bar(total=max_iter, show=progress, desc="factorize")
    while len(curve) < max_iter and since < patience:
        F, G = step(G)
        loss = float((X - G @ F.T).square().sum())
        if not math.isfinite(loss):
            raise EmberError(f"the factorization diverged at iteration {len(curve) + 1}")
        curve.append(loss)
        since = 0 if loss < best_loss - tol else since + 1
        if loss < best_loss:
            best, best_loss = (F, G), loss
        shown.update()
    shown.close()
    assert best is not None
    return Factorization(*best, tuple(curve), since >= patience)
