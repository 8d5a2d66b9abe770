"""The result of a recipe, the ground costs, and the reduction over items."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._states import clean, products, unit, weighted_mean


class Recipe(NamedTuple):
    """Loss and transport plan of a recipe."""

    loss: Tensor  # (B,)
    plan: Tensor  # (B, N, M), 0 on the padding


def ground_cost(x: Tensor, y: Tensor, mask_x: Tensor, mask_y: Tensor, cost: str) -> Tensor:
    """The ground cost between all points of each item, differentiable, in float32 at least: `(B, N, M)`.

    Args:
        x: `(B, N, D)`.
        y: `(B, M, D)`.
        mask_x: `(B, N)`, True on the points. Padding counts as zero vectors, so the cost is finite there too.
        mask_y: likewise `(B, M)`.
        cost: `"cosine"` = 1 - cos, `"sqeuclidean"` = |x - y|^2, or `"euclidean"`, with gradient 0 at distance 0.
    """
    x, y = clean(x, mask_x), clean(y, mask_y)
    if cost == "cosine":
        return 1 - products(unit(x), unit(y))
    squares = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * products(x, y)
    squares = squares.clamp(min=0)
    if cost == "sqeuclidean":
        return squares
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def reduced(losses: Tensor, filled: Tensor, reduction: str) -> Tensor:
    """Reduce losses `(B,)`, which are 0 where `filled` `(B,)` is False. `"mean"` counts the filled items only."""
    if reduction == "mean":
        return weighted_mean(losses, filled, None, None)
    return losses if reduction == "none" else losses.sum()
