"""Massless points, points without allowed pairs, forbidden pairs and extreme numbers: what stays exact, and what is NaN.

Every backend is compared with tests/helpers/oracle.py, which shares no code with the backends. The CUDA kernels run on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import otalign
from otalign import Prior

from ..cuda_on_cpu.host_cuda import emulated
from ..helpers import oracle
from ..helpers.problems import close

INF = math.inf
BALANCED = (INF, INF)
RELAXATIONS = [BALANCED, (0.3, INF), (INF, 0.4), (0.3, 0.5)]
ENGINES = ["reference", "cpu", "triton", "cuda"]


@pytest.fixture(params=ENGINES, scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, which is available while the test runs."""
    with emulated() if request.param == "cuda" else contextlib.nullcontext():
        yield request.param


def wide(engine: str) -> torch.dtype:
    """The default precision for the backend. In float32, which some tests choose, Triton keeps the matrix in registers."""
    return torch.float32 if engine in ("cuda", "triton") else torch.float64


def costs(n: int = 6, m: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, m))


def weights(count: int, *massless: int) -> np.ndarray:
    """Weights that sum to one; the points `massless` have weight zero."""
    w = np.arange(1.0, count + 1)
    w[list(massless)] = 0
    return w / w.sum()


def solved(engine, C, a, b, reg, rho=BALANCED, dtype=None, **options):
    """An item solved up to rounding, and the leaves for its cost and weights."""
    dtype = dtype or wide(engine)
    leaves = [torch.tensor(t, dtype=dtype)[None].requires_grad_() for t in (C, a, b)]
    options = {"tol": 1e-6 if dtype == torch.float32 else 1e-13, "max_iter": 3000} | options
    result = otalign.solve_cost(leaves[0], a=leaves[1], b=leaves[2], reg=reg, unbalanced=rho, backend=engine, **options)
    return result, leaves


def agrees(result, leaves, C, a, b, reg, rho=BALANCED, within=None) -> None:
    """Compare all outputs with the oracle, and the gradients with closed forms of its plan and potentials."""
    right = oracle.solve(C, a, b, reg, rho)
    within = within or (3e-5 if result.value.dtype == torch.float32 else 1e-9)
    near = {"rtol": within, "atol": within}
    np.testing.assert_allclose(result.value.item(), right.value, **near)
    np.testing.assert_allclose(result.value_linear.item(), right.linear, **near)
    plan = result.plan()[0].detach().numpy()
    np.testing.assert_allclose(plan, right.plan, rtol=0, atol=within)
    assert (plan[a == 0] == 0).all() and (plan[:, b == 0] == 0).all() and (plan[C == INF] == 0).all()
    f, g = (t[0].numpy() for t in result.potentials)
    if rho == BALANCED:
        shift = (b * right.g).sum()
        right = right._replace(f=right.f + shift, g=right.g - shift)
    np.testing.assert_allclose(f, right.f, **near)
    np.testing.assert_allclose(g, right.g, **near)
    grads = torch.autograd.grad(result.value.sum(), leaves, retain_graph=True)
    np.testing.assert_allclose(grads[0][0].numpy(), right.plan, rtol=0, atol=within)
    for grad, weight, potential, r in zip(grads[1:], (a, b), (right.f, right.g), rho, strict=True):
        # before the weights are normalised, the derivative is dual_term(f) + reg (1 - mass), with the mass of the update
        mass = 1 if r == INF else np.exp(-potential / r)
        raw = (potential if r == INF else -r * np.expm1(-potential / r)) + reg * (1 - mass)
        expected = raw - (raw * weight).sum()
        np.testing.assert_allclose(grad[0].numpy(), expected, rtol=30 * within, atol=30 * within)
    implicit = torch.autograd.grad(result.value_linear.sum() + result.plan().square().sum(), leaves)
    for grad in implicit:
        assert grad.isfinite().all()
    assert (implicit[0][0].numpy()[right.plan == 0] == 0).all()


# Points without mass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", RELAXATIONS, ids=str)
@pytest.mark.parametrize("reg", [0.05, 0.005])
def test_massless_points(engine, reg, rho):
    C, a, b = costs(), weights(6, 1, 5), weights(5, 0, 2)
    C[:, 0] += 3  # costs between massless points are unbounded
    result, leaves = solved(engine, C, a, b, reg, rho)
    assert result.converged.all()
    agrees(result, leaves, C, a, b, reg, rho)


