"""otalign on a GPU against its peers and its floor: part of `make gpu`; `python benchmarks gpu --dry` anywhere.

All providers solve the same batch, with exactly 100 iterations or to the same marginal error. A time counts only if the
result agrees with float64. CUDA events measure it, and the L2 cache is flushed between runs. A provider that cannot run
has a row with the reason; a wrong result has a row without a time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from common import environment
from common.shapes import SMALL, Batch
from gpu import oracle
from gpu.cases import (
    FIXED,
    FIXED_DRY,
    LARGE,
    MODES,
    OUT_OF_TIME,
    REG,
    TYPES,
    Case,
    cases,
    failed,
    first_cases,
    make,
    plan,
    targets,
)
from gpu.exits import RESTART
from gpu.providers import OURS, PROVIDERS, Contestant, Missing, Task
from gpu.rows import Row, Table
from gpu.timing import Call, Clock, captured, captured_backward, peak_mb, watched, within

COLUMNS = (
    "shape", "mode", "provider", "dtype", "B", "N", "M", "D", "reg", "iterations", "marginal_error", "match", "median_us",
    "p20_us", "p80_us", "peak_mb", "floor_us", "ratio_to_floor", "device", "driver", "cuda", "torch", "triton", "commit",
    "date",
)  # fmt: skip
ROUNDING = 1e-5  # a marginal error that all iteration schemes reach in float32
PATIENCE = 25  # seconds for a provider and case: autotuning can take long
PATIENCE_DRY = 100  # Triton's interpreter is slow
STUCK = 10  # seconds more after which it does not end any more
WARMERS, WARM_SECONDS = 12, 40  # processes that compile ahead, and their time limit
WARMED = 6  # peers compile ahead for this many cases
Work = list[tuple[Case, list[str]]]  # cases with their providers, in order
COMPILED = ("FlashSinkhorn", "torch log, compiled, graph", "torch absorbed, compiled, graph")


class Run(NamedTuple):
    """`call` is timed. `plain` is the same without a CUDA graph, so that its memory is its own and not a pool's."""

    call: Call
    plain: Call


def runs(contestant: Contestant, batch: Batch) -> dict[str, Callable[[], Run]]:
    """Functions that prepare the runs: of the loss, of loss and gradients, and of the gradients alone.

    A run returns the loss and, if it computes them, the gradients. Each run is prepared separately, because a capture may
    fail. The capture of a backward pass alone is the likeliest to fail, so it comes last.
    """
    x, y = batch.x.detach().requires_grad_(), batch.y.detach().requires_grad_()
    one = torch.ones((), device=x.device)

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (contestant.loss(x, y),)

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (x, y), one, retain_graph=True)

    def full() -> tuple[torch.Tensor, ...]:
        loss = contestant.loss(x, y)
        return loss.detach(), *torch.autograd.grad(loss, (x, y), one)

    def backward() -> Call:
        kept = contestant.loss(x, y)
        return lambda: (kept.detach(), *gradients(kept))

    def ready(plain: Callable[[], Call], capture: Callable[[], Call]) -> Run:
        # First the capture: a loss that is kept on the default stream would draw this stream into the capture.
        call = capture() if contestant.graph else None
        prepared = plain()
        return Run(call or prepared, prepared)

    return {
        "forward": lambda: ready(lambda: forward, lambda: captured(forward)),
        "full": lambda: ready(lambda: full, lambda: captured(full)),
        "backward": lambda: ready(backward, lambda: captured_backward(lambda: contestant.loss(x, y), gradients)),
    }


def warm(case: Case, provider: str) -> None:
    """Compile what a provider needs for a case. Triton and inductor keep the result on disk."""
    (_, B, N, M, D), device = case.shape, torch.device("cuda")
    x, y = (torch.randn(B, size, D, device=device).to(TYPES[case.dtype]) for size in (N, M))
    n, m = (torch.full((B,), size, device=device) for size in (N, M))
    n[0] -= int(case.ragged)
    a, b = (torch.full((B, size), 1 / size, device=device) for size in (N, M))
    contestant = PROVIDERS[provider](Task(Batch(x, y, n, m, a, b), REG, tol=0.0, iterations=2, error=1.0))
    x, y = x.requires_grad_(), y.requires_grad_()
    torch.autograd.grad(contestant.loss(x, y), (x, y))
    torch.cuda.synchronize()


