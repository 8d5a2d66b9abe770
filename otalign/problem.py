"""The validated problem that every backend takes, and the solution that every backend gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import valid_or_nan
from .layout import Lengths, Segments, expect_dense, padded_segments, points
from .options import COSTS, GIVEN, Options, Rho, Unbalanced, checks_values, dtype_name, one_of, rho_of_sides
from .weights import normalized_weights

LARGEST_START = {
    torch.float32: 1e5,
    torch.float64: 1e13,
}  # the largest |g| / reg of `init`: beyond it, exponents have no digits left


class SideInput(NamedTuple):
    """One side of a batch as the caller gives it, not yet checked."""

    points: Any  # a tensor, not yet known to be one; None = the cost is given
    lengths: Lengths | None
    weights: Tensor | str | None
    offsets: Lengths | None = None  # cu_seqlens
    max_seqlen: int | None = None


@dataclass(frozen=True)
class Side:
    """One side of a batch: its points, where the items lie among them, their weights and the marginal relaxation."""

    points: Tensor | None  # (B, N, D) padded or (total, D) packed; None = the cost is given
    segments: Segments
    weights: Tensor | None  # normalised, in the layout of the points and in the problem's dtype; None = uniform
    rho: Rho  # inf = strict marginal; of a backend's problem, one number


@dataclass(frozen=True)
class Problem:
    """One batch of problems: two sides of points with a `cost` word, or a given cost matrix `C` (B, N, M)."""

    x: Side
    y: Side
    C: Tensor | None
    options: Options
    dtype: torch.dtype  # what is computed in: float64 for float64 input, else float32
    init: Tensor | None = None  # g to start from, in the layout of y and in `dtype`
    symmetric: bool = False  # both sides are the same points with the same weights: f = g
    fixed_plan: bool = False  # the value's gradient holds the plan constant, also where it is differentiated again

    @property
    def items(self) -> int:
        return self.x.segments.items

    @property
    def regs(self) -> Tensor:
        """(B,) float64."""
        reg = self.options.reg
        if isinstance(reg, Tensor):
            return reg
        return torch.full((self.items,), reg, dtype=torch.float64, device=self.device)

    @property
    def device(self) -> torch.device:
        tensor = self.x.points if self.C is None else self.C
        assert tensor is not None
        return tensor.device


class Solution(NamedTuple):
    """What a backend returns: (B,) unless said, potentials in the layouts of x and y; functions compute on demand."""

    value: Tensor
    value_linear: Tensor
    plan_cost: Callable[[], Tensor]
    f: Tensor
    g: Tensor
    n_iter: Tensor
    error: Tensor
    plan: Callable[[], Tensor]
    barycentric: Callable[[bool], Tensor] | None = None  # by_y; None = computed from the plan, as `assign`
    assign: Callable[[], Tensor] | None = None
    apply: Callable[[Tensor, bool], Tensor] | None = None  # values and by_y; without gradients


def fixed_plan_cost(linear: Tensor, value: Tensor) -> Tensor:
    """The number `linear` with the gradient of `value`: with the plan fixed, d<P, C> = P dC = d value."""
    return linear.detach() + (value - value.detach())


def from_points(
    x: SideInput,
    y: SideInput,
    options: Options,
    unbalanced: Unbalanced,
    init: tuple[Tensor, Tensor] | None = None,
) -> Problem:
    """Validate a problem that is given by points."""
    x_points, x_segments = points("x", x.points, x.lengths, x.offsets, x.max_seqlen)
    y_points, y_segments = points("y", y.points, y.lengths, y.offsets, y.max_seqlen)
    if x_points.device != y_points.device:
        raise ValueError(f"y: expected the device of x, {x_points.device}, got {y_points.device}")
    if x_points.shape[-1] != y_points.shape[-1]:
        raise ValueError(f"y: expected D = {x_points.shape[-1]} as in x, got {y_points.shape[-1]}")
    if x_segments.items != y_segments.items:
        raise ValueError(f"y: expected {x_segments.items} items as in x, got {y_segments.items}")
    one_of("cost", options.cost, COSTS)
    dtype = torch.float64 if torch.float64 in (x_points.dtype, y_points.dtype) else torch.float32
    options = options.checked(x_segments.items, dtype, x_points.device)
    a = normalized_weights("a", x.weights, x_points, x_segments, dtype, x_points.device)
    b = normalized_weights("b", y.weights, y_points, y_segments, dtype, x_points.device)
    rho_x, rho_y = rho_of_sides(unbalanced, x_segments.items)
    x_side, y_side = Side(x_points, x_segments, a, rho_x), Side(y_points, y_segments, b, rho_y)
    start = _init(init, options.reg, x_segments, y_segments, dtype, x_points.device)
    return Problem(x_side, y_side, None, options, dtype, start)


def from_cost(
    C: Tensor,
    x: SideInput,
    y: SideInput,
    options: Options,
    unbalanced: Unbalanced,
    init: tuple[Tensor, Tensor] | None = None,
) -> Problem:
    """Validate a problem that is given by its cost: `options.cost` does not matter, and the sides have no points."""
    if isinstance(C, Tensor) and C.is_nested:
        raise ValueError("C: expected shape (B, N, M), got a nested tensor")
    expect_dense("C", C)
    if C.dim() != 3:
        raise ValueError(f"C: expected shape (B, N, M), got {tuple(C.shape)}")
    if not C.is_floating_point() or C.dtype.itemsize < 2:
        raise TypeError(f"C: expected a float16, bfloat16, float32 or float64 tensor, got {C.dtype}")
    x_segments = padded_segments("x_lengths", C, C.shape[1], x.lengths)
    y_segments = padded_segments("y_lengths", C, C.shape[2], y.lengths)
    dtype = torch.float64 if C.dtype == torch.float64 else torch.float32
    options = options._replace(cost=GIVEN).checked(x_segments.items, dtype, C.device)
    a = normalized_weights("a", x.weights, None, x_segments, dtype, C.device)
    b = normalized_weights("b", y.weights, None, y_segments, dtype, C.device)
    rho_x, rho_y = rho_of_sides(unbalanced, x_segments.items)
    start = _init(init, options.reg, x_segments, y_segments, dtype, C.device)
    return Problem(Side(None, x_segments, a, rho_x), Side(None, y_segments, b, rho_y), C, options, dtype, start)


def _init(
    init: tuple[Tensor, Tensor] | None,
    reg: float | Tensor,
    x_segments: Segments,
    y_segments: Segments,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """The potential g of a warm start, checked; f is not needed, since the first row update computes it from g."""
    if init is None:
        return None
    if not isinstance(init, (tuple, list)) or len(init) != 2:
        raise TypeError(f"init: expected the pair (f, g), got {type(init).__name__}")
    for letter, potential, segments in zip("fg", init, (x_segments, y_segments), strict=True):
        if not isinstance(potential, Tensor):
            raise TypeError(f"init: expected a tensor {letter}, got {type(potential).__name__}")
        expect_dense("init", potential)
        if tuple(potential.shape) != segments.shape:
            raise ValueError(f"init: expected {letter} of shape {segments.shape}, got {tuple(potential.shape)}")
        if potential.device != device:
            raise ValueError(f"init: expected {letter} on {device}, got {potential.device}")
        if potential.is_complex() or potential.dtype == torch.bool:
            raise TypeError(f"init: expected a float tensor {letter}, got {potential.dtype}")
    f, g = (
        torch.where(segments.mask(), potential.detach(), 0)
        for potential, segments in zip(init, (x_segments, y_segments), strict=True)
    )
    usable = is_start(g.to(dtype), reg, y_segments)
    expected = f"init: expected finite potentials, |g| / reg at most {LARGEST_START[dtype]:g} in {dtype_name(dtype)}"
    if checks_values(g):
        if not bool(usable.all() & f.isfinite().all()):
            raise ValueError(f"{expected}, got |f| up to {float(f.abs().max())}, |g| up to {float(g.abs().max())}")
        return g.to(dtype).contiguous()
    return valid_or_nan(g.to(dtype), usable, expected).contiguous()


def is_start(g: Tensor, reg: float | Tensor, segments: Segments) -> Tensor:
    """Whether the solver can start from each of these potentials of y; not from NaN."""
    return g.abs() <= _spread(reg, segments) * LARGEST_START[g.dtype]


def _spread(reg: float | Tensor, segments: Segments) -> float | Tensor:
    """reg of every point of a side: a number, or a tensor in the layout of the points."""
    if not isinstance(reg, Tensor):
        return reg
    if not segments.packed:
        return reg[:, None]
    return torch.nn.functional.pad(reg, (0, 1), value=1.0)[segments.item_of_row()]