@pytest.mark.parametrize("massless", [((0,), ()), ((), (4,))], ids=["x", "y"])
def test_massless_points_of_one_side(engine, massless):
    C, a, b = costs(), weights(6, *massless[0]), weights(5, *massless[1])
    result, leaves = solved(engine, C, a, b, 0.02, (0.3, INF), dtype=torch.float32, tol=1e-5)
    agrees(result, leaves, C, a, b, 0.02, (0.3, INF))


@pytest.mark.parametrize("reg", [0.05, 0.01, 0.001])
def test_a_point_without_mass_far_away(engine, reg):
    """The cost's range over reg is beyond the exponents of float32."""
    C, a, b = np.array([[0.0, 1], [1, 0]]), np.array([1.0, 0]), np.array([0.5, 0.5])
    result, leaves = solved(engine, C, a, b, reg, dtype=torch.float32)
    assert result.n_iter.item() <= 3  # one iteration, but for the rounding of exponents up to 1000
    agrees(result, leaves, C, a, b, reg)


def test_a_column_without_mass_and_a_small_rho(engine):
    C, a, b = np.array([[0.0, -1], [0, -1]]), np.array([0.5, 0.5]), np.array([1.0, 0])
    result, leaves = solved(engine, C, a, b, 0.005, (INF, 0.002), dtype=torch.float32)
    # The gradient by the zero weight is rho - (rho + reg) exp(500), which is infinite in float32: it is not compared.
    assert abs(result.value.item()) < 1e-8
    np.testing.assert_allclose(result.potentials[1][0].numpy(), [0, -1 / 3.5], rtol=1e-6)
    assert torch.autograd.grad(result.value.sum(), leaves[0])[0].isfinite().all()


