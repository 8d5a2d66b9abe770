"""Other implementations for the same problem, each called in the fastest way that gives the right gradients.

All peers take a padded batch, with zero weights for the padding, and the same cost: one `bmm`, scaled by the norms.
No peer records an autograd graph through its iterations: by the envelope theorem the gradient is dL/dC = P.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.shapes import Batch

# POT imports every array library that is installed, and JAX reserves three quarters of a GPU's memory at its first use.
QUIET = {
    "POT_BACKEND_DISABLE_CUPY": "1",
    "POT_BACKEND_DISABLE_JAX": "1",
    "POT_BACKEND_DISABLE_TENSORFLOW": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
os.environ.update(QUIET)

EPS = 1e-12  # of norms, as in torch.nn.functional.normalize
TINY = 1e-30  # of masses


class Solution(NamedTuple):
    """`plan` `(B, N, M)`, `value` `(B,)`, and the number of iterations: all items make those of the slowest."""

    plan: Tensor
    value: Tensor
    n_iter: int


Solver = Callable[[Tensor, Tensor, Tensor], Solution]  # cost, a, b


class CosineLoss(torch.autograd.Function):
    """The mean value over the batch for the cost 1 - cos, with any solver, as an expert would write it in torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, batch: Batch, solve: Solver) -> Tensor:
        x_scale = torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min_(EPS).reciprocal_()
        y_scale = torch.linalg.vector_norm(y, dim=2, keepdim=True).clamp_min_(EPS).reciprocal_()
        scale = x_scale * y_scale.mT
        cos = torch.bmm(x, y.mT).mul_(scale)
        solution = solve(1 - cos, batch.a, batch.b)
        ctx.save_for_backward(x, y, x_scale, y_scale, scale, cos, solution.plan)
        return solution.value.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, x_scale, y_scale, scale, cos, plan = ctx.saved_tensors
        weight = plan * (grad / len(x))
        radial = cos.mul_(weight)  # the part along x and y themselves, which the normalisation removes
        dx = x * (radial.sum(2, keepdim=True) * x_scale**2)
        dy = y * (radial.sum(1, keepdim=True).mT * y_scale**2)
        weight.mul_(scale)
        return dx.baddbmm_(weight, y, alpha=-1), dy.baddbmm_(weight.mT, x, alpha=-1), None, None


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos as a padded `(B, N, M)` tensor; 1 on the padding."""
    return 1 - torch.nn.functional.normalize(x, dim=2) @ torch.nn.functional.normalize(y, dim=2).mT


def marginal_error(plan: Tensor, batch: Batch) -> float:
    """The worst item's L1 error over both marginals."""
    rows = (plan.sum(2) - batch.a).abs().sum(1)
    columns = (plan.sum(1) - batch.b).abs().sum(1)
    return float((rows + columns).max())


# --- POT -------------------------------------------------------------------------------------------------------------


def pot(reg: float, max_iter: int, method: str) -> Solver:
    """`ot.batch.solve_batch`.

    `grad="detach"` is its fastest mode ("envelope" records every iteration); `CosineLoss` adds the envelope gradient.
    `reg_type="KL"` gives NaN with zero weights. The value with the entropy instead is shifted by the entropies of the
    marginals (uniform: log n + log m). POT's stopping rule checks an L2 error of the rows every ten iterations. With
    `tol=0` and the smallest sufficient `max_iter` (see `fewest_iterations`) it stops as soon as it may.
    """
    from ot.batch import solve_batch

    def solve(cost: Tensor, a: Tensor, b: Tensor) -> Solution:
        result = solve_batch(cost, reg, a, b, max_iter=max_iter, tol=0, method=method, grad="detach")
        shift = (a > 0).sum(1).to(cost.dtype).log() + (b > 0).sum(1).to(cost.dtype).log()
        return Solution(result.plan, result.value + reg * shift, max_iter)

    return solve


def fewest_iterations(make: Callable[[int], Solver], batch: Batch, cost: Tensor, tol: float, guess: int) -> int:
    """The smallest number of iterations for which `make(iterations)` has a marginal error of at most `tol`."""

    def enough(iterations: int) -> bool:
        return marginal_error(make(iterations)(cost, batch.a, batch.b).plan, batch) <= tol

    count = max(guess, 1)
    while not enough(count):
        count += 1
    while count > 1 and enough(count - 1):
        count -= 1
    return count


# --- Plain torch -----------------------------------------------------------------------------------------------------
# In all three solvers, a row update also gives the row error of the plan before it, so that the stopping rule needs no
# further pass over the cost. A zero weight is a log-weight of -inf and needs no mask.


