"""Are costs and gradients right for the largest and the smallest numbers, and NaN for items with NaN?"""

import math

import pytest
import torch

import otalign

from ..helpers.problems import close, identical

FLOAT_NORMS = [1e-44, 1e-40, 1e-30, 1e-20, 1e-18, 1e-16, 1e-10, 1e10, 1e14, 1e16, 1e18, 3e19, 1e30, 1e37]
DOUBLE_NORMS = [1e-320, 1e-300, 1e-200, 1e-160, 1e-150, 1e150, 1e160, 1e200, 1e300]
BACKENDS = ["cpu", "triton"]


def solved(x, y, **options):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    loss = otalign.sinkhorn_loss(x, y, reg=0.2, tol=0, max_iter=50, **options)
    return loss.detach(), *torch.autograd.grad(loss, (x, y))


def truth(x, y, **options):
    """The same problem in float64, with the rounded points. The squares of all float32 numbers are within its range."""
    return solved(x.double(), y.double(), backend="reference", **options)


def agree(ours, expected, tolerance):
    """Compare row by row, relative to the size of the row, wherever float32 can represent it."""
    highest = torch.finfo(ours.dtype).max
    size = expected.abs().amax(-1, keepdim=True)
    held = (size < highest / 4).expand_as(expected) & (size > torch.finfo(ours.dtype).tiny * 1e4)
    assert not ours.isnan().any()
    apart = torch.where(held, (ours.double() - expected) / size, 0).abs()
    assert apart.max() < tolerance, apart.max()


@pytest.mark.parametrize("objective", ["value", "transport"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("norm", FLOAT_NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_extreme_point_under_the_cosine(backend, norm, side, objective):
    points = [torch.randn(1, n, 7) for n in (6, 5)]
    points[side][0, 2] *= norm
    ours, expected = solved(*points, backend=backend, objective=objective), truth(*points, objective=objective)
    close(ours[0].double(), expected[0], 1e-5)
    for one, two in zip(ours[1:], expected[1:], strict=True):
        agree(one, two, 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_points_on_both_sides(backend):
    x, y = torch.randn(1, 14, 9), torch.randn(1, 14, 9)
    x *= torch.tensor(FLOAT_NORMS)[:, None]
    y *= torch.tensor(FLOAT_NORMS).flip(0)[:, None]
    ours, expected = solved(x, y, backend=backend), truth(x, y)
    close(ours[0].double(), expected[0], 1e-5)
    for one, two in zip(ours[1:], expected[1:], strict=True):
        agree(one, two, 1e-3)


@pytest.mark.parametrize("norm", DOUBLE_NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_points_in_float64(backend, norm):
    """The cosine ignores norms: the gradient by a point is the gradient by its direction, divided by its norm."""
    x, y = (torch.randn(1, n, 7, dtype=torch.float64) for n in (6, 5))
    factor = 2.0 ** round(math.log2(norm))
    extreme = x.clone()
    extreme[0, 1] *= factor
    loss, dx, dy = solved(extreme, y, backend=backend)
    direction = x.clone()
    direction[0, 1] = (extreme[0, 1] * 2.0**300) / (factor * 2.0**300) if factor < 1 else extreme[0, 1] / factor
    expected = solved(direction, y, backend="reference")
    close(loss, expected[0], 1e-12)
    close(dy, expected[2], 1e-10)
    others = [0, 2, 3, 4, 5]
    close(dx[0, others], expected[1][0, others], 1e-10)
    if norm > 1e-300:
        close(dx[0, 1] * factor, expected[1][0, 1], 1e-10)
    assert not dx.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_beside_an_extreme_norm(backend, dtype):
    """Rescaling the extreme point does not hide the NaN: its item is NaN, and only this item."""
    x, y = torch.randn(2, 6, 5, dtype=dtype), torch.randn(2, 4, 5, dtype=dtype)
    x[:, 3] *= 1e-20
    spoilt = x.clone()
    spoilt[1, 1] = math.nan
    results = [otalign.solve(points, y, backend=backend) for points in (x, spoilt)]
    assert results[0].value.isfinite().all()
    assert results[1].value[1].isnan()
    assert results[1].converged.tolist() == [True, False]
    identical(results[1].value[0], results[0].value[0])
    identical(results[1].plan()[0], results[0].plan()[0])
    for bad in (math.nan, math.inf, -math.inf):
        for place in ((1, 1, 2), (1, 3, 0)):
            one = x.clone()
            one[place] = bad
            assert otalign.solve(one, y, backend=backend).value.isnan().tolist() == [False, True]


@pytest.mark.parametrize("scale", [1e-28, 1e-25, 1e-22, 1e-19, 1e18, 1e20, 1e30, 1e36])
@pytest.mark.parametrize("backend", ["cpu"])
def test_extreme_distances(backend, scale):
    """The squared distances leave the range of float32; the distances do not."""
    x, y = scale * torch.randn(1, 6, 7), scale * torch.randn(1, 5, 7)
    x[0, 1] = y[0, 1] = 0
    options = {"cost": "euclidean"}
    leaves = [points.clone().requires_grad_() for points in (x, y)]
    result = otalign.solve(*leaves, reg=scale, tol=0, max_iter=50, backend=backend, **options)
    gradients = torch.autograd.grad(result.value.sum(), leaves)
    wide = [points.double().requires_grad_() for points in (x, y)]
    true = otalign.solve(*wide, reg=scale, tol=0, max_iter=50, backend="reference", **options)
    close(result.value.double() / scale, true.value / scale, 1e-5)
    for one, two in zip(gradients, torch.autograd.grad(true.value.sum(), wide), strict=True):
        close(one.double(), two, 1e-5)


@pytest.mark.parametrize("backend", ["cpu"])
def test_close_points_of_extreme_norms(backend):
    """The squared norms overflow; the squared distances do not."""
    x = 1e20 * torch.ones(1, 3, 4)
    y = x.clone()
    y[0, :, 0] *= 1 + 2.0**-20
    result = otalign.solve(x, y, cost="sqeuclidean", reg=1e28, tol=0, max_iter=20, backend=backend)
    true = otalign.solve(x.double(), y.double(), cost="sqeuclidean", reg=1e28, tol=0, max_iter=20, backend="reference")
    assert result.value.isfinite().all()
    close(result.value.double() / true.value, torch.ones(1, dtype=torch.float64), 1e-5)
