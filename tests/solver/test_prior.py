"""Do the temporal priors follow their definitions?"""

import math

import pytest
import torch

import otalign
from otalign import Prior

from ..helpers.problems import CONVERGED, close, draw

SHAPES = [(1, 1), (1, 5), (5, 1), (2, 2), (7, 3), (3, 7), (30, 11), (11, 30), (50, 49)]


@pytest.mark.parametrize("n, m", SHAPES)
def test_distance_from_the_diagonal(n, m):
    u = [i / (n - 1) if n > 1 else 0.0 for i in range(n)]
    v = [j / (m - 1) if m > 1 else 0.0 for j in range(m)]
    d = torch.tensor([[abs(p - q) for q in v] for p in u], dtype=torch.float64)
    close(Prior.quadratic(3.0).matrix(n, m), 3 * d**2, 1e-14)
    close(Prior.absolute(3.0).matrix(n, m), 3 * d, 1e-14)


@pytest.mark.parametrize("width", [0.0, 0.5, 1.0, 2.5, 100.0])
@pytest.mark.parametrize("n, m", SHAPES)
def test_band_leaves_no_row_or_column_empty(n, m, width):
    inside = Prior.band(width).matrix(n, m) == 0
    assert inside.any(1).all()
    assert inside.any(0).all()
    # The band contains what its definition includes, and is no wider than documented.
    i, j = torch.arange(n).double()[:, None], torch.arange(m).double()
    distance = (i * (m - 1) / max(n - 1, 1) - j).abs() if n > 1 else j.expand(1, m)
    widest = max(width, 0.5, 0.5 * (m - 1) / (n - 1) if n > 1 else math.inf)
    assert inside[distance <= width].all()
    assert not inside[distance > widest + 1e-6].any()


@pytest.mark.parametrize("n, m", [(12, 5), (5, 12), (1, 4), (4, 1)])
def test_band_confines_the_plan(backend, n, m):
    prior = Prior.band(2.0)
    batch = draw([n], [m])
    result = otalign.solve(*batch, prior=prior, reg=0.2, tol=1e-6, max_iter=5000, backend=backend)
    plan = result.plan()[0, :n, :m]
    assert (plan[prior.matrix(n, m) > 0] == 0).all()
    assert result.converged
    assert result.value.isfinite()
    assert result.value_linear.isfinite()
    close(plan.sum(), torch.tensor(1.0), 1e-5)


@pytest.mark.parametrize(
    "prior", [Prior.quadratic(1.5), Prior.absolute(0.7), Prior.order_preserving(0.3, 1.2), Prior.band(2.0)]
)
def test_a_prior_is_a_term_of_the_cost(backend, prior):
    """A solve with a prior equals a solve of the cost with its matrix added, for each item's own lengths."""
    batch = draw()
    options = {"reg": 0.2, "backend": backend, **CONVERGED}
    with_prior = otalign.solve(*batch, cost="sqeuclidean", prior=prior, **options)
    for index, (x, y) in enumerate(batch.items()):
        C = torch.cdist(x, y).square() + prior.matrix(len(x), len(y), 0.2)
        given = otalign.solve_cost(C.clamp(max=1e3)[None], **options)
        close(with_prior.value[index], given.value[0], 1e-9)
        close(with_prior.value_linear[index], given.value_linear[0], 1e-9)
        close(with_prior.plan()[index, : len(x), : len(y)], given.plan()[0], 1e-9)


def test_a_prior_on_a_given_cost(backend):
    C, prior = torch.rand(2, 6, 4, dtype=torch.float64), Prior.quadratic(1.0)
    options = {"reg": 0.2, "backend": backend, **CONVERGED}
    lengths = torch.tensor([6, 4]), torch.tensor([4, 2])
    added = C.clone()
    for index, (n, m) in enumerate(zip(*lengths, strict=True)):
        added[index, :n, :m] += prior.matrix(int(n), int(m))
    expected = otalign.solve_cost(added, *lengths, **options)
    actual = otalign.solve_cost(C, *lengths, prior=prior, **options)
    close(actual.value, expected.value, 1e-10)
    close(actual.plan(), expected.plan(), 1e-10)


def order_preserving_wasserstein(D, a, b, lambda1, lambda2, delta):
    """The recipe of Su and Hua (CVPR 2017, algorithm 1), as printed: K = p exp((S - D) / lambda2), then Sinkhorn."""
    n, m = D.shape
    i, j = torch.arange(1, n + 1).double()[:, None], torch.arange(1, m + 1).double()
    distance = (i / n - j / m).abs() / math.sqrt(1 / n**2 + 1 / m**2)
    p = torch.exp(-(distance**2) / (2 * delta**2)) / (delta * math.sqrt(2 * math.pi))
    similarity = lambda1 / ((i / n - j / m) ** 2 + 1)
    K = p * torch.exp((similarity - D) / lambda2)
    left, right = torch.ones(n, dtype=D.dtype), torch.ones(m, dtype=D.dtype)
    for _ in range(20_000):
        left = a / (K @ right)
        right = b / (K.T @ left)
    return left[:, None] * K * right


@pytest.mark.parametrize("n, m", [(10, 6), (6, 10), (8, 8), (1, 3)])
def test_order_preserving_is_the_papers(backend, n, m):
    lambda1, lambda2, delta = 0.5, 0.2, 1.0
    C = torch.rand(n, m, dtype=torch.float64)
    a, b = (torch.full((size,), 1 / size, dtype=torch.float64) for size in (n, m))
    expected = order_preserving_wasserstein(C, a, b, lambda1, lambda2, delta)
    prior = Prior.order_preserving(lambda1, delta)
    result = otalign.solve_cost(C[None], prior=prior, reg=lambda2, backend=backend, **CONVERGED)
    close(result.plan()[0], expected, 1e-9)


def test_order_preserving_follows_the_reg_of_the_item(backend):
    C, reg = torch.rand(1, 6, 5, dtype=torch.float64).expand(2, 6, 5), torch.tensor([0.1, 0.7])
    prior = Prior.order_preserving(0.4, 1.5)
    together = otalign.solve_cost(C, prior=prior, reg=reg, backend=backend, **CONVERGED).plan()
    for index, value in enumerate(reg.tolist()):
        alone = otalign.solve_cost(C[:1], prior=prior, reg=value, backend=backend, **CONVERGED).plan()
        close(together[index], alone[0], 1e-7)  # reg is given in float32


def test_priors_are_values():
    assert Prior.band(2) == Prior.band(2.0)
    assert Prior.quadratic(1.0) != Prior.absolute(1.0)
    assert len({Prior.band(2.0), Prior.band(2.0), Prior.quadratic(2.0)}) == 2
    with pytest.raises(AttributeError):
        Prior.band(2.0).kind = "quadratic"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Prior.quadratic(math.inf),
        lambda: Prior.absolute(math.nan),
        lambda: Prior.quadratic(-1.0),
        lambda: Prior.band(-0.5),
        lambda: Prior.order_preserving(0.1, 0.0),
    ],
)
def test_parameters_are_checked(make):
    with pytest.raises(ValueError, match="must be finite"):
        make()


@pytest.mark.parametrize("weight", [True, "1", None])
def test_parameters_are_numbers(weight):
    with pytest.raises(TypeError, match="weight must be a number"):
        Prior.quadratic(weight)