@pytest.mark.parametrize("objective", ["value", "transport", "plan_cost", "divergence"])
def test_a_pause_longer_than_the_band(engine, objective):
    """Silent frames have no weight and no gradient. Zero weights give the same result as removing the points."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(1, count, 4, generator=generator) for count in (30, 12))
    loud = torch.ones(1, 30)
    loud[:, 8:20] = 0
    x, y = x.requires_grad_(), y.requires_grad_()
    options = {"prior": Prior.band(3.0), "reg": 0.05, "max_iter": 20, "backend": engine, "objective": objective}
    loss = otalign.sinkhorn_loss(x, y, None, None, loud, unbalanced=(INF, 0.3), **options)
    grads = torch.autograd.grad(loss, (x, y))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][0, 8:20].any()


# Points without allowed pairs, forbidden pairs --------------------------------------------------------------------------


@pytest.mark.parametrize("rho", RELAXATIONS[1:], ids=str)
def test_forbidden_pairs(engine, rho):
    C, a, b = costs(), weights(6, 3), weights(5, 2)
    C[0, :3] = C[4, 1] = C[3, 4] = INF
    result, leaves = solved(engine, C, a, b, 0.05, rho, dtype=torch.float32)
    agrees(result, leaves, C, a, b, 0.05, rho)


@pytest.mark.parametrize("cut", ["x", "y", "both", "all"])
def test_points_without_allowed_pairs_on_relaxed_sides(engine, cut):
    C, a, b = costs(), weights(6, 3), weights(5, 2)
    if cut in ("x", "both"):
        C[1, [0, 1, 3, 4]] = INF  # the massless point of y does not count
    if cut in ("y", "both"):
        C[:, 4] = INF
    if cut == "all":
        C[:] = INF
    rho = (0.3, 0.4)
    result, _ = solved(engine, C, a, b, 0.1, rho, dtype=torch.float32)
    right = oracle.solve(C, a, b, 0.1, rho)
    assert result.converged.all()
    np.testing.assert_allclose(result.value.item(), right.value, rtol=1e-5)
    np.testing.assert_allclose(result.plan()[0].detach().numpy(), right.plan, rtol=0, atol=1e-6)
    f, g = result.potentials
    if cut != "y":
        np.testing.assert_allclose(f[0, 1], 40 * rho[0], rtol=1e-6)
    if cut != "x":
        np.testing.assert_allclose(g[0, 4], 40 * rho[1], rtol=1e-6)


@pytest.mark.parametrize(("rho", "error"), [((INF, 0.4), 2 / 17), ((0.3, INF), 5 / 12), (BALANCED, None)], ids=str)
def test_points_without_allowed_pairs_on_strict_sides(engine, rho, error):
    """No plan has these marginals: the error contains the mass that cannot be transported."""
    C, a, b = costs(), weights(6, 3), weights(5, 2)
    C[1] = C[:, 4] = INF
    result, leaves = solved(engine, C, a, b, 0.1, rho, dtype=torch.float32, max_iter=40)
    assert not result.converged.any()
    if error is not None:
        np.testing.assert_allclose(result.error.item(), error, rtol=1e-3)
        np.testing.assert_allclose(
            result.plan()[0].detach().numpy(), oracle.solve(C, a, b, 0.1, rho).plan, rtol=0, atol=1e-4
        )
    total = result.value.sum() + result.value_linear.sum() + result.plan().sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(total, leaves))
    assert not result.plan()[0, 1].any()
    assert not result.plan()[0, :, 4].any()


# Relaxed marginals and large costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("swap", [False, True], ids=["x", "y"])
def test_large_costs_and_a_small_rho(engine, swap, sign):
    C, rho = sign * np.array([[4.0], [170.0]]), (0.0356, INF)
    if swap:
        C, rho = C.T, rho[::-1]
    a, b = (np.full(count, 1 / count) for count in C.shape)
    result, leaves = solved(engine, C, a, b, 1.0, rho, dtype=torch.float32, tol=1e-6)
    right = oracle.solve(C, a, b, 1.0, rho)
    np.testing.assert_allclose(result.value.item(), right.value, rtol=1e-6)
    np.testing.assert_allclose(result.plan()[0].detach().numpy(), right.plan, rtol=0, atol=1e-5)
    grad = torch.autograd.grad(result.value.sum(), leaves[0])[0]
    np.testing.assert_allclose(grad[0].numpy(), right.plan, rtol=0, atol=1e-5)


# Invalid numbers -------------------------------------------------------------------------------------------------


def beside(engine, first: Tensor, **options) -> otalign.OTResult:
    """Solve two items: the first is NaN, and the second is not affected."""
    C = torch.stack([first, torch.tensor(costs(), dtype=torch.float32)])
    result = otalign.solve_cost(C, backend=engine, **options)
    assert result.value[0].isnan()
    assert result.error[0].isnan()
    assert result.converged.tolist() == [False, True]
    assert result.plan()[1].isfinite().all()
    return result


@pytest.mark.parametrize("number", [math.nan, -INF])
@pytest.mark.parametrize("place", [(0, 0), (1, 0), (0, 2), (1, 2)], ids=["mass", "x", "y", "both"])
def test_invalid_costs(engine, place, number):
    """Also if one or both of the points have no mass."""
    C = torch.tensor(costs(), dtype=torch.float32)
    C[place] = number
    a, b = (torch.tensor(w, dtype=torch.float32).expand(2, -1) for w in (weights(6, 1), weights(5, 2)))
    beside(engine, C, a=a, b=b, reg=0.1)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, no check reads the values before the kernels: invalid ones become NaN."""
    for module in (otalign.options, otalign.problem, otalign.weights):
        monkeypatch.setattr(module, "checks_values", lambda tensor: False)
        monkeypatch.setattr(module, "valid_or_nan", lambda values, good, message: torch.where(good, values, math.nan))


