"""Hessian-vector products of every backend: against finite differences of first gradients in float64, and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradgradcheck

import otalign
from otalign import Prior

from ..cuda_on_cpu.host_cuda import emulated
from ..helpers.problems import close, draw, draw_cost, draw_weights, identical, leaf

INF = math.inf
OPTIONS = {"reg": 0.2, "tol": 1e-11, "max_iter": 5000, "reduction": "sum"}
KINDS = {
    "strict": {},
    "one side relaxed, prior": {"unbalanced": (0.5, INF), "prior": Prior.quadratic(0.5)},
    "relaxed": {"unbalanced": 0.7},
}
LENGTHS = [7, 1, 5, 4, 0], [4, 3, 6, 1, 2]


def batch_of(dtype=torch.float64):
    return draw(*LENGTHS, D=3, dtype=dtype)


def gradients(leaves, lengths, backend, again=True, **options):
    """First gradients of twice the squared loss, so that its gradient depends on the loss as well."""
    names = ("x", "y", "a", "b")[: len(leaves)]
    inputs = dict(zip(names, leaves, strict=True))
    loss = 2 * otalign.sinkhorn_loss(
        inputs.pop("x"), inputs.pop("y"), *lengths, backend=backend, **inputs, **OPTIONS | options
    ).square()  # fmt: skip
    return torch.autograd.grad(loss, leaves, create_graph=again)


def directions(leaves):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in leaves]


def product(leaves, lengths, backend, **options):
    """The Hessian times `directions`."""
    first = gradients(leaves, lengths, backend, **options)
    return torch.autograd.grad(first, leaves, directions(leaves))


def draw_leaves(*, zeros=False, dtype=torch.float64):
    batch = batch_of(dtype)
    a = draw_weights(batch.x_lengths, batch.x.shape[1], zeros=zeros).to(dtype)
    b = draw_weights(batch.y_lengths, batch.y.shape[1], seed=3).to(dtype)
    return [leaf(t) for t in (batch.x, batch.y, a, b)], (batch.x_lengths, batch.y_lengths)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "euclidean", "dot"])
@pytest.mark.parametrize("objective", ["value", "transport"])
def test_finite_differences(objective, cost, options):
    """Central differences of the first gradients, which the kernels compute: no code in common."""
    leaves, lengths = draw_leaves()
    found = product(leaves, lengths, "cpu", objective=objective, cost=cost, **options)
    step, moved = 1e-5, directions(leaves)
    sides = [
        gradients(
            [leaf(t + sign * step * d) for t, d in zip(leaves, moved, strict=True)],
            lengths, "cpu", again=False, objective=objective, cost=cost, **options,
        )
        for sign in (1, -1)
    ]  # fmt: skip
    for ours, up, down in zip(found, *sides, strict=True):
        close(ours, (up - down) / (2 * step), 1e-5)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_finite_differences_of_the_divergence(cost):
    """Both sides of a self term move."""
    batch = batch_of()
    leaves, lengths = [leaf(batch.x), leaf(batch.y)], batch[2:]
    found = product(leaves, lengths, "cpu", objective="divergence", cost=cost)
    step, moved = 1e-5, directions(leaves)
    up, down = (
        gradients(
            [leaf(t + sign * step * d) for t, d in zip(leaves, moved, strict=True)],
            lengths, "cpu", again=False, objective="divergence", cost=cost,
        )
        for sign in (1, -1)
    )  # fmt: skip
    for ours, right, left in zip(found, up, down, strict=True):
        close(ours, (right - left) / (2 * step), 1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("objective", ["value", "plan_cost", "transport", "divergence"])
def test_as_the_reference(backend, objective, options):
    """With weights of zero, an empty item, and an item with one point. `plan_cost` holds the plan constant each time."""
    if objective == "divergence":
        options = {name: value for name, value in options.items() if name != "prior"}
    leaves, lengths = draw_leaves(zeros=True)
    leaves = leaves[:2] if objective == "divergence" else leaves
    if objective == "plan_cost":
        leaves = leaves[:2]
    found = product(leaves, lengths, backend, objective=objective, **options)
    for ours, theirs in zip(found, product(leaves, lengths, "reference", objective=objective, **options), strict=True):
        close(ours, theirs, 1e-7)


@pytest.mark.quick
@pytest.mark.parametrize("objective", ["value", "transport"])
def test_cuda(objective):
    """The CUDA kernels find the potentials, in float32; here their source runs on the CPU."""
    leaves, lengths = draw_leaves(dtype=torch.float32)
    with emulated():
        found = product(leaves, lengths, "cuda", objective=objective, tol=1e-6)
    wide = [leaf(t.double()) for t in leaves]
    for ours, theirs in zip(found, product(wide, lengths, "reference", objective=objective), strict=True):
        close(ours.double(), theirs, 1e-4)


def test_packed_and_padded_alike():
    batch = batch_of()
    packed = batch.packed()
    points = leaf(packed["x"]), leaf(packed["y"])
    loss = otalign.sinkhorn_loss(
        *points, **{k: v for k, v in packed.items() if k not in "xy"}, backend="cpu", **OPTIONS
    )
    first = torch.autograd.grad(loss, points, create_graph=True)
    found = torch.autograd.grad([t.square().sum() for t in first], points)
    padded = leaf(batch.x), leaf(batch.y)
    loss = otalign.sinkhorn_loss(*padded, *batch[2:], backend="cpu", **OPTIONS)
    first = torch.autograd.grad(loss, padded, create_graph=True)
    for ours, theirs, lengths in zip(
        found, torch.autograd.grad([t.square().sum() for t in first], padded), batch[2:], strict=True
    ):
        close(ours, torch.cat([t[:n] for t, n in zip(theirs, lengths.tolist(), strict=True)]), 1e-12)


def test_one_tensor_on_both_sides():
    """x and y are the same tensor, or one is computed from the other: no path counts twice."""
    x = leaf(draw([6, 4], [6, 4], D=3, poison=0.0).x)
    for make in (lambda t: t, lambda t: 2 * t.tanh()):
        products = []
        for backend in ("cpu", "reference"):
            (first,) = torch.autograd.grad(
                otalign.sinkhorn_loss(x, make(x), backend=backend, **OPTIONS), x, create_graph=True
            )
            products.append(torch.autograd.grad(first.square().sum(), x)[0])
        close(*products, 1e-8)


@pytest.mark.parametrize("which", ["value", "value_linear", "plan"])
def test_given_costs_reg_per_item(which):
    C, n, m = draw_cost([5, 3], [4, 2])
    C, a, b = leaf(C), leaf(torch.rand(2, 5).double() + 0.2), leaf(torch.rand(2, 4).double() + 0.2)
    reg = torch.tensor([0.3, 0.5], dtype=torch.float64)

    def compute(C, a, b):
        result = otalign.solve_cost(C, n, m, a, b, reg=reg, tol=1e-12, max_iter=5000, backend="cpu")
        return result.plan() if which == "plan" else getattr(result, which)

    assert gradgradcheck(compute, (C, a, b), eps=1e-5, atol=1e-5, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """The product has the type of the points; it is computed in float64 from the potentials in float32."""
    batch = batch_of(dtype)
    leaves = [leaf(batch.x), leaf(batch.y)]
    found = product(leaves, batch[2:], "cpu", tol=1e-6)
    wide = [leaf(t.double()) for t in leaves]
    for ours, theirs in zip(found, product(wide, batch[2:], "reference"), strict=True):
        assert ours.dtype == dtype
        close(ours.double(), theirs, 2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_first_gradients_keep_their_bits():
    leaves, lengths = draw_leaves(dtype=torch.float32)
    for objective in ("value", "transport"):
        once = gradients(leaves, lengths, "cpu", again=False, objective=objective)
        for ours, theirs in zip(gradients(leaves, lengths, "cpu", objective=objective), once, strict=True):
            identical(ours, theirs)


def test_items_that_are_nan_stay_alone():
    """An item of NaN makes its own product NaN, and nothing if its loss is not used."""
    batch = draw([4, 5], [3, 2], D=3, poison=0.0)
    x = batch.x.clone()
    x[1, 0] = math.nan
    x = leaf(x)
    losses = otalign.sinkhorn_loss(x, batch.y, *batch[2:], backend="cpu", **OPTIONS | {"reduction": "none"})
    for used in ([1.0, 0.0], [1.0, 1.0]):
        (first,) = torch.autograd.grad(losses, x, torch.tensor(used).double(), create_graph=True)
        (second,) = torch.autograd.grad(first[0].square().sum(), x, retain_graph=True)
        assert second[0].isfinite().all()
        assert (second[1] == 0).all() or used[1] != 0


def test_compiled_graphs_have_first_derivatives_only():
    compiled = torch.compile(
        lambda x, y: otalign.sinkhorn_loss(x, y, backend="cpu"), backend="aot_eager", fullgraph=True
    )
    x, y = leaf(torch.randn(1, 4, 3)), torch.randn(1, 3, 3)
    (first,) = torch.autograd.grad(compiled(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), x)
