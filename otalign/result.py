"""What a solve returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .layout import Segments, expect_dense
from .options import one_of
from .problem import Problem, Side, Solution


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
            :math:`\langle b, g \rangle = 0`. The potential of a point of weight zero follows from the other side's. A point
            at infinite cost from all mass has 0, or 40 rho if its marginal is relaxed, in place of infinity.
            `init=result.potentials` warm-starts another solve.
        n_iter: `(B,)` int32, the number of iterations.
        error: `(B,)` the L1 marginal error at the end; for unbalanced problems the fixed-point residual
            :math:`\sum_i a_i |\exp((f_i - f'_i) / \mathrm{reg}) - 1|`, where f' is the next update. It includes the weights of
            points that have a strict marginal but are at infinite cost from all mass.
        converged: `(B,)` bool, `error <= tol`.

    `pickle`, `torch.save` (read it by `torch.load(..., weights_only=False)`) and `copy.deepcopy` take a result. The copy is
    detached from the graph; its plan, projections and assignment still work.
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
        """The transport plan `(B, N, M)`, zero on the padding; computed by this call. Differentiable (implicit)."""
        return self._solution.plan()

    def barycentric_x(self) -> Tensor:
        """For every `x` its image under the plan, `sum_j P_ij y_j / sum_j P_ij`: `(B, N, D)`, or `(total_x, D)`.

        Zero for points without mass. Differentiable in the plan and in `y`.
        """
        _, y = self._points()
        if self._solution.barycentric is not None:
            return self._solution.barycentric(False)
        plan = self.plan()
        image = _average(plan, self._problem.y.segments.to_padded(y.to(plan.dtype)))
        return self._problem.x.segments.from_padded(image)

    def barycentric_y(self) -> Tensor:
        """For every `y` its image under the plan, `sum_i P_ij x_i / sum_i P_ij`: `(B, M, D)`, or `(total_y, D)`."""
        x, _ = self._points()
        if self._solution.barycentric is not None:
            return self._solution.barycentric(True)
        plan = self.plan()
        image = _average(plan.mT, self._problem.x.segments.to_padded(x.to(plan.dtype)))
        return self._problem.y.segments.from_padded(image)

    def apply(self, values: Tensor, to: str = "x") -> Tensor:
        """The plan applied to vectors: `sum_j P_ij values_j` for every `x`, or `sum_i P_ij values_i` for every `y`.

        Unlike the barycentric projections, the sums are not divided by the mass: `apply(torch.ones(B, M))` gives the row
        sums. On a GPU the plan is built only if a gradient is wanted. Differentiable in the plan and in the values.

        Args:
            values: with `to="x"` one vector or number for every `y`: `(B, M, E)` or `(B, M)`, packed `(total_y, E)` or
                `(total_y,)`; with `to="y"` one for every `x`. Values on the padding are never read.
            to: `"x"` or `"y"`, the side that gets the sums.

        Returns:
            `(B, N, E)`, `(B, N)`, `(total_x, E)` or `(total_x,)`, or likewise for `y`; 0 on the padding.

        Example:
            >>> result = otalign.solve(torch.randn(2, 50, 64), torch.randn(2, 10, 64))
            >>> result.apply(torch.randn(2, 10, 3)).shape, result.apply(torch.randn(2, 50), to="y").shape
            (torch.Size([2, 50, 3]), torch.Size([2, 10]))
        """
        one_of("to", to, ("x", "y"))
        by_y, p = to == "y", self._problem
        source, target = (p.x.segments, p.y.segments) if by_y else (p.y.segments, p.x.segments)
        values = _expect_values(values, source, p)
        vector = values.dim() == len(source.shape)
        if vector:
            values = values[..., None]
        wide = values.to(p.dtype)
        if self._solution.apply is not None and not self._needs_gradient(values):
            image = self._solution.apply(wide.contiguous(), by_y)
        else:
            image = self._dense_apply(source.to_padded(wide), target, by_y)
        return image[..., 0] if vector else image

    def _needs_gradient(self, values: Tensor) -> bool:
        return torch.is_grad_enabled() and (values.requires_grad or self.value.requires_grad)

    def _dense_apply(self, padded: Tensor, target: Segments, by_y: bool) -> Tensor:
        plan = self.plan()
        with torch.autocast(plan.device.type, enabled=False):
            image = (plan.mT if by_y else plan) @ padded
        return target.from_padded(image)

    def marginal_x(self) -> Tensor:
        """The mass of every `x`, the row sums of the plan: `(B, N)`, or `(total_x,)`. Differentiable (implicit)."""
        y = self._problem.y.segments
        return self.apply(self.value.new_ones(y.shape), to="x")

    def marginal_y(self) -> Tensor:
        """The mass of every `y`, the column sums of the plan: `(B, M)`, or `(total_y,)`. Differentiable (implicit)."""
        x = self._problem.x.segments
        return self.apply(self.value.new_ones(x.shape), to="y")

    def __getstate__(self) -> dict[str, Any]:
        return {name: _detached(value) for name, value in self.__dict__.items()}

    def assign_y(self) -> Tensor:
        """For every `y` the index of the `x` that gives it most mass: `(B, M)` int64, or `(total_y,)`; -1 on padding.

        Indices count from the item's first point; of equal masses the first wins. Also -1 where no finite mass exists: the
        other side is empty, the point has weight zero, or the item is NaN.
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
            return self._problem.y.segments.from_padded(best, fill=-1)

    def _points(self) -> tuple[Tensor, Tensor]:
        x, y = self._problem.x.points, self._problem.y.points
        if x is None or y is None:
            raise RuntimeError("barycentric projections need the points: use solve(x, y) instead of solve_cost(C)")
        return x, y


def _expect_values(values: Tensor, side: Segments, problem: Problem) -> Tensor:
    expect_dense("values", values)
    shape = tuple(values.shape)
    if shape[: len(side.shape)] != side.shape or values.dim() > len(side.shape) + 1:
        raise ValueError(f"values: expected shape {side.shape} or {(*side.shape, 'E')}, got {shape}")
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"values: expected a float tensor, got {values.dtype}")
    if values.device != problem.device:
        raise ValueError(f"values: expected a tensor on {problem.device}, got one on {values.device}")
    return values


def _detached(value: Any) -> Any:
    """A copy of `value` with all its tensors detached."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, partial):
        return partial(value.func, *map(_detached, value.args))
    if isinstance(value, (Problem, Side, Segments)):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{f.name: _detached(getattr(value, f.name)) for f in fields})
    if isinstance(value, (list, tuple)):
        parts = map(_detached, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _average(plan: Tensor, values: Tensor) -> Tensor:
    """Rows of `values` (B, M, D) averaged with weights `plan` (B, N, M); zero for rows without mass."""
    with torch.autocast(plan.device.type, enabled=False):
        mass = plan.sum(-1, keepdim=True)
        return plan @ values / torch.where(mass == 0, 1, mass)
