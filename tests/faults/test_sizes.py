"""Are indices beyond 2^31 right, and sizes refused that a BLAS cannot take?

Memory that no test writes to takes no room: the system gives pages to what is touched only.
"""

import json
import mmap
import sys

import pytest
import torch

import otalign

from ..helpers.problems import identical
from ..helpers.processes import run_program

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(sys.platform != "linux", reason="maps memory beyond that of the machine"),
]

WIDE = 2**31 + 64
GIGABYTES = 14  # that a test takes, and some to spare
NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python names from 3.11 on


def spread(points: torch.Tensor, *strides: int) -> torch.Tensor:
    """The same numbers in a storage with these strides."""
    numbers = sum((size - 1) * stride for size, stride in zip(points.shape, strides, strict=True)) + 1
    memory = mmap.mmap(-1, numbers * points.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=points.dtype).as_strided(points.shape, strides).copy_(points)


def results(solve, *leaves):
    result = solve(*leaves)
    gradients = torch.autograd.grad(result.value_linear.sum(), leaves)
    return result.value, *result.potentials, result.plan().detach(), *gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "strides",
    [(WIDE, 8, 1), (4, 2**30 + 16, 1), (4, 2**31 + 16, 1), (2**29 + 16, 2**30 + 16, 1), (8, 32, WIDE // 8)],
    ids=["items", "rows", "rows too far apart for a BLAS", "items and rows", "columns"],
)
def test_points_far_apart(dtype, strides):
    x, y = torch.randn(2, 5, 4).to(dtype), torch.randn(2, 3, 4).to(dtype)

    def solve(x, y):
        return otalign.solve(x, y, torch.tensor([5, 4]), backend="cpu")

    far = [spread(points, *strides).requires_grad_() for points in (x, y)]
    for ours, expected in zip(
        results(solve, *far), results(solve, x.requires_grad_(), y.requires_grad_()), strict=True
    ):
        identical(ours, expected)


def test_packed_points_far_apart():
    x, y = torch.randn(7, 4), torch.randn(6, 4)
    offsets = {"cu_seqlens_x": torch.tensor([0, 3, 7]), "cu_seqlens_y": torch.tensor([0, 1, 6])}

    def solve(x, y):
        return otalign.solve(x, y, **offsets, backend="cpu")

    far = [spread(points, 2**30 + 16, 1).requires_grad_() for points in (x, y)]
    for ours, expected in zip(
        results(solve, *far), results(solve, x.requires_grad_(), y.requires_grad_()), strict=True
    ):
        identical(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "strides", [(WIDE, 8, 1), (8, WIDE // 2, 1), (2**29, 2**30 + 4, 2**28 + 1)], ids=["items", "rows", "all"]
)
def test_costs_far_apart(dtype, strides):
    C = torch.rand(2, 5, 4).to(dtype)

    def solve(C):
        return otalign.solve_cost(C, reg=0.1, backend="cpu")

    far = spread(C, *strides).requires_grad_()
    for ours, expected in zip(results(solve, far), results(solve, C.requires_grad_()), strict=True):
        identical(ours, expected)


@pytest.mark.parametrize(("items", "size"), [(70_000, 200), (2, 40_000)])
def test_costs_of_more_than_2_to_the_31_elements(items, size):
    """Most of them are padding. A view that repeats numbers takes no memory."""
    C = torch.rand(size, dtype=torch.float16).expand(items, size, size)
    lengths, options = torch.full((items,), 3), {"reg": 0.1, "max_iter": 3, "tol": 0, "backend": "cpu"}
    result = otalign.solve_cost(C, lengths, lengths, **options)
    expected = otalign.solve_cost(C[:1, :3, :3].contiguous(), **options)
    assert torch.equal(result.value, expected.value.expand(items))


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("packed", [False, True])
def test_sizes_beyond_a_blas_are_refused(side, packed):
    few = torch.zeros(1, 1, 1)
    for shape, got in (((1, 2**31, 1), f"{2**31} of 1"), ((1, 1, 2**31), f"1 of {2**31}")):
        many = few.expand(shape)
        others = few.expand(1, 1, shape[-1])
        points = [many, others] if side == "x" else [others, many]
        options = {}
        if packed:
            ends = [torch.tensor([0, t.shape[1]]) for t in points]
            points, options = [t[0] for t in points], dict(zip(("cu_seqlens_x", "cu_seqlens_y"), ends, strict=True))
        with pytest.raises(ValueError, match=f"items of at most 2147483646 points of as many numbers, got {got}"):
            otalign.solve(*points, **options, backend="cpu")


@pytest.mark.parametrize("shape", [(1, 2**31, 1), (1, 1, 2**31)])
def test_costs_beyond_a_blas_are_refused(shape):
    with pytest.raises(ValueError, match="C: expected items of at most 2147483646 points"):
        otalign.solve_cost(torch.zeros(1, 1, 1).expand(shape), reg=0.1, backend="cpu")


def available() -> float:
    """Gigabytes."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) / 2**20 for line in file if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one item", "many items", "dense plans"])
def test_more_than_2_to_the_31_numbers_in_memory(case):
    """One item whose plan has more, a batch whose plans have more together, and dense plans with padding."""
    if available() < GIGABYTES:
        pytest.skip(f"needs {GIGABYTES} GB of free memory, and {available():.1f} are free")
    found = json.loads(run_program("large_sizes", case, timeout=1200))
    print(found)
    assert found["elements"] > 2**31
    assert found["worst"] < 1
