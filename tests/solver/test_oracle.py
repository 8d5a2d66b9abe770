"""Do the backends agree with an oracle that shares no code with the reference? Zero weights, forbidden pairs, extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import otalign
from otalign import Prior

from ..helpers import oracle
from ..helpers.problems import close, leaf

INF = math.inf
STRICT = (INF, INF)


class Case(NamedTuple):
    C: np.ndarray
    a: np.ndarray
    b: np.ndarray
    reg: float
    rho: tuple[float, float] = STRICT
    prior: Prior | None = None

    def cost(self) -> np.ndarray:
        n, m = self.C.shape
        return self.C if self.prior is None else self.C + self.prior.matrix(n, m, self.reg).numpy()

    def optimum(self) -> oracle.Optimum:
        return oracle.solve(self.cost(), self.a, self.b, self.reg, self.rho)


def uniform(n: int) -> np.ndarray:
    return np.full(n, 1 / n)


def share(*weights: float) -> np.ndarray:
    return np.array(weights) / np.sum(weights)


def costs(n: int, m: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, m)).astype(np.float32).astype(np.float64)


def silence(n: int, begin: int, end: int) -> np.ndarray:
    weights = np.ones(n)
    weights[begin:end] = 0
    return weights / weights.sum()


def bump(n: int, at: float) -> np.ndarray:
    """A Gaussian on [0, 1], whose tails are subnormal and zero in float32."""
    weights = np.exp(-((np.linspace(0, 1, n) - at) ** 2) / 0.003).astype(np.float32).astype(np.float64)
    return weights / weights.sum()


def line(n: int) -> np.ndarray:
    points = np.linspace(0, 1, n)
    return (points[:, None] - points) ** 2


def forbid(C: np.ndarray, *pairs: tuple) -> np.ndarray:
    C = C.copy()
    for pair in pairs:
        C[pair] = INF
    return C


SWAPPED = np.array([[0.0, 1.0], [1.0, 0.0]])
CASES: dict[str, Callable[[], Case]] = {
    "one massless point": lambda: Case(SWAPPED, share(1, 0), uniform(2), 0.05),
    "one massless point, small reg": lambda: Case(SWAPPED, share(1, 0), uniform(2), 0.01),
    "massless on both sides": lambda: Case(costs(7, 5), share(0, 1, 2, 0, 1, 1, 0), share(1, 0, 3, 1, 0), 0.02),
    "massless, one side relaxed": lambda: Case(
        costs(7, 5), share(0, 1, 2, 0, 1, 1, 0), share(1, 0, 3, 1, 0), 0.02, (0.3, INF)
    ),
    "massless point that mass would flow to": lambda: Case(
        np.array([[0.0, -1.0], [0.0, -1.0]]), uniform(2), share(1, 0), 0.005, (INF, 0.002)
    ),
    "silent frames, small reg": lambda: Case(costs(30, 10), silence(30, 10, 20), uniform(10), 0.005, (INF, 0.3)),
    "pause longer than a band": lambda: Case(
        costs(60, 20), silence(60, 15, 45), uniform(20), 0.05, (INF, 0.3), Prior.band(3.0)
    ),
    "pause within a band": lambda: Case(costs(60, 20), silence(60, 25, 28), uniform(20), 0.05, STRICT, Prior.band(6.0)),
    "relaxed x, costs far below zero": lambda: Case(
        np.array([[-4.0], [-170.0]]), uniform(2), uniform(1), 1.0, (0.0356, INF)
    ),
    "relaxed x, offset": lambda: Case(costs(9, 6) * 3 - 500, uniform(9), uniform(6), 0.5, (0.3, INF)),
    "relaxed y, offset": lambda: Case(costs(9, 6) * 3 - 500, uniform(9), uniform(6), 0.5, (INF, 0.3)),
    "relaxed, offset above": lambda: Case(costs(9, 6) * 3 + 40, uniform(9), uniform(6), 0.5, (3.0, 4.0)),
    "tails of zero": lambda: Case(line(40), bump(40, 0.2), bump(40, 0.7), 0.01),
    "tails of zero, relaxed": lambda: Case(line(40), bump(40, 0.2), bump(40, 0.7), 0.01, (0.1, 0.1)),
    "forbidden pairs": lambda: Case(forbid(costs(6, 5), (0, slice(3)), (3, 4)), uniform(6), uniform(5), 0.05),
    "forbidden pairs, relaxed": lambda: Case(
        forbid(costs(6, 5), (0, slice(3)), (3, 4)), uniform(6), uniform(5), 0.05, (0.2, 0.3)
    ),
    "points that nothing reaches": lambda: Case(
        forbid(costs(6, 5), 2, (slice(None), 1)), uniform(6), uniform(5), 0.05, (0.2, 0.3)
    ),
    "nothing reaches anything": lambda: Case(np.full((3, 2), INF), uniform(3), uniform(2), 0.05, (0.2, 0.3)),
}
# The interpreter would need more than seconds for these.
LONG = {"relaxed x, offset", "relaxed y, offset", "tails of zero", "tails of zero, relaxed"}


def solve(case: Case, backend: str, dtype: torch.dtype, **options):
    """The result, and its leaves: cost and weights."""
    tensors = [leaf(torch.from_numpy(t).to(dtype)[None]) for t in (case.C, case.a, case.b)]
    C, a, b = tensors
    options = {"tol": 1e-11 if dtype == torch.float64 else 1e-6, "max_iter": 5000, **options}
    result = otalign.solve_cost(
        C, a=a, b=b, reg=case.reg, prior=case.prior, unbalanced=case.rho, backend=backend, **options
    )
    return result, tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_the_optimum(backend, name, dtype):
    case = CASES[name]()
    expected = case.optimum()
    result, (C, a, b) = solve(case, backend, dtype)
    tol = 1e-8 if dtype == torch.float64 else 5e-5
    plan = torch.from_numpy(expected.plan)[None]
    close(result.plan(), plan, tol)
    close(result.value, torch.tensor([expected.value]), tol)
    close(result.value_linear, torch.tensor([expected.linear]), 4 * tol)
    assert result.converged.all()
    gradients = torch.autograd.grad(result.value.sum(), (C, a, b), retain_graph=True)
    close(gradients[0], plan, tol)
    for gradient in (*gradients, *torch.autograd.grad(result.value_linear.sum(), (C, a, b))):
        assert not gradient.isnan().any()
    assert all(potential.isfinite().all() for potential in result.potentials)


@pytest.mark.parametrize("name", [name for name in CASES if "massless" in name and "flow" not in name])
def test_gradients_by_weights_of_zero_are_one_sided_derivatives(backend, name):
    case, step = CASES[name](), 1e-7
    result, (_, a, b) = solve(case, backend, torch.float64)
    by_a, by_b = torch.autograd.grad(result.value.sum(), (a, b))
    value = case.optimum().value
    for side, gradient in (("a", by_a[0]), ("b", by_b[0])):
        weights = getattr(case, side)
        for index in np.flatnonzero(weights == 0):
            more = weights.copy()
            more[index] += step
            moved = case._replace(**{side: more / more.sum()}).optimum().value
            # The entropy of a new weight has an infinite slope in the plan but not in the value, so the error is of order step.
            close(gradient[index], torch.tensor((moved - value) / step, dtype=torch.float64), 2e-4)


def test_a_zero_weight_equals_an_absent_point(backend):
    case = CASES["massless on both sides"]()
    rows, columns = case.a > 0, case.b > 0
    part = case._replace(C=case.C[np.ix_(rows, columns)], a=case.a[rows], b=case.b[columns])
    (result, _), (there, _) = (solve(c, backend, torch.float64) for c in (case, part))
    close(result.value, there.value.detach(), 1e-10)
    close(result.plan()[0][rows][:, columns], there.plan()[0].detach(), 1e-10)
    close(result.potentials[0][0][rows], there.potentials[0][0], 1e-9)


def test_a_strict_point_without_allowed_pairs_is_left_out_and_reported(backend):
    case = CASES["points that nothing reaches"]()._replace(rho=STRICT)
    result, (C, a, b) = solve(case, backend, torch.float64, max_iter=50)
    plan = result.plan()[0]
    assert not result.converged.any()
    assert result.error.item() >= 1 / 6 + 1 / 5 - 1e-9
    assert not plan[2].any() and not plan[:, 1].any()
    assert plan.isfinite().all() and plan.sum() > 0.5
    for gradient in torch.autograd.grad(result.value.sum() + result.value_linear.sum(), (C, a, b)):
        assert gradient.isfinite().all()


def test_silent_frames_under_a_band_in_a_divergence(backend):
    """In the self term of x, silent frames have allowed pairs with silent frames only."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 8, generator=generator, requires_grad=True)
    y = torch.randn(2, 20, 8, generator=generator, requires_grad=True)
    a = torch.ones(2, 60)
    a[:, 20:40] = 0
    loss = otalign.sinkhorn_loss(
        x, y, a=a, prior=Prior.band(3.0), unbalanced=(INF, 0.5), objective="divergence", backend=backend
    )
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()
    assert not x.grad[:, 20:40].any()


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "euclidean", "dot"])
@pytest.mark.parametrize("rho", [None, 0.5, (0.3, 0.3)])
def test_a_divergence_is_stationary_where_both_sides_are_the_same(backend, cost, rho):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 2, generator=generator).requires_grad_()
    lengths = torch.tensor([20, 7, 1])
    options = {"cost": cost, "unbalanced": rho, "backend": backend}

    def loss_and_gradient(objective: str) -> tuple[torch.Tensor, torch.Tensor]:
        loss = otalign.sinkhorn_loss(x, x.detach().clone(), lengths, lengths, objective=objective, **options)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    value, of_value = loss_and_gradient("value")
    divergence, of_divergence = loss_and_gradient("divergence")
    assert divergence.abs() < 2e-6 * max(1, value.abs())
    assert of_divergence.norm() < 2e-6 * max(1, of_value.norm())


