"""Are the results independent of the layout of the points in memory?"""

import pytest
import torch

import otalign

from ..helpers.problems import close, draw, draw_weights, identical, leaf, offsets, same_on
from ..helpers.views import gathered, offset, sliced, transposed

OPTIONS = {"cost": "sqeuclidean", "reg": 0.2, "tol": 0, "max_iter": 6}
OBJECTIVES = ["value", "plan_cost", "transport", "divergence"]


@pytest.fixture
def batch():
    return draw([7, 1, 5, 0, 9], [4, 3, 6, 2, 1])


def solve_with_gradients(leaves, objective, backend, **extra):
    """Losses (B,) for these keyword arguments, and the gradients of x and y."""
    loss = otalign.sinkhorn_loss(**leaves, objective=objective, reduction="none", backend=backend, **OPTIONS, **extra)
    loss.backward(torch.linspace(1, 2, len(loss)).to(loss))
    return loss.detach(), leaves["x"].grad, leaves["y"].grad


def padded(batch):
    return batch.requires_grad()._asdict()


def packed(batch):
    arguments = batch.packed()
    return arguments | {"x": leaf(arguments["x"]), "y": leaf(arguments["y"])}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_equals_padded(backend, batch, objective):
    same = same_on(backend)
    loss, dx, dy = solve_with_gradients(padded(batch), objective, backend)
    packed_loss, packed_dx, packed_dy = solve_with_gradients(packed(batch), objective, backend)
    same(packed_loss, loss)
    same(packed_dx, gathered(dx, batch.x_lengths))
    same(packed_dy, gathered(dy, batch.y_lengths))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batch_equals_single_items(backend, batch, objective):
    loss, dx, dy = solve_with_gradients(padded(batch), objective, backend)
    for index, (x, y) in enumerate(batch.items()):
        leaves = {"x": leaf(x[None]), "y": leaf(y[None])}
        alone = otalign.sinkhorn_loss(**leaves, objective=objective, reduction="sum", backend=backend, **OPTIONS)
        alone.backward()
        scale = float(torch.linspace(1, 2, len(loss))[index])
        close(loss[index], alone, 1e-12)
        close(dx[index, : len(x)], scale * leaves["x"].grad[0], 1e-7)
        close(dy[index, : len(y)], scale * leaves["y"].grad[0], 1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_jagged_equals_packed(backend, batch, objective):
    same = same_on(backend)
    arguments = packed(batch)
    loss, dx, dy = solve_with_gradients(arguments, objective, backend)
    values = {side: leaf(arguments[side].detach()) for side in "xy"}
    nested = {
        side: torch.nested.nested_tensor_from_jagged(values[side], arguments[f"cu_seqlens_{side}"]) for side in "xy"
    }
    jagged = otalign.sinkhorn_loss(**nested, objective=objective, reduction="none", backend=backend, **OPTIONS)
    jagged.backward(torch.linspace(1, 2, len(jagged)).to(jagged))
    same(jagged.detach(), loss)
    same(values["x"].grad, dx)
    same(values["y"].grad, dy)


def test_the_sides_may_differ_in_layout(backend, batch):
    same = same_on(backend)
    arguments = padded(batch)
    expected, dx, dy = solve_with_gradients(arguments, "value", backend)
    mixed = packed(batch)
    mixed = {
        "x": mixed["x"],
        "cu_seqlens_x": mixed["cu_seqlens_x"],
        "y": leaf(batch.y),
        "y_lengths": batch.y_lengths,
    }
    loss, mixed_dx, mixed_dy = solve_with_gradients(mixed, "value", backend)
    same(loss, expected)
    same(mixed_dx, gathered(dx, batch.x_lengths))
    same(mixed_dy, dy)


def features_first(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)  # as a convolution returns them


@pytest.mark.parametrize("objective", ["value", "transport"])
@pytest.mark.parametrize("view", [transposed, sliced, features_first, offset])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strides(backend, batch, view, objective, dtype):
    batch = batch.to(dtype)
    expected, dx, dy = solve_with_gradients(padded(batch), objective, backend)
    leaves = padded(batch)
    views = {side: view(batch._asdict()[side]).requires_grad_() for side in "xy"}
    for side in "xy":
        assert view is offset or not views[side].is_contiguous()
        identical(views[side].detach(), leaves[side].detach())
    loss, view_dx, view_dy = solve_with_gradients(leaves | views, objective, backend)
    tol = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 1e-2
    close(loss, expected, tol)
    close(view_dx, dx, tol)
    close(view_dy, dy, tol)


def test_expanded_points(backend):
    """One text for all items has stride zero, and its gradients add up."""
    same = same_on(backend)
    x, text = torch.randn(3, 6, 4, dtype=torch.float64), leaf(torch.randn(5, 4, dtype=torch.float64))
    copies = leaf(text[None].repeat(3, 1, 1))
    shared = otalign.sinkhorn_loss(x, text[None].expand(3, 5, 4), backend=backend, **OPTIONS)
    apart = otalign.sinkhorn_loss(x, copies, backend=backend, **OPTIONS)
    shared.backward()
    apart.backward()
    same(shared, apart)
    close(text.grad, copies.grad.sum(0), 1e-12)


@pytest.mark.parametrize("view", [transposed, sliced, features_first, offset])
def test_strides_of_a_given_cost(backend, view):
    C, lengths = torch.rand(3, 6, 4, dtype=torch.float64), (torch.tensor([6, 2, 5]), torch.tensor([4, 4, 1]))
    one, two = leaf(C), view(C).requires_grad_()
    options = {"reg": 0.1, "backend": backend}
    for cost in (one, two):
        result = otalign.solve_cost(cost, *lengths, **options)
        (result.value.sum() + result.value_linear.sum() + result.plan().square().sum()).backward()
    close(two.grad, one.grad, 1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_types_of_lengths(backend, batch, dtype):
    same = same_on(backend)
    expected = otalign.sinkhorn_loss(*batch, backend=backend)
    lengths = batch.x_lengths.to(dtype), batch.y_lengths.to(dtype)
    same(otalign.sinkhorn_loss(batch.x, batch.y, *lengths, backend=backend), expected)
    arguments = batch.packed()
    arguments |= {name: value.to(dtype) for name, value in arguments.items() if name.startswith("cu")}
    same(otalign.sinkhorn_loss(**arguments, backend=backend), expected)


def test_no_lengths_means_full(backend):
    same = same_on(backend)
    x, y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    full = otalign.sinkhorn_loss(x, y, torch.tensor([5, 5]), torch.tensor([4, 4]), backend=backend)
    same(otalign.sinkhorn_loss(x, y, backend=backend), full)


@pytest.mark.parametrize("mixed", [(torch.float64, torch.float32), (torch.bfloat16, torch.float32)])
def test_sides_of_different_dtypes(backend, batch, mixed):
    x, y = batch.x.to(mixed[0]), batch.y.to(mixed[1])
    leaves = {"x": leaf(x), "y": leaf(y), "x_lengths": batch.x_lengths, "y_lengths": batch.y_lengths}
    loss, dx, dy = solve_with_gradients(leaves, "value", backend)
    wide = {"x": leaf(x.double()), "y": leaf(y.double())}
    expected, wide_dx, wide_dy = solve_with_gradients(leaves | wide, "value", "reference")
    assert loss.dtype == (torch.float64 if torch.float64 in mixed else torch.float32)
    assert (dx.dtype, dy.dtype) == mixed
    close(loss, expected, 1e-5)
    close(dx.double(), wide_dx, 1e-2)
    close(dy.double(), wide_dy, 1e-2)


def test_packed_results_are_packed(backend, batch):
    """Up to rounding: the sums that normalise the weights are made in another order."""
    arguments = batch.packed()
    a = draw_weights(batch.x_lengths, batch.x.shape[1])
    result = otalign.solve(*batch, a, backend=backend, **OPTIONS)
    flat = otalign.solve(**arguments, a=gathered(a, batch.x_lengths), backend=backend, **OPTIONS)
    close(flat.value, result.value, 1e-12)
    for ours, theirs, lengths in zip(flat.potentials, result.potentials, batch[2:], strict=True):
        close(ours, gathered(theirs, lengths), 1e-12)
    close(flat.barycentric_x(), gathered(result.barycentric_x(), batch.x_lengths), 1e-12)
    close(flat.barycentric_y(), gathered(result.barycentric_y(), batch.y_lengths), 1e-12)
    identical(flat.assign_y(), gathered(result.assign_y(), batch.y_lengths))
    close(flat.plan(), result.plan()[:, :9, :6], 1e-12)
    start = {"a": gathered(a, batch.x_lengths), "init": flat.potentials}
    again = otalign.solve(**arguments, **start, backend=backend, **OPTIONS | {"max_iter": 1})
    assert (again.error <= result.error + 1e-12).all()


def test_rows_behind_the_last_packed_item_are_not_read(backend, batch):
    same = same_on(backend)
    arguments = batch.packed()
    longer = arguments | {
        side: torch.cat([arguments[side], torch.full((3, arguments[side].shape[1]), torch.nan)]) for side in "xy"
    }
    longer = {name: leaf(value) if name in ("x", "y") else value for name, value in longer.items()}
    loss, dx, _ = solve_with_gradients(longer, "value", backend)
    expected, expected_dx, _ = solve_with_gradients(packed(batch), "value", backend)
    same(loss, expected)
    same(dx[:-3], expected_dx)
    same(dx[-3:], torch.zeros_like(dx[-3:]))
    result = otalign.solve(**{name: value.detach() for name, value in longer.items()}, backend=backend)
    same(result.potentials[0][-3:], torch.zeros(3, dtype=torch.float64))
    assert result.assign_y()[-3:].tolist() == [-1] * 3


@pytest.mark.parametrize("longest", [9, 14])
def test_max_seqlen(backend, batch, longest):
    """max_seqlen saves reading the offsets. It only sets the size of the plan."""
    same = same_on(backend)
    arguments = batch.packed()
    expected = otalign.solve(**arguments, backend=backend)
    result = otalign.solve(**arguments, max_seqlen_x=longest, max_seqlen_y=6, backend=backend)
    same(result.value, expected.value)
    assert result.plan().shape == (5, longest, 6)
    same(result.plan()[:, :9], expected.plan())


def test_offsets_with_empty_items(backend):
    lengths = torch.tensor([0, 3, 0, 0, 2, 0])
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    losses = otalign.sinkhorn_loss(
        x, y, cu_seqlens_x=offsets(lengths), cu_seqlens_y=offsets(lengths), reduction="none", backend=backend
    )
    for index, (start, length) in enumerate(zip(offsets(lengths)[:-1].tolist(), lengths.tolist(), strict=True)):
        rows = slice(start, start + length)
        alone = otalign.sinkhorn_loss(x[None, rows], y[None, rows], backend=backend)
        close(losses[index], alone, 1e-12)
