"""The check of each figure: its distance from the converged float64 reference. A wrong result gets no time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import otalign
from common.shapes import Batch

CONVERGED = 1e-6  # marginal error of the oracle, a thousandth of what is compared

# A contestant that stops at a marginal error of 1e-3 differs from the optimum by about as much: its gradients to first
# order, its loss to second order. POT's loss is the primal expression, which differs to first order.
LOSS_BOUND = 1e-3
GRADIENT_BOUND = 1e-2
MARGINAL_SLACK = 1.02  # for float32 sums of the plan, against the error that the contestant computed


class Oracle(NamedTuple):
    """Mean loss (), its gradients, values `(B,)` and plan `(B, N, M)` of the converged reference in float64."""

    loss: Tensor
    dx: Tensor
    dy: Tensor
    value: Tensor
    plan: Tensor


class Check(NamedTuple):
    """Relative errors of a contestant against the oracle; NaN if it has no such output."""

    n_iter: int
    marginal_error: float
    loss_error: float
    dx_error: float = float("nan")
    dy_error: float = float("nan")

    def passed(self, tol: float) -> bool:
        gradients = all(not error > GRADIENT_BOUND for error in (self.dx_error, self.dy_error))
        return self.marginal_error <= MARGINAL_SLACK * tol and self.loss_error <= LOSS_BOUND and gradients


def solve_reference(batch: Batch, reg: float) -> Oracle:
    batch = batch.double()
    x, y = batch.x.requires_grad_(), batch.y.requires_grad_()
    result = otalign.solve(x, y, batch.n, batch.m, reg=reg, max_iter=5000, tol=CONVERGED, backend="reference")
    loss = result.value.mean()
    dx, dy = torch.autograd.grad(loss, (x, y))
    with torch.no_grad():
        return Oracle(loss.detach(), dx, dy, result.value.detach(), result.plan().detach())
