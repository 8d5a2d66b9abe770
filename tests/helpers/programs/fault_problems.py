"""The calls that the programs of tests/faults make: a forward and a backward pass of the CPU engine each, as bytes."""

from collections.abc import Callable
from typing import Any

import torch

import otalign

Call = Callable[[], bytes]


def bits(*tensors: torch.Tensor) -> bytes:
    """Without an operation of torch that may run on several threads: a forked child cannot make one."""
    return b"".join(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors)


def points(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def loss(x: torch.Tensor, y: torch.Tensor, *lengths: torch.Tensor, **options: Any) -> Call:
    leaves = x.requires_grad_(), y.requires_grad_()

    def call() -> bytes:
        value = otalign.sinkhorn_loss(*leaves, *lengths, backend="cpu", **options)
        return bits(value, *torch.autograd.grad(value, leaves))

    return call


def given(C: torch.Tensor, **options: Any) -> Call:
    C.requires_grad_()

    def call() -> bytes:
        result = otalign.solve_cost(C, backend="cpu", **options)
        value = result.value_linear.sum()
        return bits(value, *result.potentials, *torch.autograd.grad(value, C))

    return call


def planned(x: torch.Tensor, y: torch.Tensor, **options: Any) -> Call:
    """Dense plans, and the gradient through them."""
    x.requires_grad_()

    def call() -> bytes:
        plan = otalign.solve(x, y, backend="cpu", **options).plan()
        return bits(plan, *torch.autograd.grad(plan, x, torch.ones_like(plan)))

    return call


def strided(*shapes: tuple[int, ...], **options: Any) -> list[torch.Tensor]:
    """Every second row of points, which the engine has to copy."""
    return [
        wide[:, ::2] for wide in points(*((items, 2 * rows, dim) for items, rows, dim in shapes), **options)
    ]  # fmt: skip


def problems(seed: int = 0) -> dict[str, Call]:
    f64, bf16 = torch.float64, torch.bfloat16
    lengths = torch.tensor([40, 1, 23, 0, 40, 17]), torch.tensor([30, 30, 2, 5, 29, 11])
    offsets = torch.tensor([0, 30, 31, 80])
    (C,) = points((2, 60, 50), seed=seed)
    (sharp,) = points((1, 60, 50), dtype=f64, seed=seed)
    (sharp_wide,) = points((1, 300, 290), dtype=f64, seed=seed)
    (long,) = points((1, 400, 300), seed=seed)
    fast = {"accelerate": True, "reg": 0.003, "tol": 1e-9, "max_iter": 3000}
    return {
        "cosine, float32": loss(*points((6, 40, 24), (6, 30, 24), seed=seed), *lengths),
        "cosine, float64": loss(*points((6, 40, 24), (6, 30, 24), dtype=f64, seed=seed), *lengths),
        "two threads' work": loss(*points((16, 140, 32), (16, 120, 32), seed=seed), max_iter=30),
        "strided bfloat16": loss(*strided((3, 40, 24), (3, 30, 24), dtype=bf16, seed=seed)),
        "euclidean": loss(*points((3, 40, 24), (3, 30, 24), seed=seed), cost="euclidean"),
        "extreme points": loss(*(1e-25 * t for t in points((3, 40, 24), (3, 30, 24), seed=seed))),
        "packed": loss(
            *points((80, 24), (80, 24), seed=seed), cu_seqlens_x=offsets, cu_seqlens_y=offsets, cost="sqeuclidean"
        ),
        "relaxed, by transport": loss(
            *points((3, 40, 24), (3, 30, 24), seed=seed), unbalanced=0.5, objective="transport"
        ),
        "divergence": loss(*points((3, 40, 24), (3, 30, 24), seed=seed), objective="divergence"),
        "given cost": given(C.abs_(), reg=0.1),
        "one long item": given(long.abs_(), reg=0.05, tol=0, max_iter=50),
        "Newton": given(sharp.abs_(), **fast),
        "Newton by conjugate gradients": given(sharp_wide.abs_(), **fast),
        "dense plans": planned(*points((3, 40, 24), (3, 30, 24), seed=seed)),
    }
