"""Word alignment by balanced, unbalanced and partial transport (Arase, Bao and Yokoi, ACL 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional import solve_cost
from ...layout import Lengths
from ...options import checked_options, one_of
from .._states import clean, finite, inside, positive, products, share, sides, unit

OTALIGN_KINDS = ("balanced", "unbalanced", "partial")


def arase_otalign(
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
    """OTAlign (Arase, Bao and Yokoi, "Unbalanced optimal transport for unbalanced word alignment", ACL 2023).

    The paper's method has the name of this package by coincidence. Its cost is 1 minus a similarity, scaled to [0, 1] over the
    item. The similarity of two words is (1 + cos) / 2, times 1 - kappa d^2, with d the difference of their relative positions.
    The words i and j are aligned where the plan, scaled to [0, 1] likewise, is above a threshold. The weight of a word is 1 or
    its norm, not normalised. Computed in float64, as in the original. (The position multiplies the similarity before the
    scaling. A `Prior` adds to the cost and cannot express this.)

    Args:
        x: `(B, N, D)`.
        y: `(B, M, D)`.
        x_lengths: `(B,)` int32 or int64, in words; None = full.
        y_lengths: likewise.
        kind: `"balanced"`, which normalises the weights; `"unbalanced"`, with marginal relaxation `tau`; or `"partial"`, which
            transports the share `tau` of the smaller side's mass.
        kappa: how much distant positions reduce the similarity.
        weights: `"uniform"` or `"norm"`.
        reg: entropic regularisation, in the unit of the scaled cost.
        tau: see `kind`.
        max_iter: most iterations; 1000 as in the original.
        tol: as in `sinkhorn_loss`; `"partial"` makes all iterations.

    Returns:
        `(B, N, M)` float64: the plan scaled to [0, 1] over each item, 0 on the padding; detached.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.
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
    C = _cost(x, y, n, m, both, kappa)
    a, b = (mask.to(x) if weights == "uniform" else t.norm(dim=2) for t, mask in ((x, mask_x), (y, mask_y)))
    if kind == "partial":
        plan = _partial(C, both, a, b, reg, tau, max_iter)
    elif kind == "balanced":
        plan = solve_cost(C, n, m, a, b, reg=reg, max_iter=max_iter, tol=tol).plan()
    else:
        C = _cost_of_relative_entropy(C, both, a, b, reg, tau)
        plan = solve_cost(C, n, m, a, b, reg=reg, unbalanced=tau, max_iter=max_iter, tol=tol).plan()
    return _min_max(plan, both)


def _cost(x: Tensor, y: Tensor, n: Tensor, m: Tensor, mask: Tensor, kappa: float) -> Tensor:
    """1 minus the similarity of words, scaled to [0, 1] over each item: `(B, N, M)`."""
    similarity = (1 + products(unit(x), unit(y))) / 2
    several = ((n > 1) & (m > 1))[:, None, None]
    u, v = (
        torch.arange(t.shape[1], device=x.device).to(x) / (k[:, None] - 1).clamp(min=1) for t, k in ((x, n), (y, m))
    )
    similarity = similarity * torch.where(several, 1 - kappa * (u[:, :, None] - v[:, None, :]).square(), 1)
    return 1 - _min_max(similarity, mask)


def _cost_of_relative_entropy(C: Tensor, mask: Tensor, a: Tensor, b: Tensor, reg: float, tau: float) -> Tensor:
    """The cost with which the solver gives the plan of the original's unbalanced problem: `(B, N, M)`.

    The solver's weights sum to 1, and its entropy is relative to them. The original's weights have any mass, and its entropy is
    relative to 1. Terms of the cost make up for both: reg log(a b) for the entropy, and -tau log(mass) for the mass of each side.
    """
    total_a, total_b = (torch.where(w.sum(1) > 0, w.sum(1), 1)[:, None] for w in (a, b))
    log_weights = torch.log(a / total_a)[:, :, None] + torch.log(b / total_b)[:, None, :]
    shift = reg * log_weights - tau * (total_a.log() + total_b.log())[:, :, None]
    return torch.where(mask, C + torch.where(log_weights.isfinite(), shift, 0), 0)


def _min_max(values: Tensor, mask: Tensor) -> Tensor:
    """Values `(B, N, M)` scaled to [0, 1] over each item, 0 outside the mask. 1e-10 guards a range of zero, as released."""
    low = values.masked_fill(~mask, torch.inf).amin((1, 2), keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax((1, 2), keepdim=True)
    scaled = (values - low + 1e-10) / (high - low + 1e-10)
    return torch.where(mask, scaled, 0)


def _partial(C: Tensor, mask: Tensor, a: Tensor, b: Tensor, reg: float, share: float, max_iter: int) -> Tensor:
    """Plan `(B, N, M)` of entropic partial transport by Dykstra's projections (Benamou et al. 2015, prop. 5)."""
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
