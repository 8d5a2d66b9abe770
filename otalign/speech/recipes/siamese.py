"""The loss of Siamese-PT (Le et al., ICML 2023)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...checks import number
from ...functional import sinkhorn_loss
from ...layout import Lengths, padded_segments
from ...options import REDUCTIONS, one_of
from ...prior import Prior
from ...weights import normalized_weights
from .._states import clean, finite, inside, positive, sides, wide
from ._shared import ground_cost, reduced


def siamese_pt(
    speech: Tensor,
    text: Tensor,
    speech_lengths: Lengths | None = None,
    text_lengths: Lengths | None = None,
    *,
    position_weight: float = 1.0,
    blur: float = 0.05,
    schedule: str = "converged",
    scaling: float = 0.5,
    a: Tensor | str | None = None,
    b: Tensor | str | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    r"""Siamese-PT's loss (Le et al., "Pre-training for speech translation: CTC meets optimal transport", ICML 2023).

    The debiased divergence with the cost :math:`\tfrac12 (\|x_i - y_j\|^2 + w^2 d_{ij}^2)` and the regularisation blur^2. d is
    the difference of the relative positions i / (S - 1) and j / (T - 1). The original computes GeomLoss's
    `SamplesLoss(p=2, blur, scaling)` on embeddings with the position as one more coordinate. Three things differ there: uniform
    weights count the padding, positions are relative to the padded length, and the schedule starts at the diameter of the
    whole batch. Here all three are taken per item. The paper weighs the loss by 0.1, beside CTC's 1.

    Args:
        speech: `(B, N, D)`.
        text: `(B, M, D)`.
        speech_lengths: `(B,)` int32 or int64, in points; None = full.
        text_lengths: likewise.
        position_weight: w, in the unit of the distance between embeddings.
        blur: in the unit of the distance between embeddings, > 0.
        schedule: `"converged"` = the optimum, by the solver, with the position as a `Prior`. `"released"` = the original's
            iteration in plain torch: a dozen averaged updates at temperatures that fall by the factor `scaling`^2, with the
            position as a coordinate, because the first temperature depends on it.
        scaling: ratio of the blurs at two successive temperatures, between 0 and 1; for `"released"`.
        a: weights of the speech, as in `sinkhorn_loss`: None = uniform, `"norm"`, or `(B, N)`. With `"released"` they get no
            gradient.
        b: likewise of the text, `(B, M)`.
        reduction: as in `sinkhorn_loss`.
        options: of `sinkhorn_loss`, with `"converged"` only.

    Returns:
        A scalar; `(B,)` with `reduction="none"`. Empty items count 0.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.
    """
    one_of("schedule", schedule, ("converged", "released"))
    one_of("reduction", reduction, REDUCTIONS)
    position_weight, blur = finite("position_weight", position_weight), positive("blur", blur)
    scaling = number("scaling", scaling)
    if not 0 < scaling < 1:
        raise ValueError(f"scaling: expected a number between 0 and 1, got {scaling}")
    n, m = sides(speech, text, speech_lengths, text_lengths)
    if schedule == "converged":
        halves = sinkhorn_loss(
            speech, text, speech_lengths, text_lengths, a, b, cost="sqeuclidean", prior=Prior.quadratic(position_weight**2),
            reg=2 * blur**2, objective="divergence", reduction=reduction, **{"max_iter": 2000, **options},
        )  # fmt: skip
        return halves / 2
    if options:
        raise TypeError(f"{', '.join(options)}: for schedule='converged' only")
    log_a, log_b = _log_weights("a", a, speech, n), _log_weights("b", b, text, m)
    x, mask_x = _with_positions(speech, n, position_weight)
    y, mask_y = _with_positions(text, m, position_weight)
    losses = _annealed_divergence(x, mask_x, y, mask_y, log_a, log_b, blur, scaling)
    return reduced(losses, (n > 0) & (m > 0), reduction)


def _log_weights(name: str, weights: Tensor | str | None, points: Tensor, lengths: Tensor) -> Tensor:
    """Logarithms of the weights as the solver takes them: `(B, N)`, minus infinity on the padding."""
    mask = inside(points, lengths)
    segments = padded_segments(name, points, points.shape[1], lengths)
    given = normalized_weights(name, weights, points, segments, wide(points), points.device)
    if given is None:
        given = mask.to(wide(points)) / lengths[:, None].clamp(min=1)
    return given.detach().log()


def _with_positions(points: Tensor, lengths: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Points with their weighted relative position as one more coordinate, `(B, N, D + 1)`; and their mask, `(B, N)`."""
    mask = inside(points, lengths)
    points = clean(points, mask)
    positions = torch.arange(points.shape[1], device=points.device).to(points) / (lengths[:, None] - 1).clamp(min=1)
    return torch.cat([points, torch.where(mask, weight * positions, 0)[..., None]], 2), mask


