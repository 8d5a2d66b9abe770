"""Points without mass, points that nothing reaches, forbidden pairs, and numbers at the edge: what stays exact, what is NaN.

Compared with tests/oracle.py, which shares nothing with the backends, for every backend; CUDA's kernels run on the CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import otalign
from otalign import Prior

from . import oracle
from .host_cuda import emulated

INF = math.inf
BALANCED = (INF, INF)
RELAXATIONS = [BALANCED, (0.3, INF), (INF, 0.4), (0.3, 0.5)]
ENGINES = ["reference", "cpu", "triton", "cuda"]


@pytest.fixture(params=ENGINES, scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, which works while the test runs."""
    with emulated() if request.param == "cuda" else contextlib.nullcontext():
        yield request.param


def wide(engine: str) -> torch.dtype:
    """What the backend computes in at its best."""
    return torch.float32 if engine == "cuda" else torch.float64


def costs(n: int = 6, m: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, m))


def weights(count: int, *massless: int) -> np.ndarray:
    """Weights that sum to one, none for the points `massless`."""
    w = np.arange(1.0, count + 1)
    w[list(massless)] = 0
    return w / w.sum()


def solved(engine, C, a, b, reg, rho=BALANCED, dtype=None, **options):
    """An item solved to rounding, and leaves of its cost and weights."""
    dtype = dtype or wide(engine)
    leaves = [torch.tensor(t, dtype=dtype)[None].requires_grad_() for t in (C, a, b)]
    options = {"tol": 1e-6 if dtype == torch.float32 else 1e-13, "max_iter": 3000} | options
    result = otalign.solve_cost(leaves[0], a=leaves[1], b=leaves[2], reg=reg, unbalanced=rho, backend=engine, **options)
    return result, leaves


def agrees(result, leaves, C, a, b, reg, rho=BALANCED, within=None) -> None:
    """All numbers of an item against the oracle, and gradients that are closed forms of its plan and potentials."""
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
        # before weights are normalised the derivative is dual_term(f) + reg (1 - mass), mass the update's
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
@pytest.mark.parametrize("massless", [((0,), ()), ((), (4,)), ((1, 5), (0, 2))], ids=str)
def test_massless_points(engine, massless, reg, rho):
    C, a, b = costs(), weights(6, *massless[0]), weights(5, *massless[1])
    C[:, 0] += 3  # nothing bounds what lies between points without mass
    result, leaves = solved(engine, C, a, b, reg, rho)
    assert result.converged.all()
    agrees(result, leaves, C, a, b, reg, rho)
