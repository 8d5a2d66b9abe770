"""Are the results right for problems with a closed-form solution?"""

import math

import pytest
import torch

import otalign

from ..helpers.problems import CONVERGED, close, draw, draw_weights, kl, solve_one

INF = math.inf
RHOS = [None, 0.7, (0.2, 3.0), (INF, 0.5), (0.5, INF)]


def grid(mean, deviation, size):
    """A grid of points (size, 1) for a normal distribution, and the weights of the points."""
    x = mean + deviation * torch.linspace(-8, 8, size, dtype=torch.float64)
    return x[:, None], torch.exp(-(((x - mean) / deviation) ** 2) / 2)


@pytest.mark.parametrize("cost, expected", [("sqeuclidean", 25.0), ("euclidean", 5.0), ("dot", 0.0), ("cosine", 1.0)])
def test_diracs(backend, cost, expected):
    x, y = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]], dtype=torch.float64)
    result = solve_one(x, y, cost=cost, reg=0.3, backend=backend)
    close(result.value[0], torch.tensor(expected), 1e-12)
    close(result.value_linear[0], torch.tensor(expected), 1e-12)
    close(result.plan()[0], torch.ones(1, 1), 1e-12)
    close(result.potentials[1], torch.zeros(1, 1), 1e-12)
    assert result.n_iter == 1


def test_unbalanced_diracs(backend):
    """min_p p C + reg KL(p | 1) + (rho_x + rho_y) KL(p | 1): mass exp(-C / s), value s (1 - mass)."""
    C, reg, rho = 1.3, 0.2, (0.4, 0.9)
    result = otalign.solve_cost(
        torch.full((1, 1, 1), C, dtype=torch.float64), reg=reg, unbalanced=rho, backend=backend, **CONVERGED
    )
    total = reg + sum(rho)
    mass = math.exp(-C / total)
    close(result.plan().squeeze(), torch.tensor(mass), 1e-6)
    close(result.value[0], torch.tensor(total * (1 - mass)), 1e-6)


@pytest.mark.parametrize("reg", [10.0, 0.5, 0.05])
def test_circulant_cost(backend, reg):
    """If all rows hold the same costs, the potentials are constant: value = -reg log mean exp(-C / reg)."""
    row = torch.rand(6, dtype=torch.float64)
    C = torch.stack([row.roll(shift) for shift in range(6)])
    result = otalign.solve_cost(C[None], reg=reg, backend=backend, **CONVERGED)
    close(result.value[0], -reg * torch.log(torch.exp(-row / reg).mean()), 1e-10)
    close(result.plan()[0], torch.softmax(-C / reg, dim=1) / 6, 1e-10)
    assert result.n_iter == 1


def test_permutation(backend):
    order = torch.randperm(8)
    y = torch.eye(8, dtype=torch.float64)
    result = solve_one(y[order], y, cost="cosine", reg=0.02, backend=backend, **CONVERGED)
    close(result.plan()[0] * 8, y[order], 1e-9)
    assert result.assign_y()[0].tolist() == order.argsort().tolist()
    close(result.barycentric_x()[0], y[order], 1e-9)
    close(result.value_linear[0], torch.tensor(0.0), 1e-9)
    close(result.value[0], torch.tensor(0.02 * math.log(8)), 1e-9)


def test_sorting(backend):
    """In one dimension the optimal plan matches sorted points."""
    x, y = (torch.randperm(12)[:, None] + 0.3 * torch.rand(12, 1, dtype=torch.float64) for _ in "xy")
    expected = (x.sort(0).values - y.sort(0).values).square().mean()
    result = solve_one(x, y, cost="sqeuclidean", reg=0.05, tol=1e-3, max_iter=20_000, backend=backend)
    assert result.converged
    close(result.value_linear[0], expected, 1e-3)
    ranks = x[:, 0].argsort().argsort()
    assert result.assign_y()[0, y[:, 0].argsort()[ranks]].tolist() == list(range(12))


@pytest.mark.parametrize("reg", [4.0, 0.5])
def test_gaussians(backend, reg):
    """Entropic transport between normal distributions (Janati et al. 2020, theorem 1), in one dimension.

    On a grid that covers eight standard deviations the rectangle rule is exact to many digits.
    """
    mean, s, t = 0.7, 1.1, 0.6
    (x, a), (y, b) = grid(0.0, s, 160), grid(mean, t, 120)
    result = solve_one(x, y, a=a, b=b, cost="sqeuclidean", reg=reg, backend=backend, **CONVERGED)
    sigma2 = reg / 2
    root = math.sqrt(4 * s**2 * t**2 + sigma2**2)
    spread = mean**2 + s**2 + t**2
    value = spread - root + sigma2 * (1 - math.log(2 * sigma2) + math.log(root + sigma2))
    close(result.value[0], torch.tensor(value), 1e-6)
    close(result.value_linear[0], torch.tensor(spread - (root - sigma2)), 1e-6)
    # The conditional mean is linear, with slope covariance / variance.
    slope = (root - sigma2) / 2 / s**2
    centre = (x[:, 0].abs() < 3 * s).nonzero().squeeze()
    close(result.barycentric_x()[0, centre], mean + slope * x[centre], 1e-6)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("weights", [False, True])
