"""What is the result for unusual but valid input: NaN, empty items, zeros, single points, extremes?"""

import math

import pytest
import torch

import otalign
from otalign import Prior

from ..helpers.problems import Batch, close, draw, draw_weights, leaf, same_on

INF = math.inf
OBJECTIVES = ["value", "plan_cost", "transport", "divergence"]
COSTS = ["cosine", "sqeuclidean", "euclidean", "dot"]
PRIORS = [None, Prior.quadratic(1.0), Prior.absolute(1.0), Prior.order_preserving(0.3, 1.0), Prior.band(1.0)]


def loss_and_gradients(batch: Batch, **options):
    leaves = batch.requires_grad()
    losses = otalign.sinkhorn_loss(*leaves, reduction="none", **options)
    losses.sum().backward()
    return losses.detach(), leaves.x.grad, leaves.y.grad


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bad_item_is_nan_and_leaves_the_others_unchanged(backend, side, bad, cost, objective, dtype):
    same = same_on(backend)
    batch = draw(dtype=dtype)
    spoilt = batch._replace(**{side: getattr(batch, side).clone()})
    getattr(spoilt, side)[2, 1, 0] = bad
    options = {"cost": cost, "objective": objective, "reg": 0.2, "max_iter": 8, "backend": backend}
    clean, results = loss_and_gradients(batch, **options), loss_and_gradients(spoilt, **options)
    others = [0, 1, 3]
    for ours, expected in zip(results, clean, strict=True):
        same(ours[others], expected[others])
    losses, dx, dy = results
    assert losses[2].isnan()
    assert dx[2, :5].isnan().all()
    assert dy[2, :6].isnan().all()
    assert not dx[2, 5:].any()  # the padding has no gradient, even if the item is NaN
    assert not dy[2, 6:].any()


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("rho", [None, 0.5])
def test_a_bad_item_in_a_result(backend, bad, rho):
    same = same_on(backend)
    batch = draw()
    spoilt = batch._replace(x=batch.x.clone())
    spoilt.x[2, 1, 0] = bad
    options = {"reg": 0.2, "unbalanced": rho, "backend": backend}
    result, clean = otalign.solve(*spoilt, **options), otalign.solve(*batch, **options)
    others = [0, 1, 3]
    assert result.converged.tolist() == [True, True, False, True]
    for name in ("value", "value_linear", "n_iter", "error"):
        same(getattr(result, name)[others], getattr(clean, name)[others])
    assert result.value[2].isnan()
    assert result.value_linear[2].isnan()
    assert result.plan()[2, :5, :6].isnan().all()
    assert not result.plan()[2, 5:].any()
    same(result.plan()[others], clean.plan()[others])
    assert result.assign_y()[2].tolist() == [-1] * 8
    same(result.barycentric_y()[others], clean.barycentric_y()[others])


@pytest.mark.parametrize("bad", [math.nan, -INF])
def test_a_bad_given_cost(backend, bad):
    same = same_on(backend)
    C = torch.rand(3, 5, 4, dtype=torch.float64)
    spoilt = C.clone()
    spoilt[1, 2, 3] = bad
    clean, result = (otalign.solve_cost(c, reg=0.1, backend=backend) for c in (C, spoilt))
    same(result.value[[0, 2]], clean.value[[0, 2]])
    assert result.value[1].isnan()
    assert result.converged.tolist() == [True, False, True]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_empty_items(backend, objective, prior):
    batch = draw([4, 0, 5, 0], [3, 2, 0, 0])
    options = {"objective": objective, "prior": prior, "reg": 0.2, "backend": backend}
    losses, dx, dy = loss_and_gradients(batch, **options)
    assert losses[1:].tolist() == [0, 0, 0]
    assert not dx[1:].any()
    assert not dy[1:].any()
    first = Batch(*(part[:1] for part in batch))
    close(otalign.sinkhorn_loss(*batch, **options), otalign.sinkhorn_loss(*first, **options), 1e-12)


