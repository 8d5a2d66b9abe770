"""The same points in another layout."""

import torch

from .problems import points_mask


def gathered(values, lengths):
    """The rows of padded (B, N, ...) as packed (total, ...)."""
    return values[points_mask(lengths, values.shape[1])]


def transposed(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)  # time-major memory


def sliced(t):
    wide = torch.full((t.shape[0] + 1, t.shape[1] + 3, 2 * t.shape[2] + 1), torch.nan, dtype=t.dtype)
    wide[1:, 2:-1, 1::2] = t
    return wide[1:, 2:-1, 1::2]


def offset(t):
    flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)  # not aligned to a vector
    flat[1:] = t.flatten()
    return flat[1:].view_as(t)
