"""Do the gradients agree with finite differences?"""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import otalign
from otalign import Prior

from ..helpers.problems import Batch, close, draw, draw_weights, leaf

INF = math.inf
COSTS = ["cosine", "sqeuclidean", "euclidean", "dot"]
RHOS = [None, 0.6, (0.3, 2.0), (INF, 0.5), (0.5, INF)]
PRIORS = [Prior.quadratic(1.0), Prior.absolute(0.5), Prior.order_preserving(0.3, 1.0), Prior.band(1.5)]
OPTIONS = {"reg": 0.5, "tol": 1e-11, "max_iter": 2000}


@pytest.fixture
def batch() -> Batch:
    return draw([4, 1, 3], [3, 2, 3], D=3, poison=0.0)


def smooth(result: otalign.OTResult) -> tuple[torch.Tensor, ...]:
    """All outputs of a result that have an exact gradient."""
    return result.value, result.value_linear, result.plan()


def differentiate(compute, *inputs: torch.Tensor) -> None:
    assert gradcheck(compute, inputs, eps=1e-5, atol=1e-6, rtol=1e-4, fast_mode=True)


def check(batch: Batch, compute, *others: torch.Tensor) -> None:
    """Check `compute(x, y, *others)` by finite differences in all its arguments that require gradients."""
    differentiate(compute, leaf(batch.x), leaf(batch.y), *others)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("cost", COSTS)
def test_points(backend, batch, cost, rho):
    def compute(x, y):
        return smooth(otalign.solve(x, y, *batch[2:], cost=cost, unbalanced=rho, backend=backend, **OPTIONS))

    check(batch, compute)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.kind)
@pytest.mark.parametrize("rho", [None, 0.6])
def test_points_under_a_prior(backend, batch, prior, rho):
    def compute(x, y):
        return smooth(otalign.solve(x, y, *batch[2:], prior=prior, unbalanced=rho, backend=backend, **OPTIONS))

    check(batch, compute)


@pytest.mark.parametrize("rho", RHOS)
def test_weights(backend, batch, rho):
    a, b = (
        leaf(draw_weights(lengths, values.shape[1]).nan_to_num(0))
        for lengths, values in ((batch.x_lengths, batch.x), (batch.y_lengths, batch.y))
    )

    def compute(x, y, a, b):
        return smooth(otalign.solve(x, y, *batch[2:], a, b, unbalanced=rho, backend=backend, **OPTIONS))

    check(batch, compute, a, b)


@pytest.mark.parametrize("rho", [None, 0.6])
def test_points_with_zero_weights(backend, rho):
    batch = draw([4, 3], [4, 3], D=3, poison=0.0)
    a = draw_weights(batch.x_lengths, batch.x.shape[1], zeros=True)
    b = draw_weights(batch.y_lengths, batch.y.shape[1], zeros=True)

    def compute(x, y):
        return smooth(otalign.solve(x, y, *batch[2:], a, b, unbalanced=rho, backend=backend, **OPTIONS))

    check(batch, compute)
    leaves = batch.requires_grad()
    sum(output.sin().sum() for output in compute(leaves.x, leaves.y)).backward()
    for gradient in (leaves.x.grad, leaves.y.grad):
        assert gradient[0, 2].abs().max() < 1e-14
        assert gradient[0, 1].abs().max() > 1e-3


@pytest.mark.parametrize("rho", [None, 0.6])
@pytest.mark.parametrize("output", ["value", "value_linear"])
def test_weights_that_are_zero(backend, output, rho):
    """The gradient is the one-sided derivative towards positive weights."""
    C = torch.rand(1, 4, 3, dtype=torch.float64)
    a, b = torch.tensor([[1.0, 2, 0, 1]]).double(), torch.tensor([[1.0, 0, 2]]).double()

    def compute(a, b):
        return getattr(otalign.solve_cost(C, a=a, b=b, unbalanced=rho, backend=backend, **OPTIONS), output).sum()

    leaves = leaf(a), leaf(b)
    compute(*leaves).backward()
    step = 1e-6
    for which, tensor in enumerate((a, b)):
        for index in range(tensor.shape[1]):
            more = [a.clone(), b.clone()]
            more[which][0, index] += step
            difference = (compute(*more) - compute(a, b)) / step
            close(leaves[which].grad[0, index], difference, 1e-4, f"{'ab'[which]}[{index}]")


@pytest.mark.parametrize("rho", RHOS)
def test_given_cost(backend, rho):
    C = torch.rand(2, 4, 3, dtype=torch.float64)
    lengths = torch.tensor([4, 2]), torch.tensor([3, 3])
    a, b = draw_weights(lengths[0], 4).nan_to_num(0), draw_weights(lengths[1], 3).nan_to_num(0)

    def compute(C, a, b):
        return smooth(otalign.solve_cost(C, *lengths, a, b, unbalanced=rho, backend=backend, **OPTIONS))

    differentiate(compute, leaf(C), leaf(a), leaf(b))


