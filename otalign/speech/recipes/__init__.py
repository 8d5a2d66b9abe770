"""Losses and alignments of neighbouring papers, as configurations of the solver: what their released code computes, batched.

Each is the limit of the original's iteration, unless it says that the iteration itself is the method. Lengths are those of
the items: where an original counts the padding as points, this does not, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import number
from ...functional import sinkhorn_loss, solve, solve_cost
from ...layout import Lengths, padded_segments
from ...prior import Prior
from ...problem import REDUCTIONS, checked_options, normalized_weights, one_of
from .._states import (
    States,
    at_least_one,
    clean,
    finite,
    inside,
    layer_numbers,
    positive,
    products,
    share,
    sides,
    stacked,
    unit,
    weighted_mean,
    wide,
)

OTALIGN_KINDS = ("balanced", "unbalanced", "partial")


class Recipe(NamedTuple):
    """What a recipe gives that has a plan to look at."""

    loss: Tensor  # (B,)
    plan: Tensor  # (B, N, M), 0 on the padding


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

    The debiased divergence with :math:`\tfrac12 (\|x_i - y_j\|^2 + w^2 d_{ij}^2)` as its cost, d between the relative positions
    i / (S - 1) and j / (T - 1), at temperature blur^2: GeomLoss's `SamplesLoss(p=2, blur, scaling)` on embeddings with the
    position as one more coordinate. There uniform weights count the padding, positions the padded length, and the
    schedule starts at the diameter of the whole batch; here all are the item's. In its recipe the weight is 0.1, beside
    CTC's 1.

    Args:
        speech: `(B, N, D)`.
        text: `(B, M, D)`.
        speech_lengths: `(B,)`; None = full.
        text_lengths: likewise.
        position_weight: w.
        blur: in the unit of the distance.
        schedule: `"converged"` = the optimum, by the solver, with the position as a `Prior`; `"released"` = the loss as the
            original has it, a dozen averaged updates at temperatures that fall by `scaling`^2, in plain torch, with the position
            as the coordinate that it is there, of which the first temperature depends.
        scaling: of the distance, from one temperature to the next.
        a: weights, as in `sinkhorn_loss`: uniform, `"norm"`, or `(B, N)`; constants to the gradient with `"released"`.
        b: likewise `(B, M)`.
        reduction: as in `sinkhorn_loss`.
        options: of `sinkhorn_loss`, with `"converged"` only.

    Returns:
        A scalar; `(B,)` with `reduction="none"`.
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
    placed = []
    for points, lengths in ((speech, n), (text, m)):
        mask = inside(points, lengths)
        points = clean(points, mask)
        places = torch.arange(points.shape[1], device=points.device).to(points) / (lengths[:, None] - 1).clamp(min=1)
        placed.append((torch.cat([points, torch.where(mask, position_weight * places, 0)[..., None]], 2), mask))
    losses = _annealed_divergence(*placed[0], *placed[1], log_a, log_b, blur, scaling)
    return _reduced(losses, (n > 0) & (m > 0), reduction)


def _log_weights(name: str, weights: Tensor | str | None, points: Tensor, lengths: Tensor) -> Tensor:
    """Logarithms of the weights as the solver takes them: `(B, N)`, minus infinity on the padding."""
    mask = inside(points, lengths)
    segments = padded_segments(name, points, points.shape[1], lengths)
    given = normalized_weights(name, weights, points, segments, wide(points), points.device)
    if given is None:
        given = mask.to(wide(points)) / lengths[:, None].clamp(min=1)
    return given.detach().log()


def _reduced(losses: Tensor, filled: Tensor, reduction: str) -> Tensor:
    """Of `(B,)` losses, those that are not `filled` being 0."""
    if reduction == "mean":
        return weighted_mean(losses, filled, None, None)
    return losses if reduction == "none" else losses.sum()


def _annealed_divergence(
    x: Tensor, mask_x: Tensor, y: Tensor, mask_y: Tensor, log_a: Tensor, log_b: Tensor, blur: float, scaling: float
) -> Tensor:
    """GeomLoss's symmetric, annealed iteration for p = 2 (Feydy 2020, section 3.3.3), debiased: `(B,)`."""
    filled = mask_x.any(1) & mask_y.any(1)
    both, mask = torch.cat([x, y], 1).detach(), torch.cat([mask_x, mask_y], 1)[..., None]
    extent = both.masked_fill(~mask, -torch.inf).amax(1) - both.masked_fill(~mask, torch.inf).amin(1)
    diameter = torch.where(filled, extent.norm(dim=1), blur).clamp(min=1e-30)
    # At least two temperatures; each item has as many as it needs, and waits at its last one for the others.
    steps = ((diameter.log() - math.log(blur)) / -math.log(scaling)).ceil().clamp(min=0).long()
    # Each potential is differentiated by its own points alone: by both, the optimum's derivative would count twice.
    costs = [
        ground_cost(own, other.detach(), mask_own, mask_other, "sqeuclidean") / 2
        for own, mask_own in ((x, mask_x), (y, mask_y))
        for other, mask_other in ((x, mask_x), (y, mask_y))
    ]
    xx, xy, yx, yy = costs

    def softmin(eps: Tensor, cost: Tensor, h: Tensor) -> Tensor:
        h = torch.where(filled[:, None], h, 0)  # an empty side has no sum
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
            # The diameter twice, then falling, and the blur at last.
            falling = diameter.square() * scaling ** (2 * max(step - 1, 0))
            eps = torch.where(step <= steps, falling, blur**2)
            averaged = [(old + new) / 2 for old, new in zip(potentials, updates(eps, *potentials), strict=True)]
            ended = (step > steps + 1)[:, None]
            potentials = tuple(torch.where(ended, old, new) for old, new in zip(potentials, averaged, strict=True))
    f, g, p, q = updates(torch.full_like(diameter, blur**2), *potentials)
    terms = torch.where(mask_x, (f - p) * log_a.exp(), 0).sum(1) + torch.where(mask_y, (g - q) * log_b.exp(), 0).sum(1)
    return torch.where(filled, terms, 0)


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

    Siamese-PT's divergence in several layers of the encoders (six, stacked in the batch), each with the weight `layer_weight`,
    and with positions that weigh ten times as much. Its weights are uniform, or the norms: `a="norm", b="norm"`.

    Args:
        speech_states: lists or dicts of `(B, N, D)`, as in `InnerAlignmentLoss`.
        text_states: likewise of `(B, M, D)`.
        speech_lengths: `(B,)`; None = full.
        text_lengths: likewise.
        layers: numbers of the layers.
        layer_weight: of each layer in the sum.
        position_weight: as in `siamese_pt`.
        reduction: over the items of the sum over the layers, as in `sinkhorn_loss`.
        options: of `siamese_pt`. Weights that are tensors are those of the stacked layers, `(L B, N)`.
    """
    one_of("reduction", reduction, REDUCTIONS)
    layers, layer_weight = layer_numbers(layers), finite("layer_weight", layer_weight)
    stack = stacked(speech_states, text_states, speech_lengths, text_lengths, layers)
    divergences = siamese_pt(*stack, position_weight=position_weight, reduction="none", **options)
    losses = layer_weight * divergences.view(len(layers), -1).sum(0)
    return _reduced(losses, stack.filled[: len(losses)], reduction)


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

    Semi-relaxed transport without entropy: the marginal of the text is dropped, so that each speech frame sends its weight, its
    detached norm, to the nearest token among those at most `window` from j = i M / N. The loss is the transport cost; the
    plan's argmax is what the paper mixes up with probability 0.2 (`mixup`).

    This is a nearest neighbour, in closed form: no solver takes part, and the window cuts off what a `Prior` would weigh.

    Args:
        speech: `(B, N, D)`.
        text: `(B, M, D)`.
        speech_lengths: `(B,)`; None = full.
        text_lengths: likewise.
        window: in tokens; None = all. (Below 1 some frames have no token, and send nothing.)
        cost: `"euclidean"` or `"cosine"`.
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
    """CMOT's mixup: each frame is replaced, with probability `p`, by the token that its plan sends most to: `(B, N, D)`.

    Args:
        speech: `(B, N, D)`.
        text: `(B, M, D)`.
        plan: `(B, N, M)`, such as `cmot`'s; frames that send nothing stay.
        p: the probability.
        generator: of the random numbers, on the device of `plan`.
    """
    p = share("p", p)
    if not text.shape[1]:
        return speech
    chosen = torch.rand(plan.shape[:2], generator=generator, dtype=torch.float32, device=plan.device) < p
    chosen = chosen & (plan.sum(2) > 0)
    partner = text.gather(1, plan.argmax(2)[:, :, None].expand(-1, -1, text.shape[2]))
    return torch.where(chosen[:, :, None], partner.to(speech.dtype), speech)


def opw(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    *,
    lambda1: float = 50.0,
    reg: float = 0.1,
    delta: float = 1.0,
    max_iter: int = 20,
    tol: float = 0.0,
) -> Recipe:
    """The order-preserving Wasserstein distance (Su and Hua, CVPR 2017): <P, D> of the plan with their two temporal terms.

    D is the squared distance; `Prior.order_preserving` has the terms.

    Args:
        x: `(B, N, D)`.
        y: `(B, M, D)`.
        x_lengths: `(B,)`; None = full.
        y_lengths: likewise.
        lambda1: weight of the inverse difference moment.
        reg: their lambda2.
        delta: their sigma, of the Gaussian over the distance from the diagonal.
        max_iter: 20 is theirs.
        tol: as in `sinkhorn_loss`; 0 = all iterations, as theirs.
    """
    n, m = sides(x, y, x_lengths, y_lengths, ("x", "y"))
    result = solve(
        x, y, x_lengths, y_lengths, cost="sqeuclidean", prior=Prior.order_preserving(lambda1, delta), reg=reg,
        max_iter=max_iter, tol=tol,
    )  # fmt: skip
    plan = result.plan()
    return Recipe((plan * ground_cost(x, y, inside(x, n), inside(y, m), "sqeuclidean")).sum((1, 2)), plan)


def ipot(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    *,
    beta: float = 0.5,
    steps: int = 50,
    cost: str = "cosine",
) -> Recipe:
    r"""Sequence-level supervision by inexact proximal transport (Chen et al., ICLR 2019; IPOT: Xie et al., UAI 2020, alg. 1).

    Each proximal step multiplies the plan by :math:`e^{-C / \beta}` and makes one iteration from the last scaling of columns. So
    the t-th plan is one of temperature beta / t: here one iteration of the solver, which starts from the potentials that the
    algorithm starts from. The plan is a constant to the gradient, as in the released code: loss <sg(P), C>.

    Args:
        x: `(B, N, D)`.
        y: `(B, M, D)`.
        x_lengths: `(B,)`; None = full.
        y_lengths: likewise.
        beta: the proximal weight; 0.5 in the paper's machine translation, with `steps` 50.
        steps: proximal ones, 1 at least.
        cost: `"cosine"` as there, `"sqeuclidean"` or `"euclidean"`.
    """
    one_of("cost", cost, ("cosine", "sqeuclidean", "euclidean"))
    steps, beta = at_least_one("steps", steps), positive("beta", beta)
    n, m = sides(x, y, x_lengths, y_lengths, ("x", "y"))
    C = ground_cost(x, y, inside(x, n), inside(y, m), cost)
    fixed, log_v = C.detach(), C.new_zeros(len(C), C.shape[2])
    before = log_v
    for step in range(1, steps + 1):
        reg = beta / step
        init = (C.new_zeros(C.shape[:2]), reg * (2 * log_v - before))
        result = solve_cost(fixed, n, m, reg=reg, max_iter=1, tol=0, init=init)
        before, log_v = log_v, result.potentials[1] / reg
    plan = result.plan().detach()
    return Recipe((plan * C).sum((1, 2)), plan)


def otalign(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    *,
    kind: str = "unbalanced",
    kappa: float = 0.0,
    weights: str = "uniform",
    reg: float = 0.1,
    tau: float = 0.5,
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> Tensor:
    """Word alignment by transport (Arase, Bao and Yokoi, "Unbalanced optimal transport for unbalanced word alignment", ACL 2023).

    The cost is 1 minus the similarity (1 + cos) / 2, times 1 - kappa d^2 with d between relative positions, scaled to [0, 1] over
    the item; the alignment is the plan, scaled likewise, above a threshold. Weights are one, or the norm, of each word, not
    normalised. Computed in float64, as there. (The position multiplies the similarity before it is scaled: no `Prior`, which
    adds to the cost.)

    Args:
        x: `(B, N, D)`.
        y: `(B, M, D)`.
        x_lengths: `(B,)`; None = full.
        y_lengths: likewise.
        kind: `"balanced"` (weights are normalised), `"unbalanced"` with relaxation `tau`, or `"partial"` with the share `tau`
            of the smaller side's mass.
        kappa: how much words count as less similar the further apart they are in position.
        weights: `"uniform"` or `"norm"`.
        reg: entropic regularisation, in the unit of the scaled cost.
        tau: see `kind`.
        max_iter: iterations at most; 1000 there.
        tol: as in `sinkhorn_loss`; `"partial"` makes all iterations.

    Returns:
        `(B, N, M)` the plan scaled to [0, 1] over each item, 0 on the padding; detached.
    """
    one_of("kind", kind, OTALIGN_KINDS)
    one_of("weights", weights, ("uniform", "norm"))
    options = checked_options(reg=reg, max_iter=max_iter, tol=tol)
    reg, max_iter, tol = positive("reg", options["reg"]), options["max_iter"], options["tol"]
    kappa, tau = finite("kappa", kappa), share("tau", tau) if kind == "partial" else positive("tau", tau)
    n, m = sides(x, y, x_lengths, y_lengths, ("x", "y"))
    if not x.shape[1] or not y.shape[1]:
        return x.new_zeros(len(x), x.shape[1], y.shape[1], dtype=torch.float64)
    mask_x, mask_y = inside(x, n), inside(y, m)
    x, y = (clean(t.detach(), mask).double() for t, mask in ((x, mask_x), (y, mask_y)))
    both = mask_x[:, :, None] & mask_y[:, None, :]
    similarity = (1 + products(unit(x), unit(y))) / 2
    long = ((n > 1) & (m > 1))[:, None, None]
    u, v = (
        torch.arange(t.shape[1], device=x.device).to(x) / (k[:, None] - 1).clamp(min=1) for t, k in ((x, n), (y, m))
    )
    similarity = similarity * torch.where(long, 1 - kappa * (u[:, :, None] - v[:, None, :]).square(), 1)
    C = 1 - _min_max(similarity, both)
    a, b = (mask.to(x) if weights == "uniform" else t.norm(dim=2) for t, mask in ((x, mask_x), (y, mask_y)))
    if kind == "partial":
        return _min_max(_partial(C, both, a, b, reg, tau, max_iter), both)
    if kind == "balanced":
        result = solve_cost(C, n, m, a, b, reg=reg, max_iter=max_iter, tol=tol)
        return _min_max(result.plan(), both)
    # The solver knows weights that sum to one, and entropy relative to them. The original's, relative to one, and its masses
    # are terms of the cost: reg log(a b) for the one, and -tau log(mass) for each of the others.
    totals = (torch.where(w.sum(1) > 0, w.sum(1), 1)[:, None] for w in (a, b))
    total_a, total_b = totals
    log_weights = torch.log(a / total_a)[:, :, None] + torch.log(b / total_b)[:, None, :]
    shift = reg * log_weights - tau * (total_a.log() + total_b.log())[:, :, None]
    shifted = torch.where(both, C + torch.where(log_weights.isfinite(), shift, 0), 0)
    result = solve_cost(shifted, n, m, a, b, reg=reg, unbalanced=tau, max_iter=max_iter, tol=tol)
    return _min_max(result.plan(), both)


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

    How strongly, and all other options, are not published in what we could read: `rho` and `options` are ours.

    Args:
        speech: `(B, N, D)`.
        text: `(B, M, D)`.
        speech_lengths: `(B,)`; None = full.
        text_lengths: likewise.
        rho: relaxation of the speech's marginal, in the unit of the cost.
        options: of `sinkhorn_loss`.
    """
    relaxed = (rho, float("inf"))
    return sinkhorn_loss(speech, text, speech_lengths, text_lengths, unbalanced=relaxed, **options)


