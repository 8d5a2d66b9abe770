"""The time of each launch of a loss with both gradients, with its floor: stages.csv, by torch's profiler."""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import otalign
from common import environment
from common.shapes import SMALL, Batch
from gpu import backends, oracle
from gpu.cases import FIXED, LARGE, REG, TYPES, Case, failed, make
from gpu.rows import Table
from gpu.timing import FLUSHED

COLUMNS = (
    "shape",
    "dtype",
    "backend",
    "stage",
    "kernel",
    "median_us",
    "p20_us",
    "p80_us",
    "floor_us",
    "ratio_to_floor",
    *("device", "driver", "cuda", "torch", "triton", "commit", "date"),
)
SEPARATOR = "bitwise_not"  # in the name of the kernel that flushes the L2 cache before every run
Event = tuple[str, float]  # a kernel and its microseconds
Stage = tuple[str, list[float]]  # a kernel and its microseconds, run by run


def stages(batch: Batch, backend: str, iterations: int, repeats: int) -> list[Stage]:
    """All launches of a loss with both gradients, in their order."""
    x, y = batch.x.detach().requires_grad_(), batch.y.detach().requires_grad_()
    on_gpu = x.device.type == "cuda"
    other = torch.zeros(FLUSHED if on_gpu else 2**20, dtype=torch.uint8, device=x.device)

    def full() -> None:
        loss = otalign.sinkhorn_loss(x, y, reg=REG, tol=0, max_iter=iterations, backend=backend)
        torch.autograd.grad(loss, (x, y))

    full()
    with events_on_gpu() if on_gpu else events_on_host() as events:
        for _ in range(repeats):
            other.bitwise_not_()
            if not on_gpu:
                events.append((SEPARATOR, 0.0))
            full()
    return by_stage(events)


@contextmanager
def events_on_gpu() -> Iterator[list[Event]]:
    """After the block, the list has all kernels that ran in it, by torch's profiler."""
    events: list[Event] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield events
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    events += [(event.name, event.time_range.elapsed_us()) for event in kernels]


@contextmanager
def events_on_host() -> Iterator[list[Event]]:
    """For a dry run on a CPU: the launches, and the time of the interpreter."""
    from otalign.triton_kernels.runtime import Kernel

    events: list[Event] = []
    launch = Kernel.launch

    def timed(kernel: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        launch(kernel, *arguments)
        events.append((kernel.function.fn.__name__, 1e6 * (time.perf_counter() - start)))

    Kernel.launch = timed  # type: ignore[method-assign]
    try:
        yield events
    finally:
        Kernel.launch = launch  # type: ignore[method-assign]


def by_stage(events: list[Event]) -> list[Stage]:
    """Events of several equal runs, each after a separator, as one list of launches with the times of all runs."""
    found: list[list[Event]] = []
    for name, duration in events:
        if SEPARATOR in name:
            found.append([])
        elif found:
            found[-1].append((name, duration))
    if not found:
        raise RuntimeError("the profiler saw no launch")
    names = [name for name, _ in found[0]]
    alike = [run for run in found if [name for name, _ in run] == names]  # without a run that the profiler cut
    return [(name, [run[i][1] for run in alike]) for i, name in enumerate(names)]


def floors(batch: Batch, iterations: int, ceilings: oracle.Ceilings) -> dict[str, Iterator[float]]:
    """The least microseconds of a kernel's launches, by its name: for bytes or operations, whichever is more."""
    x, y, entries = batch.x.nbytes, batch.y.nbytes, batch.valid
    stored = entries * batch.x.itemsize
    product = 2 * entries * batch.x.shape[-1] / ceilings.rates[batch.x.dtype]

    def of(moved: float, computed: float) -> float:
        return 1e6 * max(moved / ceilings.bandwidth, computed)

    return {
        "cost_kernel": iter([of(x + y + 4 * entries, product)]),
        # Two multiply-adds for each entry and iteration, entries on chip. The name stands in that of the CUDA kernel, too.
        "sinkhorn_kernel": iter([of(4 * entries, 4 * entries * iterations / ceilings.multiply_adds)]),
        # Each entry is one multiplier of a point, of the points' type.
        "coefficients_kernel": iter([of(4 * entries + stored, 0)] * 2),
        # The gradient by x reads y, the gradient by y reads x. The cosine's gradients need their own points as well.
        "points_gradient_kernel": iter([of(stored + 2 * x + y, product), of(stored + x + 2 * y, product)]),
    }


def timed_stages(
    batch: Batch, backend: str, iterations: int, repeats: int, ceilings: oracle.Ceilings
) -> Iterator[dict[str, object]]:
    """The columns of each launch."""
    floor = floors(batch, iterations, ceilings)
    for place, (name, times) in enumerate(stages(batch, backend, iterations, repeats)):
        found = re.search(r"\w+_kernel", name)
        kernel = found[0] if found else name
        least = next(floor.get(kernel, iter(())), float("nan"))
        median, low, high = np.percentile(times, (50, 20, 80))
        figures = {
            "median_us": median,
            "p20_us": low,
            "p80_us": high,
            "floor_us": least,
            "ratio_to_floor": median / least,
        }
        yield {"stage": place, "kernel": kernel} | {column: f"{value:.5g}" for column, value in figures.items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks stages", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--dry", action="store_true", help="a toy size, on the CPU if there is no GPU")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = [SMALL._replace(B=2, N=9, M=5)] if args.dry else [LARGE["A"], LARGE["B"]]
    iterations, repeats = (2, 2) if args.dry else (FIXED, 20)
    ceilings = oracle.measure_ceilings(device, small=device.type != "cuda")
    about = environment.describe_device(device)
    cases = [Case(shape, False, dtype, 0.0) for shape in shapes for dtype in TYPES]
    usable, failures = backends.usable(), 0
    if not usable:
        print("no backend for a GPU is available here")
        return 1
    with Table(args.out / "stages.csv", COLUMNS) as table:
        for case, backend in itertools.product(cases, usable):
            base = {"shape": case.shape.name, "dtype": case.dtype, "backend": backend, **about}
            try:
                for row in timed_stages(make(case, device), backend, iterations, repeats, ceilings):
                    table.write(base | row)
                    print(case.shape.name, case.dtype, backend, *row.values(), sep=" | ", flush=True)
            except Exception as error:
                failures += 1
                table.write(base | {"kernel": failed(error)})
                print(case.shape.name, case.dtype, backend, failed(error), sep=" | ", flush=True)
    return int(failures > 0)
