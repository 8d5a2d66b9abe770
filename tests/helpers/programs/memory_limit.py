"""A cost of 6 GB with 2 GB left: prints the error, and whether the next call succeeds."""

import resource

import torch

import otalign


def main() -> None:
    x = torch.zeros(1, 40_000, 1).expand(1, 40_000, 1)
    y = torch.zeros(1, 1, 1).expand(1, 40_000, 1)
    small = torch.rand(1, 4, 2)
    otalign.sinkhorn_loss(small, small, backend="cpu")
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
    try:
        otalign.sinkhorn_loss(x, y, cost="sqeuclidean", max_iter=1, backend="cpu")
        print("fitted")
    except (RuntimeError, MemoryError) as error:
        print("refused:", type(error).__name__)
    print(bool(otalign.sinkhorn_loss(small, small, backend="cpu").isfinite()))


if __name__ == "__main__":
    main()
