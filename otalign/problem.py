"""The validated problem that every backend takes, and the solution that every backend gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Segments, debugging, padded_segments, points
from .prior import Prior

COSTS = ("cosine", "sqeuclidean", "euclidean", "dot")
OBJECTIVES = ("value", "plan_cost", "transport", "divergence")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Problem:
    """One batch of problems. Either points `x` and `y` with a `cost` word, or a given cost matrix `C` (B, N, M)."""

    x: Tensor | None
    y: Tensor | None
    C: Tensor | None
    x_segments: Segments
    y_segments: Segments
    a: Tensor | None  # normalised, in the layout of x and in `dtype`; None = uniform
    b: Tensor | None
    init: Tensor | None  # g to start from, in the layout of y and in `dtype`
    reg: float | Tensor  # for all items, or (B,) float64 with the values
    cost: str
    prior: Prior | None
    rho: tuple[float, float]
    max_iter: int
    tol: float
    dtype: torch.dtype  # what is computed in: float64 for float64 input, else float32

    @property
    def items(self) -> int:
        return self.x_segments.items

    @property
    def regs(self) -> Tensor:
        """(B,) float64."""
        return self.reg if isinstance(self.reg, Tensor) else torch.full((self.items,), self.reg, dtype=torch.float64)

    @property
    def device(self) -> torch.device:
        tensor = self.x if self.C is None else self.C
        assert tensor is not None
        return tensor.device


class Solution(NamedTuple):
    """What a backend returns: (B,) unless said, potentials in the layouts of x and y, `plan` made when called."""

    value: Tensor
    value_linear: Tensor
    plan_cost: Callable[[], Tensor]
    f: Tensor
    g: Tensor
    n_iter: Tensor
    error: Tensor
    plan: Callable[[], Tensor]
    barycentric: Callable[[bool], Tensor] | None = None  # by_y; None = to be made of the plan, as `assign`
    assign: Callable[[], Tensor] | None = None


def checks_values(tensor: Tensor) -> bool:
    """Whether the contents of this tensor may be looked at now."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or debugging()


def from_points(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    a: Tensor | str | None,
    b: Tensor | str | None,
    *,
    cu_seqlens_x: Tensor | None,
    cu_seqlens_y: Tensor | None,
    max_seqlen_x: int | None,
    max_seqlen_y: int | None,
    cost: str,
    prior: Prior | None,
    reg: float | Tensor,
    unbalanced: float | tuple[float, float] | None,
    max_iter: int,
    tol: float,
    init: tuple[Tensor, Tensor] | None = None,
) -> Problem:
    """Validate a problem that is given by points."""
    x, x_segments = points("x", x, x_lengths, cu_seqlens_x, max_seqlen_x)
    y, y_segments = points("y", y, y_lengths, cu_seqlens_y, max_seqlen_y)
    if x.device != y.device:
        raise ValueError(f"y: expected the device of x, {x.device}, got {y.device}")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected D = {x.shape[-1]} as in x, got {y.shape[-1]}")
    if x_segments.items != y_segments.items:
        raise ValueError(f"y: expected {x_segments.items} items as in x, got {y_segments.items}")
    one_of("cost", cost, COSTS)
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    return _problem(x, y, None, x_segments, y_segments, a, b, init, reg, cost, prior, unbalanced, max_iter, tol, dtype)


def from_cost(
    C: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    *,
    prior: Prior | None,
    reg: float | Tensor,
    unbalanced: float | tuple[float, float] | None,
    max_iter: int,
    tol: float,
    init: tuple[Tensor, Tensor] | None,
) -> Problem:
    """Validate a problem that is given by its cost."""
    if not isinstance(C, Tensor):
        raise TypeError(f"C: expected a torch.Tensor, got {type(C).__name__}")
    if C.is_nested or C.dim() != 3:
        raise ValueError(f"C: expected shape (B, N, M), got {'nested' if C.is_nested else tuple(C.shape)}")
    if not C.is_floating_point() or C.dtype.itemsize < 2:
        raise TypeError(f"C: expected a float16, bfloat16, float32 or float64 tensor, got {C.dtype}")
    x_segments = padded_segments("x_lengths", C, C.shape[1], x_lengths)
    y_segments = padded_segments("y_lengths", C, C.shape[2], y_lengths)
    dtype = torch.float64 if C.dtype == torch.float64 else torch.float32
    return _problem(
        None, None, C, x_segments, y_segments, a, b, init, reg, "given", prior, unbalanced, max_iter, tol, dtype
    )


def _problem(
    x: Tensor | None,
    y: Tensor | None,
    C: Tensor | None,
    x_segments: Segments,
    y_segments: Segments,
    a: Tensor | str | None,
    b: Tensor | str | None,
    init: tuple[Tensor, Tensor] | None,
    reg: float | Tensor,
    cost: str,
    prior: Prior | None,
    unbalanced: float | tuple[float, float] | None,
    max_iter: int,
    tol: float,
    dtype: torch.dtype,
) -> Problem:
    if prior is not None and not isinstance(prior, Prior):
        raise TypeError(f"prior: expected an otalign.Prior or None, got {type(prior).__name__}")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int):
        raise TypeError(f"max_iter: expected an int, got {type(max_iter).__name__}")
    if max_iter < 1:
        raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
    _expect_number("tol", tol)
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol: expected a finite number >= 0, got {tol}")
    device = (x if C is None else C).device  # type: ignore[union-attr]
    return Problem(
        x=x,
        y=y,
        C=C,
        x_segments=x_segments,
        y_segments=y_segments,
        a=normalized_weights("a", a, x, x_segments, dtype, device),
        b=normalized_weights("b", b, y, y_segments, dtype, device),
        init=_init(init, x_segments, y_segments, dtype, device),
        reg=_reg(reg, x_segments.items, device),
        cost=cost,
        prior=prior,
        rho=_rho(unbalanced),
        max_iter=max_iter,
        tol=float(tol),
        dtype=dtype,
    )


