"""The alignment and the mixup of CMOT (Zhou et al., ACL 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import number
from ...layout import Lengths
from ...options import one_of
from .._states import clean, inside, share, sides
from ._shared import Recipe, ground_cost


def cmot(
    speech: Tensor,
    text: Tensor,
    speech_lengths: Lengths | None = None,
    text_lengths: Lengths | None = None,
    *,
    window: float | None = 10,
    cost: str = "euclidean",
) -> Recipe:
    """CMOT's alignment (Zhou et al., "CMOT: cross-modal mixup via optimal transport for speech translation", ACL 2023).

    Semi-relaxed transport without entropy: without the marginal of the text, each speech frame sends its whole weight to the
    nearest token among those at most `window` from j = i M / N. The weight is the frame's detached norm, normalised over the
    item. The loss is the transport cost. The paper mixes up each frame with the argmax of its row of the plan, with
    probability 0.2 (`mixup`).

    This is a nearest neighbour in closed form, without the solver. The window excludes tokens; a `Prior` would weigh them.

    Args:
        speech: `(B, N, D)`.
        text: `(B, M, D)`.
        speech_lengths: `(B,)` int32 or int64, in points; None = full.
        text_lengths: likewise.
        window: in tokens, >= 0; None = all tokens. (Below 1 some frames have no token and send nothing.)
        cost: `"euclidean"` or `"cosine"`.

    Returns:
        `loss` `(B,)`, 0 for empty items, and `plan` `(B, N, M)`, a constant to the gradient.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.
    """
    one_of("cost", cost, ("euclidean", "cosine"))
    if window is not None and not number("window", window) >= 0:
        raise ValueError(f"window: expected a number >= 0 or None, got {window}")
    n, m = sides(speech, text, speech_lengths, text_lengths)
    mask_x, mask_y = inside(speech, n), inside(text, m)
    C = ground_cost(speech, text, mask_x, mask_y, cost)
    allowed = mask_x[:, :, None] & mask_y[:, None, :]
    if window is not None:
        i = torch.arange(speech.shape[1], device=speech.device)[None, :, None]
        j = torch.arange(text.shape[1], device=speech.device)[None, None, :]
        centre = (i * m[:, None, None]).float() / n[:, None, None].clamp(min=1)
        allowed = allowed & ((j - centre).abs() <= window)
    nearest = C.masked_fill(~allowed, torch.inf).argmin(2, keepdim=True) if text.shape[1] else C.new_zeros(0).long()
    norms = torch.linalg.vector_norm(clean(speech, mask_x).detach(), dim=2) * (m > 0)[:, None]
    total = norms.sum(1, keepdim=True)
    a = norms / torch.where(total > 0, total, 1)
    plan = torch.zeros_like(C)
    if text.shape[1]:
        plan = plan.scatter(2, nearest, torch.where(allowed.any(2), a, 0)[:, :, None])
    return Recipe((plan * torch.where(allowed, C, 0)).sum((1, 2)), plan)


def mixup(
    speech: Tensor, text: Tensor, plan: Tensor, *, p: float = 0.2, generator: torch.Generator | None = None
) -> Tensor:
    """CMOT's mixup: with probability `p`, replace a frame by the token that gets most of its mass. Returns `(B, N, D)`.

    Args:
        speech: `(B, N, D)`.
        text: `(B, M, D)`.
        plan: `(B, N, M)`, such as the plan of `cmot`. Frames without mass stay.
        p: probability in [0, 1].
        generator: of the random numbers, on the device of `plan`.

    Raises:
        ValueError, TypeError: for a `p` that is no number in [0, 1].
    """
    p = share("p", p)
    if not text.shape[1]:
        return speech
    chosen = torch.rand(plan.shape[:2], generator=generator, dtype=torch.float32, device=plan.device) < p
    chosen = chosen & (plan.sum(2) > 0)
    partner = text.gather(1, plan.argmax(2)[:, :, None].expand(-1, -1, text.shape[2]))
    return torch.where(chosen[:, :, None], partner.to(speech.dtype), speech)
