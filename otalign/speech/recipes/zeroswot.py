"""The loss of ZeroSwot (Tsiamas et al., ACL Findings 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...layout import Lengths
from ...options import REDUCTIONS, one_of
from .._states import States, finite, layer_numbers, stacked
from ._shared import reduced
from .siamese import siamese_pt


def zeroswot(
    speech_states: States,
    text_states: States,
    speech_lengths: Lengths | None = None,
    text_lengths: Lengths | None = None,
    *,
    layers: Sequence[int],
    layer_weight: float = 0.1285,
    position_weight: float = 10.0,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """ZeroSwot's loss (Tsiamas et al., "Pushing the limits of zero-shot end-to-end speech translation", ACL Findings 2024).

    The sum over layers of `layer_weight` times Siamese-PT's divergence, with positions that weigh ten times as much. The paper
    uses six layers of the encoders, stacked in the batch. Its weights of points are uniform, or the norms of the embeddings:
    `a="norm", b="norm"`.

    Args:
        speech_states: lists or dicts of `(B, N, D)`, as in `InnerAlignmentLoss`.
        text_states: likewise of `(B, M, D)`.
        speech_lengths: `(B,)` int32 or int64, in points; None = full.
        text_lengths: likewise.
        layers: numbers of the layers.
        layer_weight: of each layer in the sum.
        position_weight: as in `siamese_pt`.
        reduction: over the items, after the sum over the layers; as in `sinkhorn_loss`.
        options: of `siamese_pt`. Weights that are tensors are those of the stacked layers, `(L B, N)`.

    Returns:
        A scalar; `(B,)` with `reduction="none"`. Empty items count 0.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.
    """
    one_of("reduction", reduction, REDUCTIONS)
    layers, layer_weight = layer_numbers(layers), finite("layer_weight", layer_weight)
    stack = stacked(speech_states, text_states, speech_lengths, text_lengths, layers)
    divergences = siamese_pt(*stack, position_weight=position_weight, reduction="none", **options)
    losses = layer_weight * divergences.view(len(layers), -1).sum(0)
    return reduced(losses, stack.filled[: len(losses)], reduction)
