"""Are results independent of later changes to their inputs, and can no argument from Python cause access to foreign memory?"""

import os
import subprocess
import sys
import threading

import pytest
import torch

import otalign
from otalign import backends

from ..helpers.problems import draw, identical, leaf

pytestmark = pytest.mark.unpoisoned

LENGTHS = {
    "too large": lambda lengths: lengths.fill_(200_000),
    "one more": lambda lengths: lengths.add_(1),
    "negative": lambda lengths: lengths.fill_(-7),
    "zero": lambda lengths: lengths.zero_(),
}


def outputs(result, leaves):
    plan = result.plan()
    return plan.detach(), *torch.autograd.grad(result.value_linear.sum() + plan.square().sum(), leaves)


@pytest.mark.parametrize("change", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_lengths_that_change_after_a_solve(backend, dtype, change):
    batch = draw([6, 3], [4, 4], poison=0.0).requires_grad()
    clean = outputs(otalign.solve(*batch, backend=backend), batch[:2])
    lengths = batch.x_lengths.to(dtype), batch.y_lengths.to(dtype)
    result = otalign.solve(batch.x, batch.y, *lengths, backend=backend)
    for tensor in lengths:
        change(tensor)
    for ours, expected in zip(outputs(result, batch[:2]), clean, strict=True):
        identical(ours, expected)


def test_lengths_that_share_their_memory_with_numpy(backend):
    batch = draw([6, 3], [4, 4], poison=0.0).requires_grad()
    clean = outputs(otalign.solve(*batch, backend=backend), batch[:2])
    lengths = [tensor.numpy().copy() for tensor in batch[2:]]
    result = otalign.solve(batch.x, batch.y, *map(torch.from_numpy, lengths), backend=backend)
    for array in lengths:
        array += 1  # torch does not notice this write
    for ours, expected in zip(outputs(result, batch[:2]), clean, strict=True):
        identical(ours, expected)


def test_offsets_reg_and_init_that_change_after_a_solve(backend):
    arguments = draw([6, 3], [4, 4], poison=0.0).packed()
    leaves = [leaf(arguments[side]) for side in "xy"]
    arguments |= dict(zip("xy", leaves, strict=True))
    vectors = torch.zeros(9, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)

    def solve(reg, init):
        return otalign.solve(**arguments, reg=reg, init=init, backend=backend)

    reg = torch.tensor([0.1, 0.2], dtype=torch.float64)
    clean = outputs(solve(reg.clone(), tuple(v.clone() for v in vectors)), leaves)
    offsets = [arguments[f"cu_seqlens_{side}"] for side in "xy"]
    result = solve(reg, vectors)
    for tensor in (*offsets, reg, *vectors):
        tensor.mul_(3).add_(5)
    for ours, expected in zip(outputs(result, leaves), clean, strict=True):
        identical(ours, expected)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_points_that_change_before_the_backward(backend):
    """As in torch, autograd notices the change and raises. (The reference does not save the points themselves.)"""
    batch = draw([6, 3], [4, 4], poison=0.0).requires_grad()
    x = batch.x * 1
    loss = otalign.sinkhorn_loss(x, *batch[1:], backend=backend)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_points_whose_storage_is_gone():
    """FSDP frees the storage of tensors that are still referenced."""
    batch = draw([6, 3], [4, 4], poison=0.0).requires_grad()
    x = batch.x * 1
    loss = otalign.sinkhorn_loss(x, *batch[1:], backend="cpu")
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"x: expected .* bytes of memory"):
        loss.backward()


def test_lengths_that_change_all_the_time():
    """The engine checks its own copies, so another thread cannot change the lengths after the check."""
    x, y = torch.randn(64, 40, 4), torch.randn(64, 30, 4)
    lengths = torch.full((64,), 40)
    stop = threading.Event()

    def change():
        while not stop.is_set():
            lengths.fill_(10**9)
            lengths.fill_(40)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            try:
                plan = otalign.solve(x, y, lengths, max_iter=2, backend="cpu").plan()
            except ValueError as error:
                assert "x_lengths" in str(error)
            else:
                assert plan.shape == (64, 40, 30)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(("longest_x", "longest_y"), [(2, 40), (2, 4), (6, 2), (1, 10_000)])
def test_wrong_longest_lengths_under_compile(longest_x, longest_y):
    arguments = draw([6, 3], [4, 4], poison=0.0).packed()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def plan(x, y, cu_seqlens_x, cu_seqlens_y):
        result = otalign.solve(
            x,
            y,
            cu_seqlens_x=cu_seqlens_x,
            cu_seqlens_y=cu_seqlens_y,
            max_seqlen_x=longest_x,
            max_seqlen_y=longest_y,
            backend="cpu",
        )
        return result.plan()

    with pytest.raises(ValueError, match="max_seqlen_x" if longest_x < 6 else "max_seqlen_y"):
        plan(*(arguments[name] for name in ("x", "y", "cu_seqlens_x", "cu_seqlens_y")))


@pytest.mark.parametrize(("backend", "count"), [pytest.param("cpu", 1500, marks=pytest.mark.slow), ("triton", 40)])
def test_operators_survive_invalid_arguments(backend, count):
    """Wrong lengths, capacities, sizes, types, shapes and storages give errors or numbers, but never a crash."""
    command = [sys.executable, "-m", "tests.helpers.invalid_calls", backend, str(count), "0"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1"  # for the run under AddressSanitizer
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > count / 3


def test_the_engine_refuses_missing_memory():
    engine = backends.extension.module()
    problem = engine.Problem()
    problem.items, problem.dim, problem.capacity = 2, 4, 100
    problem.x.size = problem.y.size = 3
    problem.x.rows = problem.y.rows = 6
    for call in (
        lambda: engine.cpu_forward(problem),
        lambda: engine.cpu_backward(problem, engine.Gradients()),
        lambda: engine.cpu_unpack(problem, (0, 0)),
        lambda: engine.cpu_pack(problem, (0, 0)),
    ):
        with pytest.raises(ValueError, match="x_lengths: expected 16 bytes of memory, got none"):
            call()
    with pytest.raises(ValueError, match="cost: no member has the index 17"):
        problem.cost = 17
    with pytest.raises(MemoryError):
        engine.PooledMemory.new(2**64 - 1)


def test_plans_are_checked_both_ways():
    plan, lengths = torch.zeros(64), torch.tensor([2, 2])
    unpack, pack = torch.ops.otalign.unpack, torch.ops.otalign.pack
    assert unpack(plan, lengths, lengths, 2, 2).shape == (2, 2, 2)
    for wrong, of in ((torch.tensor([2, 5]), "x_lengths"), (torch.tensor([-1, 2]), "x_lengths")):
        with pytest.raises(ValueError, match=of):
            unpack(plan, wrong, lengths, 2, 2)
        with pytest.raises(ValueError, match=of):
            pack(torch.zeros(2, 2, 2), wrong, lengths, 64)
    with pytest.raises(ValueError, match="capacity"):
        unpack(plan[:10], lengths, lengths, 2, 2)
    with pytest.raises(ValueError, match="capacity"):
        pack(torch.zeros(2, 2, 2), lengths, lengths, 10)
