"""How the GPU backends use the process and the device, on a real GPU: `pytest -m gpu`. Nothing here is skipped either.

Problems are of few kinds, so that few kernels are compiled: see test_gpu.py.
"""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import otalign
from otalign import backends

from ..helpers.problems import NARROW, RAGGED, WIDE, close, draw, identical, on

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]  # filling memory launches kernels of torch

OBJECTIVES = ("value", "plan_cost", "transport", "divergence")


BACKEND = "triton"


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def gpu_backend(request, monkeypatch):
    """All tests run on both backends. (conftest.py deselects float64 for CUDA.)"""
    monkeypatch.setitem(globals(), "BACKEND", request.param)


def ragged(device, dtype=torch.float32, seed=0):
    return on(draw(*RAGGED, D=WIDE, dtype=dtype, seed=seed), device)


def step(batch, **options):
    """A loss and both gradients."""
    x, y = (t.detach().requires_grad_() for t in (batch.x, batch.y))
    loss = otalign.sinkhorn_loss(x, y, batch.x_lengths, batch.y_lengths, **{"backend": BACKEND, **options})
    return loss.detach(), *torch.autograd.grad(loss, (x, y))


def all_identical(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        identical(a, b)


# Bits ------------------------------------------------------------------------------------------------------------------


# (In float64 the kernel matrix lies in memory for any lengths.)
LENGTHS = {"registers": RAGGED, "memory": ([2000, 1200], [400, 300])}
TYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "where, dtype", [("registers", torch.float64), *((where, dtype) for where in LENGTHS for dtype in TYPES)], ids=str
)
def test_bitwise_from_run_to_run(device, where, dtype):
    batch = on(draw(*LENGTHS[where], D=WIDE, dtype=dtype), device)

    def run():
        leaves = [t.detach().requires_grad_() for t in (batch.x, batch.y)]
        result = otalign.solve(*leaves, *batch[2:], reg=0.1, max_iter=20, backend=BACKEND)
        plan = result.plan()
        total = result.value.sum() + result.value_linear.sum() + plan.square().sum() + result.barycentric_y().sum()
        return result.value.detach(), plan.detach(), *result.potentials, *torch.autograd.grad(total, leaves)

    first = run()
    for _ in range(50):
        all_identical(run(), first)


# The host --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_synchronisation():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_waits_for_the_device(device, objective, no_synchronisation):
    batch = ragged(device)
    step(batch, objective=objective)
    no_synchronisation()
    step(batch, objective=objective)


def test_nothing_waits_with_packed_points_weights_and_regs(device, no_synchronisation):
    packed = ragged(device).packed() | {"max_seqlen_x": max(RAGGED[0]), "max_seqlen_y": max(RAGGED[1])}
    packed["reg"] = torch.full((len(RAGGED[0]),), 0.1, device=device)
    packed |= {"a": torch.rand(len(packed["x"]), device=device), "b": "norm", "backend": BACKEND}
    leaves = {side: packed[side].requires_grad_() for side in "xy"}

    def run():
        result = otalign.solve(**packed | leaves)
        total = result.value.sum() + result.plan().square().sum() + result.barycentric_x().sum()
        torch.autograd.grad(total, list(leaves.values()))
        return result.assign_y()

    run()
    no_synchronisation()
    run()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cuda_graph_with_other_points_and_lengths(device, objective, dtype):
    first = ragged(device, dtype)
    second = on(draw([280, 9, 4, 1, 0], [100, 50, 128, 100, 3], D=WIDE, dtype=dtype, seed=5), device)
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
        for name, there in fixed._asdict().items():
            new = getattr(batch, name)
            if new.dim() == 1:
                there.copy_(new)
            else:
                there.fill_(math.nan)
                there[:, : new.shape[1]] = new[:, : there.shape[1]]
        graph.replay()
        all_identical(outputs, step(fixed, objective=objective))


def test_streams_at_once(device):
    """Two batches at once on two streams: programs wait for programs of their own batch only."""
    batches = [ragged(device, seed=seed) for seed in range(2)]
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
            all_identical(result, right)


def test_stream_is_the_current_one(device):
    """The launches wait for points that arrive late on the current stream: no launch goes to another stream."""
    early, late = ragged(device, seed=0), ragged(device, seed=1)
    expected = step(late)
    buffer = early._replace(x=early.x.clone(), y=early.y.clone())
    step(buffer)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        buffer.x.copy_(late.x)
        buffer.y.copy_(late.y)
        actual = step(buffer)
    torch.cuda.synchronize()
    all_identical(actual, expected)


def test_every_device(device):
    batch = draw(*RAGGED, D=WIDE, dtype=torch.float32)
    expected = step(on(batch, device))
    for index in range(torch.cuda.device_count()):
        other = torch.device("cuda", index)
        for a, b in zip(step(on(batch, other)), expected, strict=True):
            assert a.device == other
            close(a.cpu(), b.cpu(), 1e-6)
        assert torch.cuda.current_device() == device.index


