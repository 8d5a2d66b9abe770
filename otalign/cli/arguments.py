"""Types of arguments for argparse, and the devices of the backends."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from ..prior import Prior

PRIORS: dict[str, tuple[Callable[..., Prior], str]] = {
    "quadratic": (Prior.quadratic, "quadratic:WEIGHT"),
    "absolute": (Prior.absolute, "absolute:WEIGHT"),
    "band": (Prior.band, "band:WIDTH"),
    "order": (Prior.order_preserving, "order:LAMBDA1,DELTA"),
}
PRIOR_FORMS = ", ".join(form for _, form in PRIORS.values())


def prior(text: str) -> Prior:
    """Parse a prior, such as `quadratic:1.0` or `order:0.4,1`."""
    word, _, rest = text.partition(":")
    if word not in PRIORS:
        raise argparse.ArgumentTypeError(f"unknown prior {text!r}; one of {PRIOR_FORMS}")
    make, form = PRIORS[word]
    if rest.count(",") != form.count(",") or not rest:
        raise argparse.ArgumentTypeError(f"expected {form}, got {text!r}")
    try:
        return make(*numbers(rest))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def relaxation(text: str) -> float | tuple[float, float]:
    """Parse a marginal relaxation: `RHO`, or `RHO_X,RHO_Y`."""
    found = numbers(text)
    if len(found) not in (1, 2) or not all(rho > 0 for rho in found):
        raise argparse.ArgumentTypeError(f"expected RHO or RHO_X,RHO_Y above 0 (inf = strict), got {text!r}")
    return found[0] if len(found) == 1 else (found[0], found[1])


def numbers(text: str) -> list[float]:
    """Parse numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    (number, *more) = numbers(text)
    if more or not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return number


def count(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def device_of(backend: str) -> torch.device:
    """The device on which this backend takes its tensors; the CPU if there is no GPU for it."""
    if backend not in ("triton", "cuda"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("xpu" if torch.xpu.is_available() else "cpu")
