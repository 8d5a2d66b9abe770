"""otalign where `reg` is small, against a Newton solver: `python benchmarks small-reg` writes results/small_reg.csv.

The time to a marginal error, over `reg`, of one item on one thread. The costs are cosines of frames that speak tokens of random
duration, and unstructured ones. RegOT's `sinkhorn_ssns` makes the fewest steps that reach the error. A time counts only if the
plan has the error in float64.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import otalign
from common import environment
from cpu.report import judge
from cpu.timing import interleave, keep_memory

RESULTS = Path(__file__).parents[1] / "results" / "small_reg.csv"
SIZES = ((300, 60), (750, 128), (1500, 200))
REGS = (0.1, 0.05, 0.02, 0.01, 0.005)  # of the range of the cost
ERRORS = (1e-2, 1e-3, 1e-5)
SEEDS = 5
DIM, NOISE = 256, 1.5
MAX_ITER = 100_000
MOST_STEPS = 256  # of Newton's method
OURS, PLAIN, SSNS = "otalign", "otalign, plain", "RegOT SSNS"
SPOKEN, UNSTRUCTURED = "spoken", "unstructured"
NAN = math.nan
# Bounds of medians over seeds at the last error, by reg: how many times as fast as SSNS; times fewer passes than plain; time
# relative to plain.
FASTER = {0.05: ">= 20", 0.02: ">= 20", 0.01: ">= 12", 0.005: ">= 10"}
FEWER = {0.01: ">= 8"}
NO_SLOWER = {(SPOKEN, 0.1): "<= 1.1", (UNSTRUCTURED, 0.1): "<= 1.1", (UNSTRUCTURED, 0.05): "<= 1.1"}


@dataclass(frozen=True)
class Row:
    """A time, or a ratio with its bound: the median over the seeds, with the 20th and 80th percentile."""

    costs: str
    size: str
    reg: float  # of the range of the cost
    error: float  # L1 error of both marginals that is reached
    name: str
    value: float
    low: float
    high: float
    unit: str = "ms"
    bound: str = ""
    verdict: str = ""
    others: float = NAN  # share of the CPUs that other processes took
    passes: float = NAN  # over the matrix; for Newton's method: steps


COLUMNS = [field.name for field in fields(Row)]


def spoken_costs(N: int, M: int, seed: int) -> Tensor:
    """Cosine costs (N, M) in float32 of frames that are their token plus noise; durations of tokens are random."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(M, DIM, generator=generator)
    ends = (torch.rand(M, generator=generator) + 0.2).cumsum(0)
    times = (torch.arange(N) + 0.5) / N * ends[-1]
    frames = tokens[torch.searchsorted(ends, times).clamp(max=M - 1)]
    frames = frames + NOISE * torch.randn(N, DIM, generator=generator)
    return 1 - torch.nn.functional.normalize(frames, dim=1) @ torch.nn.functional.normalize(tokens, dim=1).T


def unstructured_costs(N: int, M: int, seed: int) -> Tensor:
    return torch.rand(N, M, generator=torch.Generator().manual_seed(seed))


def marginal_error(plan: Any) -> float:
    """L1 error of both marginals of a plan (N, M), which should be uniform, in float64."""
    plan = np.asarray(plan, dtype=np.float64)
    return float(sum(np.abs(plan.sum(1 - axis) - 1 / plan.shape[axis]).sum() for axis in (0, 1)))


@dataclass(frozen=True)
class Contestant:
    run: Callable[[], object]
    passes: int
    reached: float  # its marginal error


def ours(C: Tensor, reg: float, error: float, *, accelerate: bool) -> Contestant:
    def run() -> otalign.OTResult:
        return otalign.solve_cost(
            C[None], reg=reg, tol=error, max_iter=MAX_ITER, accelerate=accelerate, backend="cpu"
        )  # fmt: skip

    result = run()
    return Contestant(run, int(result.n_iter), marginal_error(result.plan()[0]))


def newton(C: Tensor, reg: float, error: float) -> Contestant:
    """SSNS with the fewest steps that reach the error."""
    import regot

    M = np.asfortranarray(C.double().numpy())
    a, b = (np.full(size, 1 / size) for size in C.shape)

    def steps(count: int) -> Callable[[], Any]:
        return lambda: regot.sinkhorn_ssns(M, a, b, reg, tol=0.0, max_iter=count)

    few, enough = 0, 8
    while (reached := marginal_error(steps(enough)().plan)) > error and enough < MOST_STEPS:
        few, enough = enough, 2 * enough
    while enough - few > 1 and reached <= error:
        middle = (few + enough) // 2
        found = marginal_error(steps(middle)().plan)
        if found <= error:
            enough, reached = middle, found
        else:
            few = middle
    return Contestant(steps(enough), enough, reached)