def test_optimality(backend, rho, weights):
    """The marginals are a exp(-f / rho_x) and b exp(-g / rho_y), and the primal value of the plan is the value."""
    (x, y), reg = next(draw([9], [6]).items()), 0.15
    a, b = (torch.ones(n, dtype=torch.float64) for n in (9, 6))
    if weights:
        a, b = draw_weights(torch.tensor([9]), 9)[0], draw_weights(torch.tensor([6]), 6)[0]
    a, b = a / a.sum(), b / b.sum()
    result = solve_one(x, y, a=a, b=b, cost="sqeuclidean", reg=reg, unbalanced=rho, backend=backend, **CONVERGED)
    assert result.converged
    f, g = (potential[0] for potential in result.potentials)
    plan, C = result.plan()[0], torch.cdist(x, y).square()
    close(plan, a[:, None] * b * torch.exp((f[:, None] + g - C) / reg), 1e-10)
    pair = rho if isinstance(rho, tuple) else (rho or INF,) * 2
    value = (plan * C).sum() + reg * kl(plan, a[:, None] * b)
    for marginal, weight, potential, r in ((plan.sum(1), a, f, pair[0]), (plan.sum(0), b, g, pair[1])):
        close(marginal, weight * torch.exp(-potential / r), 1e-9)
        value = value + (0 if r == INF else r * kl(marginal, weight))
    close(result.value[0], value, 1e-9)
    close(result.value_linear[0], (plan * C).sum(), 1e-9)
    if rho is None:
        close((b * g).sum(), torch.tensor(0.0), 1e-10)


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_error_is_the_marginal_error(backend, tol):
    """`error` is the L1 distance of the row sums from a (the columns are exact), and the iteration stops by it."""
    batch = draw([9, 6, 3], [5, 8, 2])
    options = {"reg": 0.05, "cost": "sqeuclidean", "backend": backend}
    result = otalign.solve(*batch, tol=tol, max_iter=10_000, **options)
    plan = result.plan()
    for b, (n, m) in enumerate(zip(batch.x_lengths, batch.y_lengths, strict=True)):
        item = plan[b, :n, :m]
        close(item.sum(0), 1 / m.double().expand(m), 1e-10)
        close(result.error[b], (item.sum(1) - 1 / n.double()).abs().sum(), 1e-10)
        assert result.error[b] <= tol
        assert result.n_iter[b] > 1
        before = otalign.solve(*batch, tol=0, max_iter=int(result.n_iter[b]) - 1, **options)
        assert before.error[b] > tol
    assert result.converged.all()


def test_value_before_convergence_has_a_quadratic_error(backend):
    batch = draw([20], [12])
    options = {"reg": 0.1, "cost": "sqeuclidean", "backend": backend}
    best = otalign.solve(*batch, **options, **CONVERGED).value
    short = otalign.solve(*batch, tol=0, max_iter=10, **options)
    assert 1e-4 < short.error < 0.1
    assert (best - short.value).abs() < 10 * short.error**2


@pytest.mark.parametrize("rho", [None, (0.4, 1.5), (INF, 0.5)])
@pytest.mark.parametrize("prior", [None, otalign.Prior.quadratic(1.0)])
def test_divergence_is_its_definition(backend, rho, prior):
    """v(x, y) - (v(x, x) + v(y, y)) / 2, where a self term keeps the weights and the relaxation of its side."""
    batch = draw([8, 3], [5, 6])
    x, y, n, m = batch
    a, b = draw_weights(n, x.shape[1]), draw_weights(m, y.shape[1])
    options = {"cost": "sqeuclidean", "reg": 0.5, "prior": prior, "backend": backend, "tol": 0, "max_iter": 500}
    of_x, of_y = (rho[:1] * 2, rho[1:] * 2) if rho else (None, None)
    across = otalign.solve(x, y, n, m, a, b, unbalanced=rho, **options).value
    within_x = otalign.solve(x, x, n, n, a, a, unbalanced=of_x, **options).value
    within_y = otalign.solve(y, y, m, m, b, b, unbalanced=of_y, **options).value
    losses = otalign.sinkhorn_loss(*batch, a, b, unbalanced=rho, objective="divergence", reduction="none", **options)
    close(losses, across - (within_x + within_y) / 2, 1e-6)  # alternating updates converge slowly for self terms


def test_divergence_is_zero_only_for_equal_measures(backend):
    """Feydy et al. 2019, theorem 1 (for a kernel exp(-C / reg) that is positive, as of the squared distance)."""
    batch = draw([8], [8])
    options = {"cost": "sqeuclidean", "reg": 0.5, "objective": "divergence", "backend": backend, **CONVERGED}
    same = otalign.sinkhorn_loss(batch.x, batch.x[:, torch.randperm(8)], *batch[2:], **options)
    close(same, torch.tensor(0.0), 1e-10)
    assert otalign.sinkhorn_loss(*batch, **options) > 1e-3


def test_divergence_of_a_shift(backend):
    """Shifting the points by s adds |s|^2 and terms that belong to single points and cancel."""
    x = draw([8], [8]).x[:, :8]
    options = {"cost": "sqeuclidean", "reg": 0.5, "objective": "divergence", "backend": backend, **CONVERGED}
    for shift in (0.0, 0.5, 2.0):
        moved = otalign.sinkhorn_loss(x, x + shift, **options)
        close(moved, torch.tensor(x.shape[-1] * shift**2), 1e-9)
