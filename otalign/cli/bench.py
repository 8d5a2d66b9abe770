"""`python -m otalign bench`: the time of a loss with its gradients on this machine, beside bare matrix products."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import otalign

from .. import backends
from ..options import COSTS
from .arguments import count, positive
from .errors import InputError, first_line
from .table import table

HELP = "time a loss with its gradients on this machine, beside bare matrix products"
DESCRIPTION = """\
Times the loss and both gradients of a random batch on each backend of the device. Lengths lie between a quarter and the
whole of --frames and --tokens. The backends take turns with the bare matrix products of the padded batch, by torch.bmm:
x y^T, P y and P^T x. The products compute in --dtype, the losses in float32 at least. A ratio compares times of one round.
Do not publish these numbers: they include the effect of other work on the machine."""
EXAMPLES = """\
examples:
  python -m otalign bench
  python -m otalign bench --batch 32 --frames 750 --tokens 128 --repeats 50
  python -m otalign bench --device cuda --dtype bfloat16
  python -m otalign bench --backend cpu reference"""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCTS = "bare products"
BURST = 0.01  # least total seconds of the counted calls of a turn
PAUSE = 0.02  # seconds; the threads of the previous contestant may spin for about this long


class RaggedBatch(NamedTuple):
    """A padded batch with lengths."""

    x: Tensor  # (B, N, D)
    y: Tensor  # (B, M, D)
    n: Tensor  # (B,)
    m: Tensor  # (B,)


class Spread(NamedTuple):
    """Median with the 20th and 80th percentile."""

    median: float
    low: float
    high: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench`."""
    add = parser.add_argument
    for name, size in (("batch", 16), ("frames", 300), ("tokens", 60), ("dim", 1024)):
        add(f"--{name}", type=count, default=size, metavar="COUNT", help="(default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the points (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add(
        "--backend",
        choices=backends.NAMES[1:],
        nargs="+",
        help="(default: all backends of the device except the reference)",
    )
    add("--repeats", type=count, default=20, metavar="COUNT", help="number of rounds (default: %(default)s)")
    add("--reg", type=positive, default=0.05, help="(default: %(default)s)")
    add("--cost", choices=COSTS, default="cosine", help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Time and print."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no usable GPU")
    batch = draw(arguments, device)
    contestants, solved = competitors(batch, arguments)
    print(show_conditions(arguments, device), "", sep="\n", flush=True)
    times = interleave(contestants, arguments.repeats, device)
    print(show(times, solved))
    return 0


