"""Losses and alignments of neighbouring papers: what their released code computes, batched, by this package's solver.

Each recipe returns the limit of the original's iteration, unless its docstring says that the iteration itself is the method.
Lengths are those of the items. Some originals count the padding as points; the docstrings say which.
"""

import functools
import warnings
from typing import Any

from torch import Tensor

from ._shared import Recipe, ground_cost
from .cmot import cmot, mixup
from .ipot import ipot
from .one_sided import one_sided
from .opw import opw
from .siamese import siamese_pt
from .word_alignment import OTALIGN_KINDS, arase_otalign
from .zeroswot import zeroswot

__all__ = [
    "OTALIGN_KINDS",
    "Recipe",
    "arase_otalign",
    "cmot",
    "ground_cost",
    "ipot",
    "mixup",
    "one_sided",
    "opw",
    "otalign",
    "siamese_pt",
    "zeroswot",
]


@functools.wraps(arase_otalign, assigned=())
def otalign(*args: Any, **kwargs: Any) -> Tensor:
    """Deprecated: the old name of `arase_otalign`, with the same arguments."""
    warnings.warn(
        "otalign.speech.recipes.otalign is deprecated; use otalign.speech.recipes.arase_otalign",
        DeprecationWarning,
        stacklevel=2,
    )
    return arase_otalign(*args, **kwargs)
