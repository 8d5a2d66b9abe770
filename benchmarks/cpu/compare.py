"""otalign on the CPU against its peers and its floor: `make bench`, or `python benchmarks cpu --quick`.

All contestants solve the same batch to the same marginal error, in turns and in one process. A time counts only if the
result agrees with the float64 reference. Each function `measure_*` is one experiment with its targets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import otalign
from common import environment, peers
from common.accuracy import relative
from common.shapes import NOISE, SHAPES, Batch, Shape, make_batch, pad_double, repeat_items
from cpu import memory, oracle, report
from cpu.oracle import Check, Oracle
from cpu.report import Row, judge
from cpu.timing import Spread, Times, interleave, keep_memory

MAX_ITER = 5000
PEERS = ("POT log", "torch log")  # the targets name these; the others are shown for comparison


def single(value: float) -> Spread:
    return Spread(value, report.NAN, report.NAN)


class Bench:
    """One shape: its batch, the oracle's answer, and the contestants' solvers."""

    def __init__(self, shape: Shape, args: argparse.Namespace) -> None:
        self.shape, self.reg, self.tol, self.backend = shape, args.reg, args.tol, args.backend
        self.threads, self.timed = args.threads, partial(interleave, rounds=args.rounds, budget=args.budget)
        self.batch = make_batch(shape, noise=args.noise)
        self.oracle: Oracle = oracle.solve_reference(self.batch, self.reg)
        self.cost = peers.cosine_cost(self.batch.x, self.batch.y)
        torch_log = peers.torch_log(self.reg, self.tol)
        guess = torch_log(self.cost, self.batch.a, self.batch.b).n_iter
        self.solvers: dict[str, peers.Solver] = {}
        for name, method in (("POT log", "log_sinkhorn"), ("POT scaling", "sinkhorn")):
            make = partial(peers.pot, self.reg, method=method)
            count = peers.fewest_iterations(make, self.batch, self.cost, self.tol, guess)
            self.solvers[name] = make(count)
        self.solvers["torch log"] = torch_log
        self.solvers["torch log, one exp"] = peers.torch_one_exp(self.reg, self.tol)
        self.solvers["torch absorbed"] = peers.torch_absorbed(self.reg, self.tol)

    @property
    def options(self) -> dict[str, object]:
        return {"reg": self.reg, "tol": self.tol, "max_iter": MAX_ITER, "backend": self.backend}

    def loss(self, batch: Batch) -> Tensor:
        return otalign.sinkhorn_loss(batch.x, batch.y, batch.n, batch.m, **self.options)  # type: ignore[arg-type]

    def peer_loss(self, solver: peers.Solver, batch: Batch) -> Tensor:
        return peers.CosineLoss.apply(batch.x, batch.y, batch, solver)

    def row(self, experiment: str, name: str, spread: Spread, **columns: Any) -> Row:
        return Row(experiment, self.shape.name, name, *spread, **columns)

    def time_row(self, experiment: str, name: str, times: Times, check: Check) -> Row:
        verdict = judge(trusted=check.passed(self.tol), others=times.others)
        return self.row(experiment, name, times.ms(name), verdict=verdict, others=times.others, **check._asdict())

    def unchecked(self, experiment: str, name: str, times: Times) -> Row:
        return self.row(experiment, name, times.ms(name), verdict=judge(others=times.others), others=times.others)

    def target(
        self, experiment: str, name: str, spread: Spread, bound: str, *, trusted: bool = True, **columns: Any
    ) -> Row:
        """A figure with its bound and verdict. If its check failed, the figure is NaN."""
        verdict = judge(spread.median, bound, trusted=trusted, others=columns.get("others", 0.0))
        spread = spread if trusted else single(report.NAN)
        return self.row(experiment, name, spread, bound=bound, verdict=verdict, **{"unit": "x", **columns})

    def ratio(self, experiment: str, name: str, times: Times, pair: tuple[str, str], bound: str, trusted: bool) -> Row:
        return self.target(experiment, name, times.ratio(*pair), bound, trusted=trusted, others=times.others)


def with_gradients(loss: Callable[[Batch], Tensor], batch: Batch) -> Callable[[], tuple[Tensor, ...]]:
    """A call that computes the loss and both gradients, as in training."""
    batch = batch._replace(x=batch.x.detach().requires_grad_(), y=batch.y.detach().requires_grad_())
    one = torch.ones(())

    def run() -> tuple[Tensor, ...]:
        value = loss(batch)
        return value.detach(), *torch.autograd.grad(value, (batch.x, batch.y), grad_outputs=one)

    return run


def measure_loss(bench: Bench) -> Iterator[Row]:
    """Loss and both gradients, against the peers and against the three bare matrix products."""
    batch, truth = bench.batch, bench.oracle
    runs = {"otalign": with_gradients(bench.loss, batch)}
    for name, solver in bench.solvers.items():
        runs[name] = with_gradients(partial(bench.peer_loss, solver), batch)

    checks = {}
    for name, run in runs.items():
        outputs = run()
        if name == "otalign":
            result = otalign.solve(batch.x, batch.y, batch.n, batch.m, **bench.options)  # type: ignore[arg-type]
            n_iter, plan = int(result.n_iter.max()), result.plan()
        else:
            plan, _, n_iter = bench.solvers[name](bench.cost, batch.a, batch.b)
        errors = map(relative, outputs, (truth.loss, truth.dx, truth.dy))
        checks[name] = Check(n_iter, peers.marginal_error(plan, batch), *errors)

    floor = peers.bare_products(batch, truth.plan.float())
    times = bench.timed({**runs, "bare products": floor})
    for name, check in checks.items():
        yield bench.time_row("loss", name, times, check)
    yield bench.unchecked("loss", "bare products", times)
    good = {name: check.passed(bench.tol) for name, check in checks.items()}
    faster = min(PEERS, key=lambda name: times.ms(name).median)
    trusted = good["otalign"] and good[faster]
    yield bench.ratio("loss", report.SPEED_UP, times, (faster, "otalign"), ">= 6", trusted)
    pair = ("otalign", "bare products")
    yield bench.ratio("loss", "time over bare products", times, pair, "<= 1.6", good["otalign"])


def measure_solver(bench: Bench) -> Iterator[Row]:
    """The solver alone on a given cost, without gradients. Peers return the plan, otalign potentials or the plan."""
    batch, cost = bench.batch, bench.cost

    def solve() -> otalign.OTResult:
        return otalign.solve_cost(cost, batch.n, batch.m, **bench.options)  # type: ignore[arg-type]

    def run_peer(solver: peers.Solver) -> peers.Solution:
        return solver(cost, batch.a, batch.b)

    runs: dict[str, Callable[[], object]] = {"otalign": solve, "otalign with plan": lambda: solve().plan()}
    runs |= {name: partial(run_peer, solver) for name, solver in bench.solvers.items()}
    with torch.no_grad():
        times = bench.timed(runs)
        result = solve()
        answers = {name: run_peer(solver) for name, solver in bench.solvers.items()}
        ours = peers.Solution(result.plan(), result.value, int(result.n_iter.max()))
    good = {}
    for name, answer in {"otalign": ours, "otalign with plan": ours, **answers}.items():
        value_error = relative(answer.value, bench.oracle.value)
        check = Check(answer.n_iter, peers.marginal_error(answer.plan, batch), value_error)
        good[name] = check.passed(bench.tol)
        yield bench.time_row("solver", name, times, check)
    trusted = good["otalign"] and good["POT log"]
    yield bench.ratio("solver", "speed-up over POT log", times, ("POT log", "otalign"), ">= 100", trusted)


def measure_growth(bench: Bench) -> Iterator[Row]:
    """Twice the padding must not take more time, and twice the items must take twice the time."""
    padded, doubled = pad_double(bench.batch), repeat_items(bench.batch)
    runs = {
        "otalign": with_gradients(bench.loss, bench.batch),
        "twice the padding": with_gradients(bench.loss, padded),
        "twice the items": with_gradients(bench.loss, doubled),
    }
    outputs = {name: run() for name, run in runs.items()}
    (loss, dx, dy), (padded_loss, padded_dx, padded_dy) = outputs["otalign"], outputs["twice the padding"]
    N, M = bench.shape.N, bench.shape.M
    same = torch.equal(loss, padded_loss) and torch.equal(dx, padded_dx[:, :N]) and torch.equal(dy, padded_dy[:, :M])
    zero = not (padded_dx[:, N:].any() or padded_dy[:, M:].any())
    mean_kept = torch.allclose(outputs["twice the items"][0], loss, rtol=1e-5)
    del outputs, dx, dy, padded_dx, padded_dy
    times = bench.timed(runs)
    for name in runs:
        yield bench.unchecked("growth", name, times)
    for name, bound, trusted in (
        ("twice the padding", "<= 1.1", same and zero),
        ("twice the items", "<= 2.2", mean_kept),
    ):
        yield bench.ratio("growth", f"time at {name}", times, (name, "otalign"), bound, trusted)


def measure_memory(bench: Bench) -> Iterator[Row]:
    """Peak memory without inputs, loss and gradients, as a multiple of the valid cost's bytes, in fresh processes."""
    for name, contestant in (("otalign", bench.backend), ("torch log", "torch log")):
        peak = memory.measure(bench.shape.name, contestant, threads=bench.threads, reg=bench.reg, tol=bench.tol)
        pages, allocations = single(peak["pages"]), single(peak["torch"])
        if name == "otalign":
            yield bench.target("memory", f"{name}, peak of pages", pages, "<= 1.5")
        else:
            yield bench.row("memory", f"{name}, peak of pages", pages, unit="x")
        yield bench.row("memory", f"{name}, peak of torch's allocations", allocations, unit="x")


