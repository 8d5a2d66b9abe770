"""Small cases that reach every kernel, for compute-sanitizer: `compute-sanitizer --tool racecheck python sanitize_gpu.py`.

Each is compared with the reference, so that this also tests without the sanitizer.
"""

from __future__ import annotations

import argparse
import sys

import torch

import otalign

COSTS = ("cosine", "sqeuclidean", "euclidean", "dot")


def case(device: torch.device, cost: str, dtype: torch.dtype, N: int, rho: float | None) -> float:
    """Forward, and all gradients of everything; how far the values are from the reference's."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, size, 20, generator=generator).to(device, dtype).requires_grad_() for size in (N, 24))
    lengths = torch.tensor([N, 1, 0], device=device), torch.tensor([24, 7, 5], device=device)
    options = {"cost": cost, "reg": 0.5, "max_iter": 8, "unbalanced": rho, "prior": otalign.Prior.quadratic(0.1)}
    result = otalign.solve(x, y, *lengths, backend="triton", **options)
    total = result.value.sum() + result.value_linear.sum() + result.plan().square().sum()
    total = total + result.barycentric_x().sum() + result.barycentric_y().sum()
    torch.autograd.grad(total, (x, y))
    result.assign_y()
    expected = otalign.solve(x.detach(), y.detach(), *lengths, backend="reference", **options).value
    return float((result.value - expected).abs().max())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases: a sanitizer is slow")
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    few = args.quick or not on_gpu
    worst = 0.0
    # On a GPU 40 rows stay in one program's registers, 700 in those of several; float64 lies in memory.
    for cost in COSTS[:1] if few else COSTS:
        for dtype in (torch.float32, torch.float64) if few else (torch.bfloat16, torch.float32, torch.float64):
            for N in (40, 700) if on_gpu else (9,):
                for rho in (None, 1.0):
                    worst = max(worst, case(device, cost, dtype, N, rho))
    print(f"largest difference from the reference: {worst:.2g}")
    return int(not worst < 2e-2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
