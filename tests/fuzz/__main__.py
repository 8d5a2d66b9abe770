"""Random problems against the oracle, until one is found whose result is outside of its budget.

    python -m tests.fuzz --backend cpu --cases 100000 --minutes 60 --seed 0

Every failure is shrunk, and written as a script that reproduces it, into the folder `--failures`. The end of the report is the worst
share of the budget of every quantity: above 1, it is a fault. Without a GPU, "triton" runs in Triton's interpreter and "cuda" is the
kernels' source compiled for the CPU, both at small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHUNK = 250  # cases that hypothesis draws as one test
# The kernels of CUDA refuse float64. The reference defines the results in float64, and its
# dense pseudo-inverse has too few digits in float32.
TYPES_OF = {"cuda": ("float32", "bfloat16", "float16"), "reference": ("float64",)}


@dataclass
class Report:
    """What a run, or a part of it, has found."""

    cases: int = 0
    seconds: float = 0.0
    items: int = 0
    beyond: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # paths of scripts

    def join(self, other: Report) -> None:
        self.cases, self.seconds = self.cases + other.cases, max(self.seconds, other.seconds)
        self.items, self.beyond = self.items + other.items, self.beyond + other.beyond
        for quantity, share in other.shares.items():
            self.shares[quantity] = max(self.shares.get(quantity, 0.0), share)
        for quantity, count in other.compared.items():
            self.compared[quantity] = self.compared.get(quantity, 0) + count
        self.faults += other.faults


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backend", default="cpu", choices=["reference", "cpu", "triton", "cuda"])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long, whatever --cases says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--failures", type=Path, default=Path("out/fuzz"), help="folder for scripts that reproduce failures"
    )
    parser.add_argument("--report", type=Path, help="a CSV file for the report")
    arguments = parser.parse_args()
    prepare(arguments.backend)
    end = time.time() + 60 * arguments.minutes
    begin, report = time.time(), Report()
    progress = sys.stderr.isatty()
    report.join(fuzz(arguments.backend, arguments.cases, end, arguments.seed, arguments.failures, progress=progress))
    report.seconds = time.time() - begin
    print_report(arguments.backend, arguments.seed, report)
    if arguments.report:
        write_report(arguments.report, arguments.backend, arguments.seed, report)
    return 1 if report.faults else 0


def prepare(backend: str) -> None:
    """Before anything imports Triton: without a GPU, its kernels run in the interpreter."""
    if backend in ("triton", "cuda"):
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
            from ..helpers.interpreter import make_quicker

            make_quicker()


@contextlib.contextmanager
def engine(backend: str) -> Any:
    """The device to run a backend on."""
    import torch

    if torch.cuda.is_available() and backend in ("triton", "cuda"):
        yield "cuda"
    elif backend == "cuda":
        from ..cuda_on_cpu.host_cuda import emulated

        with emulated():
            yield "cpu"
    else:
        yield "cpu"


class Enough(BaseException):
    """Ends hypothesis: out of time, or enough of shrinking."""


def fuzz(
    backend: str, cases: int, end: float, seed: int, failures: Path, progress: bool = False, shrinking: float = 30
) -> Report:
    """Draw so many cases, or until `end` (of time.time()); write a script for each failure."""
    report = Report()
    begin = time.time()
    with engine(backend) as device:
        chunk = 0
        while report.cases < cases and time.time() < end:
            fuzz_chunk(
                backend,
                device,
                min(CHUNK, cases - report.cases),
                end,
                10007 * seed + chunk,
                failures,
                report,
                shrinking,
            )
            chunk += 1
            if progress:
                rate = report.cases / (time.time() - begin)
                sys.stderr.write(f"\r{report.cases} cases, {rate:.1f} a second, {len(report.faults)} faults  ")
    if progress:
        sys.stderr.write("\n")
    report.seconds = time.time() - begin
    return report


def fuzz_chunk(
    backend: str, device: str, cases: int, end: float, seed: int, failures: Path, report: Report, shrinking: float
) -> None:
    import hypothesis

    from .case import TYPES, Case
    from .case import cases as strategy
    from .check import Record, run
    from .script import simplest, write_script

    failing: list[tuple[Case, str]] = []
    first_failure = [0.0]
    small = backend in ("triton", "cuda") and device == "cpu"
    types = TYPES_OF.get(backend, tuple(TYPES))

    def one(case: Case) -> None:
        now = time.time()
        if now > end or (failing and now > first_failure[0] + shrinking):
            raise Enough
        record = Record()
        if not failing:
            report.cases += 1
        try:
            run(case, backend, record, device)
        except Exception as error:
            first_failure[0] = first_failure[0] or now
            failing.append((case, f"{type(error).__name__}: {error}"))
            raise
        if not failing:
            for name in ("items", "beyond"):
                setattr(report, name, getattr(report, name) + getattr(record, name))
            joined = Report(shares=record.shares, compared=record.compared)
            joined.seconds = report.seconds
            report.join(joined)

    settings = hypothesis.settings(
        max_examples=cases, database=None, deadline=None, phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck), report_multiple_bugs=False, print_blob=False,
    )  # fmt: skip
    test = hypothesis.seed(seed)(settings(hypothesis.given(strategy(small, types))(one)))
    try:
        test()
    except (Enough, Exception):
        if failing:
            case, message = simplest(failing)
            report.faults.append(str(write_script(failures, case, backend, message)))


def print_report(backend: str, seed: int, report: Report) -> None:
    print(f"{backend}: {report.cases} cases, {report.items} items, {report.seconds / 60:.1f} minutes, seed {seed}")
    print(f"{report.beyond} items had numbers beyond the digits of their type, and were checked for their form alone")
    for quantity, share in sorted(report.shares.items(), key=lambda pair: -pair[1]):
        print(f"  {quantity:36} {share:8.3f} of the budget, {report.compared[quantity]} numbers")
    for quantity in sorted(set(report.compared) - set(report.shares)):
        print(f"  {quantity:36}    exact, {report.compared[quantity]} times")
    for path in report.faults:
        print(f"FAULT: python {path}")
    print(f"{len(report.faults)} faults")


def write_report(path: Path, backend: str, seed: int, report: Report) -> None:
    """One row a quantity. `share` is the worst part of its budget; empty = a condition without numbers, which held."""
    import torch

    run = lambda *command: subprocess.run(command, capture_output=True, text=True).stdout.strip()  # noqa: E731
    cpu = next((line.split(":")[1].strip() for line in run("lscpu").splitlines() if line.startswith("Model name")), "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and backend in ("triton", "cuda") else cpu
    about = {
        "backend": backend, "device": device, "commit": run("git", "rev-parse", "--short", "HEAD"), "torch": torch.__version__,
        "cases": report.cases, "items": report.items, "beyond": report.beyond, "minutes": f"{report.seconds / 60:.1f}",
        "seed": seed, "faults": len(report.faults),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*about, "quantity", "numbers", "share"])
        for quantity in sorted(report.compared):
            share = report.shares.get(quantity)
            writer.writerow(
                [*about.values(), quantity, report.compared[quantity], "" if share is None else f"{share:.3g}"]
            )


if __name__ == "__main__":
    sys.exit(main())
