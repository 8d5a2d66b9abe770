"""Do other libraries give the same results for the same problems?"""

import math

import geomloss
import geomloss.ot
import numpy as np
import ot
import pytest
import scipy.optimize
import torch

import otalign

from ..helpers.problems import CONVERGED, close, draw_weights

INF = math.inf


@pytest.fixture
def problem():
    """A cost (6, 4) and weights (6,), (4,) summing to one."""
    generator = torch.Generator().manual_seed(3)
    C = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    a, b = (draw_weights(torch.tensor([n]), n, seed=n)[0] for n in C.shape)
    return C, a / a.sum(), b / b.sum()


def solve(C, a, b, backend, **options):
    return otalign.solve_cost(C[None], a=a[None], b=b[None], backend=backend, **CONVERGED, **options)


@pytest.mark.parametrize("reg", [1.0, 0.1, 0.02])
def test_pot_balanced(problem, backend, reg):
    C, a, b = problem
    ours = solve(C, a, b, backend, reg=reg)
    theirs = ot.solve(C, a, b, reg=reg, reg_type="KL", tol=1e-13, max_iter=100_000)
    close(ours.value[0], theirs.value, 1e-9)
    close(ours.value_linear[0], theirs.value_linear, 1e-9)
    close(ours.plan()[0], theirs.plan, 1e-9)
    # POT's potentials are in units of reg, contain the weights, and have their own gauge.
    f, g = (potential[0] for potential in ours.potentials)
    log_u, log_v = theirs.potentials
    gauge = f / reg + a.log() - log_u
    close(gauge, gauge.mean().expand(6), 1e-8)
    close(g / reg + b.log() - log_v, -gauge.mean().expand(4), 1e-8)


@pytest.mark.parametrize("rho", [(0.3, 0.3), (2.0, 0.1), (0.05, 1.0)])
def test_pot_unbalanced(problem, backend, rho):
    C, a, b = problem
    ours = solve(C, a, b, backend, reg=0.1, unbalanced=rho)
    theirs = ot.solve(
        C, a, b, reg=0.1, reg_type="KL", unbalanced=rho, unbalanced_type="KL", tol=1e-13, max_iter=100_000
    )
    close(ours.plan()[0], theirs.plan, 1e-8)
    close(ours.value_linear[0], theirs.value_linear, 1e-8)


def test_pot_batched(backend):
    C = torch.rand(3, 5, 7, dtype=torch.float64)
    ours = otalign.solve_cost(C, reg=0.1, backend=backend, **CONVERGED)
    theirs = ot.solve_batch(C, reg=0.1, reg_type="kl", tol=1e-12, max_iter=10_000)
    close(ours.plan(), theirs.plan, 1e-8)
    close(ours.value, theirs.value, 1e-8)


def test_pot_entropy_is_ours_up_to_the_entropy_of_the_weights(problem, backend):
    """reg_type="entropy" adds reg * sum P log P: the plan is the same, and the value differs by a constant."""
    C, a, b = problem
    ours = solve(C, a, b, backend, reg=0.1)
    theirs = ot.solve(C, a, b, reg=0.1, reg_type="entropy", tol=1e-13, max_iter=100_000)
    close(ours.plan()[0], theirs.plan, 1e-9)
    weights_entropy = (a * a.log()).sum() + (b * b.log()).sum()
    close(ours.value[0] + 0.1 * weights_entropy, theirs.value, 1e-9)


@pytest.mark.parametrize("rho", [None, 0.5])
def test_geomloss_solve(problem, backend, rho):
    C, a, b = problem
    ours = solve(C, a, b, backend, reg=0.1, unbalanced=rho)
    theirs = geomloss.ot.solve(C, a=a, b=b, reg=0.1, unbalanced=rho, max_iter=2000)
    close(ours.value[0], torch.as_tensor(theirs.value), 1e-6)
    close(ours.plan()[0], torch.as_tensor(theirs.plan), 1e-4)


@pytest.mark.parametrize("rho", [None, 0.8])
def test_geomloss_blur(backend, rho):
    """SamplesLoss(p=2) halves the squared distance: reg = blur^2 on |x - y|^2 / 2, so 2 blur^2 and twice its value.

    GeomLoss ends its annealing with one step at the target blur, so the two agree only as far as GeomLoss converges.
    """
    x, y = torch.rand(1, 30, 2, dtype=torch.float64), torch.rand(1, 20, 2, dtype=torch.float64)
    blur, reach = 0.3, None if rho is None else math.sqrt(rho)
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=blur, reach=reach, debias=False, scaling=0.99, backend="tensorized"
    )
    debiased = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=blur, reach=reach, debias=True, scaling=0.99, backend="tensorized"
    )
    options = {"cost": "sqeuclidean", "reg": 2 * blur**2, "unbalanced": None if rho is None else 2 * rho, **CONVERGED}
    ours = otalign.sinkhorn_loss(x, y, backend=backend, **options)
    close(ours, 2 * loss(x, y)[0], 1e-4)
    if rho is None:
        ours = otalign.sinkhorn_loss(x, y, objective="divergence", backend=backend, **options)
        close(ours, 2 * debiased(x, y)[0], 1e-4)


def test_geomloss_blur_of_unit_vectors_is_the_cosine(backend):
    """On unit vectors |x - y|^2 / 2 = 1 - cos, so there reg = blur^2 exactly."""
    x, y = (torch.nn.functional.normalize(torch.randn(1, n, 4, dtype=torch.float64), dim=-1) for n in (15, 9))
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.4, debias=False, scaling=0.99, backend="tensorized")(x, y)
    ours = otalign.sinkhorn_loss(x, y, cost="cosine", reg=0.4**2, backend=backend, **CONVERGED)
    close(ours, theirs[0], 1e-4)


def test_linear_program_as_reg_falls(problem, backend):
    C, a, b = problem
    n, m = C.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    program = scipy.optimize.linprog(
        C.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=torch.cat([a, b]).numpy(), bounds=(0, None)
    )
    gaps = []
    for reg in (0.1, 0.03, 0.01, 0.003):
        ours = otalign.solve_cost(C[None], a=a[None], b=b[None], reg=reg, tol=1e-9, max_iter=50_000, backend=backend)
        assert ours.converged
        gaps.append(float(ours.value_linear - program.fun))
        assert -1e-8 < gaps[-1] <= reg * math.log(n * m)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-4
    close(ours.plan()[0], torch.as_tensor(program.x.reshape(n, m)), 1e-3)


def test_assignment_as_reg_falls(backend):
    C = torch.rand(7, 7, dtype=torch.float64)
    result = otalign.solve_cost(C[None], reg=0.005, tol=1e-3, max_iter=5000, backend=backend)
    rows, columns = scipy.optimize.linear_sum_assignment(C)
    assert result.assign_y()[0, columns].tolist() == rows.tolist()
    close(result.value_linear[0], C[rows, columns].mean(), 1e-3)
