"""The float64 results that check each figure of the GPU benchmark, computed on the device; and the floors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common.accuracy import relative
from common.shapes import Batch

# Relative, for stopping at a marginal error of 1e-3; a hundredth of it after a fixed number of iterations.
LOSS_BOUND = 1e-3
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


def matches(outputs: tuple[Tensor, ...], truth: Truth, dtype: torch.dtype, *, fixed: bool, error: float = 0) -> bool:
    """Whether the loss is right, and the gradients if there are any.

    If `fixed`, both made the same iterations and may differ by rounding only. Otherwise they may differ as much as
    stopping at a marginal error of 1e-3 allows, or at `error` if it is larger.
    """
    loss = LOSS_BOUND / 100 if fixed else max(LOSS_BOUND, error)
    gradient = GRADIENT_BOUND[dtype] if fixed else max(LOOSE_GRADIENT_BOUND, 10 * error)
    pairs = zip(outputs, truth[:3], (loss, gradient, gradient))  # noqa: B905 - a forward pass has the loss alone
    return all(relative(output, expected) <= bound for output, expected, bound in pairs)


# Floors ----------------------------------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """The largest measured rates of this device, per second."""

    bandwidth: float  # bytes of a copy, read and written
    rates: dict[torch.dtype, float]  # operations of a matrix product with factors of this precision
    multiply_adds: float = float("nan")  # operations outside tensor cores


def measure_ceilings(device: torch.device, *, small: bool = False) -> Ceilings:
    """Measure the rates in this run, with a large copy and large products of random numbers."""
    source = torch.randint(256, (2**22 if small else 2**30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source), device)
    n = 256 if small else 8192

    def rate(dtype: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return 2 * n**3 / seconds(lambda: a @ b, device)

    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        plain, bf16 = rate(torch.float32), rate(torch.bfloat16)
        torch.backends.cuda.matmul.allow_tf32 = True
        tf32 = rate(torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    # Three products of TF32 factors are as precise as one of float32 factors, and may be faster.
    return Ceilings(bandwidth, {torch.bfloat16: bf16, torch.float32: max(plain, tf32 / 3)}, plain)


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The time of the median call, by CUDA events on a GPU."""
    on_gpu = device.type == "cuda"
    times = []
    for _ in range(repeats + 2):
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def floor_us(batch: Batch, dtype: torch.dtype, mode: str, ceilings: Ceilings) -> float:
    """The least time for the valid part of a batch: bytes over bandwidth or operations over rate, whichever is longer.

    Forward reads both sides and multiplies once. Backward reads both again, writes both gradients and multiplies twice.
    The floor leaves the iterations out: their time is what an implementation can save.
    """
    numbers = int(batch.n.sum() + batch.m.sum()) * batch.x.shape[-1]
    product = 2 * batch.valid * batch.x.shape[-1]
    passes = {"forward": (1, 1), "backward": (2, 2), "full": (3, 3)}[mode]
    moved, multiplied = passes[0] * numbers * dtype.itemsize, passes[1] * product
    return 1e6 * max(moved / ceilings.bandwidth, multiplied / ceilings.rates[dtype])
