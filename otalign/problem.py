"""The validated problem that every backend takes, and the solution that every backend gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import checks
from .checks import number, whole_number
from .layout import Lengths, Segments, debugging, expect_dense, mapped, padded_segments, points
from .prior import Prior

COSTS = ("cosine", "sqeuclidean", "euclidean", "dot")
OBJECTIVES = ("value", "plan_cost", "transport", "divergence")
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
LARGEST_MAX_ITER = 2**31 - 1  # n_iter is int32
LARGEST_START = {
    torch.float32: 1e5,
    torch.float64: 1e13,
}  # |g| / reg of `init`, beyond which exponents have no digits left

Rho: TypeAlias = Any  # a number for all items, inf = strict; or a tuple with one for each
Unbalanced: TypeAlias = "float | Tensor | tuple[float | Tensor | None, float | Tensor | None] | None"


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
    rho: tuple[Rho, Rho]  # of a backend's problem, two numbers
    max_iter: int
    tol: float
    dtype: torch.dtype  # what is computed in: float64 for float64 input, else float32
    symmetric: bool = False  # both sides are the same points with the same weights: f = g

    @property
    def items(self) -> int:
        return self.x_segments.items

    @property
    def regs(self) -> Tensor:
        """(B,) float64."""
        if isinstance(self.reg, Tensor):
            return self.reg
        return torch.full((self.items,), self.reg, dtype=torch.float64, device=self.device)

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
    apply: Callable[[Tensor, bool], Tensor] | None = None  # values and by_y; without gradients


def fixed_plan_cost(linear: Tensor, value: Tensor) -> Tensor:
    """The number of one with the gradient of the other: with the plan fixed, d<P, C> = P dC = d value."""
    return linear.detach() + (value - value.detach())


def checks_values(tensor: Tensor) -> bool:
    """Whether the contents of this tensor may be looked at now."""
    if torch.compiler.is_compiling() or mapped(tensor):
        return False
    return tensor.device.type == "cpu" or debugging()


def from_points(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None,
    y_lengths: Lengths | None,
    a: Tensor | str | None,
    b: Tensor | str | None,
    *,
    cu_seqlens_x: Lengths | None,
    cu_seqlens_y: Lengths | None,
    max_seqlen_x: int | None,
    max_seqlen_y: int | None,
    cost: str,
    prior: Prior | None,
    reg: float | Tensor,
    unbalanced: Unbalanced,
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
    x_lengths: Lengths | None,
    y_lengths: Lengths | None,
    a: Tensor | None,
    b: Tensor | None,
    *,
    prior: Prior | None,
    reg: float | Tensor,
    unbalanced: Unbalanced,
    max_iter: int,
    tol: float,
    init: tuple[Tensor, Tensor] | None,
) -> Problem:
    """Validate a problem that is given by its cost."""
    if isinstance(C, Tensor) and C.is_nested:
        raise ValueError("C: expected shape (B, N, M), got a nested tensor")
    expect_dense("C", C)
    if C.dim() != 3:
        raise ValueError(f"C: expected shape (B, N, M), got {tuple(C.shape)}")
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
    unbalanced: Unbalanced,
    max_iter: int,
    tol: float,
    dtype: torch.dtype,
) -> Problem:
    _expect_prior(prior)
    max_iter, tol = _max_iter(max_iter), _tol(tol)
    device = (x if C is None else C).device  # type: ignore[union-attr]
    reg = _reg(reg, x_segments.items, dtype, device)
    return Problem(
        x=x,
        y=y,
        C=C,
        x_segments=x_segments,
        y_segments=y_segments,
        a=normalized_weights("a", a, x, x_segments, dtype, device),
        b=normalized_weights("b", b, y, y_segments, dtype, device),
        init=_init(init, reg, x_segments, y_segments, dtype, device),
        reg=reg,
        cost=cost,
        prior=prior,
        rho=_rho(unbalanced, x_segments.items),
        max_iter=max_iter,
        tol=tol,
        dtype=dtype,
    )


def one_of(name: str, word: object, words: tuple[str, ...]) -> None:
    """Raise unless `word` is one of the `words` that the argument `name` knows."""
    if not isinstance(word, str):
        raise TypeError(f"{name}: expected one of {words}, got {type(word).__name__}")
    if word not in words:
        raise ValueError(f"{name}: expected one of {words}, got {word!r}")


def checked_options(**options: Any) -> dict[str, Any]:
    """The options of a loss as its constructor keeps them, refused there by the messages of the call.

    Any of `cost`, `prior`, `reg`, `unbalanced`, `max_iter`, `tol`, `objective`, `reduction` and `backend`.
    """
    words = {"cost": COSTS, "objective": OBJECTIVES, "reduction": REDUCTIONS, "backend": BACKENDS}
    for name, value in options.items():
        if name in words:
            one_of(name, value, words[name])
        elif name == "prior":
            _expect_prior(value)
        elif name == "reg":
            options[name] = _kept_reg(value)
        elif name == "unbalanced":
            options[name] = _kept_unbalanced(value)
        elif name in ("max_iter", "tol"):
            options[name] = (_max_iter if name == "max_iter" else _tol)(value)
    return options


def _kept_reg(reg: float | Tensor) -> float | Tensor:
    if not isinstance(reg, Tensor):
        return _expect_reg(reg, torch.float64)
    _expect_reg_tensor(reg, torch.float64)
    return reg


def _kept_unbalanced(unbalanced: Unbalanced) -> Unbalanced:
    """In the form in which it was given, of Python's numbers."""
    rho = _rho(unbalanced, None)
    if unbalanced is None:
        return None
    pair = unbalanced if isinstance(unbalanced, (tuple, list)) else (unbalanced, unbalanced)
    kept = [given if isinstance(given, Tensor) else one for given, one in zip(pair, rho, strict=True)]
    return (kept[0], kept[1]) if isinstance(unbalanced, (tuple, list)) else kept[0]