@pytest.mark.parametrize("side", ["x", "y"])
def test_barycentric(backend, batch, side):
    def compute(x, y):
        result = otalign.solve(x, y, *batch[2:], backend=backend, **OPTIONS)
        return result.barycentric_x() if side == "x" else result.barycentric_y()

    check(batch, compute)


@pytest.mark.parametrize("objective", ["value", "transport", "divergence"])
@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_objectives(backend, batch, objective, cost):
    def compute(x, y):
        return otalign.sinkhorn_loss(
            x, y, *batch[2:], cost=cost, objective=objective, reduction="none", backend=backend, **OPTIONS
        )

    check(batch, compute)


def test_divergence_of_unbalanced_weighted_measures(backend, batch):
    a, b = (
        leaf(draw_weights(lengths, values.shape[1]).nan_to_num(0))
        for lengths, values in ((batch.x_lengths, batch.x), (batch.y_lengths, batch.y))
    )

    def compute(x, y, a, b):
        return otalign.sinkhorn_loss(
            x, y, *batch[2:], a, b, unbalanced=(0.4, 1.5), objective="divergence", backend=backend, **OPTIONS
        )

    check(batch, compute, a, b)


@pytest.mark.parametrize("max_iter", [3, 500])
def test_plan_cost_is_the_cost_weighted_by_a_fixed_plan(backend, batch, max_iter):
    options = {"cost": "sqeuclidean", "reg": 0.1, "tol": 0, "max_iter": max_iter, "backend": backend}
    leaves, plain = batch.requires_grad(), batch.requires_grad()
    loss = otalign.sinkhorn_loss(*leaves, objective="plan_cost", reduction="sum", **options)
    plan = otalign.solve(*batch, **options).plan()
    expected = (plan * (plain.x[:, :, None] - plain.y[:, None]).square().sum(-1)).sum()
    close(loss, expected, 1e-10)
    loss.backward()
    expected.backward()
    close(leaves.x.grad, plain.x.grad, 1e-10)
    close(leaves.y.grad, plain.y.grad, 1e-10)


def test_plan_cost_does_not_train_the_weights(backend, batch):
    a = leaf(draw_weights(batch.x_lengths, batch.x.shape[1]).nan_to_num(0))
    leaves = batch.requires_grad()
    otalign.sinkhorn_loss(*leaves, a, objective="plan_cost", backend=backend, **OPTIONS).backward()
    assert a.grad is None or not a.grad.any()


def test_transport_is_not_plan_cost(backend, batch):
    """plan_cost ignores how the plan changes, so its gradient differs from that of transport."""
    gradients = []
    for objective in ("transport", "plan_cost"):
        leaves = batch.requires_grad()
        otalign.sinkhorn_loss(*leaves, objective=objective, backend=backend, **OPTIONS).backward()
        gradients.append(leaves.x.grad)
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert difference > 0.05


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("rho", [None, 0.6])
def test_hessian_of_the_value(cost, rho):
    """The reference differentiates twice."""
    batch = draw([3, 2], [3, 2], D=2, poison=0.0)

    def compute(x, y):
        return otalign.solve(x, y, *batch[2:], cost=cost, unbalanced=rho, backend="reference", **OPTIONS).value

    assert gradgradcheck(compute, (leaf(batch.x), leaf(batch.y)), eps=1e-5, atol=1e-5, rtol=1e-3, fast_mode=True)


def test_hessian_by_given_cost_and_weights():
    C, a, b = torch.rand(1, 3, 3).double(), torch.rand(1, 3).double() + 0.5, torch.rand(1, 3).double() + 0.5

    def compute(C, a, b):
        return otalign.solve_cost(C, a=a, b=b, backend="reference", **OPTIONS).value

    assert gradgradcheck(compute, (leaf(C), leaf(a), leaf(b)), eps=1e-5, atol=1e-5, rtol=1e-3, fast_mode=True)


def test_potentials_are_detached(backend, batch):
    result = otalign.solve(*batch.requires_grad(), backend=backend)
    assert not any(potential.requires_grad for potential in result.potentials)
    assert not result.error.requires_grad


def test_norm_weights_are_detached(backend, batch):
    """a="norm" equals the same numbers given as constants, forward and backward."""
    norms = batch.x.norm(dim=-1), batch.y.norm(dim=-1)
    gradients = []
    for weights in (("norm", "norm"), norms):
        leaves = batch.requires_grad()
        otalign.sinkhorn_loss(*leaves, *weights, cost="sqeuclidean", backend=backend, **OPTIONS).backward()
        gradients.append((leaves.x.grad, leaves.y.grad))
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected, 1e-12)
