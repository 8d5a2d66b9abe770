"""Are weights of any size normalised, and arguments that contradict them refused?"""

from __future__ import annotations

import math

import pytest
import torch

import otalign

from ..helpers.problems import close, draw, draw_weights, identical, leaf, offsets
from ..helpers.refusals import check, rejected

BATCH = draw((7, 1, 5), (4, 3, 6), dtype=torch.float32)
ARGUMENTS = BATCH.x, BATCH.y, BATCH.x_lengths, BATCH.y_lengths
WEIGHTS = draw_weights(BATCH.x_lengths, BATCH.x.shape[1])
X, Y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)


def losses(a, **options):
    return otalign.sinkhorn_loss(*ARGUMENTS, a, reduction="none", **options)


@pytest.mark.parametrize("scale", [1e38, 3e-39, 2.0**-120])
def test_sums_neither_overflow_nor_vanish(backend, scale):
    """float32 represents every weight here, but not the sum of the large ones, nor all digits of the small ones."""
    weights = (WEIGHTS / 1.2).float()
    scaled = (weights.double() * scale).float()
    close(losses(scaled, backend=backend), losses(scaled.double(), backend=backend), 1e-6)
    if math.log2(scale).is_integer():
        identical(losses(scaled, backend=backend), losses(weights, backend=backend))


def test_packed_sums_neither_overflow_nor_vanish(backend):
    for scale in (1e38, 3e-39):
        a = torch.cat([w[:n] for w, n in zip(WEIGHTS / 1.2 * scale, BATCH.x_lengths.tolist(), strict=True)])
        found = otalign.sinkhorn_loss(**BATCH.packed(), a=a.float(), reduction="none", backend=backend)
        close(found, losses(WEIGHTS, backend=backend), 2e-6 if scale > 1 else 1e-4)


def test_float64_weights_keep_their_range():
    """In float32 problems: weights below the smallest float32 beside weights above the largest."""
    for scale in (1e-200, 1e200, 1e308):
        identical(losses(WEIGHTS / 1.2 * scale), losses(WEIGHTS / 1.2 * scale / scale))


@pytest.mark.parametrize("scale", [1e38, 1e-30])
def test_gradient_of_scaled_weights(scale):
    """The value does not depend on the scale, so its gradient is proportional to 1 / scale."""
    weights = (WEIGHTS / 1.2).float().nan_to_num()
    one, scaled = leaf(weights), leaf(weights * scale)
    losses(one, tol=1e-6, max_iter=5000).sum().backward()
    losses(scaled, tol=1e-6, max_iter=5000).sum().backward()
    close(scaled.grad.double() * scale, one.grad.double(), 1e-4)


def test_infinite_weight_affects_only_its_item(backend):
    weights = WEIGHTS.float()
    weights[0, 1] = math.inf
    found = losses(weights, backend=backend)
    assert found[0].isnan()
    identical(found[1:], losses(WEIGHTS.float(), backend=backend)[1:])
    check(
        otalign.sinkhorn_loss, ValueError, ["a:", "non-negative", "-inf"], {"x": X, "y": Y, "a": X[..., 0] * -math.inf}
    )


@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float64, 1e300)])
def test_norms_of_any_size(dtype, size):
    """The norms must be within the range of the type, their squares need not."""
    x = torch.rand(1, 5, 3).double().add(0.1)
    y = torch.rand(1, 4, 3).double()
    found = otalign.sinkhorn_loss((x * size).to(dtype), y.to(dtype), a="norm")
    close(found.double(), otalign.sinkhorn_loss(x, y, a=torch.linalg.vector_norm(x, dim=-1)), 1e-6)


@pytest.mark.parametrize("shape", [(1, 7 + 2), (7 + 2,)])
def test_one_row_for_all_items(backend, shape):
    """The gradient of the row is the sum over the items."""
    row = leaf(torch.rand(shape) + 0.1)
    every = leaf(row.detach().expand(3, 9))
    found, expected = losses(row, backend=backend), losses(every, backend=backend)
    identical(found, expected)
    for result in (found, expected):
        result.sum().backward()
    close(row.grad.reshape(-1), every.grad.sum(0), 1e-6)