def _expect_prior(prior: object) -> None:
    if prior is not None and not isinstance(prior, Prior):
        raise TypeError(f"prior: expected an otalign.Prior or None, got {type(prior).__name__}")


def _max_iter(max_iter: int) -> int:
    max_iter = whole_number("max_iter", max_iter)
    if max_iter < 1:
        raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
    if max_iter > LARGEST_MAX_ITER:
        raise ValueError(f"max_iter: expected at most {LARGEST_MAX_ITER}, got {max_iter}")
    return max_iter


def _tol(tol: float) -> float:
    tol = number("tol", tol)
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol: expected a finite number >= 0, got {tol}")
    return tol


def _expect_reg(reg: float, dtype: torch.dtype) -> float:
    reg, least = number("reg", reg), torch.finfo(dtype).tiny
    if not 0 < reg < math.inf:
        raise ValueError(f"reg: expected a finite number > 0, got {reg}")
    if reg < least:
        raise ValueError(f"reg: expected at least {least}, the smallest normal {_name(dtype)}, got {reg}")
    return reg


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expect_reg_tensor(reg: Tensor, dtype: torch.dtype) -> None:
    expect_dense("reg", reg)
    if reg.dtype == torch.bool or reg.is_complex():
        raise TypeError(f"reg: expected a float tensor, got {reg.dtype}")
    if checks_values(reg):
        if not bool((torch.isfinite(reg) & (reg > 0)).all()):
            raise ValueError(f"reg: expected finite numbers > 0, got {reg.tolist()}")
        least = torch.finfo(dtype).tiny
        if bool((reg.double() < least).any()):
            raise ValueError(f"reg: expected at least {least}, the smallest normal {_name(dtype)}, got {reg.tolist()}")


