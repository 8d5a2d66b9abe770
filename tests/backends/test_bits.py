"""Does an item have the same bits in any batch, in any layout and at any address?

The rounding of a BLAS may depend on where in a cache line a matrix starts, and on the distance of its rows: MKL's does on AMD
processors, and on Intel's below AVX2. The BLAS of these tests does so on every machine, and by far more than rounding.
"""

import ctypes

import numpy as np
import pytest
import torch

import otalign
from otalign import backends

from ..helpers.blas_by_address import by_address
from ..helpers.problems import draw, identical, leaf
from ..helpers.processes import run_program
from ..helpers.views import gathered, offset, sliced, transposed

LENGTHS = [40, 3, 0, 390, 17, 1, 8], [20, 9, 4, 6, 17, 5, 1]  # 390: two blocks of the cost, four panels of its gradient
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
DIMS = [13, 48]  # rows that start anywhere in a cache line, and rows that fill lines


@pytest.fixture
def blas_by_address():
    """The engine uses the BLAS whose results depend on the address."""
    engine = backends.extension.module()
    products = by_address(ctypes.c_float), by_address(ctypes.c_double)
    engine.use_blas("by address", *(ctypes.cast(product, ctypes.c_void_p).value for product in products), 0, 0, 0)
    yield
    engine.use_blas(*backends.extension._blas())


def solve(x, y, lengths, *, packed=False, cost="cosine", objective="transport"):
    """Losses (B,), gradients and plans. `lengths` are offsets if the points are packed."""
    names = ("cu_seqlens_x", "cu_seqlens_y") if packed else ("x_lengths", "y_lengths")
    options = {"cost": cost, "reg": 0.2, "tol": 0, "max_iter": 10, "backend": "cpu"}
    arguments = dict(zip(names, lengths, strict=True)) | options
    loss = otalign.sinkhorn_loss(x, y, objective=objective, reduction="none", **arguments)
    loss.backward(torch.ones_like(loss))
    plan = otalign.solve(x.detach(), y.detach(), **arguments).plan()
    return loss.detach(), x.grad, y.grad, plan


def draw_batch(D, dtype):
    return draw(*LENGTHS, D=D, dtype=dtype)


def test_blas_by_address_depends_on_the_address(blas_by_address):
    """Otherwise the tests below could not fail."""
    product = by_address(ctypes.c_double)
    memory = np.zeros(64 + 8)
    start = -memory.ctypes.data % 64 // 8
    results = []
    for shift in (0, 1):
        a, b, c = (memory[start + at : start + at + 4] for at in (shift, 16, 32))
        a[:], b[:] = 1, 1
        size, one, zero = ctypes.c_int(2), ctypes.c_double(1), ctypes.c_double(0)
        product(b"N", b"N", size, size, size, one, a.ctypes.data, size, b.ctypes.data, size, zero, c.ctypes.data, size)
        results.append(c.copy())
    np.testing.assert_allclose(results, 2, rtol=1e-3)
    assert (results[0] != results[1]).all()


@pytest.mark.parametrize(
    ("cost", "objective"),
    [("cosine", "value"), ("sqeuclidean", "transport"), ("euclidean", "value"), ("dot", "divergence")],
)
@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_equals_padded(blas_by_address, dtype, D, cost, objective):
    batch = draw_batch(D, dtype)
    options = {"cost": cost, "objective": objective}
    expected = solve(leaf(batch.x), leaf(batch.y), batch[2:], **options)
    packed = batch.packed()
    points, lengths = (leaf(packed["x"]), leaf(packed["y"])), (packed["cu_seqlens_x"], packed["cu_seqlens_y"])
    loss, dx, dy, plan = solve(*points, lengths, packed=True, **options)
    identical(loss, expected[0])
    identical(dx, gathered(expected[1], batch.x_lengths))
    identical(dy, gathered(expected[2], batch.y_lengths))
    identical(plan, expected[3][:, : plan.shape[1], : plan.shape[2]])


def columns(t):
    return torch.nn.functional.pad(t, (16, 16), value=torch.nan)[..., 16:-16]


@pytest.mark.parametrize("view", [transposed, sliced, columns, offset])
@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views(blas_by_address, dtype, D, view):
    """Strided points, and points that do not start at a cache line."""
    batch = draw_batch(D, dtype)
    expected = solve(leaf(batch.x), leaf(batch.y), batch[2:])
    views = [view(points).requires_grad_() for points in batch[:2]]
    for ours, theirs in zip(solve(*views, batch[2:]), expected, strict=True):
        identical(ours, theirs)


@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_with_more_padding_and_in_another_order(blas_by_address, dtype, D):
    batch = draw_batch(D, dtype)
    loss, dx, dy, plan = solve(leaf(batch.x), leaf(batch.y), batch[2:])
    for index, (x, y) in enumerate(batch.items()):
        alone = solve(leaf(x[None]), leaf(y[None]), (torch.tensor([len(x)]), torch.tensor([len(y)])))
        theirs = loss[[index]], dx[[index], : len(x)], dy[[index], : len(y)], plan[[index], : len(x), : len(y)]
        for ours, expected in zip(alone, theirs, strict=True):
            identical(ours, expected)
    wide = [torch.nn.functional.pad(points, (0, 0, 0, rows)) for points, rows in zip(batch[:2], (1, 5), strict=True)]
    wider = solve(*map(leaf, wide), batch[2:])
    identical(wider[0], loss)
    identical(wider[1][:, : dx.shape[1]], dx)
    identical(wider[2][:, : dy.shape[1]], dy)
    order = [3, 6, 0, 5, 2, 4, 1]
    moved = solve(leaf(batch.x[order]), leaf(batch.y[order]), (batch.x_lengths[order], batch.y_lengths[order]))
    for ours, theirs in zip(moved, (loss, dx, dy, plan), strict=True):
        identical(ours, theirs[order])


@pytest.mark.parametrize("D", [520, 528])
def test_slices_of_the_gradient(blas_by_address, D):
    """Items so large that the engine computes their gradients in two slices of columns."""
    batch = draw([300, 7], [250, 9], D=D, dtype=torch.float32)
    expected = solve(leaf(batch.x), leaf(batch.y), batch[2:])
    views = [columns(points).requires_grad_() for points in batch[:2]]
    for ours, theirs in zip(solve(*views, batch[2:]), expected, strict=True):
        identical(ours, theirs)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_points_of_extreme_norm(blas_by_address, size):
    """Points of extreme norm, which the engine rescales in a copy."""
    batch = draw_batch(13, torch.float32)
    batch.x[0, 5] *= size
    batch.y[3, 2] *= size
    expected = solve(leaf(batch.x), leaf(batch.y), batch[2:])
    views = [offset(points).requires_grad_() for points in batch[:2]]
    for _ in range(3):
        for ours, theirs in zip(solve(*views, batch[2:]), expected, strict=True):
            identical(ours, theirs)
        views = [leaf(view) for view in views]


def test_packed_equals_padded_with_old_instruction_sets():
    """MKL's products depend on the address below AVX2. With another BLAS this is one more test of the layouts."""
    assert float(run_program("packed_against_padded", MKL_ENABLE_INSTRUCTIONS="SSE4_2")) == 0