def warm_all(work: Work) -> None:
    """Compile in several processes. What fails here fails again when it is measured, and then has a row."""
    pairs = [(case, name) for case, names in work for name in names if case.tol == 0]
    early = list(dict.fromkeys(case for case, _ in pairs))[:WARMED]
    jobs = [pair for pair in pairs if pair[1] in COMPILED and pair[0] in early]  # the slowest first
    jobs += [pair for pair in pairs if pair[1] == "triton"]
    # One thread for each process, and in this process too: otherwise inductor may not recognise what it kept.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    until = time.monotonic() + WARM_SECONDS
    with multiprocessing.get_context("spawn").Pool(WARMERS) as pool:  # the end of the block ends them
        for job, result in [(job, pool.apply_async(warm, job)) for job in jobs]:
            try:
                result.get(max(0.0, until - time.monotonic()))
            except Exception as error:
                print(f"compiling ahead, {job[0].name}, {job[1]}: {type(error).__name__}: {error}"[:200])


# Rows ------------------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, device: torch.device, budget: float, fixed: int, write: Callable[[Row], None]) -> None:
        self.device, self.fixed, self.write = device, fixed, write
        self.clock = Clock(device, budget)
        self.ceilings = oracle.measure_ceilings(device, small=device.type != "cuda")
        self.about = environment.describe_device(device)

    def row(self, case: Case, mode: str, provider: str, match: object, **columns: object) -> None:
        shape = case.shape
        base = {"shape": case.name, "mode": mode, "provider": provider, "dtype": case.dtype, "reg": REG, "match": match}
        sizes = {"B": shape.B, "N": shape.N, "M": shape.M, "D": shape.D}
        self.write({**base, **sizes, **columns, **self.about})

    def run(self, case: Case, providers: list[str], until: float) -> None:
        """Write the rows of a case. After `until`, by time.monotonic(), they say that time is over."""
        if time.monotonic() > until:
            for provider in providers:
                self.without_figure(case, provider, OUT_OF_TIME)
            return
        try:
            task, truth = self.prepared(case)
        except Exception as error:  # too little memory for float64, say
            for provider in providers:
                self.without_figure(case, provider, failed(error))
            self.restart_if_lost()
            return
        for provider in providers:
            if time.monotonic() > until:
                self.without_figure(case, provider, OUT_OF_TIME)
            else:
                self.provider(case, provider, task, truth)
                self.restart_if_lost()

    def prepared(self, case: Case) -> tuple[Task, oracle.Truth]:
        """The problem of a case and its result in float64."""
        batch = make(case, self.device)
        truth = oracle.solve(batch, REG, iterations=None if case.tol else self.fixed)
        iterations = self.fixed if case.tol == 0 else oracle.solve(batch, REG, tol=case.tol).iterations
        return Task(batch, REG, case.tol, iterations, case.tol or max(truth.marginal_error, ROUNDING)), truth

    def without_figure(self, case: Case, provider: str, reason: str, modes: Iterable[str] = MODES) -> None:
        """Rows with the reason why there is no figure."""
        for mode in modes:
            self.row(case, mode, provider, reason)

    def provider(self, case: Case, provider: str, task: Task, truth: oracle.Truth) -> None:
        """Three rows. A provider that cannot run, fails, or takes too long gets rows with the reason."""
        left = list(MODES)
        late = STUCK + (PATIENCE if self.device.type == "cuda" else PATIENCE_DRY)

        def stuck() -> None:
            self.without_figure(case, provider, f"failed: did not end within {late} s", left)
            os._exit(RESTART)

        try:
            with watched(late, stuck), within(late - STUCK):
                contestant = PROVIDERS[provider](task)
                for mode, ready in runs(contestant, task.batch).items():
                    try:
                        match, columns = self.measure(case, mode, contestant, ready(), task, truth)
                    except RuntimeError as error:
                        match, columns = failed(error), {}
                    self.row(case, mode, provider, match, **columns)
                    left.remove(mode)
        except Missing as reason:
            self.without_figure(case, provider, f"missing: {reason}", left)
        except Exception as error:
            self.without_figure(case, provider, failed(error), left)

    def restart_if_lost(self) -> None:
        """End this process if an error, such as an illegal access to memory, has made the GPU unusable for it."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                print(f"this process cannot use the GPU any more: {error}", flush=True)
                raise SystemExit(RESTART) from None

    def measure(
        self, case: Case, mode: str, contestant: Contestant, run: Run, task: Task, truth: oracle.Truth
    ) -> tuple[object, Row]:
        """Whether the outputs are right and, with a tolerance, converged; and the columns. Only then they have a time."""
        dtype, fixed = TYPES[case.dtype], case.tol == 0 and contestant.same
        columns: Row = {"iterations": contestant.iterations, "marginal_error": f"{contestant.marginal_error:.3g}"}
        converged = fixed or not contestant.marginal_error > 1.02 * task.error
        if not (
            converged and oracle.matches(run.call(), truth, dtype, fixed=fixed, error=0 if case.tol else task.error)
        ):
            return False, columns
        times = self.clock.time(run.call)
        floor = oracle.floor_us(task.batch, dtype, mode, self.ceilings)
        figures = {"median_us": times.median, "p20_us": times.low, "p80_us": times.high, "floor_us": floor}
        figures |= {"ratio_to_floor": times.median / floor, "peak_mb": peak_mb(run.plain, self.device)}
        return True, columns | {name: f"{value:.5g}" for name, value in figures.items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder for benchmark.csv")
    parser.add_argument(
        "--dry", action="store_true", help="toy sizes, on the CPU if there is no GPU; no figure is claimed"
    )
    parser.add_argument("--seconds", type=float, default=200, help="no case starts after this time")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds of timing for each row")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--shapes", nargs="+", choices=LARGE, default=list(LARGE))
    parser.add_argument("--first", action="store_true", help="only bf16 points of full length")
    parser.add_argument(
        "--append", action="store_true", help="keep the rows of benchmark.csv and measure what has none"
    )
    args = parser.parse_args(arguments)
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU was found; --dry runs toy sizes on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = [SMALL._replace(B=2, N=20, M=10)] if args.dry else [LARGE[name] for name in args.shapes]
    todo = first_cases(list(cases(shapes))) if args.first else list(cases(shapes))
    until = time.monotonic() + args.seconds
    keep = (lambda row: row["match"] != OUT_OF_TIME) if args.append else None
    with Table(args.out / "benchmark.csv", COLUMNS, keep) as table:
        work = remaining(plan(todo, args.providers), table.rows)
        if device.type == "cuda":
            warm_all(work)
        bench = Bench(device, 0.0 if args.dry else args.budget, FIXED_DRY if args.dry else FIXED, told(table))
        rates = (f"{dtype} {rate / 1e12:.1f}" for dtype, rate in bench.ceilings.rates.items())
        ceilings = f"copy {bench.ceilings.bandwidth / 1e12:.3f} TB/s; products in TFLOP/s: {', '.join(rates)}"
        print(ceilings)
        try:
            for case, providers in work:
                bench.run(case, providers, until)
        finally:
            lines = ["dry run: no figure counts"] if args.dry else [ceilings, *targets(table.rows)]
            (args.out / "targets.txt").write_text("\n".join(lines) + "\n")
            print(*lines, sep="\n")
    ours = [str(row["match"]) for row in table.rows if row["provider"] in OURS]
    return int(any(match == "False" or match.startswith("failed") for match in ours))


def remaining(work: Iterable[tuple[Case, list[str]]], rows: list[Row]) -> Work:
    """The cases, each with the providers that have no row yet."""
    done = {(row["shape"], row["dtype"], row["provider"]) for row in rows}
    left = [(case, [name for name in names if (case.name, case.dtype, name) not in done]) for case, names in work]
    return [(case, names) for case, names in left if names]


def told(table: Table) -> Callable[[Row], None]:
    """A function that writes a row and prints it."""

    def write(row: Row) -> None:
        table.write(row)
        print(*(row.get(key, "") for key in ("shape", "mode", "provider", "dtype", "match", "median_us")), sep=" | ")

    return write
