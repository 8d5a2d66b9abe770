"""What makes a mean over processes the mean over the joined batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..speech.retrieval import processes


@torch.no_grad()
def joined_mean_normalizer(weights: Tensor) -> Tensor:
    """What this process has to divide its weighted sum of losses by, where gradients are averaged over processes (DDP, FSDP).

    Each process has its own number of items that are not empty, so that the mean of the processes' means is not the mean of all
    items. Divided by the weights' sum over all processes, over the number of processes, it is. Every process has to call,
    also one whose items are all empty.

    Args:
        weights: of this process's items, any shape: 1 (or True) for those that count, 0 for empty ones.

    Returns:
        A scalar; 1 if there is nothing to divide.

    Example:
        >>> n, m = torch.tensor([3, 0, 5]), torch.tensor([2, 1, 0])
        >>> losses = otalign.SinkhornLoss(reduction="none")(torch.randn(3, 5, 4), torch.randn(3, 2, 4), n, m)
        >>> loss = losses.sum() / otalign.integrations.joined_mean_normalizer((n > 0) & (m > 0))
    """
    total = weights.sum(dtype=None if weights.is_floating_point() else torch.float32)
    if processes() > 1:
        dist.all_reduce(total)
        total = total / processes()
    return torch.where(total > 0, total, 1)
