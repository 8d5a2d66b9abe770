"""Does a cost of +inf forbid exactly its pair?"""

from __future__ import annotations

import math

import pytest
import torch

import otalign

from ..helpers.problems import close, identical, kl, leaf

REG = 0.3
EXACT = {"reg": REG, "tol": 1e-12, "max_iter": 50_000}
torch.manual_seed(0)
C = torch.rand(2, 6, 4, dtype=torch.float64)
ALLOWED = torch.rand(2, 6, 4) > 0.4
ALLOWED[:, range(4), range(4)] = True
ALLOWED[:, [4, 5], [0, 1]] = True
RELAXATIONS = [(math.inf, 0.5), (0.5, math.inf), (0.4, 0.7)]


def scaled(cost, rho):
    """The plan diag(u) K diag(v), K being 0 where the cost is infinite: plain scaling in float64."""
    n, m = cost.shape
    kernel = (-cost / REG).exp() / (n * m)
    power_x, power_y = (1.0 if math.isinf(r) else r / (r + REG) for r in rho)
    u, v = torch.ones(n, dtype=cost.dtype), torch.ones(m, dtype=cost.dtype)
    for _ in range(2_000):
        u = (1 / n / (kernel @ v)) ** power_x
        v = (1 / m / (kernel.T @ u)) ** power_y
    return u[:, None] * kernel * v


@pytest.mark.parametrize("rho", RELAXATIONS)
def test_plan_value_and_gradient(backend, rho):
    cost = leaf(C)
    forbidden = cost.masked_fill(~ALLOWED, math.inf)
    result = otalign.solve_cost(forbidden, unbalanced=rho, backend=backend, **EXACT)
    assert result.converged.all()
    result.value.sum().backward()
    for item in range(2):
        plan = scaled(forbidden[item].detach(), rho)
        close(result.plan()[item], plan, 1e-9)
        close(cost.grad[item], plan, 1e-9)
        linear = (plan * C[item]).sum()
        value = linear + REG * kl(plan, torch.full((6, 4), 1 / 24, dtype=plan.dtype))
        for r, mass, size in ((rho[0], plan.sum(1), 6), (rho[1], plan.sum(0), 4)):
            value = value + (0 if math.isinf(r) else r * kl(mass, torch.full_like(mass, 1 / size)))
        close(result.value_linear[item], linear, 1e-9)
        close(result.value[item], value, 1e-9)
    assert (result.plan()[~ALLOWED] == 0).all() and (cost.grad[~ALLOWED] == 0).all()


def test_gradient_of_the_linear_value(backend):
    """Against finite differences, and zero at the forbidden pairs."""

    def linear(cost):
        forbidden = cost.masked_fill(~ALLOWED, math.inf)
        return otalign.solve_cost(forbidden, unbalanced=(math.inf, 0.5), backend=backend, **EXACT).value_linear.sum()

    cost, direction = leaf(C), torch.randn(C.shape, dtype=C.dtype)
    linear(cost).backward()
    slope = (linear(C + 1e-5 * direction) - linear(C - 1e-5 * direction)) / 2e-5
    close((cost.grad * direction).sum(), slope, 1e-6)
    assert (cost.grad[~ALLOWED] == 0).all()


def test_segments_are_separate_problems(backend):
    """Frames may only be aligned with words of their own segment: two blocks, each with its share of the mass."""
    allowed = torch.zeros(1, 6, 4, dtype=torch.bool)
    allowed[:, :3, :2] = allowed[:, 3:, 2:] = True
    cost = C[:1].masked_fill(~allowed, math.inf)
    result = otalign.solve_cost(cost, backend=backend, **EXACT)
    assert result.converged.all()
    for rows, columns in ((slice(0, 3), slice(0, 2)), (slice(3, 6), slice(2, 4))):
        block = otalign.solve_cost(C[:1, rows, columns], backend=backend, **EXACT)
        close(result.plan()[:, rows, columns], block.plan() / 2, 1e-9)
    assert (result.plan()[~allowed] == 0).all()


def test_a_point_without_allowed_pairs(backend):
    """On a relaxed side the point is dropped, and costs rho times its weight. On a strict side the item does not converge.

    Neither is NaN.
    """
    cost = C.clone()
    cost[0, 2] = math.inf
    relaxed = otalign.solve_cost(cost, unbalanced=(0.5, 0.5), backend=backend, **EXACT)
    assert relaxed.converged.all() and (relaxed.plan()[0, 2] == 0).all()
    nearly = otalign.solve_cost(
        cost[:1].masked_fill(cost[:1].isinf(), 1e4), unbalanced=(0.5, 0.5), backend=backend, **EXACT
    )
    close(relaxed.value[0], nearly.value[0], 1e-8)
    close(relaxed.plan()[0, [0, 1, 3, 4, 5]], nearly.plan()[0, [0, 1, 3, 4, 5]], 1e-8)
    strict = otalign.solve_cost(cost, backend=backend, **EXACT | {"max_iter": 50})
    assert not strict.converged[0] and strict.error[0] >= 1 / 6 - 1e-6
    assert strict.value[0].isfinite() and strict.plan()[0].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_invalid_cost_affects_only_its_item(backend, bad):
    cost = C.masked_fill(~ALLOWED, math.inf)
    expected = otalign.solve_cost(cost, unbalanced=(math.inf, 0.5), backend=backend, **EXACT)
    cost[0, 1, 1] = bad
    found = otalign.solve_cost(cost, unbalanced=(math.inf, 0.5), backend=backend, **EXACT)
    assert found.value[0].isnan() and not found.converged[0]
    assert expected.value.isfinite().all()
    identical(found.value[1], expected.value[1])


def test_padding_is_not_read(backend):
    cost = C.masked_fill(~ALLOWED, math.inf)
    lengths = torch.tensor([4, 6])
    expected = otalign.solve_cost(cost, lengths, unbalanced=(math.inf, 0.5), backend=backend, **EXACT)
    cost[0, 4:] = math.nan
    found = otalign.solve_cost(cost, lengths, unbalanced=(math.inf, 0.5), backend=backend, **EXACT)
    assert expected.value.isfinite().all()
    identical(found.value, expected.value)
    identical(found.plan(), expected.plan())
