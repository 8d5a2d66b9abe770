"""The Triton backend on a real GPU: `pytest -m gpu`. Nothing here is skipped; without a GPU it is not selected."""

from __future__ import annotations

import math

import pytest
import torch

import otalign
from otalign import Prior

from .problems import close, draw, draw_weights, identical

pytestmark = pytest.mark.gpu

# What float32 potentials allow for at reg 0.1; gradients of 16-bit points are rounded to their type.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
RAGGED = [750, 1, 0, 300, 129], [128, 5, 7, 100, 128]
COSTS = ("cosine", "sqeuclidean", "euclidean", "dot")


@pytest.fixture(scope="module")
def device():
    assert torch.cuda.is_available(), "these tests need a GPU"
    return torch.device("cuda", torch.cuda.current_device())


def on(batch, device):
    return batch._replace(**{name: value.to(device) for name, value in batch._asdict().items()})


def everything(batch, backend, weights=(None, None), **options):
    """Values, potentials, plan, images, assignments, and the gradients of a number made of all of them."""
    leaves = [batch.x.detach().requires_grad_(), batch.y.detach().requires_grad_()]
    weights = [None if w is None else w.detach().requires_grad_() for w in weights]
    result = otalign.solve(*leaves, batch.x_lengths, batch.y_lengths, *weights, backend=backend, **options)
    plan = result.plan()
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(plan.shape, generator=generator, dtype=torch.float64).to(plan)
    total = result.value.sum() + 0.5 * result.value_linear.sum() + (plan * mask).sum()
    images = [result.barycentric_x(), result.barycentric_y()]
    total = total + sum((image * image.detach().sign()).sum() for image in images) * 0.01
    leaves += [w for w in weights if w is not None]
    gradients = torch.autograd.grad(total, leaves)
    named = {"value": result.value, "linear": result.value_linear, "plan": plan, "error": result.error}
    named |= dict(zip(("f", "g", "images of x", "images of y"), (*result.potentials, *images), strict=True))
    named |= {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return named, result


def compare(batch, device, weights=(None, None), **options):
    dtype = batch.x.dtype
    moved = [None if w is None else w.to(device) for w in weights]
    actual, result = everything(on(batch, device), "triton", moved, **options)
    doubled = [None if w is None else w.double() for w in weights]
    expected, _ = everything(batch.to(torch.float64), "reference", doubled, **options)
    for name, value in expected.items():
        close(actual[name].cpu(), value, TOLERANCE[dtype], name)
    return result


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_costs_and_types(device, cost, dtype):
    batch = draw(*RAGGED, D=72, dtype=torch.float64).to(dtype)
    compare(batch, device, cost=cost, reg=0.3, tol=0, max_iter=20)


@pytest.mark.parametrize(
    "prior", [Prior.quadratic(0.5), Prior.absolute(0.5), Prior.order_preserving(0.1, 0.5), Prior.band(4)]
)
@pytest.mark.parametrize("rho", [None, 0.5, (0.4, math.inf), (math.inf, 0.4)], ids=str)
def test_priors_and_relaxations(device, prior, rho):
    compare(draw([40, 1, 33], [30, 4, 17], D=16), device, prior=prior, unbalanced=rho, reg=0.2, tol=0, max_iter=30)


@pytest.mark.parametrize(
    ("lengths", "B"),
    [(([64], [20]), 1), (([256], [60]), 1), (([1500], [100]), 1), (([3000, 1200], [512, 300]), 2), (([90], [700]), 1)],
    ids=["registers", "registers, wide", "shared registers", "shared memory", "wide"],
)
def test_every_way_to_solve(device, lengths, B):
    compare(draw(*lengths, D=32, dtype=torch.float32), device, reg=0.2, tol=0, max_iter=15)


def test_many_and_long_items(device):
    lengths = [1 + 7 * i % 50 for i in range(512)]
    compare(draw(lengths, lengths[::-1], D=16, dtype=torch.float32), device, reg=0.3, tol=0, max_iter=5)
    compare(draw([8192], [64], D=16, dtype=torch.float32), device, reg=0.3, tol=0, max_iter=5)


def test_weights(device):
    batch = draw(*RAGGED, D=16, dtype=torch.float64)
    weights = [
        draw_weights(lengths, values.shape[1], zeros=True).nan_to_num(0)
        for lengths, values in ((batch.x_lengths, batch.x), (batch.y_lengths, batch.y))
    ]
    compare(batch, device, weights, cost="sqeuclidean", reg=0.4, tol=0, max_iter=20)


def test_small_reg(device):
    """A range of 10^4 reg: absorption again and again, and again the reference's numbers."""
    C = torch.rand(2, 700, 90, generator=torch.Generator().manual_seed(0))
    options = {"reg": 1e-4, "tol": 0, "max_iter": 60}
    actual = otalign.solve_cost(C.to(device), backend="triton", **options)
    expected = otalign.solve_cost(C.double(), backend="reference", **options)
    close(actual.value.cpu(), expected.value, 1e-5)
    assert actual.plan().isfinite().all()


def test_items_stop_by_themselves(device):
    batch = draw(*RAGGED, D=16, dtype=torch.float64)
    actual = otalign.solve(*on(batch, device), reg=0.2, tol=1e-4, backend="triton")
    expected = otalign.solve(*batch, reg=0.2, tol=1e-4, backend="reference")
    assert actual.n_iter.tolist() == expected.n_iter.tolist()
    assert actual.converged.all()


def test_packed_and_jagged(device):
    batch = on(draw([750, 1, 0, 300], [128, 5, 7, 100], D=16, dtype=torch.float32), device)
    expected = otalign.solve(*batch, backend="triton")
    packed = batch.packed()
    actual = otalign.solve(**packed, max_seqlen_x=750, max_seqlen_y=128, backend="triton")
    close(actual.value, expected.value, 1e-6)
    potentials = torch.cat([f[:n] for f, n in zip(expected.potentials[0], batch.x_lengths, strict=True)])
    close(actual.potentials[0], potentials, 1e-6)
    x, y = (torch.nested.nested_tensor_from_jagged(packed[s], packed[f"cu_seqlens_{s}"]) for s in "xy")
    close(otalign.solve(x, y, backend="triton").value, expected.value, 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_item_is_alone(device, bad):
    batch = on(draw(*RAGGED, D=16, dtype=torch.float32), device)
    spoilt = batch._replace(x=batch.x.clone())
    spoilt.x[3, 200, 4] = bad
    good, found = (otalign.solve(*b, backend="triton") for b in (batch, spoilt))
    others = torch.tensor([0, 1, 2, 4], device=device)
    identical(found.value[others], good.value[others])
    assert found.value[3].isnan()
    assert not found.converged[3]


def test_bitwise_from_run_to_run(device):
    batch = on(draw(*RAGGED, D=64, dtype=torch.float32), device)
    first, _ = everything(batch, "triton", reg=0.1)
    for _ in range(50):
        again, _ = everything(batch, "triton", reg=0.1)
        for name, value in first.items():
            identical(again[name], value)


def step(batch, **options):
    x, y = (t.detach().requires_grad_() for t in (batch.x, batch.y))
    loss = otalign.sinkhorn_loss(x, y, batch.x_lengths, batch.y_lengths, backend="triton", **options)
    return loss.detach(), *torch.autograd.grad(loss, (x, y))


@pytest.mark.parametrize("objective", ["value", "plan_cost", "transport", "divergence"])
def test_nothing_waits_for_the_device(device, objective):
    batch = on(draw(*RAGGED, D=64, dtype=torch.float32), device)
    step(batch, objective=objective)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch, objective=objective)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("objective", ["value", "transport"])
def test_cuda_graph_with_other_points_and_lengths(device, objective):
    first = on(draw(*RAGGED, D=64, dtype=torch.float32), device)
    second = on(draw([700, 9, 4, 1, 0], [100, 50, 128, 100, 3], D=64, dtype=torch.float32, seed=5), device)
    fixed = first._replace(**{name: value.clone() for name, value in first._asdict().items()})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(fixed, objective=objective)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(fixed, objective=objective)
    for batch in (second, first):
        fixed.x.fill_(math.nan)
        fixed.x[:, : batch.x.shape[1]] = batch.x[:, : fixed.x.shape[1]]
        fixed.y.fill_(math.nan)
        fixed.y[:, : batch.y.shape[1]] = batch.y[:, : fixed.y.shape[1]]
        fixed.x_lengths.copy_(batch.x_lengths)
        fixed.y_lengths.copy_(batch.y_lengths)
        graph.replay()
        for actual, expected in zip(outputs, step(fixed, objective=objective), strict=True):
            identical(actual, expected)


def test_streams(device):
    """Two batches at once on streams of their own; and none on the default one."""
    batches = [on(draw(*RAGGED, D=64, dtype=torch.float32, seed=seed), device) for seed in range(2)]
    expected = [step(batch) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    found = [[], []]
    for _ in range(20):
        for batch, stream, results in zip(batches, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(batch))
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        for result in results:
            for a, b in zip(result, right, strict=True):
                identical(a, b)


def test_every_device(device):
    batch = draw(*RAGGED, D=64, dtype=torch.float32)
    expected = step(on(batch, device))
    for index in range(torch.cuda.device_count()):
        other = torch.device("cuda", index)
        for a, b in zip(step(on(batch, other)), expected, strict=True):  # the current device stays what it was
            assert a.device == other
            close(a.cpu(), b.cpu(), 1e-6)
    assert torch.cuda.current_device() == device.index


def test_compiled_whole(device):
    batch = on(draw(*RAGGED, D=64, dtype=torch.float32), device)
    criterion = torch.compile(otalign.SinkhornLoss(), fullgraph=True)
    leaves = [t.detach().requires_grad_() for t in (batch.x, batch.y)]
    loss = criterion(*leaves, batch.x_lengths, batch.y_lengths)
    for actual, expected in zip((loss.detach(), *torch.autograd.grad(loss, leaves)), step(batch), strict=True):
        close(actual, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(device, dtype):
    batch = on(draw(*RAGGED, D=64, dtype=torch.float32), device)
    expected = step(batch)
    with torch.autocast("cuda", dtype):
        actual = step(batch)
    for a, b in zip(actual, expected, strict=True):
        identical(a, b)


def test_auto_is_triton(device):
    assert otalign.backends.resolve("auto", device) == "triton"
    batch = on(draw(*RAGGED, D=64, dtype=torch.float32), device)
    identical(otalign.sinkhorn_loss(*batch), otalign.sinkhorn_loss(*batch, backend="triton"))


def test_memory_of_the_backward_pass(device):
    """Gradients and nothing else: no plan."""
    x, y = torch.randn(8, 2000, 32, device=device, requires_grad=True), torch.randn(8, 500, 32, device=device)
    loss = otalign.sinkhorn_loss(x, y, backend="triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(loss, x)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < x.numel() * 4 + 2**20


def test_images_without_a_plan(device):
    x, y = torch.randn(8, 2000, 8, device=device), torch.randn(8, 500, 8, device=device)
    result = otalign.solve(x, y, backend="triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result.barycentric_x(), result.barycentric_y(), result.assign_y()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 8 * 2000 * 500 * 4 / 2