def test_device_guard(device, monkeypatch):
    """The code path for tensors on another device, on a machine with one device: the test pretends that the current one differs."""
    batch = ragged(device)
    expected = step(batch)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: device.index + 1)
    all_identical(step(batch), expected)
    assert torch.cuda.current_device() == device.index


# torch -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_compiler():
    """torch compiles in this process alone: there is little to compile, and other workers use the cores."""
    with importlib.import_module("torch._inductor.config").patch(compile_threads=1):
        yield


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_without_graph_breaks(device, mode, one_compiler):
    torch._dynamo.reset()
    layer, criterion = torch.nn.Linear(WIDE, WIDE, device=device), otalign.SinkhornLoss(backend=BACKEND)
    batch = on(draw(*RAGGED, D=WIDE, dtype=torch.float32, poison=0.0), device)

    def loss(x, y, x_lengths, y_lengths):
        return criterion(layer(x), y, x_lengths, y_lengths)

    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    leaves = [batch.x.requires_grad_(), batch.y.requires_grad_(), layer.weight]
    for _ in range(3):  # the first runs of a CUDA graph differ from its replays
        torch.compiler.cudagraph_mark_step_begin()
        outcomes = []
        for function in (compiled, loss):
            value = function(*batch)
            outcomes.append((value.detach().clone(), *(g.clone() for g in torch.autograd.grad(value, leaves))))
        for actual, expected in zip(*outcomes, strict=True):
            close(actual / expected.abs().max(), expected / expected.abs().max(), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast_changes_nothing(device, objective, dtype):
    batch = ragged(device)
    expected = step(batch, objective=objective)
    with torch.autocast("cuda", dtype):
        all_identical(step(batch, objective=objective), expected)


def test_mixed_precision_training(device):
    """A layer under autocast, gradients scaled for float16: finite, and the loss falls."""
    torch.manual_seed(0)
    batch = on(draw(*RAGGED, D=WIDE, dtype=torch.float32, poison=0.0), device)
    layer, criterion = torch.nn.Linear(WIDE, WIDE, device=device), otalign.SinkhornLoss(backend=BACKEND)
    optimiser, scaler = torch.optim.SGD(layer.parameters(), lr=1.0), torch.amp.GradScaler("cuda", init_scale=1024.0)
    losses = []
    for _ in range(10):
        with torch.autocast("cuda", torch.float16):
            hidden = layer(batch.x)
            assert hidden.dtype == torch.float16
            loss = criterion(hidden, batch.y, *batch[2:])
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def test_auto_is_triton(device):
    assert backends.resolve("auto", device) == "triton"
    batch = ragged(device)
    all_identical(step(batch, backend="auto"), step(batch, backend="triton"))
    with pytest.raises(ValueError, match="takes tensors on the CPU"):
        step(batch, backend="cpu")


# Memory ----------------------------------------------------------------------------------------------------------------


def peak(run):
    """The largest number of bytes that a call allocates on top of what was allocated before, and what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_memory_of_a_loss(device, dtype):
    """The forward pass stores the costs once. The backward pass allocates gradients, and the coefficients of one side."""
    B, N, M, D = 8, 1000, 128, WIDE
    x, y = (torch.randn(B, n, D, device=device, dtype=dtype, requires_grad=True) for n in (N, M))
    torch.autograd.grad(otalign.sinkhorn_loss(x, y, backend=BACKEND), (x, y))
    costs, vectors = 4 * B * N * M, 4 * 8 * B * (N + M)
    forward, loss = peak(lambda: otalign.sinkhorn_loss(x, y, backend=BACKEND))
    assert forward <= costs + vectors + 2**20
    backward, _ = peak(lambda: torch.autograd.grad(loss, (x, y)))
    coefficients = (2 if dtype == torch.bfloat16 else 4) * B * N * M
    spare = 2 * 2**20  # torch may leave up to 1 MiB at the end of the block of each gradient
    assert spare < costs
    assert backward <= x.nbytes + y.nbytes + coefficients + vectors + spare


def test_memory_of_images(device):
    """Images and assignments are computed without storing the plan."""
    x, y = torch.randn(8, 2000, NARROW, device=device), torch.randn(8, 500, NARROW, device=device)
    result = otalign.solve(x, y, backend=BACKEND)
    needed, _ = peak(lambda: (result.barycentric_x(), result.barycentric_y(), result.assign_y()))
    assert needed < 4 * 8 * 2000 * 500 / 2


def test_memory_does_not_grow(device):
    batch = ragged(device)
    step(batch)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        step(batch, objective="transport")
    assert torch.cuda.memory_allocated() == before


# The sanitizer's cases -------------------------------------------------------------------------------------------------


def sanitizer() -> ModuleType:
    """benchmarks/gpu/session/sanitize.py. The benchmarks are programs, not a package that is installed."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("gpu.session.sanitize")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("case", sanitizer().CASES, ids=lambda case: f"{case.cost}-{case.dtype}-{case.N}x{case.M}")
def test_cases_of_the_sanitizer(device, case):
    """Their results are right. This run also compiles their kernels, so the sanitizer need not."""
    assert sanitizer().run(case, BACKEND, device) < 1e-3
