"""Collectives over the processes of torch.distributed: gathered vectors, and the normaliser of a mean."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def processes() -> int:
    """The number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(vectors: Tensor) -> Tensor:
    """The vectors of all processes; each process may have a different number of them."""
    counts = [torch.zeros((), dtype=torch.int64, device=vectors.device) for _ in range(processes())]
    dist.all_gather(counts, torch.tensor(len(vectors), device=vectors.device))
    longest = int(max(counts))
    padded = F.pad(vectors, (0, 0, 0, longest - len(vectors)))
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


@torch.no_grad()
def joined_mean_normalizer(weights: Tensor) -> Tensor:
    """The divisor of a process's sum of losses, where gradients are averaged over processes (DDP, FSDP).

    Each process has its own number of non-empty items, so the mean of the processes' means is not the mean over all items.
    A sum of losses over this divisor gives that mean: the divisor is the sum of the weights of all processes over the
    number of processes. Every process has to call this function, even if all its items are empty.

    Args:
        weights: of this process's items, any shape: 1 (or True) for an item that counts, 0 for an empty one.

    Returns:
        A scalar; 1 if no item counts.

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
