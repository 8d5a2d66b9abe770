"""The first solves by the CUDA kernels, one for each way to store the matrix: do they end with the right result?"""

from __future__ import annotations

import argparse

import torch

import otalign

SIZES = ((4, 40, 20), (32, 300, 100), (32, 750, 128), (2, 3000, 512), (3, 500, 1000))


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser("python benchmarks first-solve", description=__doc__).parse_args(arguments)
    print(otalign.backends.available()["cuda"] or "available", flush=True)
    wrong = 0
    for items, n, m in SIZES:
        C = torch.rand(items, n, m, generator=torch.Generator().manual_seed(0))
        leaf = C.cuda().requires_grad_()
        with otalign.debug():
            result = otalign.solve_cost(leaf, reg=0.1, tol=0, max_iter=20, backend="cuda")
            (gradient,) = torch.autograd.grad(result.value_linear.sum(), leaf)
        expected = otalign.solve_cost(C[:1].double(), reg=0.1, tol=0, max_iter=20, backend="reference")
        off = float((result.plan()[0].detach().cpu() - expected.plan()[0]).abs().sum())
        wrong += not (off < 1e-4 and bool(gradient.isfinite().all()))
        print(f"{items} x {n} x {m}: plan off by {off:.1e} (L1)", flush=True)
    return int(wrong > 0)
