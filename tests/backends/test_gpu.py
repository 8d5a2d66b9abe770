"""The results of the GPU backends on a real GPU: `pytest -m gpu`. Without a GPU, do not select these tests: none is skipped.

They compare results with the reference in float64, on the CPU. test_gpu_runtime.py tests the process and the device.
"""

from __future__ import annotations

import math

import pytest
import torch

import otalign
from otalign import Prior

from ..helpers.problems import RAGGED, close, draw, draw_weights, identical, on

pytestmark = pytest.mark.gpu

COSTS = ("cosine", "sqeuclidean", "euclidean", "dot")
OBJECTIVES = ("value", "plan_cost", "transport", "divergence")
# For any type of points, costs and iterations are in float32 or float64. Images of 16-bit points are products in TF32.
FORWARD = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
IMAGES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.float16: 2e-3}
# For gradients, relative to the largest entry: they are rounded to the type of the points.
GRADIENTS = {torch.float64: 1e-8, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


BACKEND = "triton"


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def gpu_backend(request, monkeypatch):
    """All tests run on both backends. (conftest.py deselects float64 for CUDA.)"""
    monkeypatch.setitem(globals(), "BACKEND", request.param)


def precise() -> torch.dtype:
    """The most precise type of points that the backend takes."""
    return torch.float64 if BACKEND == "triton" else torch.float32


def everything(batch, backend, weights=(None, None), **options):
    """The result, its plan and barycentric images, and the gradients of a scalar computed from all of them."""
    leaves = [batch.x.detach().requires_grad_(), batch.y.detach().requires_grad_()]
    weights = [None if w is None else w.detach().requires_grad_() for w in weights]
    result = otalign.solve(*leaves, batch.x_lengths, batch.y_lengths, *weights, backend=backend, **options)
    plan, images = result.plan(), (result.barycentric_x(), result.barycentric_y())
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(plan.shape, generator=generator, dtype=torch.float64).to(plan)
    total = result.value.sum() + 0.5 * result.value_linear.sum() + (plan * mask).sum()
    total = total + 0.01 * (images[0].sin().sum() + images[1].cos().sum())
    return result, plan, images, torch.autograd.grad(total, [*leaves, *(w for w in weights if w is not None)])


def compare(batch, device, weights=(None, None), **options):
    """Compare the backend with the reference: all outputs of a solve, and their gradients."""
    dtype = batch.x.dtype
    moved = [None if w is None else w.to(device) for w in weights]
    result, plan, images, gradients = everything(on(batch, device), BACKEND, moved, **options)
    doubled = [None if w is None else w.double() for w in weights]
    expected, right_plan, right_images, right_gradients = everything(
        batch.to(torch.float64), "reference", doubled, **options
    )
    assert result.n_iter.tolist() == expected.n_iter.tolist()
    for name in ("value", "value_linear", "error"):
        close(getattr(result, name).cpu(), getattr(expected, name), FORWARD[dtype], name)
    for name, actual, right in zip("fg", result.potentials, expected.potentials, strict=True):
        close(actual.cpu(), right, FORWARD[dtype], f"potential {name}")
    excess = (plan.detach().cpu().double() - right_plan).abs().sum((1, 2))
    assert (excess <= FORWARD[dtype] * right_plan.sum((1, 2)).clamp(min=1)).all(), f"plan is off by {excess} (L1)"
    for name, actual, right in zip(("images of x", "images of y"), images, right_images, strict=True):
        close(actual.cpu(), right, IMAGES[dtype], name)
    relatively(gradients, right_gradients, GRADIENTS[dtype])
    return result


def relatively(gradients, expected, tol):
    """Assert equality relative to the largest entry, which is far below one, and exact zeros where zeros are expected (padding)."""
    for place, (actual, right) in enumerate(zip(gradients, expected, strict=True)):
        scale = float(right.abs().max())
        assert scale > 0
        close(actual.cpu().double() / scale, right / scale, tol, f"gradient {place}")
    for actual, right in zip(gradients[:2], expected[:2], strict=True):
        assert not actual.cpu()[(right == 0).all(-1)].any()


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_costs_and_types(device, cost, dtype):
    batch = draw(*RAGGED, D=72, dtype=torch.float64).to(dtype)
    compare(batch, device, cost=cost, reg=0.3, tol=0, max_iter=20)


@pytest.mark.parametrize(
    "prior", [Prior.quadratic(0.5), Prior.absolute(0.5), Prior.order_preserving(0.1, 0.5), Prior.band(4)]
)
@pytest.mark.parametrize("rho", [None, 0.5, (0.4, math.inf), (math.inf, 0.4)], ids=str)
def test_priors_and_relaxations(device, prior, rho):
    compare(
        draw([40, 1, 33], [30, 4, 17], D=16, dtype=precise()),
        device,
        prior=prior,
        unbalanced=rho,
        reg=0.2,
        tol=0,
        max_iter=30,
    )


def compare_losses(batch, device, **options):
    """Compare as a trainer calls the loss: gradients of the value alone use other kernels than `compare`."""
    dtype, outcomes = batch.x.dtype, []
    for part, backend in ((on(batch, device), BACKEND), (batch.to(torch.float64), "reference")):
        x, y = (t.detach().requires_grad_() for t in (part.x, part.y))
        loss = otalign.sinkhorn_loss(x, y, part.x_lengths, part.y_lengths, backend=backend, tol=0, **options)
        outcomes.append((loss.detach(), torch.autograd.grad(loss, (x, y))))
    (loss, gradients), (right_loss, right_gradients) = outcomes
    assert [gradient.dtype for gradient in gradients] == [dtype] * 2
    close(loss.cpu(), right_loss, FORWARD[dtype])
    relatively(gradients, right_gradients, GRADIENTS[dtype])


@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses(device, objective, dtype):
    compare_losses(draw(*RAGGED, D=72).to(dtype), device, objective=objective, reg=0.1, max_iter=30)


@pytest.mark.parametrize(
    "lengths",
    [
        ([64], [20]),
        ([256], [60]),
        ([1500], [100]),
        ([1500, 2], [100, 90]),
        ([1500, 900, 3], [128, 128, 5]),
        ([1500, 1499, 1, 700], [128, 1, 128, 100]),
        ([3000, 1200], [512, 300]),
        ([90], [700]),
    ],
    ids=["registers", "wide", "1 shared", "2 shared", "3 shared", "4 shared", "shared memory", "wide memory"],
)
def test_every_placement_of_the_kernel_matrix(device, lengths):
    """One program an item, or several; the kernel matrix in registers or in memory."""
    compare(draw(*lengths, D=32, dtype=torch.float32), device, reg=0.2, tol=0, max_iter=15)


def test_many_items(device):
    lengths = [1 + 7 * i % 50 for i in range(512)]
    compare_losses(draw(lengths, lengths[::-1], D=16, dtype=torch.float32), device, reg=0.3, max_iter=5)


def test_a_long_item(device):
    compare(draw([8192], [64], D=16, dtype=torch.float32), device, reg=0.3, tol=0, max_iter=5)


def test_weights(device):
    batch = draw(*RAGGED, D=16, dtype=precise())
    sides = (batch.x_lengths, batch.x), (batch.y_lengths, batch.y)
    weights = [draw_weights(lengths, values.shape[1]).nan_to_num(0) for lengths, values in sides]
    compare(batch, device, weights, cost="sqeuclidean", reg=0.4, tol=0, max_iter=20)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_of_zero(device, objective):
    batch = draw(*RAGGED, D=16, dtype=precise())
    sides = (batch.x_lengths, batch.x), (batch.y_lengths, batch.y)
    weights = [draw_weights(lengths, values.shape[1], zeros=True).nan_to_num(0) for lengths, values in sides]
    outcomes = []
    for where, backend in ((device, BACKEND), ("cpu", "reference")):
        kind = precise() if backend == BACKEND else torch.float64
        leaves = [t.detach().to(where, kind).requires_grad_() for t in (batch.x, batch.y, *weights)]
        lengths = [length.to(where) for length in batch[2:]]
        options = {"objective": objective, "reg": 0.2, "tol": 0, "max_iter": 30, "backend": backend}
        loss = otalign.sinkhorn_loss(*leaves[:2], *lengths, *leaves[2:], **options)
        wanted = leaves if objective != "plan_cost" else leaves[:2]
        outcomes.append((loss.detach(), torch.autograd.grad(loss, wanted)))
    (loss, gradients), (right_loss, right_gradients) = outcomes
    close(loss.cpu(), right_loss, FORWARD[precise()])
    relatively(gradients, right_gradients, GRADIENTS[precise()])


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_given_cost(device, dtype):
    lengths = torch.tensor([300, 1, 0, 200]), torch.tensor([90, 5, 7, 1])
    C = torch.rand(4, 300, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    outcomes = []
    for given, where, backend in ((C.to(device), device, BACKEND), (C.double(), "cpu", "reference")):
        leaf = given.detach().requires_grad_()
        moved = [length.to(where) for length in lengths]
        result = otalign.solve_cost(leaf, *moved, reg=0.1, tol=0, max_iter=30, backend=backend)
        (gradient,) = torch.autograd.grad(result.value.sum() + result.plan().square().sum(), leaf)
        outcomes.append((result.value.detach(), result.plan().detach(), gradient))
    (value, plan, gradient), (right_value, right_plan, right_gradient) = outcomes
    close(value.cpu(), right_value, FORWARD[dtype])
    assert ((plan.cpu() - right_plan).abs().sum((1, 2)) <= FORWARD[dtype]).all()
    relatively([gradient.flatten(1)], [right_gradient.flatten(1)], GRADIENTS[dtype])


@pytest.mark.parametrize("size", [(700, 90), (300, 600)], ids=["registers", "memory"])
def test_small_reg(device, size):
    """A cost range of 10^4 reg needs many absorptions, and still agrees with the reference."""
    C = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    options = {"reg": 1e-4, "tol": 0, "max_iter": 60}
    actual = otalign.solve_cost(C.to(device), backend=BACKEND, **options)
    expected = otalign.solve_cost(C.double(), backend="reference", **options)
    close(actual.value.cpu(), expected.value, 1e-5)
    assert ((actual.plan().cpu() - expected.plan()).abs().sum((1, 2)) <= 1e-2).all(), (
        "float32, times the range over reg"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_items_stop_by_themselves(device, dtype):
    batch = draw(*RAGGED, D=16, dtype=dtype)
    options = {"reg": 0.2, "tol": 1e-4, "max_iter": 1000}
    actual = otalign.solve(*on(batch, device), backend=BACKEND, **options)
    expected = otalign.solve(*batch.to(torch.float64), backend="reference", **options)
    assert actual.converged.all()
    late = (actual.n_iter.cpu() - expected.n_iter).abs()
    assert (late <= (0 if dtype == torch.float64 else 1)).all(), "float32 may stop one iteration earlier or later"
    assert len(set(actual.n_iter.tolist())) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_and_jagged(device, dtype):
    batch = on(draw([750, 1, 0, 300], [128, 5, 7, 100], D=16, dtype=dtype), device)
    expected = otalign.solve(*batch, backend=BACKEND)
    packed = batch.packed()
    actual = otalign.solve(**packed, max_seqlen_x=750, max_seqlen_y=128, backend=BACKEND)
    close(actual.value, expected.value, 1e-6)
    potentials = torch.cat([f[:n] for f, n in zip(expected.potentials[0], batch.x_lengths, strict=True)])
    close(actual.potentials[0], potentials, 1e-6)
    x, y = (torch.nested.nested_tensor_from_jagged(packed[s], packed[f"cu_seqlens_{s}"]) for s in "xy")
    close(otalign.solve(x, y, backend=BACKEND).value, expected.value, 1e-6)


def views(x):
    """The same points (B, N, D) in other memory layouts."""
    yield "time major", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "dimension first", x.mT.contiguous().mT
    yield "every second", torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1, 2)[:, ::2]
    yield "not aligned", torch.cat([torch.full_like(x[..., :1], math.nan), x], -1)[..., 1:]
    yield "far apart", far_apart(x)


def far_apart(x):
    """Items more than 2^31 numbers apart: addresses need 64 bits."""
    B, N, D = x.shape
    stride = 2**31 // (B - 1) + 64
    store = torch.empty((B - 1) * stride + N * D, dtype=x.dtype, device=x.device)
    return store.as_strided((B, N, D), (stride, D, 1)).copy_(x)


@pytest.mark.unpoisoned  # filling gigabytes takes long
def test_strides(device):
    batch = on(draw([70, 40, 90], [20, 30, 9], D=24, dtype=torch.bfloat16), device)
    int32 = batch.x_lengths.int(), batch.y_lengths.int()

    def step(x, y, *lengths):
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        loss = otalign.sinkhorn_loss(*leaves, *lengths, reg=0.1, backend=BACKEND)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    expected = step(*batch)
    for actual, right in zip(step(*batch[:2], *int32), expected, strict=True):
        identical(actual, right)
    for (name, x), (_, y) in zip(views(batch.x), views(batch.y), strict=True):
        for actual, right in zip(step(x, y, *int32), expected, strict=True):
            close(actual.float(), right.float(), 1e-5 if right.dim() == 0 else 1e-2 * float(right.abs().max()), name)


def test_types_of_the_sides_may_differ(device):
    batch = draw([70, 40], [20, 30], D=24, dtype=torch.float64)
    mixed = batch._replace(x=batch.x.bfloat16(), y=batch.y.float())
    expected = otalign.solve(*batch._replace(x=mixed.x.double(), y=mixed.y.double()), backend="reference")
    close(otalign.solve(*on(mixed, device), backend=BACKEND).value.cpu(), expected.value, 2e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_item_leaves_the_others_unchanged(device, bad):
    """Values, plans and gradients of the other items keep every bit."""
    batch = on(draw(*RAGGED, D=16, dtype=torch.float32), device)
    spoilt = batch._replace(x=batch.x.clone())
    spoilt.x[3, 200, 4] = bad
    outcomes = []
    for part in (batch, spoilt):
        leaves = [t.detach().requires_grad_() for t in (part.x, part.y)]
        result = otalign.solve(*leaves, *part[2:], reg=0.2, backend=BACKEND)
        gradients = torch.autograd.grad(result.value.sum(), leaves)
        outcomes.append((result.value.detach(), result.plan().detach(), result.n_iter, *gradients))
    others = torch.tensor([0, 1, 2, 4], device=device)
    for good, found in zip(*outcomes, strict=True):
        identical(found[others], good[others])
    assert outcomes[1][0][3].isnan()
