"""A batch as the kernels take it: their arguments by name."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import heuristics, runtime

INFINITE = float("inf")


class Side(NamedTuple):
    """One side of a batch."""

    points: Tensor | None  # (B, size, D) or packed (rows, D), any strides; None if the cost is given
    offsets: Tensor | None  # int64: lengths (B,), or offsets (B + 1,) if packed; None = all items are full
    weights: Tensor | None  # (B, size) or packed (rows,), contiguous; None = uniform
    packed: bool
    size: int  # the longest item that the side may have
    rows: int  # B * size, or the rows of packed points


class Batch:
    """A batch as the kernels take it: `values` holds their arguments by name."""

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
        symmetric: bool = False,
    ) -> None:
        """`reg_items` (B,), in float64, replaces `reg` if it is given. `symmetric`: the sides have the same points."""
        self.x, self.y, self.items = x, y, items
        self.cost, self.prior, self.dtype, self.device = cost, prior, dtype, device
        self.symmetric = symmetric
        self.relaxed = rho != (INFINITE, INFINITE)
        self.ld = heuristics.leading_dimension(y.size)
        self.empty = not (items and x.size and y.size and x.rows and y.rows)
        unused = unused_tensor(device, dtype)
        if x.offsets is None or y.offsets is None:
            unused_integers = unused_tensor(device, torch.int64)
        self.values: dict[str, Any] = {
            "items": items,
            "x_offsets": unused_integers if x.offsets is None else x.offsets,
            "y_offsets": unused_integers if y.offsets is None else y.offsets,
            "x_addressing": 2 if x.packed else int(x.offsets is not None),  # see addressing.py
            "y_addressing": 2 if y.packed else int(y.offsets is not None),
            "x_size": x.size,
            "y_size": y.size,
            "x_rows": x.rows,
            "y_rows": y.rows,
            "ld16": self.ld // 16,
            "reg": reg,
            "reg_items": unused_tensor(device, torch.float64) if reg_items is None else reg_items,
            "per_item": int(reg_items is not None),
            "prior_first": prior_parameters[0] if prior_parameters else 0.0,
            "prior_second": prior_parameters[1] if len(prior_parameters) > 1 else 0.0,
            "rho_x": rho[0],
            "rho_y": rho[1],
            "a": unused if x.weights is None else x.weights,
            "b": unused if y.weights is None else y.weights,
            "has_a": int(x.weights is not None),
            "has_b": int(y.weights is not None),
            "G": unused,
            "x_adjoint": unused,
            "y_adjoint": unused,
            "has_plan": 0,
            "grad_value": unused,
            "grad_linear": unused,
            "value_step": -1,
            "linear_step": -1,
        }
        if x.points is not None and y.points is not None:
            self.set_points(x.points, y.points)

    def set_points(self, x: Tensor, y: Tensor) -> None:
        """Take these points, (B, size, D) or packed (rows, D)."""
        x_row, x_dim = x.stride()[-2:]
        y_row, y_dim = y.stride()[-2:]
        self.values |= {
            "x": x,
            "y": y,
            "x_item": x.stride(0) if x.dim() == 3 else 0,
            "y_item": y.stride(0) if y.dim() == 3 else 0,
            "x_row": x_row,
            "y_row": y_row,
            "x_dim": x_dim,
            "y_dim": y_dim,
            "dim": x.shape[-1],
        }

    def with_points(self, x: Tensor, y: Tensor, cost: str) -> Batch:
        """This batch with other points and another cost between them."""
        other = copy.copy(self)
        other.values, other.cost = dict(self.values), cost
        other.set_points(x, y)
        return other

    def launch_config(self, *, in_memory: bool = False, mixes: bool = False) -> heuristics.LaunchConfig:
        """How the iterations are launched; if `in_memory`, with a kernel matrix that is not in registers in any case.

        `mixes` asks for iterations that mix.
        """
        return heuristics.launch_config(
            self.items,
            self.x.size,
            self.y.size,
            double=self.dtype == torch.float64,
            relaxed=self.relaxed,
            processors=runtime.processors(self.device),
            generation=runtime.generation(self.device),
            lanes=runtime.lanes(self.device),
            in_memory=in_memory,
            mixes=mixes,
        )

    def empty_tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def vector(self, side: Side) -> Tensor:
        """One number for every point of a side, in its layout."""
        return self.empty_tensor(side.rows) if side.packed else self.empty_tensor(self.items, side.size)

    def launch(self, kernel: runtime.Kernel, grid: int, constants: dict[str, Any], others: dict[str, Any]) -> None:
        """Launch on the values of the batch and on `others`. The options of the launch come with the constants."""
        kernel.launch((grid, 1, 1), self.values | others, constants, self.device)


def unused_tensor(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What stands for a tensor that is not given; no kernel reads it.

    Not kept for the next call: what is allocated while a CUDA graph is captured belongs to the graph.
    """
    return torch.empty(1, dtype=dtype, device=device)