def contestants(C: Tensor, reg: float, error: float, *, with_newton: bool) -> dict[str, Contestant]:
    found = {OURS: ours(C, reg, error, accelerate=True), PLAIN: ours(C, reg, error, accelerate=False)}
    return found | ({SSNS: newton(C, reg, error)} if with_newton else {})


def measure(costs: str, size: tuple[int, int], reg: float, error: float, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of one cell of the table: a time for each contestant, and the ratios that have bounds."""
    times: dict[str, list[float]] = {}
    passes: dict[str, list[int]] = {}
    ratios: dict[str, list[float]] = {}
    others, trusted = [], {}
    for seed in range(args.seeds):
        C = (spoken_costs if costs == SPOKEN else unstructured_costs)(*size, seed)
        absolute = reg * float(C.max() - C.min())
        field = contestants(C, absolute, error, with_newton=costs == SPOKEN and not args.without_peer)
        timed = interleave({name: each.run for name, each in field.items()}, rounds=args.rounds, budget=args.budget)
        others.append(timed.others)
        for name, each in field.items():
            times.setdefault(name, []).append(timed.ms(name).median)
            passes.setdefault(name, []).append(each.passes)
            # A float32 plan of so many entries is rounded by about 1e-7; SSNS computes in float64.
            trusted[name] = trusted.get(name, True) and each.reached <= 1.02 * error + 1e-6
        for name in field:
            ratios.setdefault(f"{name} / {OURS}", []).append(timed.ratio(name, OURS).median)
    busy = max(others)
    base = {"costs": costs, "size": "x".join(map(str, size)), "reg": reg, "error": error}

    def row(name: str, values: Iterable[float], **columns: Any) -> Row:
        low, middle, high = np.percentile(list(values), (20, 50, 80))
        return Row(**base, name=name, value=float(middle), low=float(low), high=float(high), others=busy, **columns)

    for name, values in times.items():
        verdict = judge(trusted=trusted[name], others=busy)
        yield row(name, values, verdict=verdict, passes=float(np.median(passes[name])))

    def target(name: str, values: list[float], bound: str) -> Row:
        middle = float(np.median(values))
        return row(
            name,
            values,
            unit="x",
            bound=bound,
            verdict=judge(middle, bound, trusted=all(trusted.values()), others=busy),
        )

    if error != ERRORS[-1]:
        return
    if SSNS in times:
        yield target(f"{SSNS} / {OURS}", ratios[f"{SSNS} / {OURS}"], FASTER.get(reg, ""))
    fewer = [plain / fast for plain, fast in zip(passes[PLAIN], passes[OURS], strict=True)]
    yield target("passes, plain / otalign", fewer, FEWER.get(reg, "") if costs == SPOKEN else "")
    slower = [1 / ratio for ratio in ratios[f"{PLAIN} / {OURS}"]]
    yield target(f"{OURS} / {PLAIN}", slower, NO_SLOWER.get((costs, reg), ""))


def cells(args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, int], float, float]]:
    errors, sizes = (ERRORS[-1:], SIZES[:1]) if args.quick else (ERRORS, SIZES)
    for size in sizes:
        yield from ((SPOKEN, size, reg, error) for reg in REGS for error in errors)
        yield from ((UNSTRUCTURED, size, reg, ERRORS[-1]) for reg in REGS[:2])


def missing_peer() -> str:
    return "" if environment.version("regot") != "none" else "regot is not installed"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks small-reg", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file")
    parser.add_argument("--quick", action="store_true", help="the smallest size and the last error alone")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for a cell and seed, after three rounds")
    args = parser.parse_args(arguments)
    if os.environ.get("OMP_NUM_THREADS") != "1":  # RegOT reads it when it is loaded, and takes all cores otherwise
        command = [sys.executable, str(Path(__file__).parents[1]), "small-reg", *arguments]
        return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
    torch.set_num_threads(1)
    kept = keep_memory()
    args.without_peer = bool(missing_peer())
    about = environment.describe(threads=1, memory_kept=kept) | {"RegOT": environment.version("regot")}
    if args.without_peer:
        print(f"{SSNS} is missing: {missing_peer()}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    missed = 0
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about])
        writer.writeheader()
        for cell in cells(args):
            for row in measure(*cell, args):
                writer.writerow(_short(asdict(row)) | about)
                file.flush()
                missed += row.verdict in ("MISS", "RED")
                print(*(f"{value}" for value in _short(asdict(row)).values()), sep=" | ", flush=True)
    return int(missed > 0)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: "" if value != value else f"{value:.4g}" if isinstance(value, float) else value
        for name, value in row.items()
    }
