"""Does the backward pass of every backend agree with the float64 reference?"""

import math

import pytest
import torch

import otalign
from otalign import Prior

from ..helpers.problems import Batch, close, draw, draw_weights, identical, leaf, same_on

INF = math.inf
OBJECTIVES = ["value", "plan_cost", "transport", "divergence"]
# Relative to the largest entry; the gradients of bfloat16 and float16 inputs are rounded to that.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def gradients(batch: Batch, backend: str, *, a=None, b=None, upstream=None, **options):
    """Losses (B,) and the gradients of x, y, a and b for an `upstream` gradient of the losses."""
    leaves = batch.requires_grad()
    weights = [leaf(w) if isinstance(w, torch.Tensor) else w for w in (a, b)]
    losses = otalign.sinkhorn_loss(*leaves, *weights, reduction="none", backend=backend, **options)
    losses.backward(torch.linspace(-1, 2, len(losses)).to(losses) if upstream is None else upstream)
    return losses, [t.grad for t in (leaves.x, leaves.y, *weights) if isinstance(t, torch.Tensor)]


def agree(batch: Batch, backend: str, **options) -> None:
    dtype = batch.x.dtype
    losses, ours = gradients(batch, backend, **options)
    assert {gradient.dtype for gradient in ours} == {dtype}
    for name in ("a", "b"):
        if isinstance(options.get(name), torch.Tensor):
            options[name] = options[name].double()
    expected, theirs = gradients(batch.to(torch.float64), "reference", **options)
    close(losses, expected, TOLERANCE[dtype] / 5, "loss")
    for name, actual, wanted in zip("xyab", ours, theirs, strict=False):
        scale = float(wanted.abs().max())
        assert scale > 0
        close(actual.double() / scale, wanted / scale, TOLERANCE[dtype], f"gradient of {name}")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "euclidean", "dot"])
