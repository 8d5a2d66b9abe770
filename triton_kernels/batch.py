"""A batch as the kernels take it: their arguments by name."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import heuristics, runtime
from .runtime import Kernel, aligned

INFINITE = float("inf")


def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What stands for a tensor that is not given; it is never read.

    Not kept for the next call: what is allocated while a CUDA graph is captured belongs to the graph.
    """
    return torch.empty(1, dtype=dtype, device=device)


class Side(NamedTuple):
    """One side of a batch."""

    points: Tensor | None  # (B, size, D) or (rows, D), any strides
    layout: Tensor | None  # int64: lengths (B,), or offsets (B + 1,) if packed; None = full
    weights: Tensor | None
    packed: bool
    size: int
    rows: int


class Saved(NamedTuple):
    """What is kept of a solution: potentials, costs (rows of x, ld), and reciprocal norms if the cost is the cosine."""

    f: Tensor
    g: Tensor
    costs: Tensor
    x_scale: Tensor
    y_scale: Tensor


class Solved(NamedTuple):
    """What `solve` fills; the last five are `Saved`."""

    value: Tensor
    linear: Tensor
    error: Tensor
    n_iter: Tensor
    f: Tensor
    g: Tensor
    costs: Tensor
    x_scale: Tensor
    y_scale: Tensor


class Batch:
    """A batch as the kernels take it: `values`, their arguments by name, and the `kind` of the calls made with them."""

    def __init__(
        self,
        x: Side,
        y: Side,
        *,
        items: int,
        reg: float,
        reg_items: Tensor | None,
        cost: str,
        prior: str,
        prior_parameters: tuple[float, ...],
        rho: tuple[float, float],
        dtype: torch.dtype,
        device: torch.device,
        engine: Any = None,
        symmetric: bool = False,
    ) -> None:
        """`engine` iterates, and solves implicit systems, instead of the kernels here: otalign.cuda, if anybody.

        (Not on `symmetric` problems, whose sides are the same: their iteration is here only.)
        """
        self.x, self.y, self.items, self.engine = x, y, items, engine
        self.cost, self.prior, self.dtype, self.device = cost, prior, dtype, device
        self.symmetric = symmetric
        self.relaxed = rho != (INFINITE, INFINITE)
        self.ld = heuristics.leading_dimension(y.size)
        self.empty = not (items and x.size and y.size and x.rows and y.rows)
        vector = _nothing(device, dtype)
        if x.layout is None or y.layout is None:
            integers = _nothing(device, torch.int64)
        self.values: dict[str, Any] = {
            "items": items,
            "x_layout": integers if x.layout is None else x.layout,
            "y_layout": integers if y.layout is None else y.layout,
            "x_mode": 2 if x.packed else int(x.layout is not None),
            "y_mode": 2 if y.packed else int(y.layout is not None),
            "x_size": x.size,
            "y_size": y.size,
            "x_rows": x.rows,
            "y_rows": y.rows,
            "ld16": self.ld // 16,
            "reg": reg,
            "reg_items": _nothing(device, torch.float64) if reg_items is None else reg_items,
            "per_item": int(reg_items is not None),
            "prior_first": prior_parameters[0] if prior_parameters else 0.0,
            "prior_second": prior_parameters[1] if len(prior_parameters) > 1 else 0.0,
            "rho_x": rho[0],
            "rho_y": rho[1],
            "a": vector if x.weights is None else x.weights,
            "b": vector if y.weights is None else y.weights,
            "has_a": int(x.weights is not None),
            "has_b": int(y.weights is not None),
            "G": vector,
            "x_lift": vector,
            "y_lift": vector,
            "has_plan": 0,
            "grad_value": vector,
            "grad_linear": vector,
            "value_step": -1,
            "linear_step": -1,
        }
        self.kind: tuple[Any, ...] = (dtype,)
        if x.points is not None and y.points is not None:
            self.set_points(x.points, y.points)

    def set_points(self, x: Tensor, y: Tensor) -> None:
        x_row, x_dim = x.stride()[-2:]
        y_row, y_dim = y.stride()[-2:]
        dim = x.shape[-1]
        self.values |= {
            "x": x,
            "y": y,
            "x_item": x.stride(0) if x.dim() == 3 else 0,
            "y_item": y.stride(0) if y.dim() == 3 else 0,
            "x_row": x_row,
            "y_row": y_row,
            "x_dim": x_dim,
            "y_dim": y_dim,
            "dim": dim,
        }
        of_x = (x.dtype, aligned(x), x_row % 16 == 0, x_row == 1, x_dim % 16 == 0, x_dim == 1)
        of_y = (y.dtype, aligned(y), y_row % 16 == 0, y_row == 1, y_dim % 16 == 0, y_dim == 1)
        self.kind = (self.dtype, dim % 16 == 0, dim == 1, of_x, of_y)

    def with_points(self, x: Tensor, y: Tensor, cost: str) -> Batch:
        """This batch with other points."""
        other = copy.copy(self)
        other.values, other.cost = dict(self.values), cost
        other.set_points(x, y)
        return other

    def solver(self, *, in_memory: bool = False) -> heuristics.Solver:
        """How this batch is solved; with the kernel matrix in memory at any rate, if so."""
        return heuristics.solver(
            self.items,
            self.x.size,
            self.y.size,
            double=self.dtype == torch.float64,
            relaxed=self.relaxed,
            processors=runtime.processors(self.device),
            generation=runtime.generation(self.device),
            in_memory=in_memory,
        )

    def counters(self) -> Tensor:
        """Where the programs of the implicit system count each other; to be set to zero."""
        if self.engine is not None:
            return self.empty_tensor(0, dtype=torch.int32)
        choice = self.solver(in_memory=True)
        return self.empty_tensor(choice.in_flight * choice.programs + 1, dtype=torch.int32)

    def empty_tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def vector(self, side: Side) -> Tensor:
        """One number for every point of a side, in its layout."""
        return self.empty_tensor(side.rows) if side.packed else self.empty_tensor(self.items, side.size)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        constants: dict[str, Any],
        others: dict[str, Any],
        kind: tuple[Any, ...] = (),
    ) -> None:
        """Launch on the values of the batch and `others`, whose `kind`, beyond that of the batch, the caller tells.

        Freshly allocated tensors of the batch's type need no mention. The options of the launch come with the constants.
        """
        kernel.launch(grid, self.values | others, constants, self.device, (*self.kind, *kind))