weights = st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-6, 0.3, 1.0]), min_size=1, max_size=6).filter(any)


@hypothesis.given(
    a=weights,
    b=weights,
    seed=st.integers(0, 10**6),
    forbidden=st.sampled_from([0.0, 0.2, 0.6]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    offset=st.sampled_from([0.0, -20.0, 50.0]),
    rho=st.sampled_from([(0.5, 0.5), (0.5, INF), (INF, 2.0), STRICT]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_weights_and_costs(backend, a, b, seed, forbidden, scale, offset, rho, dtype):
    random = np.random.default_rng(seed)
    C = (random.random((len(a), len(b))) * scale + offset).astype(np.float32).astype(np.float64)
    C[random.random(C.shape) < forbidden] = INF
    hypothesis.assume(rho != STRICT or not np.isinf(C).any())  # there may be no plan
    case = Case(C, share(*a), share(*b), 0.4, rho)
    result, leaves = solve(case, backend, dtype, max_iter=3000)
    gradients = torch.autograd.grad(result.value.sum(), leaves)
    assert not any(gradient.isnan().any() for gradient in gradients)
    expected = case.optimum()
    if not abs(expected.plan).max() < 1e30:
        return  # its mass may be too small for float32
    hypothesis.assume(bool(result.converged))
    bound = 1e-6 if dtype == torch.float64 else 1e-3
    scale_of_plan = max(1.0, expected.plan.sum())
    assert np.abs(result.plan()[0].detach().double().numpy() - expected.plan).sum() <= bound * scale_of_plan
    assert abs(float(result.value.detach()) - expected.value) <= bound * max(1.0, abs(expected.value), scale_of_plan)
