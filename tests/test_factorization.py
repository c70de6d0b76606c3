"""Both factorizations against a reference in plain numpy, and what any result of theirs must satisfy."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ember.factorization import Factorization, semi_nmf, sparse_mf

METHODS = pytest.mark.parametrize("method", [sparse_mf, semi_nmf])
RIDGE = 1e-4


def noise(n: int = 60, d: int = 16, seed: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def start(n: int = 60, rank: int = 5) -> torch.Tensor:
    """G₀, non-negative so that it serves both methods."""
    return noise(n, rank, seed=9).abs()


def planted(n: int = 120, d: int = 20, rank: int = 5, sparsity: float = 0.1, seed: int = 0):
    """X = G Fᵀ + a little noise, with unit columns of F and ceil(sparsity n) activations of magnitude ≥ 1."""
    random = np.random.default_rng(seed)
    F = random.normal(size=(d, rank))
    F /= np.linalg.norm(F, axis=0)
    G = np.zeros((n, rank))
    for k in range(rank):
        rows = random.choice(n, math.ceil(sparsity * n), replace=False)
        G[rows, k] = random.choice([-1, 1], len(rows)) * (1 + random.exponential(size=len(rows)))
    return torch.tensor(G @ F.T + 0.01 * random.normal(size=(n, d))).float(), F, G


def loss_of(X, F, G) -> float:
    X, F, G = (np.asarray(M, dtype=np.float64) for M in (X, F, G))
    return float(((X - G @ F.T) ** 2).sum())


def ridge_solve(product: np.ndarray, regressors: np.ndarray, ridge: float) -> np.ndarray:
    """This and what follows is the reference: SPEC sections 3 and 7, in float64."""
    return product @ np.linalg.inv(regressors.T @ regressors + ridge * np.eye(regressors.shape[1]))


def keep_largest(M: np.ndarray, kept: int) -> np.ndarray:
    rank = np.argsort(np.argsort(-abs(M), axis=0, kind="stable"), axis=0)
    return np.where(rank < kept, M, 0.0)


def unit_columns(F: np.ndarray, G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norms = np.sqrt((G**2).sum(0))
    return F * norms, G / norms


def sparse_step(X: np.ndarray, G: np.ndarray, sparsity: float, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    F, G = unit_columns(ridge_solve(X.T @ G, G, ridge), G)
    return F, keep_largest(ridge_solve(X @ F, F, ridge), math.ceil(sparsity * len(X)))


def semi_step(X: np.ndarray, G: np.ndarray, sparsity: float, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    F, G = unit_columns(keep_largest(ridge_solve(X.T @ G, G, ridge), math.ceil(sparsity * X.shape[1])), G)
    P, Q = X @ F, F.T @ F
    up, down = (np.maximum(s * P, 0) + G @ np.maximum(-s * Q, 0) for s in (1, -1))
    return F, G * np.sqrt(np.divide(up, down, out=np.zeros_like(G), where=G > 0))  # a product with zero stays zero


STEPS = {sparse_mf: sparse_step, semi_nmf: semi_step}


def reference(method, X, G, sparsity: float, iterations: int, ridge: float = RIDGE) -> Factorization:
    X, pairs = np.asarray(X, dtype=np.float64), [(None, np.asarray(G, dtype=np.float64))]
    for _ in range(iterations):
        pairs.append(STEPS[method](X, pairs[-1][1], sparsity, ridge))
    curve = tuple(loss_of(X, *pair) for pair in pairs[1:])
    return Factorization(*map(torch.tensor, pairs[1 + np.argmin(curve)]), curve, False)


@METHODS
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 1.0])
def test_follows_the_reference_iterate_by_iterate(method, sparsity):
    """In both types, which the same seed gives the same start; later a tie at the threshold may part them."""
    X, G0 = noise(dtype=torch.float64), start()
    expected = reference(method, X, G0, sparsity, 12)
    for dtype, rtol in ((torch.float64, 1e-8), (torch.float32, 2e-4)):
        found = method(X.to(dtype), 5, sparsity=sparsity, ridge=RIDGE, max_iter=12, init=G0)
        assert found.G.dtype == found.F.dtype == dtype
        assert found.loss_curve == pytest.approx(expected.loss_curve, rel=rtol)
        close = partial(torch.testing.assert_close, rtol=rtol, atol=20 * rtol)
        close(found.normalized().F.double(), expected.normalized().F)
        close(found.normalized().G.double(), expected.normalized().G)
        close((found.G @ found.F.T).double(), expected.G @ expected.F.T)
    single, double = (method(X.to(t), 5, sparsity=sparsity, max_iter=5).loss_curve for t in (torch.float32, X.dtype))
    assert single == pytest.approx(double, rel=1e-3) and single != double


@pytest.mark.parametrize("before", range(0, 12, 3))
@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_steps_1_and_3_never_raise_the_loss(before, ridge):
    """Each minimizes the loss plus ridge times the squared norm of what it solves for; step 4 may raise both."""

    def objective(F, G, solved) -> float:
        return loss_of(X, F, G) + ridge * (solved**2).sum()

    X, G = noise(dtype=torch.float64).numpy(), start().double().numpy()
    for _ in range(1 + before):
        F, G = sparse_step(X, G, 0.3, ridge)
    solved = ridge_solve(X.T @ G, G, ridge)
    assert objective(solved, G, solved) < objective(F, G, F)
    F, G = unit_columns(solved, G)
    solved = ridge_solve(X @ F, F, ridge)
    assert objective(F, solved, solved) < objective(F, G, G)


@METHODS
def test_the_best_pair_is_returned_with_its_loss_which_never_rises_without_thresholding(method):
    curve = np.array(method(noise(dtype=torch.float64), 5, sparsity=1.0, ridge=0.0, max_iter=200).loss_curve)
    assert curve[-1] < curve[0] - 1
    assert (np.diff(curve) <= 1e-9 * curve[0]).all()
    X = noise().relu()
    found = method(X, 5, sparsity=0.3, max_iter=60)
    assert found.loss_curve[-1] > found.loss * (1 + 1e-5)  # or the last pair would do
    assert loss_of(X, found.F, found.G) == pytest.approx(found.loss, rel=1e-6)
    assert found.loss == min(found.loss_curve)
    # Where hardly anything is left, a difference of sums would be rounding.
    _, F, G = planted(seed=0)
    X = torch.tensor(np.abs(G) @ np.abs(F).T if method is semi_nmf else G @ F.T)
    for M in (X.float(), X):
        found = method(M, 5, sparsity=0.1 if method is sparse_mf else 1.0, max_iter=300, seed=2)
        assert loss_of(M, found.F, found.G) == pytest.approx(found.loss, rel=1e-3, abs=1e-20)


@pytest.mark.parametrize("sparsity", [0.001, 0.05, 0.11, 0.5, 1.0])
def test_sparsity_bounds_the_non_zeros_of_each_column(sparsity):
    X = noise()
    counts = (sparse_mf(X, 5, sparsity=sparsity, max_iter=20).G != 0).sum(0)
    assert counts.max() == math.ceil(sparsity * len(X))
    found = semi_nmf(X, 5, sparsity=sparsity, max_iter=20)
    assert (found.F != 0).sum(0).max() == math.ceil(sparsity * X.shape[1])
    assert (found.G >= 0).all() and (found.G > 0).any()


@pytest.mark.parametrize("seed", range(4))
def test_recovers_a_planted_factorization(seed):
    """The best of three starts does; one alone may end in a local minimum."""
    X, F, G = planted(seed=seed)
    found = min((sparse_mf(X, 5, sparsity=0.1, max_iter=500, seed=s) for s in range(3)), key=lambda f: f.loss)
    for one, other in ((found.F, F), (found.G, G)):
        one = one.double().numpy()
        cosine = np.abs(one.T @ other) / np.outer(np.linalg.norm(one, axis=0), np.linalg.norm(other, axis=0))
        assert cosine[linear_sum_assignment(-cosine)].min() > 0.99


def test_semi_nmf_follows_the_scale_of_its_input_and_sparse_mf_in_float64_no_order_of_summation():
    """Columns in another order: the same problem, rounded otherwise."""
    one = semi_nmf(noise(), 5, sparsity=0.3, max_iter=10, tol=0.0)
    for scale in (1e3, 1e-3):
        other = semi_nmf(noise() * scale, 5, sparsity=0.3, max_iter=10, tol=0.0)
        torch.testing.assert_close(other.G, one.G, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.F / scale, one.F, rtol=1e-4, atol=1e-4)
    X, G0 = rough(), start(400, 8)
    order = torch.randperm(X.shape[1], generator=torch.Generator().manual_seed(3))
    one, other = (sparse_mf(M, 8, sparsity=0.05, init=G0) for M in (X, X[:, order]))
    torch.testing.assert_close(other.G, one.G)
    torch.testing.assert_close(other.F, one.F[order])


@METHODS
def test_the_start_is_the_seed_s_unless_it_is_given(method):
    """To the bit; what is given is left as it was, and a column of zeros in it stays so."""
    X, G0 = noise(), start()
    fit = partial(method, X, 5, sparsity=0.3, max_iter=20)
    one, again, other = (fit(seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one.F, again.F) and torch.equal(one.G, again.G) and one.loss_curve == again.loss_curve
    assert not torch.equal(one.G, other.G)
    given, other = (fit(seed=seed, init=G0) for seed in (7, 8))
    assert torch.equal(given.F, other.F) and torch.equal(given.G, other.G) and not torch.equal(given.G, one.G)
    assert torch.equal(X, noise()) and torch.equal(G0, start())
    G0[:, 2] = 0
    found = fit(init=G0)
    assert all(torch.isfinite(M).all() for M in (found.F, found.G, found.normalized().F))
    assert (found.G[:, 2] == 0).all() and (found.G[:, [0, 1, 3, 4]] != 0).any(dim=0).all()


@METHODS
def test_it_stops_once_patience_is_exhausted_since_the_last_gain_and_not_before(method):
    """No gain after the first iteration is as large as a tolerance of 1e9; ``max_iter`` may end it before."""
    for patience in (1, 7):
        found = method(noise(), 5, sparsity=0.1, patience=patience, tol=1e9)
        assert len(found.loss_curve) == 1 + patience and found.converged
        found = method(noise(), 5, sparsity=0.1, patience=patience, tol=1e9, max_iter=patience)
        assert len(found.loss_curve) == patience and not found.converged
    for patience in (2, 3):
        found = sparse_mf(noise(dtype=torch.float64), 5, sparsity=0.1, patience=patience, tol=0.0)
        curve = found.loss_curve
        stale = [min(curve[t : t + patience]) >= min(curve[:t]) for t in range(1, len(curve) - patience + 1)]
        assert found.converged and len(stale) > 1
        assert stale == [False] * (len(stale) - 1) + [True]


def rough(n: int = 400, d: int = 30) -> torch.Tensor:
    return planted(n, d, rank=12, sparsity=0.05)[0].double() + 0.2 * noise(n, d, dtype=torch.float64)


@METHODS
def test_it_stops_at_a_fixed_point_and_nothing_follows_there(method):
    """The reference, run on for longer than patience would have, keeps the same entries and the same loss."""
    X = rough() if method is sparse_mf else rough().relu()
    G0 = start(len(X), 8)
    found = method(X, 8, sparsity=0.05, init=G0)
    stopped = len(found.loss_curve)
    assert found.converged and 11 <= stopped < 400
    if method is sparse_mf:
        longer = reference(method, X, G0, 0.05, stopped + 200)
        assert longer.loss_curve[stopped - 1 :] == pytest.approx([found.loss_curve[-1]] * 201, rel=1e-5)
        assert found.loss <= longer.loss * (1 + 1e-5)
        # Without thresholding the supports never change; the loss has to stand still as well.
        found = method(noise(dtype=torch.float64), 5, sparsity=1.0, ridge=0.0)
        last, before = (found.loss_curve[-11 - k] - found.loss_curve[-1 - k] for k in (0, 1))
        assert last <= 1e-6 * found.loss < before


@METHODS
def test_normalized_is_the_same_product_undoes_scale_and_makes_peaks_positive(method):
    found = method(noise(dtype=torch.float64), 5, sparsity=0.3, max_iter=20)
    fixed, peak = found.normalized(), found.G.abs().argmax(dim=0)
    torch.testing.assert_close(fixed.G @ fixed.F.T, found.G @ found.F.T)
    torch.testing.assert_close(fixed.F.norm(dim=0), torch.ones(5, dtype=torch.float64))
    assert (fixed.loss_curve, fixed.converged) == (found.loss_curve, found.converged)
    assert (found.G[peak, range(5)] < 0).any() or method is semi_nmf  # or there is nothing to fix
    assert (fixed.G[peak, range(5)] > 0).all()
    scale = torch.tensor([-1.0, 100.0, -0.01, 3.0, 1.0], dtype=torch.float64)
    other = Factorization(found.F * scale, found.G / scale, found.loss_curve, found.converged).normalized()
    torch.testing.assert_close(other.F, fixed.F)
    torch.testing.assert_close(other.G, fixed.G)


@METHODS
@pytest.mark.parametrize(("changes", "message"), [
    ({"rank": 0}, "rank .*got 0"), ({"rank": 17}, r"rank .*16 .*got 17"), ({"sparsity": 0.0}, "sparsity .*got 0.0"),
    ({"sparsity": 1.5}, "sparsity .*got 1.5"), ({"sparsity": math.nan}, "sparsity .*got nan"),
    ({"ridge": -0.5}, "ridge .*got -0.5"), ({"max_iter": 0}, "max_iter .*got 0"), ({"patience": 0}, "patience .*got 0"),
    ({"X": torch.ones(60, 16, dtype=torch.int64)}, "int64"),
    ({"X": noise().index_fill(0, torch.tensor([3]), math.nan)}, "X holds NaN"),
    ({"X": noise().index_fill(0, torch.tensor([3]), math.inf)}, "X holds .*infinite"),
    ({"X": torch.ones(60)}, r"shape \(60,\)"), ({"init": torch.ones(60, 4)}, r"init .*\(60, 5\).*\(60, 4\)"),
    ({"init": torch.ones(5, 60)}, r"init .*\(60, 5\).*\(5, 60\)"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else None)  # fmt: skip
def test_errors_name_the_bad_value(method, changes, message):
    arguments = {"X": noise(), "rank": 5, "max_iter": 2} | changes
    with pytest.raises(ValueError, match=message):
        method(arguments.pop("X"), arguments.pop("rank"), **arguments)
    with pytest.raises(ValueError, match="non-negative"):
        semi_nmf(noise(), 5, init=-start())