def torch_log(reg: float, tol: float, max_iter: int = 5000) -> Solver:
    """Gauss-Seidel iterations with `torch.logsumexp`, all sums in one buffer."""

    def solve(cost: Tensor, a: Tensor, b: Tensor) -> Solution:
        scores = cost * (-1 / reg)
        log_a, log_b = a.log(), b.log()
        buffer = torch.empty_like(scores)

        def lse(potential: Tensor, dim: int) -> Tensor:
            return torch.logsumexp(torch.add(scores, potential.unsqueeze(3 - dim), out=buffer), dim)

        v = log_b
        u = log_a - lse(v, 2)
        for n_iter in range(1, max_iter + 1):
            v = log_b - lse(u, 1)
            rows = lse(v, 2)
            error = ((u + rows).exp_() - a).abs_().sum(1).max()
            if error <= tol or n_iter == max_iter:
                break
            u = log_a - rows
        plan = torch.add(scores, u[:, :, None], out=buffer).add_(v[:, None, :]).exp_()
        return Solution(plan, dual_value(u, v, log_a, log_b, a, b, reg), n_iter)

    return solve


def torch_one_exp(reg: float, tol: float, max_iter: int = 5000) -> Solver:
    """As `torch_log`, but the column sums reuse the rows' exponentials: one `exp` for each entry and iteration."""

    def solve(cost: Tensor, a: Tensor, b: Tensor) -> Solution:
        scores = cost * (-1 / reg)
        log_a, log_b = a.log(), b.log()
        plan = torch.empty_like(scores)
        v = log_b
        u = log_a - torch.logsumexp(torch.add(scores, v[:, None, :], out=plan), 2)
        v = log_b - torch.logsumexp(torch.add(scores, u[:, :, None], out=plan), 1)
        for n_iter in range(1, max_iter + 1):
            torch.add(scores, u[:, :, None], out=plan).add_(v[:, None, :]).exp_()
            rows = plan.sum(2)
            if (rows - a).abs_().sum(1).max() <= tol or n_iter == max_iter:
                break
            row_scale = a / rows.clamp_min_(TINY)
            columns = torch.bmm(row_scale[:, None, :], plan)[:, 0]
            u = u + row_scale.clamp_min_(TINY).log_()
            v = v + (b / columns.clamp_min_(TINY)).clamp_min_(TINY).log_()
        return Solution(plan, dual_value(u, v, log_a, log_b, a, b, reg), n_iter)

    return solve


def torch_absorbed(reg: float, tol: float, max_iter: int = 5000) -> Solver:
    """One update in the log domain, then scaling iterations (`bmm` with vectors) on exp((f + g - C) / reg).

    It absorbs only once: at the values of reg that are timed, the potentials change by far less than 80 nats.
    """

    def solve(cost: Tensor, a: Tensor, b: Tensor) -> Solution:
        log_a, log_b = a.log(), b.log()
        scores = torch.mul(cost, -1 / reg).add_(log_b[:, None, :])
        u = log_a - torch.logsumexp(scores, 2)
        kernel = scores.add_(u[:, :, None]).exp_()
        row_scale = torch.ones_like(a)
        column_scale = b / kernel.sum(1).clamp_min_(TINY)
        for n_iter in range(1, max_iter + 1):
            rows = torch.bmm(kernel, column_scale[:, :, None])[:, :, 0]
            if (row_scale * rows - a).abs_().sum(1).max() <= tol or n_iter == max_iter:
                break
            row_scale = a / rows.clamp_min_(TINY)
            column_scale = b / torch.bmm(row_scale[:, None, :], kernel)[:, 0].clamp_min_(TINY)
        plan = kernel.mul_(row_scale[:, :, None]).mul_(column_scale[:, None, :])
        u = u + row_scale.clamp_min_(TINY).log_()
        v = log_b + column_scale.clamp_min_(TINY).log_()
        return Solution(plan, dual_value(u, v, log_a, log_b, a, b, reg), n_iter)

    return solve


def dual_value(u: Tensor, v: Tensor, log_a: Tensor, log_b: Tensor, a: Tensor, b: Tensor, reg: float) -> Tensor:
    """The dual value reg * (<a, u - log a> + <b, v - log b>); points without mass add nothing."""
    rows = torch.where(a > 0, a * (u - log_a), 0).sum(1)
    columns = torch.where(b > 0, b * (v - log_b), 0).sum(1)
    return reg * (rows + columns)


# --- The floor -------------------------------------------------------------------------------------------------------


def bare_products(batch: Batch, plan: Tensor) -> Callable[[], None]:
    """The three matrix products of one loss, item by item on the valid parts, and nothing else: x y^T, P y, P^T x."""
    lengths = zip(batch.n.tolist(), batch.m.tolist(), strict=True)
    items = [(batch.x[i, :n], batch.y[i, :m], plan[i, :n, :m]) for i, (n, m) in enumerate(lengths)]
    triples = [(x, y, y.mT, p, p.mT) for x, y, p in items]

    def products() -> None:
        for x, y, y_t, p, p_t in triples:
            torch.mm(x, y_t)
            torch.mm(p, y)
            torch.mm(p_t, x)

    return products
