"""The options of a solve: the words that they take, their checks, and the form in which operators pass them on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, get_type_hints

import torch
from torch import Tensor

from .checks import flag, number, valid_or_nan, whole_number
from .layout import debugging, expect_dense, mapped
from .prior import Prior

COSTS = ("cosine", "sqeuclidean", "euclidean", "dot")
GIVEN = "given"  # the cost of a problem that comes as a matrix
OBJECTIVES = ("value", "plan_cost", "transport", "divergence")
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
LARGEST_MAX_ITER = 2**31 - 1  # n_iter is int32

Rho: TypeAlias = Any  # a number for all items, inf = strict; or a tuple with one for each
Unbalanced: TypeAlias = "float | Tensor | tuple[float | Tensor | None, float | Tensor | None] | None"


class Options(NamedTuple):
    """How every item is solved. A new option is one more field here, with its check in `_CHECKS`.

    Numbers that follow `reg` reach every backend by their names: through the schemas of the operators, the fields of
    `Options` in csrc/problem.h, and the arguments of the Triton kernels.
    """

    cost: str
    prior: Prior | None
    reg: float | Tensor  # for all items, or (B,) float64
    max_iter: int
    tol: float
    accelerate: bool = True

    @property
    def numbers(self) -> dict[str, Any]:
        """The options that every backend takes as plain numbers, by name."""
        return dict(zip(self._fields[3:], self[3:], strict=True))

    def flat(self) -> tuple[Any, ...]:
        """The options as operators take them: see `flat_types`."""
        kind, parameters = ("none", ()) if self.prior is None else (self.prior.kind, self.prior.parameters)
        reg, reg_items = (0.0, self.reg) if isinstance(self.reg, Tensor) else (self.reg, None)
        return (self.cost, kind, parameters, reg, reg_items, *self[3:])

    @classmethod
    def from_flat(
        cls, cost: str, kind: str, parameters: Sequence[float], reg: float, reg_items: Tensor | None, *numbers: Any
    ) -> Options:
        """The inverse of `flat`."""
        prior = None if kind == "none" else Prior(kind, tuple(parameters))
        return cls(cost, prior, reg if reg_items is None else reg_items, *numbers)

    @classmethod
    def flat_types(cls) -> dict[str, Any]:
        """Names and types of the operators' arguments that hold options."""
        types = {
            "cost": str,
            "prior": str,
            "prior_parameters": Sequence[float],
            "reg": float,
            "reg_items": Tensor | None,
        }
        hints = get_type_hints(cls)
        return types | {name: hints[name] for name in cls._fields[3:]}

    @classmethod
    def pick(cls, arguments: Mapping[str, Any]) -> Options:
        """The options among the keywords of a loss."""
        return cls(*(arguments[name] for name in cls._fields))

    def checked(self, items: int, dtype: torch.dtype, device: torch.device) -> Options:
        """These options for a batch: numbers of Python, and a tensor `reg` as (B,) float64 on the device."""
        prior = _prior(self.prior)
        numbers = [_CHECKS[name](value) for name, value in self.numbers.items()]
        return Options(self.cost, prior, _reg(self.reg, items, dtype, device), *numbers)


def checks_values(tensor: Tensor) -> bool:
    """Whether the contents of this tensor may be read now."""
    if torch.compiler.is_compiling() or mapped(tensor):
        return False
    return tensor.device.type == "cpu" or debugging()


def one_of(name: str, word: object, words: tuple[str, ...]) -> None:
    """Raise unless the argument `name` is one of the `words`."""
    if not isinstance(word, str):
        raise TypeError(f"{name}: expected one of {words}, got {type(word).__name__}")
    if word not in words:
        raise ValueError(f"{name}: expected one of {words}, got {word!r}")


def checked_options(**options: Any) -> dict[str, Any]:
    """The options of a loss as its constructor keeps them: checked there, with the error messages of the call.

    Any of `cost`, `prior`, `reg`, `unbalanced`, `max_iter`, `tol`, `accelerate`, `objective`, `reduction` and `backend`.
    """
    return {name: _CHECKS[name](value) for name, value in options.items()}


def _word(name: str, words: tuple[str, ...]) -> Callable[[object], object]:
    def check(word: object) -> object:
        one_of(name, word, words)
        return word

    return check


def _kept_reg(reg: float | Tensor) -> float | Tensor:
    if not isinstance(reg, Tensor):
        return _expect_reg(reg, torch.float64)
    _expect_reg_tensor(reg, torch.float64)
    return reg


def _kept_unbalanced(unbalanced: Unbalanced) -> Unbalanced:
    """`unbalanced` as it was given, with Python's numbers."""
    rho = rho_of_sides(unbalanced, None)
    if unbalanced is None:
        return None
    pair = unbalanced if isinstance(unbalanced, (tuple, list)) else (unbalanced, unbalanced)
    kept = [given if isinstance(given, Tensor) else one for given, one in zip(pair, rho, strict=True)]
    return (kept[0], kept[1]) if isinstance(unbalanced, (tuple, list)) else kept[0]


def _prior(prior: object) -> Prior | None:
    if prior is not None and not isinstance(prior, Prior):
        raise TypeError(f"prior: expected an otalign.Prior or None, got {type(prior).__name__}")
    return prior


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
        raise ValueError(f"reg: expected at least {least}, the smallest normal {dtype_name(dtype)}, got {reg}")
    return reg


def dtype_name(dtype: torch.dtype) -> str:
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
            raise ValueError(
                f"reg: expected at least {least}, the smallest normal {dtype_name(dtype)}, got {reg.tolist()}"
            )


def _reg(reg: float | Tensor, items: int, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    if not isinstance(reg, Tensor):
        return _expect_reg(reg, dtype)
    if reg.dim() > 0 and tuple(reg.shape) != (items,):
        raise ValueError(f"reg: expected a number or shape ({items},), got {tuple(reg.shape)}")
    reg = reg.detach().clone()  # later changes of the caller's tensor do not matter
    _expect_reg_tensor(reg, dtype)
    looked_at = checks_values(reg)
    reg = reg.to(device, torch.float64, non_blocking=device.type != "cpu").expand(items).contiguous()
    if looked_at:
        return reg
    least = torch.finfo(dtype).tiny
    return valid_or_nan(reg, (reg >= least) & (reg < math.inf), f"reg: expected finite numbers of at least {least}")


def rho_of_sides(unbalanced: Unbalanced, items: int | None) -> tuple[Rho, Rho]:
    """The marginal relaxation of each side, for a batch of `items`; None = of any size."""
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


# What each option has to be, whatever the batch; a call checks `reg` and `unbalanced` against its batch besides.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "cost": _word("cost", COSTS),
    "prior": _prior,
    "reg": _kept_reg,
    "unbalanced": _kept_unbalanced,
    "max_iter": _max_iter,
    "tol": _tol,
    "accelerate": lambda accelerate: flag("accelerate", accelerate),
    "objective": _word("objective", OBJECTIVES),
    "reduction": _word("reduction", REDUCTIONS),
    "backend": _word("backend", BACKENDS),
}