def test_costs_objectives_dtypes(backend, cost, objective, dtype):
    batch = draw([9, 1, 5], [6, 4, 7], D=24, dtype=dtype)
    agree(batch, backend, cost=cost, objective=objective, reg=0.2, tol=0, max_iter=15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rho", [0.5, (0.2, 3.0), (INF, 0.4), (0.4, INF)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_relaxations(backend, objective, rho, dtype):
    batch = draw([9, 1, 5], [6, 4, 7], D=24, dtype=dtype)
    agree(batch, backend, objective=objective, unbalanced=rho, cost="sqeuclidean", reg=0.2, tol=0, max_iter=15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "prior",
    [Prior.quadratic(2.0), Prior.absolute(1.0), Prior.order_preserving(0.4, 1.0), Prior.band(2.0)],
    ids=lambda prior: prior.kind,
)
def test_priors(backend, prior, objective, dtype):
    batch = draw([9, 1, 5], [6, 1, 5], D=24, dtype=dtype)
    agree(batch, backend, prior=prior, objective=objective, reg=0.2, tol=0, max_iter=25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("objective", ["value", "transport", "divergence"])
@pytest.mark.parametrize("rho", [None, 0.5])
def test_weights(backend, rho, objective, zeros, dtype):
    batch = draw([9, 2, 5], [6, 4, 7], D=24, dtype=dtype)
    a = draw_weights(batch.x_lengths, batch.x.shape[1], zeros=zeros).nan_to_num(0).to(dtype)
    b = draw_weights(batch.y_lengths, batch.y.shape[1], zeros=zeros).nan_to_num(0).to(dtype)
    agree(batch, backend, a=a, b=b, unbalanced=rho, objective=objective, reg=0.2, tol=0, max_iter=25)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rho", [None, (0.4, INF)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_early_stop(backend, objective, rho, dtype):
    """After three iterations, which are too few, the gradient is that of the plan reached so far."""
    batch = draw([19, 12, 5], [16, 4, 7], D=24, dtype=dtype)
    options = {"cost": "sqeuclidean", "unbalanced": rho, "reg": 0.1, "tol": 0, "max_iter": 3}
    assert (otalign.solve(*batch, backend=backend, **options).error > 1e-3).any()
    agree(batch, backend, objective=objective, **options)


@pytest.mark.parametrize("objective", ["value", "plan_cost"])
def test_early_stop_gradient_of_a_dot_cost_is_the_plan(backend, objective):
    """C is linear in x, so the gradient contains the plan itself: with its own row sums, not with the weights."""
    batch = draw([9], [6], D=6, poison=0.0)
    options = {"cost": "dot", "reg": 0.05, "tol": 0, "max_iter": 2, "backend": backend}
    result = otalign.solve(*batch, **options)
    assert result.error > 1e-3
    leaves = batch.requires_grad()
    otalign.sinkhorn_loss(*leaves, objective=objective, **options).backward()
    close(leaves.x.grad, -result.plan() @ batch.y, 1e-10)
    close(leaves.y.grad, -result.plan().mT @ batch.x, 1e-10)


def test_gradients_of_everything_at_once(backend):
    """The sum of value, transport cost, plan and barycentric images of one result."""

    def run(backend):
        leaves = draw(poison=0.0).requires_grad()
        result = otalign.solve(*leaves, cost="sqeuclidean", reg=0.2, tol=0, max_iter=50, backend=backend)
        loss = result.value.sum() + 2 * result.value_linear.sum() + result.plan().square().sum()
        (loss + result.barycentric_x().sin().sum() + result.barycentric_y().cos().sum()).backward()
        return leaves.x.grad, leaves.y.grad

    for actual, expected in zip(run(backend), run("reference"), strict=True):
        close(actual, expected, 1e-8)


@pytest.mark.parametrize("needed", ["x", "y"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_one_side_needs_gradients(backend, objective, needed):
    same = same_on(backend)
    batch, both = draw(), draw().requires_grad()
    options = {"objective": objective, "cost": "sqeuclidean", "reg": 0.2, "backend": backend}
    otalign.sinkhorn_loss(*both, **options).backward()
    one = batch._replace(**{needed: leaf(getattr(batch, needed))})
    otalign.sinkhorn_loss(*one, **options).backward()
    same(getattr(one, needed).grad, getattr(both, needed).grad)


def test_no_graph_without_need(backend):
    batch = draw()
    assert not otalign.sinkhorn_loss(*batch, backend=backend).requires_grad
    with torch.no_grad():
        assert not otalign.sinkhorn_loss(*batch.requires_grad(), backend=backend).requires_grad
    with torch.inference_mode():
        otalign.solve(*draw(), backend=backend).plan()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_backward_twice(backend, objective):
    same = same_on(backend)
    leaves = draw().requires_grad()
    loss = otalign.sinkhorn_loss(*leaves, objective=objective, backend=backend)
    first = torch.autograd.grad(loss, [leaves.x, leaves.y], retain_graph=True)
    second = torch.autograd.grad(loss, [leaves.x, leaves.y])
    for one, two in zip(first, second, strict=True):
        same(one, two)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(backend, reduction):
    """The mean is over the items that are not empty."""
    batch = draw([7, 0, 5, 9], [4, 3, 6, 0])
    options = {"cost": "sqeuclidean", "reg": 0.2, "backend": backend}
    each = otalign.sinkhorn_loss(*batch, reduction="none", **options)
    assert each.shape == (4,)
    leaves, same = batch.requires_grad(), batch.requires_grad()
    reduced = otalign.sinkhorn_loss(*leaves, reduction=reduction, **options)
    share = 1.0 if reduction == "sum" else 0.5
    close(reduced, share * each.sum(), 1e-12)
    reduced.backward()
    otalign.sinkhorn_loss(*same, reduction="none", **options).backward(torch.full((4,), share, dtype=torch.float64))
    close(leaves.x.grad, same.x.grad, 1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_inputs_are_not_written(backend, objective):
    batch = draw(dtype=torch.float32)
    a = draw_weights(batch.x_lengths, batch.x.shape[1]).float()
    inputs = [leaf(batch.x), leaf(batch.y), *batch[2:], leaf(a)]
    before = [(t._version, t.detach().clone()) for t in inputs]
    otalign.sinkhorn_loss(*inputs, objective=objective, reg=torch.full((4,), 0.1), backend=backend).backward()
    for tensor, (version, values) in zip(inputs, before, strict=True):
        assert tensor._version == version
        identical(tensor.detach(), values)


def test_writing_to_inputs_before_backward_is_harmless_or_an_error(backend):
    leaves, same = draw().requires_grad(), draw().requires_grad()
    otalign.sinkhorn_loss(*same, cost="sqeuclidean", backend=backend).backward()
    x = leaves.x * 1
    loss = otalign.sinkhorn_loss(x, *leaves[1:], cost="sqeuclidean", backend=backend)
    x.mul_(2)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        close(leaves.x.grad, same.x.grad, 1e-12)
