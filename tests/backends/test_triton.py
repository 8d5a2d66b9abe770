"""What only the Triton kernels need tests for: programs that share an item, heuristics, edges."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from otalign.triton_kernels import exchange, heuristics, launch, runtime
from otalign.triton_kernels.batch import Batch, Side

import otalign

from ..helpers.interpreter import together
from ..helpers.problems import close, draw, identical

# Programs that share an item -------------------------------------------------------------------------------------------


@pytest.fixture
def processors(monkeypatch):
    def pretend(count: int) -> None:
        monkeypatch.setattr(runtime, "processors", lambda device: count)
        monkeypatch.setattr(runtime, "generation", lambda device: 0)

    return pretend


@pytest.fixture
def small_tiles(monkeypatch):
    """At most 16 rows of a kernel matrix per program in registers, so that small items need several programs."""
    tile = heuristics.TileShape(width=32, groups=2, warps=1, min_programs=1, max_programs=16, max_before_hopper=16)
    monkeypatch.setattr(heuristics, "TILE_SHAPES", (tile,))
    heuristics.launch_config.cache_clear()
    yield
    heuristics.launch_config.cache_clear()


def everything(batch, backend="triton", **options):
    """All outputs of a solve, and gradients through the implicit system."""
    batch = batch.requires_grad()
    result = otalign.solve(*batch, backend=backend, **options)
    gradients = torch.autograd.grad(result.value_linear.sum(), (batch.x, batch.y))
    return result.value.detach(), *result.potentials, result.error, result.n_iter, *gradients


@pytest.mark.parametrize("rho", [None, (0.4, math.inf)], ids=["balanced", "relaxed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["registers", "memory"])
@pytest.mark.parametrize("count", [2, 4, 13], ids=lambda count: f"{count} processors")
def test_programs_that_share_an_item(processors, small_tiles, count, dtype, rho):
    """Rows that programs cannot share equally, fewer rows than programs, an empty item, more items than fit at once."""
    batch = draw([30, 1, 3, 0, 16], [9, 5, 1, 4, 7], dtype=dtype)
    batch = batch._replace(x=batch.x[:, :31])
    options = {"reg": 0.2, "tol": 1e-4, "max_iter": 30, "unbalanced": rho, "accelerate": False}
    processors(count * 5 if count < 13 else count)
    with together(seed=count) as launches:
        actual = everything(batch, **options)
    assert max(launches) > 5, "several programs share an item"
    for a, e in zip(actual, everything(batch.to(torch.float64), "reference", **options), strict=True):
        close(a, e, 1e-10 if dtype == torch.float64 else 3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["registers", "memory"])
def test_sharing_programs_absorb_together(processors, small_tiles, dtype):
    """With a cost range of 400 reg, scalings leave the range of multiply-adds again and again."""
    C = torch.rand(2, 40, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    options = {"reg": 1 / 400, "tol": 0, "max_iter": 25}
    processors(8)
    with together() as launches:
        actual = otalign.solve_cost(C, backend="triton", **options)
    assert max(launches) == 8
    expected = otalign.solve_cost(C.double(), backend="reference", **options)
    close(actual.value, expected.value, 1e-10 if dtype == torch.float64 else 1e-5)
    close(actual.plan(), expected.plan(), 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["registers", "memory"])
def test_order_of_programs_does_not_matter(processors, small_tiles, dtype):
    """The bits are the same in any order of programs: sums are made in the order of ranks."""
    batch = draw([30, 20, 3], [9, 5, 1], dtype=dtype)
    processors(8)
    results = []
    for seed in range(4):
        with together(seed, odds=0.3):
            results.append(everything(batch, reg=0.2, tol=0, max_iter=4))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            identical(a, b)


def test_groups_count_apart(processors, small_tiles, monkeypatch):
    """Groups of programs wait at counters in cache lines of their own, and the first counter stays zero."""
    made, batch = [], draw([30, 20, 25], [9, 5, 7], dtype=torch.float32)
    empty_counters = launch.empty_counters
    monkeypatch.setattr(
        launch, "empty_counters", lambda *arguments: made.append(empty_counters(*arguments)) or made[-1]
    )
    processors(8)
    with together():
        otalign.solve(*batch, reg=0.2, tol=0, max_iter=4, backend="triton")
    (counters,) = made
    used = counters.nonzero().flatten().tolist()
    assert len(used) == len(batch.x), "a counter for each group"
    assert counters[0] == 0
    assert min(b - a for a, b in zip([0, *used], used, strict=False)) * counters.itemsize >= 128


@pytest.mark.slow
def test_a_missing_barrier_shows(processors, small_tiles, monkeypatch):
    """The test above can fail: without barriers the kernel reads values that are not written yet."""
    batch = draw([30, 20], [9, 5], dtype=torch.float32)
    processors(8)
    with together():
        expected = everything(batch, reg=0.2, tol=0, max_iter=4)
    monkeypatch.setattr(exchange, "barrier", lambda counter, target: None)
    outcomes = []
    for seed in range(4):
        with together(seed, odds=0.3):
            actual = everything(batch, reg=0.2, tol=0, max_iter=4)
        outcomes.append(all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)))
    assert not all(outcomes)


def test_a_deadlock_shows(processors, small_tiles, monkeypatch):
    """The interpreter notices when all programs wait: here for one more arrival than there are programs."""
    original = exchange.barrier.fn
    monkeypatch.setattr(exchange, "barrier", lambda counter, target: original(counter, target + 1))
    processors(8)
    with together(), pytest.raises(Exception, match="wait for each other for ever"):
        everything(draw([30, 20], [9, 5], dtype=torch.float32), reg=0.2, tol=0, max_iter=2)


def test_packed_items_share_programs(processors, small_tiles):
    batch = draw([30, 1, 0, 16], [9, 5, 4, 7], dtype=torch.float32)
    processors(16)
    expected = otalign.solve(*batch, reg=0.2, backend="reference")
    with together():
        actual = otalign.solve(**batch.packed(), reg=0.2, backend="triton")
    close(actual.value, expected.value, 1e-5)
    close(
        actual.potentials[0],
        torch.cat([f[:n] for f, n in zip(expected.potentials[0], batch.x_lengths, strict=True)]),
        1e-5,
    )


# Heuristics -----------------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 20000)


@hypothesis.given(
    items=st.integers(1, 2000),
    size_x=sizes,
    size_y=st.integers(1, heuristics.MAX_SIZE_Y),
    double=st.booleans(),
    relaxed=st.booleans(),
    processors=st.sampled_from([1, 8, 108, 132, 148]),
    generation=st.sampled_from([0, 80, 90, 100]),
    lanes=st.sampled_from([32, 64]),
    in_memory=st.booleans(),
    mixes=st.booleans(),
)
@hypothesis.settings(max_examples=500)
def test_heuristics_for_the_iterations(
    items, size_x, size_y, double, relaxed, processors, generation, lanes, in_memory, mixes
):
    choice = heuristics.launch_config(
        items,
        size_x,
        size_y,
        double=double,
        relaxed=relaxed,
        processors=processors,
        generation=generation,
        lanes=lanes,
        in_memory=in_memory,
        mixes=mixes,
    )
    assert choice.mixes <= mixes
    assert choice.warps * lanes <= 1024, "the most threads of a program on any chip"
    assert choice.programs in (1, 2, 4, 8, 16)
    assert choice.programs <= choice.max_programs
    assert choice.block_m >= size_y, "a program holds whole rows"
    assert 1 <= choice.in_flight <= items
    if choice.programs > 1:
        assert choice.in_flight * choice.programs <= processors, (
            "all programs of an item run at once, or they would wait for programs that never start"
        )
    if choice.groups:
        assert not double and not in_memory
        assert -(-size_x // choice.programs) <= choice.groups * choice.rows, "all rows in registers"
    for number in (choice.block_m, choice.block_n, choice.warps):
        assert number & (number - 1) == 0, "a power of two"


def test_too_long_items_are_refused():
    x, y = torch.zeros(1, 2, 3), torch.zeros(1, heuristics.MAX_SIZE_Y + 1, 3)
    with pytest.raises(ValueError, match="y: expected items of up to"):
        otalign.sinkhorn_loss(x, y, backend="triton")
    otalign.sinkhorn_loss(x, y, y_lengths=torch.tensor([3]), backend="reference")


# Edges -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("rows", [(4, 0), (0, 4), (4, 4)], ids=str)
def test_rows_that_belong_to_no_item(backend, rows):
    """If all items of packed sides are empty, all results are zeros that are attached to the graph."""
    x, y = (torch.randn(count, 3, requires_grad=True) for count in rows)
    offsets = torch.zeros(3, dtype=torch.int64)
    result = otalign.solve(x, y, cu_seqlens_x=offsets, cu_seqlens_y=offsets, backend=backend)
    for tensor in (result.value, result.error, *result.potentials):
        identical(tensor, torch.zeros_like(tensor))
    assert result.converged.all()
    assert (result.assign_y() == -1).all()
    for gradient, leaf in zip(torch.autograd.grad(result.value.sum(), (x, y)), (x, y), strict=True):
        identical(gradient, torch.zeros_like(leaf))


def test_offsets_beyond_the_rows_read_nothing_outside():
    """The host does not read offsets on a GPU. The kernels stay inside the existing rows."""
    rows, items, guard = 6, 2, 3
    memory = {side: torch.randn(rows + guard, 4, dtype=torch.float64) for side in "xy"}
    offsets = torch.tensor([0, 4, 900])
    sides = [Side(memory[side][:rows], offsets, None, True, 5, rows) for side in "xy"]
    batch = Batch(
        *sides, items=items, reg=0.3, reg_items=None, cost="sqeuclidean", prior="none", prior_parameters=(),
        rho=(math.inf, math.inf), dtype=torch.float64, device=torch.device("cpu"),
    )  # fmt: skip
    actual = launch.solve(batch, None, None, {"max_iter": 30, "tol": 0.0, "accelerate": False})
    points = [memory[side][:rows] for side in "xy"]
    inside = torch.tensor([0, 4, rows])
    expected = otalign.solve(
        *points, cu_seqlens_x=inside, cu_seqlens_y=inside, cost="sqeuclidean", reg=0.3, tol=0, max_iter=30,
        backend="reference",
    )  # fmt: skip
    close(actual.value, expected.value, 1e-10)
    close(actual.f, expected.potentials[0], 1e-10)


def test_lengths_that_change_before_the_backward_pass():
    """The gradient does not change: a solve keeps its own copy of the lengths."""
    batch = draw([5, 3], [4, 2], dtype=torch.float32).requires_grad()
    (expected,) = torch.autograd.grad(otalign.sinkhorn_loss(*batch, backend="triton"), batch.x)
    loss = otalign.sinkhorn_loss(*batch, backend="triton")
    batch.x_lengths.fill_(1)
    identical(torch.autograd.grad(loss, batch.x)[0], expected)