def draw(arguments: argparse.Namespace, device: torch.device) -> RaggedBatch:
    """Random points and lengths, the same in each run. The first item of each side is full."""
    generator = torch.Generator().manual_seed(0)

    def side(size: int) -> tuple[Tensor, Tensor]:
        points = torch.randn(arguments.batch, size, arguments.dim, generator=generator)
        lengths = torch.randint(-(-size // 4), size + 1, (arguments.batch,), generator=generator)
        lengths[0] = size
        return points.to(device, DTYPES[arguments.dtype]).requires_grad_(), lengths.to(device)

    (x, n), (y, m) = side(arguments.frames), side(arguments.tokens)
    return RaggedBatch(x, y, n, m)


def competitors(
    batch: RaggedBatch, arguments: argparse.Namespace
) -> tuple[dict[str, Callable[[], object]], dict[str, otalign.OTResult]]:
    """The calls to time, each called once already; and the solutions of the backends."""
    contestants: dict[str, Callable[[], object]] = {PRODUCTS: bare_products(batch)}
    solved, options = {}, {"reg": arguments.reg, "cost": arguments.cost}
    for name in arguments.backend or of_device(arguments.device):
        call = loss_and_gradients(batch, backend=name, **options)
        try:
            with torch.no_grad():
                solved[name] = otalign.solve(*batch, backend=name, **options)
            call()
        except (ValueError, TypeError, RuntimeError) as error:
            if arguments.backend:
                raise InputError(f"backend {name}: {first_line(error)}") from error
            print(f"warning: backend {name} is left out: {first_line(error)}", file=sys.stderr)
            continue
        contestants[name] = call
    if not solved:
        raise InputError("no backend can compute this")
    return contestants, solved


def of_device(device: str) -> list[str]:
    """The available backends of a device, without the reference."""
    names = ["cpu"] if device == "cpu" else ["triton", "cuda"]
    found = [name for name in names if backends.reason_missing(name) is None]
    if not found:
        reasons = "; ".join(f"{name}: {backends.reason_missing(name)}" for name in names)
        raise InputError(f"no backend but the reference (--backend reference): {reasons}")
    return found


def loss_and_gradients(batch: RaggedBatch, **options: object) -> Callable[[], tuple[Tensor, ...]]:
    """A function that computes the loss and the gradients of both sides."""

    def call() -> tuple[Tensor, ...]:
        loss = otalign.sinkhorn_loss(*batch, **options)  # type: ignore[arg-type]
        return torch.autograd.grad(loss, (batch.x, batch.y))

    return call


def bare_products(batch: RaggedBatch) -> Callable[[], object]:
    """A function that computes the matrix products of the loss and its gradients, into allocated memory."""
    x, y = batch.x.detach(), batch.y.detach()
    plan = torch.rand(x.shape[0], x.shape[1], y.shape[1], device=x.device).to(x.dtype)
    cost, dx, dy = torch.empty_like(plan), torch.empty_like(x), torch.empty_like(y)

    def call() -> object:
        return torch.bmm(x, y.mT, out=cost), torch.bmm(plan, y, out=dx), torch.bmm(plan.mT, x, out=dy)

    return call


def interleave(
    contestants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Tensor]:
    """Seconds of a call of each contestant, `(repeats,)` float64. They take turns, in an order that rotates from round to round.

    A turn is one call that does not count, which wakes the threads and fills the caches, and then calls for at least `BURST`
    seconds. The median of these calls counts.
    """
    names, samples = list(contestants), {name: torch.empty(repeats, dtype=torch.float64) for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for done in range(repeats):
            shift = done % len(names)
            for name in names[shift:] + names[:shift]:
                time.sleep(PAUSE if device.type == "cpu" else 0)
                contestants[name]()
                samples[name][done] = _burst(contestants[name], device)
    finally:
        gc.enable()
    return samples


def _burst(call: Callable[[], object], device: torch.device) -> float:
    """The median seconds of calls that take at least `BURST` seconds together."""
    seconds: list[float] = []
    while sum(seconds) < BURST:
        seconds.append(_seconds(call, device))
    return statistics.median(seconds)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call; on a GPU between CUDA events."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(samples: Tensor) -> Spread:
    """Median and percentiles of samples `(repeats,)` float64."""
    low, median, high = samples.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Spread(median, low, high)


def show_conditions(arguments: argparse.Namespace, device: torch.device) -> str:
    """The conditions of the timings, as printed text."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    given = f"batch {arguments.batch}, frames {arguments.frames}, tokens {arguments.tokens}, dim {arguments.dim}"
    return "\n".join(
        (
            f"otalign {otalign.__version__}, torch {torch.__version__}, {where}",
            f"{given}, {arguments.dtype}; cost {arguments.cost}, reg {arguments.reg:g}; {arguments.repeats} rounds",
        )
    )


def show(times: Mapping[str, Tensor], solved: Mapping[str, otalign.OTResult]) -> str:
    """A line for each contestant: milliseconds, ratio to the bare products, iterations and marginal error."""
    header = ("loss and gradients", "ms", "20% - 80%", "over products", "20% - 80%", "iterations", "marginal error")
    rows = []
    for name, samples in times.items():
        ms, ratio = spread(1e3 * samples), spread(samples / times[PRODUCTS])
        row = [name, f"{ms.median:.3g}", f"{ms.low:.3g} - {ms.high:.3g}"]
        if name not in solved:
            rows.append([*row, "1", "", "", ""])
            continue
        result = solved[name]
        converged = f"{float(result.error.max()):.1e}" + ("" if result.converged.all() else ", not converged")
        row += [f"{ratio.median:.2f}", f"{ratio.low:.2f} - {ratio.high:.2f}"]
        rows.append([*row, str(int(result.n_iter.max())), converged])
    return table(header, rows, left=[0])