def _annealed_divergence(
    x: Tensor, mask_x: Tensor, y: Tensor, mask_y: Tensor, log_a: Tensor, log_b: Tensor, blur: float, scaling: float
) -> Tensor:
    """GeomLoss's symmetric, annealed iteration for p = 2 (Feydy 2020, section 3.3.3), debiased: `(B,)`."""
    filled = mask_x.any(1) & mask_y.any(1)
    both, mask = torch.cat([x, y], 1).detach(), torch.cat([mask_x, mask_y], 1)[..., None]
    extent = both.masked_fill(~mask, -torch.inf).amax(1) - both.masked_fill(~mask, torch.inf).amin(1)
    diameter = torch.where(filled, extent.norm(dim=1), blur).clamp(min=1e-30)
    # At least two temperatures. Each item makes the steps that its own diameter needs, then keeps its potentials.
    steps = ((diameter.log() - math.log(blur)) / -math.log(scaling)).ceil().clamp(min=0).long()
    # A potential is differentiated by its own points only. By both sides, the optimum's derivative would count twice.
    xx, xy, yx, yy = (
        ground_cost(own, other.detach(), mask_own, mask_other, "sqeuclidean") / 2
        for own, mask_own in ((x, mask_x), (y, mask_y))
        for other, mask_other in ((x, mask_x), (y, mask_y))
    )

    def softmin(eps: Tensor, cost: Tensor, h: Tensor) -> Tensor:
        h = torch.where(filled[:, None], h, 0)  # the logsumexp over an empty side would be minus infinity
        return -eps[:, None] * torch.logsumexp(h[:, None, :] - cost / eps[:, None, None], 2)

    def updates(eps: Tensor, f: Tensor, g: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        over = eps[:, None]
        return (
            softmin(eps, xy, log_b + g / over), softmin(eps, yx, log_a + f / over),
            softmin(eps, xx, log_a + p / over), softmin(eps, yy, log_b + q / over),
        )  # fmt: skip

    with torch.no_grad():
        eps = diameter.square()
        zeros = torch.zeros_like(log_a), torch.zeros_like(log_b)
        potentials = updates(eps, *zeros, *zeros)
        for step in range(int(steps.max()) + 2 if len(steps) else 0):
            # GeomLoss's temperatures: the squared diameter twice, then falling ones, and the squared blur last.
            falling = diameter.square() * scaling ** (2 * max(step - 1, 0))
            eps = torch.where(step <= steps, falling, blur**2)
            averaged = [(old + new) / 2 for old, new in zip(potentials, updates(eps, *potentials), strict=True)]
            ended = (step > steps + 1)[:, None]
            potentials = tuple(torch.where(ended, old, new) for old, new in zip(potentials, averaged, strict=True))
    f, g, p, q = updates(torch.full_like(diameter, blur**2), *potentials)
    terms = torch.where(mask_x, (f - p) * log_a.exp(), 0).sum(1) + torch.where(mask_y, (g - q) * log_b.exp(), 0).sum(1)
    return torch.where(filled, terms, 0)
