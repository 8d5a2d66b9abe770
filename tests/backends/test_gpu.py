"""The results of the GPU backends on a real GPU: `pytest -m gpu`. Without a GPU these tests fail, none is skipped.

They compare results with the reference in float64, on the CPU. test_gpu_runtime.py tests the process and the device, and
test_rehearsal.py runs the tests of this file without a GPU, at small sizes.

On a GPU the tests take most of their time to compile kernels. So they share few kinds of problems, those of helpers/problems.py
and of the sanitizer's cases: a new dimension, type or alignment compiles about ten kernels more.
"""

from __future__ import annotations

import math

import pytest
import torch

import otalign
from otalign import Prior

from ..helpers.problems import NARROW, RAGGED, WIDE, close, draw, draw_cost, draw_weights, identical, on, spoken_costs

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


def everything(batch, backend, weights=(None, None), **options):
    """The result, its plan and barycentric images, and the gradients of a scalar computed from all of them."""
    leaves = [batch.x.detach().requires_grad_(), batch.y.detach().requires_grad_()]
    weights = [None if w is None else w.detach().requires_grad_() for w in weights]
    options = {name: t.to(batch.x.device) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
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
    compare(draw(*RAGGED, D=WIDE).to(dtype), device, cost=cost, reg=0.3, tol=0, max_iter=20)


@pytest.mark.parametrize("dtype, dim", [(torch.float32, 1), (torch.bfloat16, 20), (torch.float16, 100)], ids=str)
def test_dimensions_that_fill_no_copy(device, dtype, dim):
    """Rows that do not end at a multiple of 16 bytes, and points of one dimension, whose strides are all one."""
    compare_losses(draw(*RAGGED, D=dim).to(dtype), device, cost="sqeuclidean", reg=0.3, max_iter=20)


# Each with a cost and a type as in a case of the sanitizer.
PRIORS = (
    (Prior.quadratic(0.5), "cosine", torch.bfloat16),
    (Prior.absolute(0.5), "euclidean", torch.bfloat16),
    (Prior.order_preserving(0.1, 0.5), "cosine", torch.float32),
    (Prior.band(4), "euclidean", torch.float32),
)
SMALL = [298, 1, 0, 150], [22, 4, 5, 22]  # in registers of one program or, relaxed, of two
RELAXED = (0.5, (0.4, math.inf), (math.inf, 0.4))


@pytest.mark.parametrize("prior, cost, dtype", PRIORS, ids=str)
@pytest.mark.parametrize("rho", [None, *RELAXED], ids=str)
def test_priors_and_relaxations(device, prior, cost, dtype, rho):
    batch = draw(*SMALL, D=NARROW).to(dtype)
    compare(batch, device, cost=cost, prior=prior, unbalanced=rho, reg=0.2, tol=0, max_iter=30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rho", RELAXED, ids=str)
def test_relaxed_in_memory(device, rho, dtype):
    """A relaxed problem takes more registers: the kernel matrix of Triton lies in memory here."""
    compare(draw(*RAGGED, D=WIDE, dtype=dtype), device, unbalanced=rho, reg=0.2, tol=0, max_iter=20)


def loss_and_gradients(batch, backend, **options):
    x, y = (t.detach().requires_grad_() for t in (batch.x, batch.y))
    loss = otalign.sinkhorn_loss(x, y, batch.x_lengths, batch.y_lengths, backend=backend, tol=0, **options)
    return loss.detach(), torch.autograd.grad(loss, (x, y))


def compare_losses(batch, device, **options):
    """Compare as a trainer calls the loss: gradients of the value alone use other kernels than `compare`."""
    loss, gradients = loss_and_gradients(on(batch, device), BACKEND, **options)
    expected, right_gradients = loss_and_gradients(batch.to(torch.float64), "reference", **options)
    assert [gradient.dtype for gradient in gradients] == [batch.x.dtype, batch.y.dtype]
    close(loss.cpu(), expected, FORWARD[batch.x.dtype])
    relatively(gradients, right_gradients, GRADIENTS[batch.x.dtype])


@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses(device, objective, dtype):
    compare_losses(draw(*RAGGED, D=WIDE).to(dtype), device, objective=objective, reg=0.1, max_iter=30)


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_products_in_tf32(device, tf32):
    """If torch may round the factors of products to TF32, so may the kernels. They compute costs with three digits then."""
    batch = draw(*RAGGED, D=WIDE, dtype=torch.float32)
    loss, gradients = loss_and_gradients(on(batch, device), BACKEND, reg=0.1, max_iter=30)
    expected, right_gradients = loss_and_gradients(batch.to(torch.float64), "reference", reg=0.1, max_iter=30)
    close(loss.cpu(), expected, 2e-3)
    relatively(gradients, right_gradients, 2e-2)


# The tile shapes of both backends by their width, with few and with many programs or blocks an item. The names are those of
# Triton's placements. test_placements.py tests that no tile shape is left out.
PLACEMENTS = {
    "32": ([64], [20]),
    "32, few rows": ([6, 3], [30, 9]),
    "64": ([120, 70], [60, 50]),
    "64, many items": ([1 + 7 * i % 50 for i in range(300)], [1 + 11 * i % 50 for i in range(300)]),
    "64, twice the rows": ([250], [60]),
    "64, shared by 8": ([1500], [60]),
    "128": ([120], [120]),
    "128, shared by 2": ([300], [100]),
    "128, shared by 16": ([3000], [100]),
    "256, shared by 4": ([250, 129, 3], [200, 128, 5]),
    "256, shared by 16": ([1000], [200]),
    "512": ([300], [400]),
    "128 in memory": ([8192], [64]),
    "256 in memory": ([1500, 900, 3, 700], [128, 128, 5, 100]),
    "512 in memory": ([2000, 1200], [400, 300]),
    "1024 in memory": ([90, 30], [700, 600]),
}


@pytest.mark.parametrize("lengths", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_placement_of_the_kernel_matrix(device, lengths):
    """One program an item, or several; the kernel matrix in registers or in memory."""
    compare(draw(*lengths, D=NARROW, dtype=torch.float32), device, reg=0.2, tol=0, max_iter=12)


# The gradients of weights through an iteration that has not converged are not defined to the last digit.
CONVERGED = {"tol": 0, "max_iter": 100}


def weights_of(batch, *, zeros=False):
    sides = (batch.x_lengths, batch.x), (batch.y_lengths, batch.y)
    return [draw_weights(lengths, values.shape[1], zeros=zeros).nan_to_num(0) for lengths, values in sides]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weights(device, dtype):
    batch = draw(*RAGGED, D=WIDE, dtype=dtype)
    weights = [w.to(dtype) for w in weights_of(batch)]
    compare(batch, device, weights, cost="sqeuclidean", reg=0.4, **CONVERGED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_of_zero(device, objective, dtype):
    batch = draw(*RAGGED, D=WIDE, dtype=dtype)
    weights = weights_of(batch, zeros=True)
    outcomes = []
    for where, backend, kind in ((device, BACKEND, dtype), ("cpu", "reference", torch.float64)):
        leaves = [t.detach().to(where, kind).requires_grad_() for t in (batch.x, batch.y, *weights)]
        lengths = [length.to(where) for length in batch[2:]]
        options = {"objective": objective, "reg": 0.4, "backend": backend}
        loss = otalign.sinkhorn_loss(*leaves[:2], *lengths, *leaves[2:], **options, **CONVERGED)
        wanted = leaves if objective != "plan_cost" else leaves[:2]
        outcomes.append((loss.detach(), torch.autograd.grad(loss, wanted)))
    (loss, gradients), (right_loss, right_gradients) = outcomes
    close(loss.cpu(), right_loss, FORWARD[dtype])
    relatively(gradients, right_gradients, GRADIENTS[dtype])


def test_reg_of_every_item(device):
    batch = draw(*RAGGED, D=WIDE, dtype=torch.float32)
    compare(batch, device, reg=torch.linspace(0.1, 0.5, len(batch.x)), tol=0, max_iter=20)


def test_warm_start(device):
    batch = draw(*RAGGED, D=WIDE, dtype=torch.float32)
    options = {"reg": 0.2, "tol": 0, "max_iter": 3}
    first = otalign.solve(*batch.to(torch.float64), backend="reference", **options)
    expected = otalign.solve(*batch.to(torch.float64), init=first.potentials, backend="reference", **options)
    init = tuple(potential.float().to(device) for potential in first.potentials)
    actual = otalign.solve(*on(batch, device), init=init, backend=BACKEND, **options)
    close(actual.value.cpu(), expected.value, FORWARD[torch.float32])
    for found, right in zip(actual.potentials, expected.potentials, strict=True):
        close(found.cpu(), right, FORWARD[torch.float32])


@pytest.mark.parametrize("objective", ["value", "transport"])
def test_hessian_vector_products(device, objective):
    """The numbers come from the potentials of the kernels, the derivatives from torch on the GPU."""
    batch = draw([30, 1, 0, 17], [12, 5, 7, 9], D=NARROW, dtype=torch.float32, poison=0.0)
    products = []
    for points, place, backend in ((batch, device, BACKEND), (batch.to(torch.float64), "cpu", "reference")):
        x, y, *lengths = (side.to(place) for side in points)
        x.requires_grad_()
        loss = otalign.sinkhorn_loss(
            x, y, *lengths, reg=0.2, tol=1e-6, max_iter=5000, objective=objective, backend=backend
        )  # fmt: skip
        (first,) = torch.autograd.grad(3 * loss, x, create_graph=True)
        products.append(torch.autograd.grad(first.square().sum(), x)[0].double().cpu())
    close(*products, 1e-3)


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_given_cost(device, dtype):
    C, *lengths = draw_cost([300, 1, 0, 200], [90, 5, 7, 1], dtype=dtype)
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
    C, *_ = draw_cost(*([length] * 2 for length in size), dtype=torch.float32)
    options = {"reg": 1e-4, "tol": 0, "max_iter": 60}
    actual = otalign.solve_cost(C.to(device), backend=BACKEND, **options)
    expected = otalign.solve_cost(C.double(), backend="reference", **options)
    close(actual.value.cpu(), expected.value, 1e-5)
    assert ((actual.plan().cpu() - expected.plan()).abs().sum((1, 2)) <= 1e-2).all(), (
        "float32, times the range over reg"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_items_stop_by_themselves(device, dtype):
    batch = draw(*RAGGED, D=WIDE, dtype=dtype)
    options = {"reg": 0.2, "tol": 1e-4, "max_iter": 1000, "accelerate": False}
    actual = otalign.solve(*on(batch, device), backend=BACKEND, **options)
    expected = otalign.solve(*batch.to(torch.float64), backend="reference", **options)
    assert actual.converged.all()
    late = (actual.n_iter.cpu() - expected.n_iter).abs()
    assert (late <= (0 if dtype == torch.float64 else 1)).all(), "float32 may stop one iteration earlier or later"
    assert len(set(actual.n_iter.tolist())) > 2


@pytest.mark.parametrize("rho", [None, (0.5, 0.3)], ids=str)
def test_fewer_passes(device, rho):
    """The accelerated solver reaches the optimum, in fewer passes than plain iterations."""
    C = torch.stack([spoken_costs(200, 60, seed=seed) for seed in range(2)])
    C = (C - C.amin()) / (C.amax() - C.amin())
    options = {"reg": 0.02, "unbalanced": rho, "tol": 1e-4, "max_iter": 5000}
    fast, plain = (
        otalign.solve_cost(C.float().to(device), backend=BACKEND, accelerate=accelerate, **options)
        for accelerate in (True, False)
    )
    right = otalign.solve_cost(C, backend="reference", **options | {"tol": 1e-9, "max_iter": 20_000})
    assert fast.converged.all()
    assert ((fast.plan().cpu() - right.plan()).abs().sum((1, 2)) <= 3e-3).all()
    assert fast.n_iter.sum() < 0.8 * plain.n_iter.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_and_jagged(device, dtype):
    batch = on(draw(*RAGGED, D=WIDE, dtype=dtype), device)
    options = {"max_iter": 20, "backend": BACKEND}
    expected = otalign.solve(*batch, **options)
    packed = batch.packed()
    longest = {f"max_seqlen_{side}": int(lengths.max()) for side, lengths in zip("xy", batch[2:], strict=True)}
    actual = otalign.solve(**packed, **longest, **options)
    close(actual.value, expected.value, 1e-6)
    potentials = torch.cat([f[:n] for f, n in zip(expected.potentials[0], batch.x_lengths, strict=True)])
    close(actual.potentials[0], potentials, 1e-6)
    x, y = (torch.nested.nested_tensor_from_jagged(packed[s], packed[f"cu_seqlens_{s}"]) for s in "xy")
    close(otalign.solve(x, y, **options).value, expected.value, 1e-6)


def views(x):
    """The same points (B, N, D) in other memory layouts."""
    yield "time major", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "dimension first", x.mT.contiguous().mT
    yield "every second", torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1, 2)[:, ::2]
    yield "not aligned", torch.cat([torch.full_like(x[..., :1], math.nan), x], -1)[..., 1:]


FEW = {"reg": 0.1, "max_iter": 10}


def same_loss(batch, expected, message):
    """Compare with the loss and the gradients of the same points in another place of memory."""
    loss, gradients = loss_and_gradients(batch, BACKEND, **FEW)
    for actual, right, tol in zip((loss, *gradients), (expected[0], *expected[1]), (1e-5, 1e-2, 1e-2), strict=True):
        scale = max(float(right.abs().max()), float(right.dim() == 0))
        close(actual.float() / scale, right.float() / scale, tol, message)


def test_strides(device):
    batch = on(draw(*RAGGED, D=WIDE, dtype=torch.bfloat16), device)
    narrow = batch._replace(x_lengths=batch.x_lengths.int(), y_lengths=batch.y_lengths.int())
    expected = loss_and_gradients(batch, BACKEND, **FEW)
    loss, gradients = loss_and_gradients(narrow, BACKEND, **FEW)
    for actual, right in zip((loss, *gradients), (expected[0], *expected[1]), strict=True):
        identical(actual, right)
    for (name, x), (_, y) in zip(views(batch.x), views(batch.y), strict=True):
        same_loss(narrow._replace(x=x, y=y), expected, name)


def far_apart(x, y, stride):
    """The same points in items so many numbers apart. Both sides lie in the same memory, which is large enough once."""
    (B, N, D), M = x.shape, y.shape[1]
    begin = (N * D + 15) // 16 * 16
    store = torch.empty((B - 1) * stride + begin + M * D, dtype=x.dtype, device=x.device)
    sides = store.as_strided((B, N, D), (stride, D, 1)), store.as_strided((B, M, D), (stride, D, 1), begin)
    return sides[0].copy_(x), sides[1].copy_(y)


@pytest.mark.parametrize("items, stride", [(3, 2**30 + 64), (2, 2**31 + 64)], ids=["addresses", "strides"])
def test_items_far_apart(device, items, stride):
    """More than 2^31 numbers apart: addresses need 64 bits, and so does a stride that is that large itself."""
    batch = on(draw([70, 40, 90][:items], [20, 30, 9][:items], D=WIDE, dtype=torch.bfloat16), device)
    expected = loss_and_gradients(batch, BACKEND, **FEW)
    x, y = far_apart(batch.x, batch.y, stride)
    same_loss(batch._replace(x=x, y=y), expected, f"{stride} apart")


def test_types_of_the_sides_may_differ(device):
    batch = draw(*RAGGED, D=WIDE)
    mixed = batch._replace(x=batch.x.bfloat16(), y=batch.y.float())
    compare_losses(mixed, device, reg=0.1, max_iter=20)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_item_leaves_the_others_unchanged(device, bad):
    """Values, plans and gradients of the other items keep every bit."""
    batch = on(draw(*RAGGED, D=WIDE, dtype=torch.float32), device)
    spoilt = batch._replace(x=batch.x.clone())
    spoilt.x[3, 2, 4] = bad
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