def test_empty_items_in_a_result(backend):
    result = otalign.solve(*draw([4, 0, 5, 0], [3, 2, 0, 0]), backend=backend)
    for name, expected in {"value": 0, "value_linear": 0, "n_iter": 0, "error": 0, "converged": True}.items():
        assert getattr(result, name)[1:].tolist() == [expected] * 3
    assert not result.plan()[1:].any()
    assert (result.assign_y()[1:] == -1).all()
    assert not result.barycentric_x()[1:].any()
    assert not result.potentials[0][1:].any()


SHAPES = {
    "no items": ((0, 5, 3), (0, 4, 3)),
    "no points": ((2, 0, 3), (2, 4, 3)),
    "no points at all": ((2, 0, 3), (2, 0, 3)),
    "nothing": ((0, 0, 3), (0, 0, 3)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batches(backend, reduction, objective, shapes):
    """The loss is a zero that is attached to the graph: under DDP every rank must run its backward pass."""
    x, y = (torch.randn(shape, requires_grad=True) for shape in shapes)
    loss = otalign.sinkhorn_loss(x, y, objective=objective, reduction=reduction, backend=backend)
    assert loss.shape == (() if reduction != "none" else (shapes[0][0],))
    assert loss.dtype == torch.float32
    assert not loss.any()
    loss.sum().backward()
    for points in (x, y):
        assert points.grad is not None
        assert not points.grad.any()


def test_an_empty_batch_trains_the_layer_below(backend):
    layer = torch.nn.Linear(4, 3)
    lengths = torch.tensor([0, 0])
    loss = otalign.sinkhorn_loss(layer(torch.randn(2, 5, 4)), torch.randn(2, 4, 3), lengths, lengths, backend=backend)
    loss.backward()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_results_of_empty_batches(backend, shapes):
    x, y = (torch.randn(shape) for shape in shapes)
    result = otalign.solve(x, y, backend=backend)
    items, n, m = len(x), x.shape[1], y.shape[1]
    assert result.value.shape == result.n_iter.shape == (items,)
    assert result.plan().shape == (items, n, m)
    assert result.barycentric_x().shape == x.shape
    assert result.assign_y().shape == (items, m)
    assert result.converged.all()
    C = torch.zeros(items, n, m)
    assert otalign.solve_cost(C, reg=0.1, backend=backend).plan().shape == C.shape


def test_empty_packed_batches(backend):
    x, y = (torch.randn(0, 3, requires_grad=True) for _ in "xy")
    for offsets in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        loss = otalign.sinkhorn_loss(x, y, cu_seqlens_x=offsets, cu_seqlens_y=offsets, backend=backend)
        assert loss == 0
        loss.backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rho", [None, 0.5, (0.5, INF)])
def test_zero_weights(backend, objective, rho):
    """Points of weight zero have no mass and no gradient, and do not affect the others."""
    batch = draw([7, 6], [6, 4], poison=0.0)
    a = draw_weights(batch.x_lengths, batch.x.shape[1], zeros=True)
    b = draw_weights(batch.y_lengths, batch.y.shape[1], zeros=True)
    options = {"objective": objective, "unbalanced": rho, "a": a, "b": b, "cost": "sqeuclidean", "reg": 0.2}
    losses, dx, dy = loss_and_gradients(batch, backend=backend, **options)
    for gradient in (dx, dy):
        assert gradient.isfinite().all()
        assert gradient[:, 2].abs().max() < 1e-14
        assert gradient[:, 1].abs().max() > 1e-4
    moved = batch._replace(x=batch.x.clone(), y=batch.y.clone())
    moved.x[:, 2] += 3
    moved.y[:, 2] -= 3
    close(loss_and_gradients(moved, backend=backend, **options)[0], losses, 1e-9)


@pytest.mark.parametrize("rho", [None, 0.5])
def test_gradients_by_zero_weights_are_finite(backend, rho):
    batch = draw([7, 6], [6, 4], poison=0.0)
    a = leaf(draw_weights(batch.x_lengths, batch.x.shape[1], zeros=True).nan_to_num(0))
    b = leaf(draw_weights(batch.y_lengths, batch.y.shape[1], zeros=True).nan_to_num(0))
    result = otalign.solve(*batch, a, b, unbalanced=rho, backend=backend)
    (result.value.sum() + result.value_linear.sum()).backward()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_embeddings_under_the_cosine(backend, objective, dtype):
    """A zero vector has no direction: its cost to every point is 1, and its gradient is 0."""
    batch = draw([5, 3], [4, 4], dtype=dtype)
    batch.x[0, 2] = 0
    batch.x[1, :3] = 0
    losses, dx, dy = loss_and_gradients(batch, objective=objective, reg=0.2, backend=backend)
    assert losses.isfinite().all()
    assert not dx[0, 2].any()
    assert not dx[1].any()
    assert dx.isfinite().all()
    assert dy.isfinite().all()
    if objective in ("plan_cost", "transport"):
        close(losses[1].double(), torch.tensor(1.0).double(), 1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e15, 1e25])
def test_the_cosine_ignores_norms(backend, scale):
    """Squares that underflow or overflow in float32 do not change the result."""
    batch = draw([5, 3], [4, 4], dtype=torch.float32)
    expected = otalign.sinkhorn_loss(*batch, backend=backend)
    scaled = batch._replace(x=scale * batch.x)
    close(otalign.sinkhorn_loss(*scaled, backend=backend), expected, 1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cost", COSTS)
def test_identical_points(backend, cost, objective):
    """Identical points within a side, and on both sides: there the euclidean distance has a kink, and its gradient is not NaN."""
    x = torch.randn(1, 1, 4, dtype=torch.float64).expand(2, 6, 4).clone()
    batch = Batch(x, x[:, :4].clone(), torch.tensor([6, 3]), torch.tensor([4, 4]))
    for output in loss_and_gradients(batch, cost=cost, objective=objective, reg=0.05, backend=backend):
        assert output.isfinite().all()
    plan = otalign.solve(*batch, cost=cost, backend=backend).plan()
    close(plan[0], torch.full((6, 4), 1 / 24, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("lengths", [([1], [1]), ([1], [5]), ([5], [1])])
def test_single_points(backend, lengths, prior, objective):
    batch = draw(*lengths)
    options = {"objective": objective, "reg": 0.1, "prior": prior, "backend": backend}
    for output in loss_and_gradients(batch, **options):
        assert output.isfinite().all()
    result = otalign.solve(*batch, reg=0.1, prior=prior, backend=backend)
    assert result.n_iter == 1
    n, m = lengths[0][0], lengths[1][0]
    close(result.plan()[0, :n, :m], torch.full((n, m), 1 / (n * m), dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_cost_range_over_reg(backend, objective, dtype, ratio):
    batch = draw([30, 7], [20, 9], dtype=dtype)
    for output in loss_and_gradients(batch, objective=objective, reg=2 / ratio, backend=backend):
        assert output.isfinite().all()


def test_points_of_one_and_no_dimension(backend):
    x, y = torch.randn(2, 5, 1), torch.randn(2, 4, 1)
    assert otalign.sinkhorn_loss(x, y, cost="sqeuclidean", backend=backend).isfinite()
    close(otalign.sinkhorn_loss(x[..., :0], y[..., :0], cost="dot", backend=backend), torch.tensor(0.0), 1e-6)


def test_not_converged_is_reported(backend):
    result = otalign.solve(*draw([30], [20]), reg=0.005, tol=1e-6, max_iter=2, backend=backend)
    assert result.converged.tolist() == [False]
    assert result.n_iter.tolist() == [2]
    assert result.error > 1e-6
