"""otalign on a GPU against its peers and its floor: what `make gpu` runs last; `python benchmarks/gpu.py --dry` anywhere.

Everybody solves the same batch, at exactly 100 iterations or to the same marginal error, is compared with float64 before
its time counts, and is timed by CUDA events with the L2 cache flushed between runs. Who takes no part has a row that says
why; a wrong answer has a row without a time.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import environment
import gpu_oracle
from gpu_providers import PROVIDERS, Contestant, Missing, Task
from shapes import NOISE, SHAPES, SMALL, Batch, Shape, make_batch

COLUMNS = (
    "shape", "mode", "provider", "dtype", "B", "N", "M", "D", "reg", "iterations", "marginal_error", "match", "median_us",
    "p20_us", "p80_us", "peak_mb", "floor_us", "ratio_to_floor", "device", "driver", "cuda", "torch", "triton", "commit",
    "date",
)  # fmt: skip
REG = 0.05
TOL = 1e-3
FIXED, FIXED_DRY = 100, 5  # iterations
MODES = ("forward", "backward", "full")
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

LARGE = {
    "A": Shape("A", 32, 750, 128, 1024),
    "B": Shape("B", 8, 3000, 512, 4096),
    **{name: shape._replace(D=2048 if shape.D == 1024 else 4096) for name, shape in SHAPES.items()},
}
# Microseconds on an H200 at exactly 100 iterations with bf16 points of full length, or, "A, early exit", to TOL.
TARGETS = {
    ("A", "forward"): (85, 60),
    ("A", "full"): (130, 105),
    ("B", "forward"): (440, 260),
    ("B", "full"): (720, 560),
    ("A, early exit", "forward"): (45, 45),
}
TRITON_FACTOR = 3  # what Triton alone may take of a target


class Case(NamedTuple):
    shape: Shape
    ragged: bool
    dtype: str
    tol: float  # 0 for exactly FIXED iterations

    @property
    def name(self) -> str:
        kinds = (", ragged" if self.ragged else "", ", early exit" if self.tol else "")
        return self.shape.name + "".join(kinds)


def cases(shapes: list[Shape]) -> Iterator[Case]:
    """The most wanted first, since time is limited."""
    for ragged in (False, True):
        for dtype in TYPES:
            for shape in shapes:
                for tol in (0.0, TOL):
                    yield Case(shape, ragged, dtype, tol)


def make(case: Case, device: torch.device) -> Batch:
    """The batch on the device, its points in the type of the case; without `ragged`, all items at full length."""
    shape, dtype = case.shape, TYPES[case.dtype]
    if case.ragged:
        batch = make_batch(shape)
    else:
        one = [make_batch(shape._replace(B=1), seed=seed, noise=NOISE) for seed in range(shape.B)]
        batch = Batch(*(torch.cat(fields) for fields in zip(*one, strict=True)))
    return Batch(batch.x.to(device, dtype), batch.y.to(device, dtype), *(t.to(device) for t in batch[2:]))


# Time ------------------------------------------------------------------------------------------------------------------


class Clock:
    """Times on the device, the L2 cache filled with other things before every run."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self.fewest = 10 if budget else 1
        self.other = torch.empty(2**28 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)

    def microseconds(self, run: Callable[[], object]) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile of at least ten runs; of one if there is no budget."""
        for _ in range(3 if self.budget else 0):
            run()
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < self.fewest or (time.perf_counter() - start < self.budget and len(times) < 200):
            self.other.zero_()
            times.append(self._once(run))
        median, low, high = np.percentile(times, (50, 20, 80))
        return float(median), float(low), float(high)

    def _once(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)


def runs(contestant: Contestant, batch: Batch) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """What is timed: the loss, its gradients, both. Outputs are the loss and the gradients, as far as there are."""
    x, y = batch.x.detach().requires_grad_(), batch.y.detach().requires_grad_()
    one = torch.ones((), device=x.device)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (contestant.loss(x, y),)

    def full() -> tuple[Tensor, ...]:
        loss = contestant.loss(x, y)
        return loss.detach(), *torch.autograd.grad(loss, (x, y), one)

    if contestant.graph:
        return {"forward": captured(forward), "full": captured(full)}
    if not contestant.again:
        return {"forward": forward, "full": full}
    kept = contestant.loss(x, y)

    def backward() -> tuple[Tensor, ...]:
        return kept.detach(), *torch.autograd.grad(kept, (x, y), one, retain_graph=True)

    return {"forward": forward, "backward": backward, "full": full}


def captured(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """The same in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def peak_mb(run: Callable[[], object], device: torch.device) -> float:
    """Memory above what is there before, at most during a run."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# Rows ------------------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(
        self, device: torch.device, budget: float, fixed: int, write: Callable[[dict[str, object]], None]
    ) -> None:
        self.device, self.fixed, self.write = device, fixed, write
        self.clock = Clock(device, budget)
        self.ceilings = gpu_oracle.measure_ceilings(device, small=device.type != "cuda")
        self.about = describe(device)

    def row(self, case: Case, mode: str, provider: str, match: object, **columns: object) -> None:
        shape = case.shape
        base = {"shape": case.name, "mode": mode, "provider": provider, "dtype": case.dtype, "reg": REG, "match": match}
        sizes = {"B": shape.B, "N": shape.N, "M": shape.M, "D": shape.D}
        self.write({**base, **sizes, **columns, **self.about})

    def run(self, case: Case, providers: list[str]) -> None:
        batch = make(case, self.device)
        truth = gpu_oracle.solve(batch, REG, iterations=None if case.tol else self.fixed)
        iterations = self.fixed if case.tol == 0 else gpu_oracle.solve(batch, REG, tol=case.tol).iterations
        for provider in providers:
            self.provider(case, provider, Task(batch, REG, case.tol, iterations), truth)

    def provider(self, case: Case, provider: str, task: Task, truth: gpu_oracle.Truth) -> None:
        try:
            contestant = PROVIDERS[provider](task)
            prepared = runs(contestant, task.batch)
        except Missing as reason:
            for mode in MODES:
                self.row(case, mode, provider, f"missing: {reason}")
            return
        except Exception as error:  # a peer that fails is a row, not the end of the benchmark
            for mode in MODES:
                self.row(case, mode, provider, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            return
        for mode in MODES:
            if mode not in prepared:
                self.row(case, mode, provider, "missing: it runs with the forward pass only")
                continue
            self.time(case, mode, provider, contestant, prepared[mode], truth, task)

    def time(
        self,
        case: Case,
        mode: str,
        provider: str,
        contestant: Contestant,
        run: Callable[[], tuple[Tensor, ...]],
        truth: gpu_oracle.Truth,
        task: Task,
    ) -> None:
        """A row with a time if the outputs are right and, with a tolerance, converged."""
        dtype = TYPES[case.dtype]
        reached = {"iterations": contestant.iterations, "marginal_error": f"{contestant.marginal_error:.3g}"}
        converged = case.tol == 0 or not contestant.marginal_error > 1.02 * case.tol
        if not (converged and gpu_oracle.matches(run(), truth, dtype, fixed=case.tol == 0)):
            self.row(case, mode, provider, False, **reached)
            return
        median, low, high = self.clock.microseconds(run)
        floor = gpu_oracle.floor_us(task.batch, dtype, mode, self.ceilings)
        self.row(
            case, mode, provider, True, **reached, median_us=f"{median:.2f}", p20_us=f"{low:.2f}", p80_us=f"{high:.2f}",
            peak_mb=f"{peak_mb(run, self.device):.1f}", floor_us=f"{floor:.4g}", ratio_to_floor=f"{median / floor:.2f}",
        )  # fmt: skip


def describe(device: torch.device) -> dict[str, object]:
    """The last columns."""
    about = environment.describe(threads=torch.get_num_threads(), memory_kept=False)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU (dry run): {about['cpu']}",
        "driver": environment.driver() if on_gpu else "none",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": environment.version("triton"),
        "commit": about["commit"],
        "date": about["date"],
    }


def targets(rows: list[dict[str, object]]) -> Iterator[str]:
    """A line for each target: the best backend of otalign against it, and Triton alone against three times it."""
    for (shape, mode), (target, stretch) in TARGETS.items():
        ours = [
            (float(str(row["median_us"])), str(row["provider"]))
            for row in rows
            if row.get("shape") == shape and row.get("mode") == mode and row.get("dtype") == "bf16"
            and str(row.get("provider")).startswith(("triton", "cuda")) and row.get("median_us")
        ]  # fmt: skip
        if not ours:
            yield f"{shape} {mode}: not measured (target {target} us, stretch {stretch} us)"
            continue
        best, provider = min(ours)
        verdict = "stretch met" if best <= stretch else "met" if best <= target else "missed"
        alone = min((median for median, name in ours if name.startswith("triton")), default=float("nan"))
        within = "within" if alone <= TRITON_FACTOR * target else "not within"
        yield (
            f"{shape} {mode}: {best:.1f} us by {provider}, target {target} us {verdict} (stretch {stretch} us); "
            f"Triton alone {alone:.1f} us, {within} {TRITON_FACTOR}x"
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder for benchmark.csv")
    parser.add_argument(
        "--dry", action="store_true", help="toy sizes, on the CPU if there is no GPU; no figure is claimed"
    )
    parser.add_argument("--seconds", type=float, default=200, help="start no case after that")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds for the runs of one row")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--shapes", nargs="+", choices=LARGE, default=list(LARGE))
    args = parser.parse_args(arguments)
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU was found; --dry runs toy sizes on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = [SMALL._replace(B=2, N=20, M=10)] if args.dry else [LARGE[name] for name in args.shapes]
    args.out.mkdir(parents=True, exist_ok=True)
    start, rows = time.perf_counter(), []
    with (args.out / "benchmark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()

        def write(row: dict[str, object]) -> None:
            rows.append(row)
            writer.writerow(row)
            file.flush()
            print(
                *(row.get(key, "") for key in ("shape", "mode", "provider", "dtype", "match", "median_us")), sep=" | "
            )

        bench = Bench(device, 0.0 if args.dry else args.budget, FIXED_DRY if args.dry else FIXED, write)
        print(f"copy {bench.ceilings.bandwidth / 1e12:.3f} TB/s", end="; ")
        print(", ".join(f"{dtype}: {rate / 1e12:.1f} TFLOP/s" for dtype, rate in bench.ceilings.rates.items()))
        for case in cases(shapes):
            if time.perf_counter() - start > args.seconds:
                bench.row(case, "full", "all", "missing: out of time")
            else:
                bench.run(case, args.providers)
    lines = ["dry run: no figure counts"] if args.dry else list(targets(rows))
    (args.out / "targets.txt").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    ours = [row for row in rows if str(row["provider"]).startswith("triton")]
    return int(any(row["match"] is False or str(row["match"]).startswith("failed") for row in ours))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
