"""Checks of arguments: numbers of any kind, and contents of tensors that Python cannot read at the time of the call."""

from __future__ import annotations

import math
import numbers
import operator

import numpy
import torch
from torch import Tensor

_library = torch.library.Library("otalign", "FRAGMENT")
_library.define("check(Tensor good, str message) -> Tensor")


def number(name: str, value: object) -> float:
    """`value` as a float: a real number of Python or numpy, or a tensor without dimensions (this waits for its device)."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype != torch.bool and not value.is_complex():
        value = value.detach().item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number within float64, got {value}") from None


def whole_number(name: str, value: object) -> int:
    """An integer of Python or numpy as Python's int."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return operator.index(value)


def flag(name: str, value: object) -> bool:
    """True or False, of Python or numpy."""
    if not isinstance(value, (bool, numpy.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return bool(value)


def valid_or_nan(values: Tensor, good: Tensor, message: str) -> Tensor:
    """`values`, with NaN where they are not `good`: for contents that Python cannot read at the time of the call.

    On a GPU the item becomes NaN. In a graph of torch.compile on a CPU, an operator checks when the graph runs, and raises
    ValueError with the `message`, as the eager call does.
    """
    values = torch.where(good, values, math.nan)
    if values.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
        values = torch.where(torch.ops.otalign.check(good.all(), message), values, math.nan)
    return values


def _check(good: Tensor, message: str) -> Tensor:
    if not bool(good):
        raise ValueError(message)
    return good.clone()


def _fake_check(good: Tensor, message: str) -> Tensor:
    return torch.empty_like(good)


_library.impl("check", _check, "CPU")
torch.library.register_fake("otalign::check", _fake_check, lib=_library)