@pytest.mark.parametrize("engine", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("reg", [0.0, -1.0, math.nan, INF, 1e-40])
def test_invalid_reg(engine, unchecked, reg):
    C = torch.tensor(costs(), dtype=torch.float32)
    beside(engine, C, reg=torch.tensor([reg, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("engine", ["triton", "cuda"], indirect=True)
def test_cost_over_reg_overflows(engine, unchecked):
    C = torch.tensor(costs(), dtype=torch.float32) + 9
    beside(engine, C, reg=torch.tensor([1.2e-38, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("engine", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("start", [math.nan, INF, -INF, 1e30, 1.1e4])
def test_start_out_of_range(engine, unchecked, start):
    C = torch.tensor(costs(), dtype=torch.float32)
    init = torch.zeros(2, 6), torch.zeros(2, 5)
    init[1][0, 3] = start
    beside(engine, C, reg=0.1, init=init)


@pytest.mark.parametrize("engine", ["triton", "cuda"], indirect=True)
def test_invalid_weights(engine, unchecked):
    C = torch.tensor(costs(), dtype=torch.float32)
    for name, size in (("a", 6), ("b", 5)):
        weight = torch.ones(2, size)
        weight[0, 2] = -1
        beside(engine, C, reg=0.1, **{name: weight})


# The same points on both sides -----------------------------------------------------------------------------------------


def symmetric(engine: str, x: Tensor, w: Tensor | None, rho, reg: float, lengths: Tensor | None = None):
    side = otalign.problem.SideInput(x, lengths, w)
    options = otalign.options.Options("sqeuclidean", prior=None, reg=reg, max_iter=100, tol=1e-5)
    problem = otalign.problem.from_points(side, side, options, unbalanced=rho)
    return otalign.backends.solver(engine)(dataclasses.replace(problem, symmetric=True))


def one_side() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3


@functools.cache
def symmetric_optimum(massless: tuple[int, ...], reg: float, rho: tuple[float, float]) -> oracle.Optimum:
    """The oracle's result for `one_side`. Cached, because its alternating updates converge slowly here."""
    x, w = one_side(), weights(6, *massless)
    return oracle.solve((x[:, None] - x).square().sum(-1).numpy(), w, w, reg, rho)


@pytest.mark.parametrize("rho", [BALANCED, (0.3, 0.3)], ids=str)
@pytest.mark.parametrize("reg", [0.5, 0.01])
@pytest.mark.parametrize("massless", [(), (2,)], ids=["all", "some"])
def test_symmetric_problems(engine, massless, reg, rho):
    w = torch.tensor(weights(6, *massless)).float()[None]
    solution = symmetric(engine, one_side().float()[None], w, rho, reg)
    right = symmetric_optimum(massless, reg, rho)
    if rho == BALANCED:
        right = right._replace(f=(right.f + right.g) / 2)
    np.testing.assert_allclose(solution.value.item(), right.value, rtol=3e-5, atol=1e-6)
    np.testing.assert_allclose(solution.f[0].numpy(), right.f, rtol=0, atol=1e-4)
    plan = solution.plan()[0]
    np.testing.assert_allclose(plan.numpy(), right.plan, rtol=0, atol=1e-5)
    np.testing.assert_allclose(plan.numpy(), plan.T.numpy(), rtol=0, atol=1e-8)
    assert solution.f.equal(solution.g)
    assert solution.n_iter.item() < 30


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["registers", "memory"])
def test_symmetric_problems_by_several_programs(monkeypatch, dtype):
    from otalign.triton_kernels import heuristics, runtime

    from ..helpers.interpreter import together

    monkeypatch.setattr(runtime, "processors", lambda device: 8)
    tile = heuristics.TileShape(width=32, groups=2, warps=1, min_programs=1, max_programs=16, max_before_hopper=16)
    monkeypatch.setattr(heuristics, "TILE_SHAPES", (tile,))
    heuristics.launch_config.cache_clear()
    x = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0), dtype=dtype) / 3
    lengths = torch.tensor([30, 7])
    w = torch.ones(2, 30, dtype=dtype)
    w[0, 3:6] = 0
    with together() as launches:
        actual = symmetric("triton", x, w, BALANCED, 0.02, lengths)
    heuristics.launch_config.cache_clear()
    assert max(launches) > 2
    expected = symmetric("reference", x.double(), w.double(), BALANCED, 0.02, lengths)
    assert actual.n_iter.tolist() == expected.n_iter.tolist()
    for name in ("value", "f", "g", "error"):
        close(getattr(actual, name), getattr(expected, name), 1e-10 if dtype == torch.float64 else 1e-5)


def test_the_divergence_is_stationary_where_both_sides_are_the_same(engine):
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    x.requires_grad_()
    loss = otalign.sinkhorn_loss(
        x, y, reg=0.05, objective="divergence", cost="sqeuclidean", max_iter=100, backend=engine, reduction="sum"
    )
    (grad,) = torch.autograd.grad(loss, x)
    assert abs(loss.item()) < 1e-6
    assert float(grad.norm()) < 2e-6