def one_of(name: str, word: object, words: tuple[str, ...]) -> None:
    """Raise unless `word` is one of the `words` that the argument `name` knows."""
    if not isinstance(word, str):
        raise TypeError(f"{name}: expected one of {words}, got {type(word).__name__}")
    if word not in words:
        raise ValueError(f"{name}: expected one of {words}, got {word!r}")


def _expect_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _reg(reg: float | Tensor, items: int, device: torch.device) -> float | Tensor:
    if not isinstance(reg, Tensor):
        _expect_number("reg", reg)
        if not 0 < reg < math.inf:
            raise ValueError(f"reg: expected a finite number > 0, got {reg}")
        return float(reg)
    if reg.dtype == torch.bool or reg.is_complex():
        raise TypeError(f"reg: expected a float tensor, got {reg.dtype}")
    if reg.dim() > 0 and tuple(reg.shape) != (items,):
        raise ValueError(f"reg: expected a number or shape ({items},), got {tuple(reg.shape)}")
    reg = reg.detach().clone()  # what is checked is kept, whatever the caller does with his tensor
    if checks_values(reg) and not bool((torch.isfinite(reg) & (reg > 0)).all()):
        raise ValueError(f"reg: expected finite numbers > 0, got {reg.tolist()}")
    return reg.to(device, torch.float64, non_blocking=device.type != "cpu").expand(items).contiguous()


def _rho(unbalanced: float | tuple[float, float] | None) -> tuple[float, float]:
    if unbalanced is None:
        return math.inf, math.inf
    pair = tuple(unbalanced) if isinstance(unbalanced, (tuple, list)) else (unbalanced, unbalanced)
    if len(pair) != 2:
        raise ValueError(f"unbalanced: expected None, a number or (rho_x, rho_y), got {len(pair)} numbers")
    for rho in pair:
        _expect_number("unbalanced", rho)
        if not rho > 0:
            raise ValueError(f"unbalanced: expected numbers > 0 (inf = strict), got {unbalanced}")
    return float(pair[0]), float(pair[1])


def normalized_weights(
    name: str,
    weights: Tensor | str | None,
    values: Tensor | None,
    segments: Segments,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Weights as the backends take them: zero on the padding, summing to one over every item."""
    if weights is None:
        return None
    if isinstance(weights, str):
        one_of(name, weights, ("norm",))
        if values is None:
            raise ValueError(f'{name}: "norm" needs the embeddings; solve_cost knows only the cost')
        weights = torch.linalg.vector_norm(values.detach().to(dtype), dim=-1)
    if not isinstance(weights, Tensor):
        raise TypeError(f'{name}: expected a tensor, "norm" or None, got {type(weights).__name__}')
    if weights.is_nested:
        weights = weights.values()
    if tuple(weights.shape) != segments.shape:
        raise ValueError(f"{name}: expected shape {segments.shape}, got {tuple(weights.shape)}")
    if weights.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {weights.device}")
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"{name}: expected a float or integer tensor, got {weights.dtype}")
    mask = segments.mask()
    weights = torch.where(mask, weights.to(dtype), 0)
    if checks_values(weights) and bool((weights < 0).any()):
        raise ValueError(f"{name}: expected non-negative weights, got {float(weights.detach().min())}")
    if not checks_values(weights):
        weights = torch.where(weights < 0, math.nan, weights)  # and so is the item
    total = torch.where(mask, segments.item_sums(weights), 1)
    if checks_values(weights) and bool((total == 0).any()):
        raise ValueError(f"{name}: expected some positive weight in every item, got an item of only zeros")
    return weights / total


def _init(
    init: tuple[Tensor, Tensor] | None,
    x_segments: Segments,
    y_segments: Segments,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Of a warm start only g is needed: the first row update makes the f that belongs to it."""
    if init is None:
        return None
    if not isinstance(init, (tuple, list)) or len(init) != 2:
        raise TypeError(f"init: expected the pair (f, g), got {type(init).__name__}")
    for letter, potential, segments in zip("fg", init, (x_segments, y_segments), strict=True):
        if not isinstance(potential, Tensor):
            raise TypeError(f"init: expected a tensor {letter}, got {type(potential).__name__}")
        if tuple(potential.shape) != segments.shape:
            raise ValueError(f"init: expected {letter} of shape {segments.shape}, got {tuple(potential.shape)}")
        if potential.device != device:
            raise ValueError(f"init: expected {letter} on {device}, got {potential.device}")
    return init[1].detach().to(dtype, copy=True).contiguous()
