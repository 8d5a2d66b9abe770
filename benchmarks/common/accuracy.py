"""How far a result is from the truth."""

from __future__ import annotations

from torch import Tensor


def relative(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64. A NaN in the result gives infinity, which exceeds every bound."""
    error = float((actual.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")
