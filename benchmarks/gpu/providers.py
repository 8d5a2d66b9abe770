"""The providers of the GPU benchmark. Each is built for one batch and computes a loss that has gradients."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import otalign
from common import peers
from common.shapes import Batch
from gpu import backends

Outputs = tuple[Tensor, ...]


class Missing(Exception):
    """The reason why a provider cannot run."""


class Task(NamedTuple):
    """The problem: this batch, solved to `tol`, or with exactly `iterations` iterations if `tol` is 0."""

    batch: Batch  # with points in the type that is measured
    reg: float
    tol: float
    iterations: int  # to make, or expected
    error: float  # for providers with other iterations: the marginal error to reach, tol or that of `iterations`


class Contestant(NamedTuple):
    """`loss` of x and y, the iterations it makes, and the marginal error it reaches (NaN if unknown)."""

    loss: Callable[[Tensor, Tensor], Tensor]
    iterations: int
    marginal_error: float
    graph: bool = False  # to be captured in a CUDA graph and replayed
    same: bool = True  # makes the iterations of the truth: the same number of them gives the same result


# otalign ---------------------------------------------------------------------------------------------------------------


def otalign_backend(task: Task, backend: str, graph: bool = False) -> Contestant:
    reason = backends.reason_missing(backend)
    if reason is not None:
        raise Missing(reason)
    b = task.batch
    full = bool((b.n == b.x.shape[1]).all() and (b.m == b.y.shape[1]).all())
    lengths = (None, None) if full else (b.n.to(b.x.device), b.m.to(b.x.device))
    options: dict[str, Any] = {"reg": task.reg, "tol": task.tol, "backend": backend}
    options["max_iter"] = task.iterations if task.tol == 0 else 5000
    result = otalign.solve(b.x, b.y, *lengths, **options)
    if graph and b.x.device.type != "cuda":
        raise Missing("CUDA graphs need a GPU")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return otalign.sinkhorn_loss(x, y, *lengths, **options)

    return Contestant(loss, int(result.n_iter.max()), float(result.error.max()), graph)


# Plain torch -----------------------------------------------------------------------------------------------------------


def product(x: Tensor, y: Tensor) -> Tensor:
    """x y^T or P y, summed in float32. Tensor cores take 16-bit factors directly, where torch supports it."""
    if x.dtype == torch.float32 or x.device.type != "cuda":
        return torch.bmm(x.float(), y.float())
    return torch.bmm(x, y, out_dtype=torch.float32)


class CosineLoss(torch.autograd.Function):
    """As `peers.CosineLoss`, for points of 16 bits as well, as an expert would write it for a GPU in torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, batch: Batch, solve: peers.Solver) -> Tensor:
        x_scale, y_scale = (
            torch.linalg.vector_norm(t, dim=2, keepdim=True, dtype=torch.float32).clamp_min_(peers.EPS).reciprocal_()
            for t in (x, y)
        )
        scale = x_scale * y_scale.mT
        cos = product(x, y.mT).mul_(scale)
        solution = solve(1 - cos, batch.a, batch.b)
        ctx.save_for_backward(x, y, x_scale, y_scale, scale, cos, solution.plan)
        return solution.value.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, x_scale, y_scale, scale, cos, plan = ctx.saved_tensors
        weight = plan * (grad / len(x))
        radial = cos * weight
        weight = weight.mul_(scale).to(x.dtype)
        dx = x * (radial.sum(2, keepdim=True) * x_scale**2) - product(weight, y)
        dy = y * (radial.sum(1, keepdim=True).mT * y_scale**2) - product(weight.mT, x)
        return dx.to(x.dtype), dy.to(y.dtype), None, None


def cost(batch: Batch) -> Tensor:
    """1 - cos as a padded `(B, N, M)` tensor in float32."""
    x_scale, y_scale = (torch.linalg.vector_norm(t, dim=2, dtype=torch.float32) for t in (batch.x, batch.y))
    scale = x_scale.clamp_min(peers.EPS)[:, :, None] * y_scale.clamp_min(peers.EPS)[:, None, :]
    return 1 - product(batch.x, batch.y.mT) / scale


def with_solver(task: Task, solver: peers.Solver) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of x and y: the cosine cost, a solver for a given cost, and the gradient of the cost."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return CosineLoss.apply(x, y, task.batch, solver)

    return loss


