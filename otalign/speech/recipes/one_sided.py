"""Transport that may drop speech frames but no token (arXiv 2509.05609)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...functional import sinkhorn_loss
from ...layout import Lengths


def one_sided(
    speech: Tensor,
    text: Tensor,
    speech_lengths: Lengths | None = None,
    text_lengths: Lengths | None = None,
    *,
    rho: float = 0.5,
    **options: Any,
) -> Tensor:
    """Transport that may drop speech frames but no token (arXiv 2509.05609: strict text side, relaxed speech side).

    The strength of the relaxation and all other options are not published in what we could read; `rho` and `options` are ours.

    Args:
        speech: `(B, N, D)`.
        text: `(B, M, D)`.
        speech_lengths: `(B,)` int32 or int64, in points; None = full.
        text_lengths: likewise.
        rho: relaxation of the speech's marginal, in the unit of the cost, > 0.
        options: of `sinkhorn_loss`.

    Returns:
        As `sinkhorn_loss`: a scalar, or `(B,)` with `reduction="none"`.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.
    """
    relaxed = (rho, float("inf"))
    return sinkhorn_loss(speech, text, speech_lengths, text_lengths, unbalanced=relaxed, **options)