def ground_cost(x: Tensor, y: Tensor, mask_x: Tensor, mask_y: Tensor, cost: str) -> Tensor:
    """`(B, N, M)` cost between points, differentiable; for pairs outside it is that of zeros."""
    x, y = clean(x, mask_x), clean(y, mask_y)
    if cost == "cosine":
        return 1 - products(unit(x), unit(y))
    squares = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * products(x, y)
    squares = squares.clamp(min=0)
    if cost == "sqeuclidean":
        return squares
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def _min_max(values: Tensor, mask: Tensor) -> Tensor:
    """Scaled to [0, 1] over each item, as released (with 1e-10 against a range of zero), 0 outside."""
    low = values.masked_fill(~mask, torch.inf).amin((1, 2), keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax((1, 2), keepdim=True)
    scaled = (values - low + 1e-10) / (high - low + 1e-10)
    return torch.where(mask, scaled, 0)


def _partial(C: Tensor, mask: Tensor, a: Tensor, b: Tensor, reg: float, share: float, max_iter: int) -> Tensor:
    """Entropic partial transport by Dykstra's projections (Benamou et al. 2015, prop. 5), for all items at once."""
    mass = share * torch.minimum(a.sum(1), b.sum(1))[:, None, None]
    plan = torch.where(mask, torch.exp(-C / reg), 0)
    plan = plan * _over(mass, plan.sum((1, 2), keepdim=True))
    corrections = [torch.ones_like(plan) for _ in range(3)]
    for _ in range(max_iter):
        for k in range(3):
            held = plan * corrections[k]
            if k == 0:
                plan = held * _over(a[:, :, None], held.sum(2, keepdim=True)).clamp(max=1)
            elif k == 1:
                plan = held * _over(b[:, None, :], held.sum(1, keepdim=True)).clamp(max=1)
            else:
                plan = held * _over(mass, held.sum((1, 2), keepdim=True))
            corrections[k] = torch.where(mask, _over(held, plan), 1)
    return plan


def _over(p: Tensor, q: Tensor) -> Tensor:
    """p / q, 0 where q is 0."""
    return torch.where(q > 0, p / torch.where(q > 0, q, 1), 0)