def iterate_log(scores: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u = log_a - torch.logsumexp(scores + v[:, None, :], 2)
    return u, log_b - torch.logsumexp(scores + u[:, :, None], 1)


def iterate_absorbed(kernel: Tensor, a: Tensor, b: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    row_scale = a / torch.bmm(kernel, column_scale[:, :, None])[:, :, 0].clamp_min(peers.TINY)
    return row_scale, b / torch.bmm(row_scale[:, None, :], kernel)[:, 0].clamp_min(peers.TINY)


def compiled_solver(task: Task, form: str) -> peers.Solver:
    """Gauss-Seidel: an iteration compiled for its shape, repeated a fixed number of times for a CUDA graph."""
    torch._dynamo.config.recompile_limit = 64  # above it, torch would run uncompiled without a warning
    step = torch.compile({"log": iterate_log, "absorbed": iterate_absorbed}[form], dynamic=False)

    def solve(cost: Tensor, a: Tensor, b: Tensor) -> peers.Solution:
        log_a, log_b = a.log(), b.log()
        scores = cost * (-1 / task.reg)
        if form == "log":
            v = log_b
            for _ in range(task.iterations):
                u, v = step(scores, log_a, log_b, v)
        else:
            weighted = scores + log_b[:, None, :]
            u = log_a - torch.logsumexp(weighted, 2)
            kernel = (weighted + u[:, :, None]).exp()
            column_scale = b / kernel.sum(1).clamp_min(peers.TINY)
            row_scale = torch.ones_like(a)
            for _ in range(task.iterations - 1):
                row_scale, column_scale = step(kernel, a, b, column_scale)
            u, v = u + row_scale.log(), log_b + column_scale.clamp_min(peers.TINY).log()
        plan = (scores + u[:, :, None] + v[:, None, :]).exp()
        return peers.Solution(plan, peers.dual_value(u, v, log_a, log_b, a, b, task.reg), task.iterations)

    return solve


def compiled_torch(task: Task, form: str) -> Contestant:
    if task.batch.x.device.type != "cuda":
        raise Missing("CUDA graphs need a GPU")
    return from_solver(task, compiled_solver(task, form), graph=True)


def from_solver(task: Task, solver: peers.Solver, *, graph: bool = False) -> Contestant:
    b = task.batch
    with torch.no_grad():  # the mode of CosineLoss: another one would compile again
        solution = solver(cost(b), b.a, b.b)
        error = peers.marginal_error(solution.plan, b)
    return Contestant(with_solver(task, solver), solution.n_iter, error, graph)


# Packages --------------------------------------------------------------------------------------------------------------


def pot(task: Task) -> Contestant:
    _need("POT")
    make = partial(peers.pot, task.reg, method="log_sinkhorn")
    count = peers.fewest_iterations(make, task.batch, cost(task.batch), task.error, task.iterations)
    return from_solver(task, make(count))._replace(same=False)


def geomloss(task: Task) -> Contestant:
    """`geomloss.ot.solve_batch`: symmetric iterations with annealing: many more for the same error."""
    _need("geomloss")
    from geomloss.ot import solve_batch

    def solver(iterations: int) -> peers.Solver:
        def solve(cost: Tensor, a: Tensor, b: Tensor) -> peers.Solution:
            found = solve_batch(cost, reg=task.reg, a=a, b=b, max_iter=iterations)
            return peers.Solution(found.plan.detach(), found.value.detach(), iterations)

        return solve

    few, enough = 0, task.iterations
    while (error := from_solver(task, solver(enough)).marginal_error) > task.error:
        few, enough = enough, 2 * enough
        if enough > 64 * task.iterations:
            raise Missing(f"after {few} iterations its marginal error is {error:.2g}, not {task.error:.2g}")
    while enough - few > 1:
        middle = (few + enough) // 2
        converged = from_solver(task, solver(middle)).marginal_error <= task.error
        few, enough = (few, middle) if converged else (middle, enough)
    return from_solver(task, solver(enough))._replace(same=False)


def flash_sinkhorn(task: Task) -> Contestant:
    """`SamplesLoss` of FlashSinkhorn on unit vectors, item by item: its batches have one length."""
    _need("flash-sinkhorn")
    if task.batch.x.device.type != "cuda":
        raise Missing("needs a GPU")
    from flash_sinkhorn import SamplesLoss

    b = task.batch
    lengths = list(zip(b.n.tolist(), b.m.tolist(), strict=True))
    solver = SamplesLoss(
        "sinkhorn", backend="alternating", use_epsilon_scaling=False, eps=task.reg, n_iters=task.iterations,
        half_cost=True, debias=False, normalize=False, allow_tf32=False, last_extrapolation=False,
    )  # fmt: skip

    def loss(x: Tensor, y: Tensor) -> Tensor:
        items = [
            solver(
                torch.nn.functional.normalize(x[i, :n].float(), dim=1),
                torch.nn.functional.normalize(y[i, :m].float(), dim=1),
            )
            for i, (n, m) in enumerate(lengths)
        ]
        return torch.stack(items).mean()

    return Contestant(loss, task.iterations, float("nan"), same=False)


def _need(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{package} is not installed") from None


OURS = ("triton", "triton, graph", "cuda", "cuda, graph")
PROVIDERS: dict[str, Callable[[Task], Contestant]] = {
    "triton": partial(otalign_backend, backend="triton"),
    "triton, graph": partial(otalign_backend, backend="triton", graph=True),
    "cuda": partial(otalign_backend, backend="cuda"),
    "cuda, graph": partial(otalign_backend, backend="cuda", graph=True),
    "torch log, compiled, graph": partial(compiled_torch, form="log"),
    "torch absorbed, compiled, graph": partial(compiled_torch, form="absorbed"),
    "GeomLoss": geomloss,
    "POT": pot,
    "FlashSinkhorn": flash_sinkhorn,
}
