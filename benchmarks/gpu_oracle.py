"""The truth beside every figure of the GPU benchmark: float64, batched, on the device itself; and the floors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shapes import Batch

LOSS_BOUND = (
    1e-3  # relative, where a contestant may stop at a marginal error of 1e-3; a hundredth of it at fixed iterations
)
GRADIENT_BOUND = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # of the norm, at fixed iterations: rounding only
LOOSE_GRADIENT_BOUND = 1e-2


class Truth(NamedTuple):
    """Mean loss (), its gradients by x and y, the iterations made, and the marginal error of the worst item."""

    loss: Tensor
    dx: Tensor
    dy: Tensor
    iterations: int
    marginal_error: float


def solve(batch: Batch, reg: float, *, iterations: int | None = None, tol: float = 1e-6) -> Truth:
    """Gauss-Seidel in the log domain on the cosine cost, for a number of iterations or to a marginal error."""
    x, y = batch.x.double(), batch.y.double()
    a, b = (batch.a > 0) / batch.n[:, None].double(), (batch.b > 0) / batch.m[:, None].double()
    real_x, real_y = (a > 0)[..., None], (b > 0)[..., None]
    x, y = torch.where(real_x, x, 0), torch.where(real_y, y, 0)
    over_x = 1 / torch.where(real_x, x.norm(dim=-1, keepdim=True), 1)
    over_y = 1 / torch.where(real_y, y.norm(dim=-1, keepdim=True), 1)
    cos = (x * over_x) @ (y * over_y).mT
    scores = (cos - 1) / reg
    log_a, log_b = a.log(), b.log()
    u = log_a - torch.logsumexp(scores + log_b[:, None, :], 2)  # logarithms of a exp(f / reg) and b exp(g / reg)
    done, error = 0, torch.inf
    while True:
        v = log_b - torch.logsumexp(scores + u[:, :, None], 1)
        rows = torch.logsumexp(scores + v[:, None, :], 2)
        done += 1
        if iterations is None or done >= iterations:
            error = float(((u + rows).exp() - a).abs().sum(1).max())
        if done == iterations or (iterations is None and (error <= tol or done >= 5000)):
            break
        u = log_a - rows
    plan = (scores + u[:, :, None] + v[:, None, :]).exp()
    value = reg * (torch.where(a > 0, a * (u - log_a), 0).sum(1) + torch.where(b > 0, b * (v - log_b), 0).sum(1))
    weight = plan / len(x)
    dx = over_x * ((weight * cos).sum(2, keepdim=True) * x * over_x - weight @ (y * over_y))
    dy = over_y * ((weight * cos).sum(1)[..., None] * y * over_y - weight.mT @ (x * over_x))
    return Truth(value.mean(), dx, dy, done, error)


def relative(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN anywhere makes it infinite, so that no bound lets it through."""
    error = float((actual.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def matches(outputs: tuple[Tensor, ...], truth: Truth, dtype: torch.dtype, *, fixed: bool) -> bool:
    """Whether loss and gradients are right, for as many of them as there are."""
    bounds = (
        LOSS_BOUND / 100 if fixed else LOSS_BOUND,
        *[GRADIENT_BOUND[dtype] if fixed else LOOSE_GRADIENT_BOUND] * 2,
    )
    pairs = zip(outputs, truth[:3], bounds)  # noqa: B905 - a forward pass has the loss alone
    return all(relative(output, expected) <= bound for output, expected, bound in pairs)


# Floors ----------------------------------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """What this device does at best: bytes a second in a copy (read and written), operations a second in a product."""

    bandwidth: float
    rates: dict[torch.dtype, float]


def measure_ceilings(device: torch.device, *, small: bool = False) -> Ceilings:
    """From a large copy and from large products, in this run."""
    size = 2**22 if small else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    bandwidth = 2 * size / fastest(lambda: target.copy_(source), device)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        n = 256 if small else 8192
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[dtype] = 2 * n**3 / fastest(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    return Ceilings(bandwidth, rates)


def fastest(function: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of the median call."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def floor_us(batch: Batch, dtype: torch.dtype, mode: str, ceilings: Ceilings) -> float:
    """The least time for the valid part of a batch: bytes over bandwidth or operations over rate, whichever is longer.

    Forward reads both sides and multiplies once. Backward reads both again, writes both gradients and multiplies twice.
    Iterations count nothing: what they add is what there is to win.
    """
    numbers = int(batch.n.sum() + batch.m.sum()) * batch.x.shape[-1]
    product = 2 * batch.valid * batch.x.shape[-1]
    passes = {"forward": (1, 1), "backward": (2, 2), "full": (3, 3)}[mode]
    moved, multiplied = passes[0] * numbers * dtype.itemsize, passes[1] * product
    return 1e6 * max(moved / ceilings.bandwidth, multiplied / ceilings.rates[dtype])