def test_weights_of_an_empty_batch_have_zero_gradients(backend):
    """The gradients are not None: DistributedDataParallel waits for every registered parameter."""
    a, b = leaf(torch.ones(2, 5)), leaf(torch.ones(2, 4))
    for options in ({"x_lengths": torch.tensor([0, 0])}, {"y_lengths": torch.tensor([0, 0])}):
        a.grad = b.grad = None
        otalign.sinkhorn_loss(X, Y, a=a, b=b, backend=backend, **options).backward()
        identical(a.grad, torch.zeros(2, 5))
        identical(b.grad, torch.zeros(2, 4))


def test_weights_of_no_items_have_gradients(backend):
    a, b = leaf(torch.ones(0, 5)), leaf(torch.ones(0, 4))
    otalign.sinkhorn_loss(X[:0], Y[:0], a=a, b=b, backend=backend).backward()
    assert a.grad is not None and b.grad is not None


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "euclidean", "dot"])
def test_points_without_dimensions(backend, cost):
    """All costs are 0 (cosine: 1, as between zero vectors). The gradients exist, and are empty."""
    x, y, a = leaf(X[..., :0]), leaf(Y[..., :0]), leaf(torch.rand(2, 5) + 0.1)
    found = otalign.sinkhorn_loss(x, y, torch.tensor([5, 3]), a=a, cost=cost, reduction="none", backend=backend)
    close(found, torch.full((2,), float(cost == "cosine")), 1e-6)
    found.sum().backward()
    assert x.grad.shape == (2, 5, 0) and y.grad.shape == (2, 4, 0)
    close(a.grad, torch.zeros(2, 5), 1e-6)


def jagged(*lengths, width=()):
    return torch.nested.nested_tensor([torch.rand(n, *width) for n in lengths], layout=torch.jagged)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        rejected(ValueError, "a:", "[3, 2]", "[2, 3]", a=jagged(2, 3)),
        rejected(ValueError, "a:", "2 items", "got 3", a=jagged(2, 2, 1)),
        rejected(ValueError, "a:", "one weight for every point", "nested", a=jagged(3, 2, width=(1,))),
        rejected(ValueError, "b:", "(2, 4)", "nested", b=jagged(4, 4)),
        rejected(
            ValueError, "a:", "torch.jagged", "strided", a=torch.nested.nested_tensor([torch.rand(3), torch.rand(2)])
        ),
    ],
)
def test_nested_weights(error, words, arguments):
    check(otalign.sinkhorn_loss, error, words, {"x": jagged(3, 2, width=(3,)), "y": Y} | arguments)


def test_nested_weights_of_the_points_own_lengths(backend):
    x, a = jagged(3, 2, width=(3,)), jagged(3, 2)
    found = otalign.sinkhorn_loss(x, Y, a=a, backend=backend)
    identical(found, otalign.sinkhorn_loss(x.values(), Y, a=a.values(), cu_seqlens_x=x.offsets(), backend=backend))


def test_nested_of_another_ragged_dimension():
    x = jagged(3, 3, width=(3,)).transpose(1, 2)
    check(otalign.sinkhorn_loss, ValueError, ["x:", "transpose"], {"x": x, "y": Y})


@pytest.mark.parametrize(
    "kind", [list, tuple, torch.Tensor.numpy, lambda t: t.int().numpy(), lambda t: t.numpy().astype("u2")]
)
def test_lengths_as_lists(backend, kind):
    lengths = torch.tensor([5, 3])
    of = (lambda t: kind(t.tolist())) if kind in (list, tuple) else kind
    expected = otalign.sinkhorn_loss(X, Y, lengths, reduction="none", backend=backend)
    identical(otalign.sinkhorn_loss(X, Y, of(lengths), reduction="none", backend=backend), expected)
    rows = torch.cat([X[0], X[1, :3]])
    found = otalign.sinkhorn_loss(rows, Y, cu_seqlens_x=of(offsets(lengths)), reduction="none", backend=backend)
    identical(found, expected)


def test_no_lengths_of_no_items():
    assert otalign.sinkhorn_loss(X[:0], Y[:0], [], []) == 0
