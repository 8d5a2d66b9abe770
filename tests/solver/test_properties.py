"""Do the results have the properties of optimal transport for any problem? (Property-based.)"""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import otalign
from otalign import Prior

from ..helpers.problems import Batch, close, draw, draw_weights, same_on

INF = math.inf
COSTS = st.sampled_from(["cosine", "sqeuclidean", "euclidean", "dot"])
OBJECTIVES = st.sampled_from(["value", "plan_cost", "transport", "divergence"])
RHOS = st.sampled_from([None, 0.5, (0.2, 3.0), (INF, 0.4), (0.4, INF)])
PRIORS = st.sampled_from(
    [None, Prior.quadratic(1.0), Prior.absolute(0.5), Prior.order_preserving(0.3, 1.0), Prior.band(2.0)]
)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
REGS = st.sampled_from([0.05, 0.2, 1.0, 10.0])
POISON = st.sampled_from([math.nan, INF, -INF, 6e4])
# Close to convergence, for the properties of the optimum.
TIGHT = {"tol": 1e-9, "max_iter": 3000}


@st.composite
def batches(draw_value, smallest: int = 0, most_items: int = 4) -> Batch:
    items = draw_value(st.integers(1, most_items))
    lengths = st.lists(st.integers(smallest, 9), min_size=items, max_size=items)
    return draw(
        draw_value(lengths),
        draw_value(lengths),
        draw_value(st.integers(1, 6)),
        seed=draw_value(st.integers(0, 2**20)),
    )


def loss_and_gradients(batch: Batch, **options):
    leaves = batch.requires_grad()
    losses = otalign.sinkhorn_loss(*leaves, reduction="none", **options)
    losses.sum().backward()
    return losses.detach(), leaves.x.grad, leaves.y.grad


@given(batch=batches(), poison=POISON, dtype=DTYPES, cost=COSTS, objective=OBJECTIVES, rho=RHOS, prior=PRIORS)
def test_padding_changes_nothing(backend, batch, poison, dtype, cost, objective, rho, prior):
    same = same_on(backend)
    clean, dirty = (
        Batch(x.nan_to_num(fill), y.nan_to_num(fill), *batch[2:]).to(dtype)
        for fill in (0.0, poison)
        for x, y in [(batch.x, batch.y)]
    )
    if math.isnan(poison):
        dirty = batch.to(dtype)
    options = {"cost": cost, "objective": objective, "unbalanced": rho, "prior": prior, "reg": 0.2, "max_iter": 20}
    expected = loss_and_gradients(clean, backend=backend, **options)
    for ours, theirs in zip(loss_and_gradients(dirty, backend=backend, **options), expected, strict=True):
        same(ours, theirs)
        assert ours.isfinite().all()


@given(batch=batches(smallest=1), poison=POISON, rho=RHOS)
def test_padding_changes_nothing_in_a_result(backend, batch, poison, rho):
    same = same_on(backend)
    a, b = draw_weights(batch.x_lengths, batch.x.shape[1]), draw_weights(batch.y_lengths, batch.y.shape[1])
    results = [
        otalign.solve(
            Batch(*(t.nan_to_num(fill) for t in batch)).x,
            batch.y.nan_to_num(fill),
            *batch[2:],
            a.nan_to_num(abs(fill)),
            b.nan_to_num(abs(fill)),
            unbalanced=rho,
            max_iter=20,
            backend=backend,
        )
        for fill in (0.0, poison)
    ]
    for name in ("value", "value_linear", "n_iter", "error", "converged"):
        same(getattr(results[1], name), getattr(results[0], name))
    for name in ("plan", "barycentric_x", "barycentric_y", "assign_y"):
        same(getattr(results[1], name)(), getattr(results[0], name)())
    for ours, theirs, lengths in zip(results[1].potentials, results[0].potentials, batch[2:], strict=True):
        same(ours, theirs)
        assert not ours[torch.arange(ours.shape[1]) >= lengths[:, None]].any()


