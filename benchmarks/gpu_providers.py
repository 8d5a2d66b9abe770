"""Who takes part in the GPU benchmark. Each is made for one batch and gives the loss, or the loss and both gradients."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import otalign
import peers
from shapes import Batch

Outputs = tuple[Tensor, ...]


class Missing(Exception):
    """Why a provider takes no part."""


class Task(NamedTuple):
    """What everybody is asked: this batch, to `tol`, or exactly `iterations` if tol is 0."""

    batch: Batch  # with points in the type that is measured
    reg: float
    tol: float
    iterations: int  # to make, or to expect


class Contestant(NamedTuple):
    """`loss` of x and y, the iterations it makes, and the marginal error it reaches (NaN if it does not tell)."""

    loss: Callable[[Tensor, Tensor], Tensor]
    iterations: int
    marginal_error: float
    graph: bool = False  # to be captured in a CUDA graph and replayed
    again: bool = True  # its backward pass can be run again without its forward pass


def otalign_backend(task: Task, backend: str, graph: bool = False) -> Contestant:
    reason = otalign.backends.available()[backend]
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


def with_solver(task: Task, solver: peers.Solver) -> Callable[[Tensor, Tensor], Tensor]:
    """A solver for a given cost, with the cosine's cost and gradient around it, in float32."""
    padded = task.batch._replace(n=task.batch.n.cpu(), m=task.batch.m.cpu())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return peers.CosineLoss.apply(x.float(), y.float(), padded, solver)

    return loss


def iterate_log(scores: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u = log_a - torch.logsumexp(scores + v[:, None, :], 2)
    return u, log_b - torch.logsumexp(scores + u[:, :, None], 1)


def iterate_absorbed(kernel: Tensor, a: Tensor, b: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    row_scale = a / torch.bmm(kernel, column_scale[:, :, None])[:, :, 0].clamp_min(peers.TINY)
    return row_scale, b / torch.bmm(row_scale[:, None, :], kernel)[:, 0].clamp_min(peers.TINY)


def compiled_solver(task: Task, form: str) -> peers.Solver:
    """Gauss-Seidel with a compiled iteration, a fixed number of times, so that a CUDA graph can hold it."""
    step = torch.compile({"log": iterate_log, "absorbed": iterate_absorbed}[form])

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
        return peers.Solution(plan, peers._value(u, v, log_a, log_b, a, b, task.reg), task.iterations)

    return solve


def compiled_torch(task: Task, form: str) -> Contestant:
    if task.batch.x.device.type != "cuda":
        raise Missing("CUDA graphs need a GPU")
    return from_solver(task, compiled_solver(task, form), graph=True)


def from_solver(task: Task, solver: peers.Solver, *, graph: bool = False) -> Contestant:
    b = task.batch
    solution = solver(peers.cosine_cost(b.x.float(), b.y.float()), b.a, b.b)
    error = peers.marginal_error(solution.plan, b)
    return Contestant(with_solver(task, solver), solution.n_iter, error, graph, again=False)


def pot(task: Task) -> Contestant:
    _need("POT")
    make = partial(peers.pot, task.reg, method="log_sinkhorn")
    if task.tol == 0:
        return from_solver(task, make(task.iterations))
    b = task.batch
    cost = peers.cosine_cost(b.x.float(), b.y.float())
    return from_solver(task, make(peers.fewest_iterations(make, b, cost, task.tol, task.iterations)))


def geomloss(task: Task) -> Contestant:
    """`geomloss.ot.solve_batch`: symmetric iterations that anneal, so that it needs many more for the same error."""
    _need("geomloss")
    from geomloss.ot import solve_batch

    def solver(iterations: int) -> peers.Solver:
        def solve(cost: Tensor, a: Tensor, b: Tensor) -> peers.Solution:
            found = solve_batch(cost, reg=task.reg, a=a, b=b, max_iter=iterations)
            return peers.Solution(found.plan.detach(), found.value.detach(), iterations)

        return solve

    if task.tol == 0:
        return from_solver(task, solver(task.iterations))
    for iterations in (task.iterations << k for k in range(7)):
        contestant = from_solver(task, solver(iterations))
        if contestant.marginal_error <= task.tol:
            return contestant
    raise Missing(f"after {iterations} iterations its marginal error is {contestant.marginal_error:.2g}")


def flash_sinkhorn(task: Task) -> Contestant:
    """`SamplesLoss` of FlashSinkhorn on unit vectors, item by item, as it takes no batches of different lengths."""
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

    return Contestant(loss, task.iterations, float("nan"))


def _need(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{package} is not installed") from None


PROVIDERS: dict[str, Callable[[Task], Contestant]] = {
    "triton": partial(otalign_backend, backend="triton"),
    "triton, graph": partial(otalign_backend, backend="triton", graph=True),
    "cuda": partial(otalign_backend, backend="cuda"),
    "torch log, compiled, graph": partial(compiled_torch, form="log"),
    "torch absorbed, compiled, graph": partial(compiled_torch, form="absorbed"),
    "GeomLoss": geomloss,
    "POT": pot,
    "FlashSinkhorn": flash_sinkhorn,
}
