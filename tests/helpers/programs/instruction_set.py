"""Prints the instruction set of the CPU engine, and its largest error against the reference, in units of its tolerance."""

import torch

import otalign
from otalign import backends


def main() -> None:
    torch.manual_seed(0)
    worst = 0.0
    for dtype, unit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for n, m in ((1, 1), (5, 3), (17, 33), (40, 40), (70, 130), (9, 300)):
            for reg, rho in ((0.05, None), (0.002, None), (0.05, 0.5)):
                C = torch.rand(1, n, m, dtype=dtype)
                ours, true = (
                    otalign.solve_cost(c, reg=reg, unbalanced=rho, tol=0, max_iter=30, backend=name).plan().double()
                    for c, name in ((C, "cpu"), (C.double(), "reference"))
                )
                worst = max(worst, float((ours - true).abs().sum()) / unit)
    print(backends.extension.module().simd, worst)


if __name__ == "__main__":
    main()
