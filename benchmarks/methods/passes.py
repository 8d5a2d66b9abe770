"""Passes over the matrix that each engine takes for shape A, plain and accelerated: results/passes.csv, and a table of it.

`python benchmarks passes` writes both. It needs no GPU and measures no time: the CUDA kernels run on the CPU, by the tests'
stand-in for the hardware, and the Triton kernels in Triton's interpreter. Numbers of passes are the same on every machine, up
to the rounding of its exponentials.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import otalign
from common.environment import describe
from common.shapes import Shape, make_batch
from common.tables import number, replace_block

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape("A", 1, 750, 128, 1024)
REGS = (0.05, 0.02, 0.01, 0.005)  # over the range of an item's cost
ENGINES = ("cuda", "triton", "cpu")
TOL, MAX_ITER = 1e-3, 20_000
COLUMNS = ("engine", "reg", "tol", "items", "plain", "accelerated", "most", "plain_error", "accelerated_error")


def costs(items: int) -> tuple[Tensor, Tensor]:
    """(items, N, M) the cosine costs of shape A, one seed an item, and (items,) their ranges."""
    found = []
    for seed in range(items):
        x, y = (torch.nn.functional.normalize(side[0], dim=-1) for side in make_batch(SHAPE, seed=seed)[:2])
        found.append(1 - x @ y.mT)
    C = torch.stack(found)
    return C, C.amax((1, 2)) - C.amin((1, 2))


def solve(C: Tensor, reg: Tensor, engine: str, *, accelerate: bool) -> otalign.OTResult:
    from tests.cuda_on_cpu.host_cuda import HostExtension, emulated

    on: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if engine == "cuda":  # the tile shape and the clusters that heuristics.h chooses for 32 items on an H100
        on = emulated(HostExtension(shape=5, cluster=4, in_flight=len(C)))
    with on:
        return otalign.solve_cost(C, reg=reg, tol=TOL, max_iter=MAX_ITER, accelerate=accelerate, backend=engine)


def rows(items: int, engines: list[str]) -> Iterator[dict[str, object]]:
    C, ranges = costs(items)
    for engine in engines:
        for reg in REGS:
            plain, fast = (solve(C, reg * ranges, engine, accelerate=accelerate) for accelerate in (False, True))
            passes = [[int(n) for n in result.n_iter] for result in (plain, fast)]
            yield {
                "engine": engine, "reg": reg, "tol": TOL, "items": items, "plain": statistics.median(passes[0]),
                "accelerated": statistics.median(passes[1]), "most": max(passes[1]),
                "plain_error": f"{float(plain.error.max()):.2e}",
                "accelerated_error": f"{float(fast.error.max()):.2e}",
            }  # fmt: skip


def table(found: list[dict[str, object]]) -> Iterator[str]:
    yield "| engine | `reg` / range | plain | accelerated | most of an item | times fewer |"
    yield "|---|---|---|---|---|---|"
    for row in found:
        fewer = number(float(str(row["plain"])) / float(str(row["accelerated"])))
        yield f"| {row['engine']} | {row['reg']} | {row['plain']:g} | {row['accelerated']:g} | {row['most']} | {fewer} |"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks passes", description=__doc__)
    parser.add_argument("--items", type=int, default=8, help="items of shape A (8)")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=["cuda", "cpu"], help="triton takes long (cuda cpu)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/passes.csv")
    chosen = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.path.append(str(ROOT))
    found = []
    for row in rows(chosen.items, chosen.engines):
        print(row, flush=True)
        found.append(row)
    machine = describe(threads=torch.get_num_threads(), memory_kept=False)
    with chosen.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *machine])
        writer.writeheader()
        writer.writerows(row | machine for row in found)
    if chosen.out == parser.get_default("out"):
        replace_block(ROOT / "docs/performance.md", "passes", "\n".join(table(found)))
    return 0
