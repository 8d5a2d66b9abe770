"""`memory_limit_in_threads.py THREADS`: copies of extreme points with 2 MB left.

Prints whether they fitted, and whether the same call without the limit gives what it gave before.
"""

import resource
import sys

import torch

import otalign


def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return otalign.sinkhorn_loss(x, y, max_iter=3, backend="cpu")


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    x, y = torch.randn(4, 300, 20_000), torch.randn(4, 300, 20_000)
    x[:, 3] *= 1e-25
    y[:, 3] *= 1e-25
    expected = loss(x, y)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**21, hard))
    try:
        loss(x, y)
        print("fitted")
    except MemoryError:
        print("refused")
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    print(bool(loss(x, y) == expected))


if __name__ == "__main__":
    main(int(sys.argv[1]))
