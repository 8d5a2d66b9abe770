"""The shapes that are measured, and synthetic speech/text pairs of those shapes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """A padded batch: `B` items of at most `N` speech frames and `M` text tokens, embedded in `D` dimensions."""

    name: str
    B: int
    N: int
    M: int
    D: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("slm10", 16, 300, 100, 1024),
        Shape("slm25", 8, 750, 128, 1024),
        Shape("layers", 96, 60, 60, 1024),
        Shape("whisper50", 2, 1500, 200, 1280),
    )
}
SMALL = Shape("small", 4, 40, 20, 64)

# Standard deviation of a frame around its token, in units of the token's own deviation. It sets the number of iterations: 1.5 is
# a cosine of 0.55 between a frame and its token, about 30 iterations to 1e-3 at reg 0.05 for an item of 750 x 128.
NOISE = 1.5


class Batch(NamedTuple):
    """Inputs of a loss: `x` `(B, N, D)`, `y` `(B, M, D)`, lengths `(B,)`, and weights, which peers take instead."""

    x: Tensor
    y: Tensor
    n: Tensor
    m: Tensor
    a: Tensor  # (B, N), 1/n on the valid part, 0 on the padding
    b: Tensor  # (B, M), 1/m on the valid part, 0 on the padding

    @property
    def valid(self) -> int:
        """The number of valid entries of the cost: the sum of n_b * m_b."""
        return int((self.n * self.m).sum())

    def double(self) -> Batch:
        """The same batch in float64."""
        weights = (_weights(self.n, self.x.shape[1]), _weights(self.m, self.y.shape[1]))
        return Batch(self.x.double(), self.y.double(), self.n, self.m, *weights)


def _lengths(count: int, longest: int, generator: torch.Generator) -> Tensor:
    return torch.randint(math.ceil(longest / 4), longest + 1, (count,), generator=generator)


def _weights(lengths: Tensor, longest: int) -> Tensor:
    valid = torch.arange(longest) < lengths[:, None]
    return valid / lengths[:, None].double()


def _pair(n: int, m: int, D: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`n` frames and `m` random tokens. The frames are the tokens in order, each for a random time, plus noise."""
    text = torch.randn(m, D, generator=generator)
    duration = -torch.rand(m, generator=generator).clamp_min(1e-6).log()  # exponential
    ends = duration.cumsum(0) / duration.sum()
    token = torch.searchsorted(ends, (torch.arange(n) + 0.5) / n).clamp_max(m - 1)
    return text[token] + noise * torch.randn(n, D, generator=generator), text


def make_batch(shape: Shape, *, seed: int = 0, noise: float = NOISE) -> Batch:
    """A ragged batch: lengths between a quarter and the whole of the maximum, one item (not the first) at the maximum."""
    generator = torch.Generator().manual_seed(seed)
    n, m = _lengths(shape.B, shape.N, generator), _lengths(shape.B, shape.M, generator)
    n[shape.B // 2], m[shape.B // 2] = shape.N, shape.M
    x, y = torch.zeros(shape.B, shape.N, shape.D), torch.zeros(shape.B, shape.M, shape.D)
    for i, (n_i, m_i) in enumerate(zip(n.tolist(), m.tolist(), strict=True)):
        x[i, :n_i], y[i, :m_i] = _pair(n_i, m_i, shape.D, noise, generator)
    return Batch(x, y, n, m, _weights(n, shape.N).float(), _weights(m, shape.M).float())


def pad_double(batch: Batch) -> Batch:
    """The same problems in a batch padded to twice the length; the new padding is NaN, so that reading it shows."""

    def pad(h: Tensor, value: float) -> Tensor:
        return torch.cat([h, torch.full_like(h, value)], dim=1)

    return Batch(pad(batch.x, math.nan), pad(batch.y, math.nan), batch.n, batch.m, pad(batch.a, 0.0), pad(batch.b, 0.0))


def repeat_items(batch: Batch) -> Batch:
    """A batch with every item twice."""
    return Batch(*(torch.cat([field, field]) for field in batch))
