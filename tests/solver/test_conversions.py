"""Those conversions of docs/conversions.md that need no other library: their definitions, solved in NumPy.

Total masses other than one, regularisation by the plan's own entropy (as in OTT), and a relaxation for each item.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import otalign

from ..helpers.problems import close

GENERATOR = np.random.default_rng(0)
N, M, REG = 5, 4, 0.3
C = GENERATOR.uniform(0, 1.5, (N, M))
A, B = GENERATOR.uniform(0.2, 1, N), GENERATOR.uniform(0.2, 1, M)
A, B = 6 * A / A.sum(), 4 * B / B.sum()
EXACT = {"tol": 1e-13, "max_iter": 100_000}


def solve(cost, a, b, **options):
    """One item in float64."""
    of = [torch.tensor(t, dtype=torch.float64)[None] for t in (cost, a, b)]
    result = otalign.solve_cost(of[0], a=of[1], b=of[2], **EXACT, **options)
    return result.plan()[0].numpy(), float(result.value)


def kl(p, q):
    return float((p * np.log(p / q) - p + q).sum())


def term(rho, p, q):
    return 0.0 if math.isinf(rho) else rho * kl(p, q)


def fixed_point(kernel, a, b, reg, rho):
    """The plan diag(u) K diag(v) with marginals relaxed by rho: Chizat et al. 2018, algorithm 1."""
    power_x, power_y = (1.0 if math.isinf(r) else r / (r + reg) for r in rho)
    u, v = np.ones(len(a)), np.ones(len(b))
    for _ in range(20_000):
        u = (a / (kernel @ v)) ** power_x
        v = (b / (kernel.T @ u)) ** power_y
    return u[:, None] * kernel * v


RELAXATIONS = [(0.5, 0.5), (0.2, 3.0), (math.inf, 0.4), (0.7, math.inf)]


@pytest.mark.parametrize("rho", RELAXATIONS)
def test_masses_other_than_one(rho):
    """The plan is T times the plan for weights that sum to one; the value follows from it."""
    rho_x, rho_y = rho
    total_a, total_b = A.sum(), B.sum()
    plan, value = solve(C, A, B, reg=REG, unbalanced=rho)  # which normalises A and B
    if math.isinf(rho_x):
        T = total_a
        converted = T * value + REG * T * (total_b - 1 - math.log(total_b))
        converted += rho_y * (T * math.log(total_a / total_b) - total_a + total_b)
    elif math.isinf(rho_y):
        T = total_b
        converted = T * value + REG * T * (total_a - 1 - math.log(total_a))
        converted += rho_x * (T * math.log(total_b / total_a) - total_b + total_a)
    else:
        logs = REG * math.log(total_a * total_b) + rho_x * math.log(total_a) + rho_y * math.log(total_b)
        T = math.exp(logs / (REG + rho_x + rho_y))
        converted = T * (value - REG - rho_x - rho_y) + REG * total_a * total_b + rho_x * total_a + rho_y * total_b
    expected = fixed_point(np.outer(A, B) * np.exp(-C / REG), A, B, REG, rho)
    close(torch.tensor(T * plan), torch.tensor(expected), 1e-10)
    objective = (expected * C).sum() + REG * kl(expected, np.outer(A, B))
    objective += term(rho_x, expected.sum(1), A) + term(rho_y, expected.sum(0), B)
    assert converted == pytest.approx(objective, rel=1e-10)


def test_masses_other_than_one_of_pot():
    ot = pytest.importorskip("ot")
    rho = 0.5
    plan, _ = solve(C, A, B, reg=REG, unbalanced=rho)
    T = math.exp((REG + rho) * math.log(A.sum() * B.sum()) / (REG + 2 * rho))
    expected = ot.unbalanced.sinkhorn_unbalanced(
        A, B, C, REG, rho, reg_type="kl", c=np.outer(A, B), numItermax=100_000, stopThr=1e-15
    )
    close(torch.tensor(T * plan), torch.tensor(expected), 1e-9)


@pytest.mark.parametrize("tau", [(0.5, 0.5), (0.3, 0.9), (1.0, 0.6), (0.6, 1.0), (1.0, 1.0)])
def test_regularised_by_the_plans_own_entropy(tau):
    """OTT's: min <P, C> + eps (<P, log P> - <P, 1>) + rho KL(..) of each side, rho = eps tau / (1 - tau)."""
    rho = tuple(math.inf if t == 1 else REG * t / (1 - t) for t in tau)
    a, b = A / A.sum(), B / B.sum()
    plan, value = solve(C + REG * (np.log(a)[:, None] + np.log(b)), a, b, reg=REG, unbalanced=rho)
    expected = fixed_point(np.exp(-C / REG), a, b, REG, rho)
    close(torch.tensor(plan), torch.tensor(expected), 1e-10)
    objective = (expected * C).sum() + REG * (expected * (np.log(expected) - 1)).sum()
    objective += term(rho[0], expected.sum(1), a) + term(rho[1], expected.sum(0), b)
    assert value - REG == pytest.approx(objective, rel=1e-10)


def test_a_relaxation_for_each_item(backend):
    """Divide everything by rho: the plan stays, and the value is divided by rho."""
    cost = torch.rand(3, N, M, dtype=torch.float64)
    rho, reg = torch.tensor([0.2, 1.0, 3.0]).double(), torch.tensor([0.1, 0.3, 0.2]).double()
    exact = {"tol": 1e-10, "max_iter": 10_000, "backend": backend}
    for side in (1.0, (1.0, None), (None, 1.0)):
        found = otalign.solve_cost(cost / rho[:, None, None], reg=reg / rho, unbalanced=side, **exact)
        for item, strength in enumerate(rho.tolist()):
            alone = {1.0: strength, (1.0, None): (strength, None), (None, 1.0): (None, strength)}[side]
            expected = otalign.solve_cost(cost[item : item + 1], reg=float(reg[item]), unbalanced=alone, **exact)
            close(found.plan()[item], expected.plan()[0], 1e-8)
            close(found.value[item] * strength, expected.value[0], 1e-8)