def _reg(reg: float | Tensor, items: int, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    if not isinstance(reg, Tensor):
        return _expect_reg(reg, dtype)
    if reg.dim() > 0 and tuple(reg.shape) != (items,):
        raise ValueError(f"reg: expected a number or shape ({items},), got {tuple(reg.shape)}")
    reg = reg.detach().clone()  # what is checked is kept, whatever becomes of the caller's tensor
    _expect_reg_tensor(reg, dtype)
    looked_at = checks_values(reg)
    reg = reg.to(device, torch.float64, non_blocking=device.type != "cpu").expand(items).contiguous()
    if looked_at:
        return reg
    least = torch.finfo(dtype).tiny
    return checks.valid_or_nan(
        reg, (reg >= least) & (reg < math.inf), f"reg: expected finite numbers of at least {least}"
    )


def _rho(unbalanced: Unbalanced, items: int | None) -> tuple[Rho, Rho]:
    """The relaxation of each side; `items` None = of any number."""
    if isinstance(unbalanced, (tuple, list)):
        if len(unbalanced) != 2:
            raise ValueError(f"unbalanced: expected None, a number or (rho_x, rho_y), got {len(unbalanced)} numbers")
        return _rho_of_side(unbalanced[0], items), _rho_of_side(unbalanced[1], items)
    both = _rho_of_side(unbalanced, items)
    return both, both


def _rho_of_side(rho: float | Tensor | None, items: int | None) -> Rho:
    if rho is None:
        return math.inf
    if isinstance(rho, Tensor):
        expect_dense("unbalanced", rho)
        if torch.compiler.is_compiling() or mapped(rho):
            raise ValueError("unbalanced: expected numbers; torch.compile and torch.vmap cannot look into a tensor")
        if rho.dim() > 1 or (rho.dim() == 1 and items not in (None, rho.shape[0])):
            raise ValueError(f"unbalanced: expected a number or shape ({items},), got {tuple(rho.shape)}")
        if rho.dim() == 1:
            if rho.dtype == torch.bool or rho.is_complex():
                raise TypeError(f"unbalanced: expected a float tensor, got {rho.dtype}")
            each = tuple(map(_one_rho, rho.detach().tolist()))
            if len(set(each)) > 1:
                return each
            return each[0] if each else math.inf
    return _one_rho(rho)


def _one_rho(rho: float | Tensor) -> float:
    rho = number("unbalanced", rho)
    if not rho > 0:
        raise ValueError(f"unbalanced: expected numbers > 0 (None or inf = strict), got {rho}")
    return rho


def normalized_weights(
    name: str,
    weights: Tensor | str | None,
    values: Tensor | None,
    segments: Segments,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Weights as the backends take them: zero on the padding, summing to one over every item.

    They are divided by the item's largest before they are added, so that no sum overflows or vanishes, and what comes
    in float64 is rounded to `dtype` at the end only.
    """
    if weights is None:
        return None
    if isinstance(weights, str):
        one_of(name, weights, ("norm",))
        if values is None:
            raise ValueError(f'{name}: "norm" needs the embeddings; solve_cost knows only the cost')
        weights = _norms(values.detach())
    if not isinstance(weights, Tensor):
        raise TypeError(f'{name}: expected a tensor, "norm" or None, got {type(weights).__name__}')
    weights = _laid_out(name, weights, segments)
    if weights.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {weights.device}")
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"{name}: expected a float or integer tensor, got {weights.dtype}")
    mask = segments.mask()
    weights = torch.where(mask, weights.to(torch.promote_types(weights.dtype, dtype)), 0)
    looked_at = checks_values(weights)
    if looked_at and bool((weights < 0).any()):
        raise ValueError(f"{name}: expected non-negative weights, got {float(weights.detach().min())}")
    if not looked_at:
        weights = checks.valid_or_nan(weights, ~(weights < 0), f"{name}: expected non-negative weights")
    largest = segments.item_maxima(weights.detach())
    only_zeros = f"{name}: expected some positive weight in every item, got an item of only zeros"
    no_mass = largest == 0  # of empty items as well, and on the padding of packed ones
    if not looked_at:
        largest = checks.valid_or_nan(torch.where(no_mass, 1, largest), ~(mask & no_mass), only_zeros)
    elif bool(no_mass.any()):
        if bool((mask & no_mass).any()):
            raise ValueError(only_zeros)
        largest = torch.where(no_mass, 1, largest)
    weights = weights / largest
    return (weights / torch.where(mask, segments.item_sums(weights), 1)).to(dtype)


def _norms(values: Tensor) -> Tensor:
    """Euclidean norms of `values` (..., D) in float64, which the squares of no number leave: (...,)."""
    if values.dtype != torch.float64 or values.shape[-1] == 0:
        return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
    largest = values.abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return torch.linalg.vector_norm(values / scale, dim=-1) * scale.squeeze(-1)


def _laid_out(name: str, weights: Tensor, segments: Segments) -> Tensor:
    """Weights in the layout of their points: jagged ones as their values, those of one item for all as one for each."""
    if weights.is_nested:
        weights = _jagged_weights(name, weights, segments)
    expect_dense(name, weights)
    shape = tuple(weights.shape)
    if not segments.packed and shape in ((1, segments.size), (segments.size,)):
        return weights.expand(segments.shape)
    if shape != segments.shape:
        for_all = "" if segments.packed else f", or (1, {segments.size}) for all items"
        raise ValueError(f"{name}: expected shape {segments.shape}{for_all}, got {shape}")
    return weights


def _jagged_weights(name: str, weights: Tensor, segments: Segments) -> Tensor:
    if weights.layout != torch.jagged:
        raise ValueError(f"{name}: nested tensors must have layout=torch.jagged, got {weights.layout}")
    if not segments.packed:
        raise ValueError(f"{name}: expected shape {segments.shape} for padded points, got a nested tensor")
    if weights.dim() != 2 or weights.lengths() is not None:  # type: ignore[attr-defined]
        raise ValueError(f"{name}: expected a nested tensor of one weight for every point, without holes")
    offsets, values = weights.offsets(), weights.values()  # type: ignore[attr-defined]
    if offsets.shape[0] - 1 != segments.items:
        raise ValueError(f"{name}: expected {segments.items} items as the points have, got {offsets.shape[0] - 1}")
    if offsets is not segments.layout and checks_values(offsets):
        lengths, expected = offsets.diff().tolist(), segments.lengths.tolist()
        if lengths != expected:
            raise ValueError(f"{name}: expected the lengths of the points, {expected}, got {lengths}")
    return values


def _init(
    init: tuple[Tensor, Tensor] | None,
    reg: float | Tensor,
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
    expected = f"init: expected finite potentials, |g| / reg at most {LARGEST_START[dtype]:g} in {_name(dtype)}"
    if checks_values(g):
        if not bool(usable.all() & f.isfinite().all()):
            raise ValueError(f"{expected}, got |f| up to {float(f.abs().max())}, |g| up to {float(g.abs().max())}")
        return g.to(dtype).contiguous()
    return checks.valid_or_nan(g.to(dtype), usable, expected).contiguous()


def is_start(g: Tensor, reg: float | Tensor, segments: Segments) -> Tensor:
    """Whether each potential of y is a number that the solver can start from; NaN is none."""
    return g.abs() <= _spread(reg, segments) * LARGEST_START[g.dtype]


def _spread(reg: float | Tensor, segments: Segments) -> float | Tensor:
    """reg at every point of a side: a number, or in the shape of a vector."""
    if not isinstance(reg, Tensor):
        return reg
    if not segments.packed:
        return reg[:, None]
    return torch.nn.functional.pad(reg, (0, 1), value=1.0)[segments.item_of_row()]
