"""What a solve returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .problem import Problem, Solution


@dataclass(frozen=True, eq=False)
class OTResult:
    r"""The solution of a batch of optimal transport problems.

    Per-point tensors have the layout of the input: `(B, N)` for padded `x`, `(total_x,)` for packed `x`.

    Attributes:
        value: `(B,)` the regularised optimum :math:`\langle P, C + B \rangle + \mathrm{reg}\,KL(P | a b^T)` (and, where
            marginals are relaxed, their terms), evaluated through the dual: exact at the optimum and off by the
            square of the marginal error short of it. Differentiable by the envelope theorem.
        value_linear: `(B,)` the transport cost :math:`\langle P, C + B \rangle`. Differentiable, exactly, through the
            implicit function theorem.
        potentials: `f` and `g`, detached, zero on the padding; balanced problems have the gauge
            :math:`\langle b, g \rangle = 0`. `init=result.potentials` warm-starts another solve.
        n_iter: `(B,)` int32, iterations made.
        error: `(B,)` the L1 marginal error that was reached; for unbalanced problems the fixed-point residual
            :math:`\sum_i a_i |\exp((f_i - f'_i) / \mathrm{reg}) - 1|`, f' being the next update.
        converged: `(B,)` bool, `error <= tol`.
    """

    value: Tensor
    value_linear: Tensor
    potentials: tuple[Tensor, Tensor]
    n_iter: Tensor
    error: Tensor
    converged: Tensor
    _problem: Problem = field(repr=False)
    _solution: Solution = field(repr=False)

    def plan(self) -> Tensor:
        """The transport plan `(B, N, M)`, zero on the padding; built when asked for. Differentiable (implicit)."""
        return self._solution.plan()

    def barycentric_x(self) -> Tensor:
        """For every `x` its image under the plan, `sum_j P_ij y_j / sum_j P_ij`: `(B, N, D)`, or `(total_x, D)`.

        Zero for points without mass. Differentiable in the plan and in `y`.
        """
        _, y = self._points()
        if self._solution.barycentric is not None:
            return self._solution.barycentric(False)
        plan = self.plan()
        image = _average(plan, self._problem.y_segments.to_padded(y.to(plan.dtype)))
        return self._problem.x_segments.from_padded(image)

    def barycentric_y(self) -> Tensor:
        """For every `y` its image under the plan, `sum_i P_ij x_i / sum_i P_ij`: `(B, M, D)`, or `(total_y, D)`."""
        x, _ = self._points()
        if self._solution.barycentric is not None:
            return self._solution.barycentric(True)
        plan = self.plan()
        image = _average(plan.mT, self._problem.x_segments.to_padded(x.to(plan.dtype)))
        return self._problem.y_segments.from_padded(image)

    def assign_y(self) -> Tensor:
        """For every `y` the index of the `x` that gives it most mass: `(B, M)` int64, or `(total_y,)`; -1 on padding.

        Indices count from the item's first point. Ties go to the first. Also -1 where there is no finite mass to
        compare: an empty other side, a point of weight zero, an item that is NaN.
        """
        if self._solution.assign is not None:
            return self._solution.assign()
        with torch.no_grad():
            plan = self.plan()
            if plan.shape[1] == 0:
                best = plan.new_full((plan.shape[0], plan.shape[2]), -1, dtype=torch.int64)
            else:
                mass, best = plan.max(dim=1)
                best = torch.where(mass > 0, best, -1)
            return self._problem.y_segments.from_padded(best, fill=-1)

    def _points(self) -> tuple[Tensor, Tensor]:
        if self._problem.x is None or self._problem.y is None:
            raise RuntimeError("barycentric projections need the points: use solve(x, y) instead of solve_cost(C)")
        return self._problem.x, self._problem.y


def _average(plan: Tensor, values: Tensor) -> Tensor:
    """Rows of `values` (B, M, D) averaged with weights `plan` (B, N, M); zero for rows without mass."""
    with torch.autocast(plan.device.type, enabled=False):
        mass = plan.sum(-1, keepdim=True)
        return plan @ values / torch.where(mass == 0, 1, mass)
