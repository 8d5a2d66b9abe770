"""Does the forward pass of every backend agree with the float64 reference?"""

import math

import pytest
import torch

import otalign
from otalign import Prior

from ..helpers.problems import Batch, close, draw, draw_weights

INF = math.inf
# Relative to the largest entry. Only the inputs have low precision: every backend then computes in float32 from them.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
LENGTHS = {
    "ragged": ([7, 1, 5, 9], [4, 3, 6, 1]),
    "text longer": ([3, 5, 2], [8, 21, 17]),
    "one item": ([13], [6]),
    "single points": ([1, 1], [1, 1]),
    "with empty ones": ([4, 0, 5, 0], [3, 2, 0, 0]),
    "vector widths": ([8, 16, 17, 31, 33, 64], [16, 8, 15, 33, 32, 65]),
}


def reference(batch: Batch, **options) -> otalign.OTResult:
    """The oracle: the same numbers in float64."""
    options = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    return otalign.solve(*batch.to(torch.float64), backend="reference", **options)


def agree(actual: otalign.OTResult, expected: otalign.OTResult, tol: float) -> None:
    """Compare everything that a result holds, after the same number of iterations."""
    assert actual.n_iter.tolist() == expected.n_iter.tolist()
    for name in ("value", "value_linear", "error"):
        close(getattr(actual, name), getattr(expected, name), tol, name)
    for letter, ours, theirs in zip("fg", actual.potentials, expected.potentials, strict=True):
        close(ours, theirs, tol, f"potential {letter}")
    plan, expected_plan = actual.plan(), expected.plan()
    excess = (plan.double() - expected_plan).abs().sum((1, 2))
    assert (excess <= tol * expected_plan.sum((1, 2)).clamp(min=1)).all(), f"plan is off by {excess} (L1)"
    close(actual.barycentric_x(), expected.barycentric_x(), 10 * tol, "barycentric_x")
    close(actual.barycentric_y(), expected.barycentric_y(), 10 * tol, "barycentric_y")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths_and_dtypes(backend, lengths, dtype):
    batch = draw(*lengths, D=24, dtype=dtype)
    options = {"reg": 0.1, "tol": 0, "max_iter": 9}
    result = otalign.solve(*batch, backend=backend, **options)
    agree(result, reference(batch, **options), TOLERANCE[dtype])
    output = torch.float64 if dtype == torch.float64 else torch.float32
    assert {result.value.dtype, result.plan().dtype, result.error.dtype, result.potentials[0].dtype} == {output}
    assert result.n_iter.dtype == torch.int32


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rho", [None, 0.5, (0.2, 3.0), (INF, 0.4), (0.4, INF)])
@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "euclidean", "dot"])
def test_costs_and_relaxations(backend, cost, rho, dtype):
    batch = draw([9, 4], [6, 8], D=12, dtype=dtype)
    options = {"cost": cost, "unbalanced": rho, "reg": 0.2, "tol": 0, "max_iter": 12}
    agree(otalign.solve(*batch, backend=backend, **options), reference(batch, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rho", [None, 0.5])
@pytest.mark.parametrize(
    "prior",
    [Prior.quadratic(2.0), Prior.absolute(1.0), Prior.order_preserving(0.4, 1.0), Prior.band(2.0), Prior.band(0.0)],
    ids=lambda prior: prior.kind,
)
def test_priors(backend, prior, rho, dtype):
    batch = draw([9, 4, 1, 12], [6, 4, 3, 1], dtype=dtype)
    options = {"prior": prior, "unbalanced": rho, "reg": 0.2, "tol": 0, "max_iter": 15}
    agree(otalign.solve(*batch, backend=backend, **options), reference(batch, **options), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rho", [None, 0.5])
def test_weights(backend, zeros, rho, dtype):
    batch = draw([7, 3, 5], [4, 6, 5], dtype=dtype)
    a = draw_weights(batch.x_lengths, batch.x.shape[1], zeros=zeros).to(dtype)
    b = draw_weights(batch.y_lengths, batch.y.shape[1], zeros=zeros).to(dtype)
    options = {"a": a, "b": b, "unbalanced": rho, "reg": 0.1, "tol": 0, "max_iter": 12}
    result = otalign.solve(*batch, backend=backend, **options)
    agree(result, reference(batch, **options), TOLERANCE[dtype])
    if zeros:
        assert not result.plan()[:, 2].any()
        assert not result.plan()[:, :, 2].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_weights(backend, dtype):
    batch = draw(dtype=dtype)
    options = {"a": "norm", "b": "norm", "cost": "sqeuclidean", "reg": 0.3, "tol": 0, "max_iter": 12}
    agree(otalign.solve(*batch, backend=backend, **options), reference(batch, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reg_per_item(backend, dtype):
    batch = draw([7, 7, 7, 7], [5, 5, 5, 5], dtype=dtype)
    reg = torch.tensor([2.0, 0.5, 0.125, 0.0625], dtype=dtype)
    result = otalign.solve(*batch, reg=reg, tol=1e-4, max_iter=1000, accelerate=False, backend=backend)
    for index, value in enumerate(reg.tolist()):
        item = Batch(*(part[index : index + 1] for part in batch))
        alone = reference(item, reg=value, tol=1e-4, max_iter=1000)
        close(result.value[index], alone.value[0], TOLERANCE[dtype])
        close(result.plan()[index], alone.plan()[0], 10 * TOLERANCE[dtype])
    assert result.n_iter.tolist() == sorted(result.n_iter.tolist())


@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("rho", [None, (0.3, 1.0)])
@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_stops_at_the_same_iteration(backend, cost, rho, tol):
    batch = draw([9, 4, 25], [6, 8, 14], D=12)
    options = {"cost": cost, "unbalanced": rho, "reg": 0.05, "tol": tol, "max_iter": 3000, "accelerate": False}
    result = otalign.solve(*batch, backend=backend, **options)
    agree(result, reference(batch, **options), 1e-9)
    assert result.converged.all()
    assert len(set(result.n_iter.tolist())) > 1


@pytest.mark.parametrize("rho", [None, 0.5])
def test_warm_start(backend, rho):
    batch = draw([9, 4, 25], [6, 8, 14], D=12)
    options = {"cost": "sqeuclidean", "unbalanced": rho, "reg": 0.05, "tol": 1e-6, "max_iter": 3000}
    cold = otalign.solve(*batch, backend=backend, **options)
    warm = otalign.solve(*batch, init=cold.potentials, backend=backend, **options)
    assert (warm.n_iter <= 2).all()
    assert (cold.n_iter > 10).any()
    close(warm.value, cold.value, 1e-9)
    agree(warm, reference(batch, init=cold.potentials, **options), 1e-9)
    # Another start ends at the same optimum.
    elsewhere = tuple(torch.randn_like(potential) for potential in cold.potentials)
    close(otalign.solve(*batch, init=elsewhere, backend=backend, **options).plan(), cold.plan(), 1e-4)


def test_assign_y(backend):
    batch = draw([7, 0, 5, 9], [4, 3, 6, 1])
    result = otalign.solve(*batch, reg=0.05, backend=backend)
    assigned, plan = result.assign_y(), result.plan()
    assert assigned.dtype == torch.int64
    assert assigned.shape == batch.y.shape[:2]
    for index, (n, m) in enumerate(zip(batch.x_lengths.tolist(), batch.y_lengths.tolist(), strict=True)):
        expected = plan[index, :n, :m].argmax(0).tolist() if n else [-1] * m
        assert assigned[index].tolist() == expected + [-1] * (assigned.shape[1] - m)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_given_cost(backend, dtype):
    C = torch.rand(3, 8, 5, dtype=torch.float64).to(dtype)
    lengths = torch.tensor([8, 3, 5]), torch.tensor([5, 5, 1])
    options = {"reg": 0.05, "tol": 0, "max_iter": 12}
    actual = otalign.solve_cost(C, *lengths, backend=backend, **options)
    expected = otalign.solve_cost(C.double(), *lengths, backend="reference", **options)
    close(actual.value, expected.value, TOLERANCE[dtype])
    close(actual.plan(), expected.plan(), TOLERANCE[dtype])
    assert actual.n_iter.tolist() == expected.n_iter.tolist()
    with pytest.raises(RuntimeError, match="solve"):
        actual.barycentric_x()


@pytest.mark.parametrize("fraction", [0.05, 0.02, 0.005])
def test_float32_plan_is_within_1e5(backend, fraction):
    """The precision contract: L1 1e-5 at equal iterations, for reg down to 0.005 of the cost range."""
    batch = draw([120, 60], [40, 50], D=64, dtype=torch.float32)
    x, y = next(batch.items())
    C = 1 - torch.nn.functional.cosine_similarity(x[:, None].double(), y[None].double(), dim=-1)
    options = {"reg": fraction * float(C.max() - C.min()), "tol": 0, "max_iter": 100}
    actual, expected = otalign.solve(*batch, backend=backend, **options), reference(batch, **options)
    excess = (actual.plan().double() - expected.plan()).abs().sum((1, 2))
    assert (excess <= 1e-5).all(), f"{excess}"


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cost_range_over_reg(backend, dtype, ratio):
    """Absorption must keep the scalings in range. The error of float32 grows with the ratio."""
    C = torch.rand(2, 40, 30, dtype=dtype)
    options = {"reg": 1 / ratio, "tol": 0, "max_iter": 60}
    actual = otalign.solve_cost(C, backend=backend, **options)
    expected = otalign.solve_cost(C.double(), backend="reference", **options)
    rounding = 1e-10 if dtype == torch.float64 else 3e-7 * ratio
    close(actual.value, expected.value, 1e-5 if dtype == torch.float32 else 1e-10)
    close(actual.plan(), expected.plan(), rounding)
    assert actual.plan().isfinite().all()


@pytest.mark.parametrize("reg", [1e2, 1e3])
def test_huge_reg_gives_the_product_of_the_weights(backend, reg):
    batch = draw(dtype=torch.float32)
    result = otalign.solve(*batch, reg=reg, backend=backend)
    expected = reference(batch, reg=reg)
    close(result.plan(), expected.plan(), 1e-5)
    close(result.value_linear, expected.value_linear, 1e-5)
