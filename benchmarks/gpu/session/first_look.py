"""The first solves of one backend: does it end, is it right, and how long does it take? Rows are added to first.csv.

`python benchmarks first-look triton` solves given costs and computes a loss with its gradients at shape A, and compares
both with float64. The exit status is 3 if some of it is wrong. It is 1 if the backend cannot be used at all.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import otalign
from common import environment
from common.accuracy import relative
from common.shapes import Shape
from gpu import backends, oracle
from gpu.cases import FIXED, FIXED_DRY, LARGE, OUT_OF_TIME, REG, TYPES, Case, failed, make
from gpu.exits import SOLVING, WRONG
from gpu.rows import Row, Table
from gpu.timing import Clock

COLUMNS = (
    "backend", "problem", "B", "N", "M", "D", "dtype", "iterations", "error", "gradient_error", "match", "median_us",
    "p20_us", "p80_us", "device", "driver", "cuda", "torch", "triton", "commit", "date",
)  # fmt: skip
# Given costs, one for each way in which the CUDA kernels store the matrix. The smallest comes first, before the loss.
COSTS = ((4, 40, 20), (32, 300, 100), (32, 750, 128), (2, 3000, 512), (3, 500, 1000))
SMALL_COSTS = ((2, 9, 5),)
COST_ITERATIONS = 20
SMALL_LOSS = Shape("small", 2, 9, 5, 16)
PLAN_BOUND = 1e-4  # of a plan, in L1; its mass is 1
GRADIENT_BOUND = 1e-3  # of the gradient by the costs, relative to its norm
NEEDED = 2  # problems that start even if the time is over


def solve_costs(backend: str, device: torch.device, size: tuple[int, int, int]) -> Row:
    """Solve given costs. Plans and gradients of the first item are compared with the reference."""
    C = torch.rand(size, generator=torch.Generator().manual_seed(0))
    options = {"reg": 0.1, "tol": 0, "max_iter": COST_ITERATIONS}

    def solved(costs: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = costs.requires_grad_()
        result = otalign.solve_cost(leaf, **options, backend=backend)
        (gradient,) = torch.autograd.grad(result.value_linear.sum(), leaf)
        return result.plan()[0].detach().double().cpu(), gradient[0].double().cpu()

    with otalign.debug():
        plan, gradient = solved(C.to(device), backend)
    right_plan, right_gradient = solved(C[:1].double(), "reference")
    error, gradient_error = float((plan - right_plan).abs().sum()), relative(gradient, right_gradient)
    match = error < PLAN_BOUND and gradient_error < GRADIENT_BOUND
    return {"error": f"{error:.2g}", "gradient_error": f"{gradient_error:.2g}", "match": match}


def loss_of_points(backend: str, device: torch.device, case: Case, iterations: int, budget: float) -> Row:
    """Compute a loss and both gradients, compare them with float64, and time them if they are right."""
    batch = make(case, device)
    x, y = batch.x.detach().requires_grad_(), batch.y.detach().requires_grad_()

    def full() -> tuple[torch.Tensor, ...]:
        loss = otalign.sinkhorn_loss(x, y, reg=REG, tol=0, max_iter=iterations, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (x, y))

    outputs, truth = full(), oracle.solve(batch, REG, iterations=iterations)
    error, *gradients = (relative(output, right) for output, right in zip(outputs, truth[:3], strict=True))
    row: Row = {"error": f"{error:.2g}", "gradient_error": f"{max(gradients):.2g}"}
    row["match"] = oracle.matches(outputs, truth, TYPES[case.dtype], fixed=True)
    if row["match"]:
        times = Clock(device, budget).time(full)
        row |= {f"{name}_us": f"{t:.5g}" for name, t in zip(("median", "p20", "p80"), times, strict=True)}
    return row


def problems(backend: str, device: torch.device, *, dry: bool) -> list[tuple[Row, Callable[[], Row]]]:
    """The columns that describe each problem, and the function that solves it."""
    small = dry or device.type == "cpu"
    case = Case(SMALL_LOSS, False, "fp32", 0.0) if small else Case(LARGE["A"], False, "bf16", 0.0)
    iterations, budget = (FIXED_DRY, 0.0) if dry else (FIXED, 0.25)
    sizes = {name: getattr(case.shape, name) for name in "BNMD"}
    about: Row = {"backend": backend, "problem": "loss", **sizes, "dtype": case.dtype, "iterations": iterations}
    loss = about, partial(loss_of_points, backend, device, case, iterations, budget)
    costs = []
    for size in SMALL_COSTS if small else COSTS:
        about = {"backend": backend, "problem": "costs", **dict(zip("BNM", size, strict=True))}
        about |= {"dtype": "fp32", "iterations": COST_ITERATIONS}
        costs.append((about, partial(solve_costs, backend, device, size)))
    return [costs[0], loss, *costs[1:]]


def look(backend: str, device: torch.device, *, dry: bool, seconds: float) -> Iterator[Row]:
    """The rows of the problems, each as soon as it is solved."""
    start = time.monotonic()
    for place, (about, solve) in enumerate(problems(backend, device, dry=dry)):
        if place >= NEEDED and time.monotonic() - start > seconds:
            yield about | {"match": OUT_OF_TIME}
            continue
        print(SOLVING, *(f"{name} {value}" for name, value in about.items()), flush=True)
        try:
            found = solve()
        except Exception as error:
            found = {"match": failed(error)}
        yield about | found
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises if an error has made the GPU unusable: then nothing more can be solved


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks first-look", description=__doc__)
    parser.add_argument("backend", choices=(*backends.ON_GPU, "cpu"))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder for first.csv")
    parser.add_argument("--dry", action="store_true", help="toy sizes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="only two problems start after this time")
    args = parser.parse_args(arguments)
    reason = backends.reason_missing(args.backend)
    if reason is not None:
        print(f"{args.backend} is missing: {reason}")
        return 1
    on_gpu = args.backend != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    about = environment.describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    verdicts = []
    with Table(args.out / "first.csv", COLUMNS, keep=lambda row: True) as table:
        for row in look(args.backend, device, dry=args.dry, seconds=args.seconds):
            table.write(row | about)
            print(
                *(f"{name} {row[name]}" for name in COLUMNS if name in row and name not in about), sep=", ", flush=True
            )
            verdicts.append(row["match"])
    if not any(isinstance(verdict, bool) for verdict in verdicts):
        return 1  # not one problem was solved
    return 0 if {True, OUT_OF_TIME}.issuperset(verdicts) else WRONG