def measure_precision(bench: Bench) -> Iterator[Row]:
    """L1 distance of the float32 plan from the float64 reference's after the same iterations, for the worst item."""
    batch, double = bench.batch, bench.batch.double()
    valid = (bench.batch.a > 0)[:, :, None] & (bench.batch.b > 0)[:, None, :]
    high = bench.cost.masked_fill(~valid, -torch.inf).amax((1, 2))
    low = bench.cost.masked_fill(~valid, torch.inf).amin((1, 2))
    for fraction in (0.1, 0.05, 0.02, 0.01, 0.005):
        reg = fraction * (high - low)
        with torch.no_grad():
            plan = otalign.solve(
                batch.x, batch.y, batch.n, batch.m, reg=reg, tol=0, max_iter=100, backend=bench.backend
            ).plan()
            exact = otalign.solve(
                double.x, double.y, batch.n, batch.m, reg=reg.double(), tol=0, max_iter=100, backend="reference"
            ).plan()
        distance = float((plan - exact).abs().sum((1, 2)).max())
        name = f"plan after 100 iterations, reg {fraction:g} of range"
        yield bench.target("precision", name, single(distance), "<= 1e-5", unit="L1")


EXPERIMENTS = {
    "loss": measure_loss,
    "solver": measure_solver,
    "growth": measure_growth,
    "memory": measure_memory,
    "precision": measure_precision,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks cpu", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two shapes, seven rounds")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="the CSV, suffix optional (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="default: 41, or 7 with --quick")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing for each experiment and shape")
    parser.add_argument("--reg", type=float, default=0.05)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, default=NOISE, help="of the frames; less noise needs more iterations")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--default-allocator", action="store_true", help="let glibc return memory between calls")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (7 if args.quick else 41)
    shapes = args.shapes or (["slm10", "layers"] if args.quick else list(SHAPES))

    torch.set_num_threads(args.threads)
    kept = False if args.default_allocator else keep_memory()
    where = environment.describe(threads=args.threads, memory_kept=kept)
    where |= {"reg": f"{args.reg:g}", "tol": f"{args.tol:g}", "noise": f"{args.noise:g}", "backend": args.backend}
    for name, value in where.items():
        print(f"{name:<10}{value}")

    rows: list[Row] = []
    out = args.out.with_suffix(".csv")
    for name in shapes:
        shape = SHAPES[name]
        bench = Bench(shape, args)
        share = bench.batch.valid / (shape.B * shape.N * shape.M)
        print(f"\n{name}: B {shape.B}, N {shape.N}, M {shape.M}, D {shape.D}; {share:.0%} of the padded cost is valid")
        print(report.HEADER)
        for experiment in args.experiments:
            for row in EXPERIMENTS[experiment](bench):
                rows.append(row)
                print(report.format_row(row), flush=True)
        report.write_csv(out, rows, where)
    verdicts = [row.verdict for row in rows if row.bound]
    print(
        f"\n{verdicts.count('PASS')} of {len(verdicts)} targets reached, {verdicts.count('BUSY')} without a verdict; {out} written"
    )
    return 0
