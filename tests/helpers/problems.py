"""Problems for the tests, and comparisons of their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import otalign

# Converged up to rounding, for tests that do not depend on how the iteration stops.
CONVERGED: dict[str, Any] = {"tol": 1e-12, "max_iter": 20_000}


class Batch(NamedTuple):
    """A ragged batch of points, `x` (B, N, D) and `y` (B, M, D), whose padding is poison (NaN by default)."""

    x: Tensor
    y: Tensor
    x_lengths: Tensor
    y_lengths: Tensor

    def items(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The points of every item, (n, D) and (m, D), views of the batch."""
        lengths = zip(self.x_lengths.tolist(), self.y_lengths.tolist(), strict=True)
        for x, y, (n, m) in zip(self.x, self.y, lengths, strict=True):
            yield x[:n], y[:m]

    def packed(self) -> dict[str, Tensor]:
        """The same problem as keyword arguments for packed points."""
        xs, ys = zip(*self.items(), strict=True)
        return {
            "x": torch.cat(xs),
            "y": torch.cat(ys),
            "cu_seqlens_x": offsets(self.x_lengths),
            "cu_seqlens_y": offsets(self.y_lengths),
        }

    def to(self, dtype: torch.dtype) -> Batch:
        return self._replace(x=self.x.to(dtype), y=self.y.to(dtype))

    def requires_grad(self) -> Batch:
        """Leaves with the same values."""
        return self._replace(x=leaf(self.x), y=leaf(self.y))


def draw(
    x_lengths: Sequence[int] = (7, 1, 5, 9),
    y_lengths: Sequence[int] = (4, 3, 6, 1),
    D: int = 5,
    *,
    dtype: torch.dtype = torch.float64,
    poison: float = math.nan,
    seed: int = 0,
) -> Batch:
    """Random points at distances around one, padded with `poison` to two rows more than the longest item."""
    generator = torch.Generator().manual_seed(seed)

    def side(lengths: Sequence[int]) -> Tensor:
        values = torch.randn(len(lengths), max(lengths, default=0) + 2, D, generator=generator, dtype=torch.float64)
        padding = torch.arange(values.shape[1]) >= torch.tensor(lengths, dtype=torch.int64)[:, None]
        return (values / math.sqrt(D)).masked_fill(padding[..., None], poison).to(dtype)

    return Batch(side(x_lengths), side(y_lengths), torch.tensor(x_lengths), torch.tensor(y_lengths))


def draw_cost(
    x_lengths: Sequence[int], y_lengths: Sequence[int], *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random costs (B, N, M) from 0 to 1, and the lengths."""
    size = len(x_lengths), max(x_lengths), max(y_lengths)
    C = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return C.to(dtype), torch.tensor(x_lengths), torch.tensor(y_lengths)


def spoken_costs(N: int, M: int, D: int = 64, *, seed: int = 0) -> Tensor:
    """Cosine costs (N, M) of frames that speak tokens of random duration: each frame is its token plus noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(M, D, generator=generator, dtype=torch.float64)
    durations = torch.rand(M, generator=generator, dtype=torch.float64) + 0.2
    times = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    spoken = torch.searchsorted(durations.cumsum(0) / durations.sum(), times).clamp(max=M - 1)
    frames = tokens[spoken] + 1.5 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return 1 - torch.nn.functional.normalize(frames, dim=1) @ torch.nn.functional.normalize(tokens, dim=1).mT


# For tests on a GPU. Triton compiles its kernels for each kind of problem, at about a second a kernel, so that tests share
# these: lengths of items that several programs share, of one point and of none; and dimensions of one tile and of several,
# neither of which fills the last. Both are multiples of 16, for which points are copied 16 bytes at a time.
RAGGED = [300, 1, 0, 270, 129], [128, 5, 7, 100, 128]
NARROW, WIDE = 48, 272


def on(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))


def draw_weights(lengths: Tensor, size: int, *, zeros: bool = False, seed: int = 1) -> Tensor:
    """Positive weights (B, size), not normalised. With `zeros`, every third point has weight zero, but not the first point."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.2 + torch.rand(len(lengths), size, generator=generator, dtype=torch.float64)
    if zeros:
        weights[:, 2::3] = 0
    return weights.masked_fill(torch.arange(size) >= lengths[:, None], math.nan)


def on_threads(count: int, run: Callable[[], Any]) -> Any:
    """What `run` returns with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def points_mask(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size) < lengths[:, None]


def solve_one(x: Tensor, y: Tensor, **options: Any) -> otalign.OTResult:
    """Solve a single item, (n, D) and (m, D)."""
    for name in ("a", "b"):
        if isinstance(options.get(name), Tensor):
            options[name] = options[name][None]
    return otalign.solve(x[None], y[None], **options)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Generalised Kullback-Leibler divergence, 0 log 0 = 0."""
    return (torch.special.xlogy(p, p / torch.where(q > 0, q, 1)) - p + q).sum()


def close(actual: Tensor, expected: Tensor, tol: float, message: str = "") -> None:
    """Assert equality up to `tol` times the largest entry expected (at least 1); NaN equals NaN."""
    actual, expected = actual.detach(), expected.detach()
    finite = expected[expected.isfinite()]
    scale = max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)
    torch.testing.assert_close(
        actual.to(expected.dtype),
        expected,
        rtol=0,
        atol=tol * scale,
        equal_nan=True,
        msg=(lambda text: f"{message}: {text}") if message else None,
    )


def identical(actual: Tensor, expected: Tensor) -> None:
    """Assert equality to the last bit, NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def rounded(actual: Tensor, expected: Tensor) -> None:
    """Assert equality up to rounding; integers and booleans must be identical."""
    if not expected.is_floating_point():
        return identical(actual, expected)
    return close(actual, expected, {torch.float64: 1e-10, torch.float32: 1e-5}.get(expected.dtype, 1e-2))


def same_on(backend: str) -> Callable[[Tensor, Tensor], None]:
    """How to compare a backend's results for one problem at two places in memory.

    To the last bit, except for the reference: its products are torch's, and the rounding of a BLAS may depend on the address.
    """
    return rounded if backend == "reference" else identical


def states(layers: int = 3, x_lengths=(9, 1, 6, 0, 4), y_lengths=(4, 3, 6, 2, 1), D: int = 8, dtype=torch.float32):
    """Speech and text states of some layers, with poison behind the lengths."""
    batches = [draw(x_lengths, y_lengths, D=D, dtype=torch.float64, seed=seed) for seed in range(layers)]
    lengths = batches[0].x_lengths, batches[0].y_lengths
    return [b.x.to(dtype) for b in batches], [b.y.to(dtype) for b in batches], *lengths


def loss_gradients_and_plan(backend, dtype=torch.float32, objective="transport", seed=0):
    """Losses (B,), gradients of x and y, and plans (B, N, M), of a ragged batch with small and large items."""
    leaves = draw([40, 3, 120, 17, 64, 1], [20, 9, 33, 17, 48, 5], D=48, dtype=dtype, seed=seed).requires_grad()
    loss = otalign.sinkhorn_loss(*leaves, objective=objective, reduction="none", backend=backend)
    loss.sum().backward()
    plan = otalign.solve(*(part.detach() for part in leaves), backend=backend).plan()
    return loss.detach(), leaves.x.grad, leaves.y.grad, plan
