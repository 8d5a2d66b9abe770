"""Temporal priors: a term B(i, j; n, m) added to the ground cost of an item with n and m points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import number

KINDS = ("none", "quadratic", "absolute", "order_preserving", "band")
_PARAMETERS = {
    "quadratic": ("weight",),
    "absolute": ("weight",),
    "order_preserving": ("lambda1", "delta"),
    "band": ("width",),
}


def _finite(name: str, value: float, *, positive: bool = False) -> float:
    try:
        value = number(name, value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not math.isfinite(value) or (positive and value <= 0) or value < 0:
        raise ValueError(f"{name} must be finite and {'positive' if positive else 'non-negative'}, got {value}")
    return value


@dataclass(frozen=True)
class Prior:
    r"""A temporal term added to the cost. Make one with the constructors `quadratic`, `absolute`, `order_preserving`, `band`.

    With :math:`u_i = i / (n - 1)`, :math:`v_j = j / (m - 1)` (0 where the length is 1) and :math:`d = |u_i - v_j|`.

    Attributes:
        kind: name of the constructor.
        parameters: its arguments.

    Raises:
        ValueError, TypeError: for an unknown kind, and for parameters that are not finite numbers >= 0 (`delta`: > 0).

    Example:
        >>> import otalign
        >>> otalign.Prior.quadratic(2.0).matrix(3, 2)
        tensor([[0.0000, 2.0000],
                [0.5000, 0.5000],
                [2.0000, 0.0000]], dtype=torch.float64)
    """

    kind: str
    parameters: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _PARAMETERS:
            raise ValueError(f"kind: expected one of {KINDS[1:]}, got {self.kind!r}")
        names = _PARAMETERS[self.kind]
        if not isinstance(self.parameters, (tuple, list)) or len(self.parameters) != len(names):
            raise ValueError(f"parameters: expected {len(names)} numbers, {names}, got {self.parameters!r}")
        parameters = (
            _finite(name, value, positive=name == "delta") for name, value in zip(names, self.parameters, strict=True)
        )
        object.__setattr__(self, "parameters", tuple(parameters))

    @staticmethod
    def quadratic(weight: float) -> Prior:
        """`weight * d ** 2`, in the unit of the cost."""
        return Prior("quadratic", (weight,))

    @staticmethod
    def absolute(weight: float) -> Prior:
        """`weight * d`, in the unit of the cost."""
        return Prior("absolute", (weight,))

    @staticmethod
    def order_preserving(lambda1: float, delta: float) -> Prior:
        r"""The two terms of order-preserving Wasserstein distance (Su and Hua, CVPR 2017, eqs. 3, 5 and 7).

        .. math:: B_{ij} = -\frac{\lambda_1}{e^2 + 1} - \mathrm{reg} \log p_{ij}, \qquad
                  p_{ij} = \frac{1}{\delta\sqrt{2\pi}} \exp\Big(-\frac{e^2}{2\delta^2 (n^{-2} + m^{-2})}\Big)

        with the paper's positions, :math:`e = (i + 1) / n - (j + 1) / m`. The solver's `reg` is the paper's
        :math:`\lambda_2`. The plan is the paper's; the value includes both terms.

        Args:
            lambda1: weight of the inverse difference moment, in the unit of the cost.
            delta: standard deviation of the Gaussian prior, in points.
        """
        return Prior("order_preserving", (lambda1, delta))

    @staticmethod
    def band(width: float) -> Prior:
        """Zero within `width` tokens (points of `y`) of the diagonal, infinite outside.

        A narrow band could leave a row or a column empty, if there are more tokens than points of `x`, or if `width` is below
        one half. It is then widened so far that none is empty: to `max(1, (m - 1) / (n - 1)) / 2`. Strict marginals need more:
        for uniform weights on both sides the band must be about `max(1, m / n)` wide. With a narrower band `converged` stays
        False. It also stays False if a strict point with mass has only points of weight zero in its window; that point gets
        no mass.
        """
        return Prior("band", (width,))

    def matrix(
        self,
        n: int,
        m: int,
        reg: float | Tensor = 1.0,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The term for lengths `n` and `m`: `(n, m)`, in the unit of the cost. Only `order_preserving` depends on `reg`."""
        if n == 0 or m == 0:
            return torch.zeros(n, m, dtype=dtype, device=device)
        i = torch.arange(n, dtype=torch.float64, device=device)[:, None]
        j = torch.arange(m, dtype=torch.float64, device=device)[None, :]
        d = (i / max(n - 1, 1) - j / max(m - 1, 1)).abs()
        if self.kind == "quadratic":
            term = self.parameters[0] * d.square()
        elif self.kind == "absolute":
            term = self.parameters[0] * d
        elif self.kind == "order_preserving":
            lambda1, delta = self.parameters
            e2 = ((i + 1) / n - (j + 1) / m).square()
            log_p = -e2 / (2 * delta**2 * (n**-2 + m**-2)) - math.log(delta * math.sqrt(2 * math.pi))
            term = -lambda1 / (e2 + 1) - reg * log_p
        else:
            inside = d * (m - 1) <= band_width(self.parameters[0], n, m)
            term = torch.zeros_like(d).masked_fill(~inside, math.inf)
        return term.to(dtype)


def band_width(width: float, n: int, m: int) -> float:
    """The half-width, in tokens, of `Prior.band` for these lengths: `width`, or more if a row or column would be empty."""
    spacing = (m - 1) / (n - 1) if n > 1 else math.inf
    return max(width, 0.5, 0.5 * spacing) + 1e-9 * max(
        m, 1
    )  # a point exactly on the edge stays inside despite rounding