@given(batch=batches(), extra=st.integers(0, 40), cost=COSTS, objective=OBJECTIVES)
def test_more_padding_changes_nothing(backend, batch, extra, cost, objective):
    same = same_on(backend)
    wider = Batch(
        torch.nn.functional.pad(batch.x, (0, 0, 0, extra)),
        torch.nn.functional.pad(batch.y, (0, 0, 0, extra // 2)),
        *batch[2:],
    )
    options = {"cost": cost, "objective": objective, "reg": 0.2, "max_iter": 20, "backend": backend}
    expected, dx, dy = loss_and_gradients(batch, **options)
    losses, wider_dx, wider_dy = loss_and_gradients(wider, **options)
    same(losses, expected)
    same(wider_dx[:, : dx.shape[1]], dx)
    same(wider_dy[:, : dy.shape[1]], dy)


@given(batch=batches(most_items=6), cost=COSTS, rho=RHOS, prior=PRIORS, reg=REGS)
def test_batched_equals_packed_equals_single_items(backend, batch, cost, rho, prior, reg):
    same = same_on(backend)
    options = {"cost": cost, "unbalanced": rho, "prior": prior, "reg": reg, "max_iter": 20, "backend": backend}
    result = otalign.solve(*batch, **options)
    packed = otalign.solve(**batch.packed(), **options)
    for name in ("value", "value_linear", "n_iter", "error"):
        same(getattr(packed, name), getattr(result, name))
    for index, (x, y) in enumerate(batch.items()):
        alone = otalign.solve(x[None], y[None], **options)
        close(result.value[index], alone.value[0], 1e-11)
        close(result.plan()[index, : len(x), : len(y)], alone.plan()[0], 1e-11)
        assert result.n_iter[index] == alone.n_iter[0]


@given(batch=batches(smallest=1, most_items=6), cost=COSTS, data=st.data())
def test_order_of_items(backend, batch, cost, data):
    same = same_on(backend)
    order = data.draw(st.permutations(range(len(batch.x))))
    options = {"cost": cost, "reg": 0.2, "max_iter": 20, "backend": backend}
    expected, dx, _ = loss_and_gradients(batch, **options)
    losses, moved_dx, _ = loss_and_gradients(Batch(*(part[order] for part in batch)), **options)
    same(losses, expected[order])
    same(moved_dx, dx[order])


@given(batch=batches(smallest=1, most_items=1), cost=COSTS, rho=RHOS, data=st.data())
def test_order_of_points(backend, batch, cost, rho, data):
    """Without a prior, the result does not depend on the order of the points."""
    ((x, y),) = batch.items()
    i, j = (data.draw(st.permutations(range(len(points)))) for points in (x, y))
    options = {"cost": cost, "unbalanced": rho, "reg": 0.2, "max_iter": 20, "backend": backend}
    before, after = otalign.solve(x[None], y[None], **options), otalign.solve(x[None, i], y[None, j], **options)
    close(after.value, before.value, 1e-10)
    close(after.plan()[0], before.plan()[0][i][:, j], 1e-10)


@given(batch=batches(smallest=1), cost=COSTS, rho=RHOS, reg=st.sampled_from([0.3, 1.0]))
def test_swapping_the_sides(backend, batch, cost, rho, reg):
    options = {"cost": cost, "reg": reg, "backend": backend, **TIGHT}
    there = otalign.solve(*batch, unbalanced=rho, **options)
    swapped = rho[::-1] if isinstance(rho, tuple) else rho
    back = otalign.solve(batch.y, batch.x, batch.y_lengths, batch.x_lengths, unbalanced=swapped, **options)
    close(back.value, there.value, 1e-6)
    close(back.plan().mT, there.plan(), 1e-5)


@given(
    seed=st.integers(0, 2**20),
    offset=st.floats(-5, 5),
    scale=st.floats(0.01, 100),
    reg=REGS,
)
def test_offset_and_scale_of_the_cost(backend, seed, offset, scale, reg):
    """C -> s C + t with reg -> s reg: the same plan, the same iterations, value s v + t."""
    C = torch.rand(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before = otalign.solve_cost(C, reg=reg, max_iter=30, tol=0, backend=backend)
    after = otalign.solve_cost(scale * C + offset, reg=scale * reg, max_iter=30, tol=0, backend=backend)
    close(after.plan(), before.plan(), 1e-9)
    close(after.value, scale * before.value + offset, 1e-10)
    close(after.value_linear, scale * before.value_linear + offset * before.plan().sum((1, 2)), 1e-10)


@given(seed=st.integers(0, 2**20), rho=RHOS)
def test_value_and_transport_cost_rise(backend, seed, rho):
    """The value rises with reg and with the cost; the transport cost rises with reg."""
    generator = torch.Generator().manual_seed(seed)
    C, more = (torch.rand(1, 6, 5, dtype=torch.float64, generator=generator) for _ in "ab")
    results = [otalign.solve_cost(C, reg=r, unbalanced=rho, backend=backend, **TIGHT) for r in (0.1, 0.3, 1.0)]
    values = [float(result.value) for result in results]
    assert values == sorted(values)
    dearer = otalign.solve_cost(C + more, reg=0.1, unbalanced=rho, backend=backend, **TIGHT)
    assert dearer.value >= values[0]
    if rho is None:
        transport = [float(result.value_linear) for result in results]
        assert transport == sorted(transport)
        # <P, C> <= value <= the cost of the product plan
        assert transport[0] <= values[0] + 1e-9
        assert values[-1] <= C.mean() + 1e-9


@given(batch=batches(smallest=1), cost=COSTS)
def test_error_never_rises(backend, batch, cost):
    """The L1 marginal error of Sinkhorn's iteration never rises."""
    errors = [
        otalign.solve(*batch, cost=cost, reg=0.1, tol=0, max_iter=n, backend=backend).error for n in (1, 2, 5, 10)
    ]
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier + 1e-12).all()


@given(seed=st.integers(0, 2**20), n=st.integers(1, 8), m=st.integers(1, 8), reg=REGS)
def test_weights_equal_copies(backend, seed, n, m, reg):
    """A point of weight two equals two points; a point of weight zero equals none."""
    ((x, y),) = draw([n], [m], seed=seed).items()
    options = {"cost": "sqeuclidean", "reg": reg, "tol": 0, "max_iter": 25, "backend": backend}
    a = torch.ones(1, n + 1, dtype=torch.float64)
    a[0, 0], a[0, -1] = 2, 0
    weighted = otalign.solve(torch.cat([x, 100 * x[:1]])[None], y[None], a=a, **options)
    copied = otalign.solve(torch.cat([x[:1], x])[None], y[None], **options)
    close(weighted.value, copied.value, 1e-9)
    close(weighted.plan()[0, 1:n], copied.plan()[0, 2:], 1e-10)
    assert not weighted.plan()[0, n].any()


@given(scale=st.floats(0.1, 1000))
def test_weights_are_normalised(backend, scale):
    batch = draw()
    a = draw_weights(batch.x_lengths, batch.x.shape[1])
    expected = otalign.solve(*batch, a, backend=backend, max_iter=20)
    close(otalign.solve(*batch, scale * a, backend=backend, max_iter=20).value, expected.value, 1e-11)


@pytest.mark.slow
@given(batch=batches(), dtype=DTYPES, cost=COSTS, objective=OBJECTIVES, rho=RHOS, prior=PRIORS, reg=REGS)
def test_everything_is_finite(backend, batch, dtype, cost, objective, rho, prior, reg):
    options = {"cost": cost, "objective": objective, "unbalanced": rho, "prior": prior, "reg": reg}
    for output in loss_and_gradients(batch.to(dtype), backend=backend, **options):
        assert output.isfinite().all()
