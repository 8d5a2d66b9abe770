"""Forms of the CUDA kernels in turns on one batch: forms.csv. `python benchmarks forms --dry` anywhere.

A form is a tile shape and a number of blocks an item. The heuristics choose one by an estimate; beside it stand those that
are worth a measurement. All make the same plain iterations, forward, in a CUDA graph. As in the other benchmarks, only a
right result has a time.

A dry run runs the kernels on the CPU, by the tests' stand-in for the hardware.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import otalign
from common import environment
from common.shapes import SMALL, Batch
from gpu import backends, oracle
from gpu.cases import FIXED, FIXED_DRY, LARGE, REG, TYPES, Case, failed, make
from gpu.rows import Row, Table
from gpu.timing import Clock, captured

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "shape", "form", "dtype", "B", "N", "M", "D", "reg", "iterations", "tile", "cluster", "in_flight", "blocks_a_processor",
    "rows_in_shared", "match", "median_us", "p20_us", "p80_us", "device", "driver", "cuda", "torch", "triton", "commit",
    "date",
)  # fmt: skip
ROUNDS = 3  # of all forms in turn


class Form(NamedTuple):
    """`shape` is an index into kTileShapes of csrc/cuda/tiling.h."""

    name: str
    shape: int = -1  # the heuristics choose
    cluster: int = 0
    early: bool = True  # the kernel may begin before that of the costs has ended


# For shape A. 128 threads with 255 registers each leave room for a second block: while one waits for a message, the other
# computes. Six blocks hold the 750 rows of an item in registers.
FORMS = (
    Form("chosen"),
    Form("two blocks a processor", shape=4, cluster=6),
    Form("chosen, no early launch", early=False),
)


def extension() -> Any:
    from otalign.backends import cuda_launch  # imported late: it is replaced in a dry run

    return cuda_launch._extension()


@contextlib.contextmanager
def forced(form: Form) -> Iterator[None]:
    """In the block every batch has this form, or fails."""
    testing = extension().testing
    try:
        testing.cuda_force(form.shape, form.cluster)
        testing.cuda_allow_early_launch(form.early)
        yield
    finally:
        testing.cuda_force(-1, 0)
        testing.cuda_allow_early_launch(True)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """In the block backend="cuda" takes tensors on the CPU, as if they were on an H100."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.path.append(str(ROOT))
    try:
        from tests.cuda_on_cpu.host_cuda import HostExtension, emulated

        with emulated(HostExtension(chip={"processors": 132, "largest_cluster": 16})):
            yield
    finally:
        sys.path.remove(str(ROOT))


def launch(batch: Batch) -> Row:
    """The columns that describe the launch of a batch at full length."""
    (items, n, _), m = batch.x.shape, batch.y.shape[1]
    problem = extension().CudaProblem()
    problem.items, problem.x.size, problem.y.size = items, n, m
    problem.rho_x = problem.rho_y = float("inf")
    device = batch.x.device
    config = extension().testing.cuda_config(problem, False, device.index)
    width, lanes, rows, warps = config["shape"]
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return {
        "tile": f"{width} x {32 // lanes * warps * rows}, {warps} warps",
        "cluster": config["cluster"],
        "in_flight": config["in_flight"],
        "blocks_a_processor": f"{config['cluster'] * config['in_flight'] / processors:.2f}",
        "rows_in_shared": config["shared"],
    }


def measure(case: Case, device: torch.device, forms: tuple[Form, ...], iterations: int, clock: Clock) -> Iterator[Row]:
    """The rows of all forms. They take turns, so that a phase in which the GPU is slow affects all of them; the time is that
    of the round in the middle."""
    batch = make(case, device)
    truth = oracle.solve(batch, REG, iterations=iterations)
    options = {"reg": REG, "tol": 0, "max_iter": iterations, "backend": "cuda"}

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (otalign.sinkhorn_loss(batch.x, batch.y, **options),)

    rows: list[Row] = []
    runs = []
    for form in forms:
        row: Row = {"form": form.name}
        rows.append(row)
        try:
            with forced(form):
                row |= launch(batch)
        except RuntimeError as error:  # this chip cannot have the form
            row["match"] = f"missing: {error}"
            continue
        try:
            with forced(form):
                run = captured(forward) if device.type == "cuda" else forward
                row["match"] = oracle.matches(run(), truth, TYPES[case.dtype], fixed=True)
        except RuntimeError as error:
            row["match"] = failed(error)
        if row["match"] is True:
            runs.append((row, form, run, []))
    for _ in range(ROUNDS):
        for _, form, run, times in runs:
            with forced(form):
                times.append(clock.time(run))
    for row, _, _, times in runs:
        middle = sorted(times)[len(times) // 2]
        row |= {f"{name}_us": f"{value:.5g}" for name, value in zip(("median", "p20", "p80"), middle, strict=True)}
    yield from rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks forms", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder for forms.csv")
    parser.add_argument("--dry", action="store_true", help="a toy size on the CPU; no figure is claimed")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds of timing for each form and round")
    args = parser.parse_args(arguments)
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU was found; --dry runs a toy size on the CPU")
    device = torch.device("cpu" if args.dry else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    case = Case(SMALL._replace(B=2, N=20, M=10) if args.dry else LARGE["A"], False, "bf16", 0.0)
    iterations, clock = FIXED_DRY if args.dry else FIXED, Clock(device, 0.0 if args.dry else args.budget)
    sizes = {name: getattr(case.shape, name) for name in "BNMD"}
    base = {"shape": case.name, "dtype": case.dtype, **sizes, "reg": REG, "iterations": iterations}
    base |= environment.describe_device(device)
    with on_cpu() if args.dry else contextlib.nullcontext(), Table(args.out / "forms.csv", COLUMNS) as table:
        reason = None if args.dry else backends.reason_missing("cuda")
        if reason is None:
            rows = list(measure(case, device, FORMS, iterations, clock))
        else:
            rows = [{"form": form.name, "match": f"missing: {reason}"} for form in FORMS]
        for row in rows:
            table.write(base | row)
            print(*(f"{name} {row[name]}" for name in COLUMNS if name in row), sep=", ", flush=True)
    return int(any(row["match"] is False or str(row["match"]).startswith("failed") for row in rows))
