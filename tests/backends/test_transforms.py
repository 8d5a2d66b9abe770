"""The solver under torch.func: grad and vmap work with the CPU engine; everything else raises an error with the reason."""

from __future__ import annotations

import pytest
import torch

import otalign

from ..helpers.problems import close, identical, leaf

torch.manual_seed(0)
X, Y, A = torch.randn(3, 2, 5, 3), torch.randn(3, 2, 4, 3), torch.rand(3, 2, 5) + 0.1
LENGTHS = torch.tensor([5, 3])

OF_POINTS = {
    "value": lambda x, y, a: otalign.sinkhorn_loss(x, y, LENGTHS, a=a),
    "transport": lambda x, y, a: otalign.sinkhorn_loss(x, y, LENGTHS, a=a, objective="transport", cost="sqeuclidean"),
    "plan_cost": lambda x, y, a: otalign.sinkhorn_loss(x, y, LENGTHS, objective="plan_cost", cost="euclidean"),
    "divergence": lambda x, y, a: otalign.sinkhorn_loss(x, y, LENGTHS, objective="divergence"),
    "plan": lambda x, y, a: otalign.solve(x, y, LENGTHS, a=a).plan().square().sum(),
    "images": lambda x, y, a: otalign.solve(x, y, LENGTHS, a=a).barycentric_y().square().sum(),
    "applied": lambda x, y, a: otalign.solve(x, y, LENGTHS, a=a).apply(y).square().sum(),
    "cost": lambda x, y, a: otalign.solve_cost(x @ y.mT, LENGTHS, a=a, reg=0.3).value.sum(),
    "module": lambda x, y, a: otalign.SinkhornLoss(reduction="sum")(x, y, LENGTHS, a=a),
}


def gradients(f, x, y, a):
    leaves = leaf(x), leaf(y), leaf(a)
    found = torch.autograd.grad(f(*leaves), leaves, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for grad, t in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("f", OF_POINTS.values(), ids=OF_POINTS)
def test_grad(f):
    found = torch.func.grad(f, argnums=(0, 1, 2))(X[0], Y[0], A[0])
    for ours, theirs in zip(found, gradients(f, X[0], Y[0], A[0]), strict=True):
        identical(ours, theirs)


@pytest.mark.parametrize("f", OF_POINTS.values(), ids=OF_POINTS)
def test_vmap(f):
    found = torch.vmap(f)(X, Y, A)
    close(found, torch.stack([f(*each) for each in zip(X, Y, A, strict=True)]), 1e-6)


@pytest.mark.parametrize("f", OF_POINTS.values(), ids=OF_POINTS)
def test_gradients_of_each_sample(f):
    found = torch.vmap(torch.func.grad(f, argnums=(0, 1, 2)))(X, Y, A)
    each = [gradients(f, *sample) for sample in zip(X, Y, A, strict=True)]
    for ours, theirs in zip(found, zip(*each, strict=True), strict=True):
        close(ours, torch.stack(theirs), 1e-6)


def test_vmap_of_one_argument_and_another_dimension():
    found = torch.vmap(lambda x: otalign.sinkhorn_loss(x, Y[0], reduction="none"), in_dims=2, out_dims=1)(
        X.permute(1, 2, 0, 3)
    )
    expected = [otalign.sinkhorn_loss(x, Y[0], reduction="none") for x in X]
    close(found, torch.stack(expected, 1), 1e-6)


def test_jacrev():
    def losses(x):
        return otalign.sinkhorn_loss(x, Y[0], reduction="none")

    found = torch.func.jacrev(losses)(X[0])
    close(found, torch.autograd.functional.jacobian(losses, X[0]), 1e-6)


def test_vjp():
    value, pull = torch.func.vjp(lambda x: otalign.sinkhorn_loss(x, Y[0]), X[0])
    identical(value, otalign.sinkhorn_loss(X[0], Y[0]))
    identical(pull(torch.tensor(1.0))[0], gradients(lambda x, y, a: otalign.sinkhorn_loss(x, y), X[0], Y[0], A[0])[0])


def loss(x):
    return otalign.sinkhorn_loss(x, Y[0])


def with_dual_numbers():
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        loss(forward_ad.make_dual(X[0], X[0]))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: torch.func.jvp(loss, (X[0],), (X[0],)), "forward-mode"),
        (lambda: torch.func.jacfwd(loss)(X[0]), "forward-mode"),
        (lambda: torch.func.hessian(loss)(X[0]), "forward-mode"),
        (with_dual_numbers, "forward-mode"),
        (lambda: torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(X[0]), "second derivatives"),
        (
            lambda: torch.vmap(lambda x, n: otalign.sinkhorn_loss(x, Y[0], n))(X, LENGTHS.expand(3, 2)),
            "x_lengths: torch.vmap",
        ),
        (lambda: torch.func.grad(lambda x: otalign.sinkhorn_loss(x, Y[0], backend="reference"))(X[0]), "'reference'"),
        (lambda: torch.func.grad(lambda x: otalign.sinkhorn_loss(x, Y[0], backend="triton"))(X[0]), "'triton'"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(NotImplementedError, match=words):
        call()
