"""Gradients that can be differentiated again, for all backends.

With `create_graph=True`, a backward pass must itself have a gradient, which the kernels' backward passes have not. Then the
gradient is composed of torch operations, item by item and in float64: the results of reference.py at the potentials that
the backend has found. Their first derivative is the same as the kernels', up to rounding. The second one is that of the
optimum: the potentials follow their fixed point by implicit differentiation (`reference.ImplicitPotentials`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..problem import Problem, Side
from . import reference
from .autograd import Incoming


def gradients(
    problem: Problem, f: Tensor, g: Tensor, incoming: Incoming, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients by x, y, C, a and b, each in the type of its tensor; None where they are not wanted.

    Args:
        problem: as the backend has solved it, its tensors with their graphs.
        f, g: the potentials that the backend has found, in the layouts of x and y.
        incoming: `(B,)` by value and transport cost, `(B, N, M)` by the plan; None where there is none.
    """
    given = (problem.x.points, problem.y.points, problem.C, problem.x.weights, problem.y.weights)
    with torch.enable_grad(), torch.autocast(problem.device.type, enabled=False):
        # Aliases, since x and y may be the same tensor, or one may be computed from the other.
        inputs = [tensor.view_as(tensor) if tensor is not None else None for tensor in given]
        outputs, weights = _weighted(_in_double(problem, inputs), f.double(), g.double(), incoming)
        sources = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want and tensor is not None]
        if not outputs or not sources:
            found = iter([torch.zeros_like(tensor) for tensor in sources])
        else:
            found = iter(
                torch.autograd.grad(
                    outputs, sources, weights, create_graph=True, allow_unused=True, materialize_grads=True
                )
            )
        # Where both sides are the same points, x has the gradient of both, of which the caller wants one.
        part = 0.5 if problem.symmetric else 1.0
        return [
            part * next(found) if want and tensor is not None else None
            for tensor, want in zip(inputs, wanted, strict=True)
        ]


def _in_double(p: Problem, inputs: Sequence[Tensor | None]) -> Problem:
    """The problem with these tensors, computed in float64; if it is symmetric, with the points of x on both sides."""
    x, y, C, a, b = inputs
    a, b = (None if weights is None else weights.double() for weights in (a, b))
    x_side = Side(x, p.x.segments, a, p.x.rho)
    y_side = Side(x, p.x.segments, a, p.y.rho) if p.symmetric else Side(y, p.y.segments, b, p.y.rho)
    return replace(p, x=x_side, y=y_side, C=C, dtype=torch.float64, init=None)


def _weighted(p: Problem, f: Tensor, g: Tensor, incoming: Incoming) -> tuple[list[Tensor], list[Tensor]]:
    """The results of all items that have a gradient, and these gradients."""
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for index, item in enumerate(reference.items_at(p, f, g)):
        value = item.plan_cost if p.fixed_plan else item.value
        pairs = [(value, incoming.grad_value), (item.value_linear, incoming.grad_linear)]
        found = [(result, grad[index]) for result, grad in pairs if grad is not None]
        if incoming.grad_plan is not None:
            n, m = item.plan.shape
            found.append((item.plan, incoming.grad_plan[index, :n, :m]))
        # An item whose loss is not used has no gradient, even if its numbers are NaN.
        used = bool(item.value.isfinite()) or any(bool((grad != 0).any()) for _, grad in found)
        for result, grad in found:
            if used and result.requires_grad:
                outputs.append(result)
                weights.append(grad.double())
    return outputs, weights
