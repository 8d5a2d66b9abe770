"""Prints the name of the BLAS, and the largest error of the CPU engine against the reference, in units of its tolerance."""

import torch

import otalign
from otalign import backends


def main() -> None:
    torch.manual_seed(0)
    worst = 0.0
    for dtype, unit in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        for D in (1, 7, 48):
            x, y = (torch.randn(3, n, D, dtype=dtype, requires_grad=True) for n in (40, 21))
            n, m = torch.tensor([40, 1, 17]), torch.tensor([21, 5, 1])
            for cost in ("cosine", "sqeuclidean"):
                found = []
                for name, kind in (("cpu", dtype), ("reference", torch.float64)):
                    loss = otalign.sinkhorn_loss(
                        x.to(kind), y.to(kind), n, m, cost=cost, reg=0.5, tol=0, max_iter=20, backend=name
                    )
                    found.append((loss, *torch.autograd.grad(loss, (x, y))))
                for ours, true in zip(*found, strict=True):
                    worst = max(worst, float((ours - true).abs().max() / true.abs().max().clamp(min=1)) / unit)
    print(backends.extension.module().blas().replace(" ", "_"), worst)


if __name__ == "__main__":
    main()
