"""`data_loader.py METHOD [THREADS]`: data loaders whose workers, started by METHOD, make the calls of fault_problems.

Their parent has made them before, with two threads. Prints the number of results, and how many have other bits.
"""

import sys
import warnings

import torch
from fault_problems import problems
from torch.utils.data import DataLoader, Dataset

SEEDS = 6
CALLS = [problems(seed) for seed in range(SEEDS)]  # made before a fork, after which torch's own threads are gone


class Solved(Dataset):
    """Item k is the bits of all calls with seed k."""

    def __len__(self) -> int:
        return SEEDS

    def __getitem__(self, seed: int) -> dict[str, bytes]:
        return {name: call() for name, call in CALLS[seed].items()}


def collate(items: list[dict[str, bytes]]) -> tuple[list[dict[str, bytes]], dict[str, bytes]]:
    return items, Solved()[0]


class Threads:
    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __call__(self, worker: int) -> None:
        torch.set_num_threads(self.threads)


def main(method: str, threads: int = 0) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch.rand(2000, 2000).exp().sum()
    expected = [Solved()[seed] for seed in range(SEEDS)]
    loader = DataLoader(
        Solved(),
        batch_size=2,
        num_workers=2,
        collate_fn=collate,
        multiprocessing_context=method,
        persistent_workers=True,
        timeout=60,
        worker_init_fn=Threads(threads) if threads else None,
    )
    found, others = 0, 0
    for _ in range(2):
        epoch = list(loader)
        ours = [item for items, _ in epoch for item in items] + [first for _, first in epoch]
        right = [*expected, *[expected[0]] * len(epoch)]
        found += len(ours)
        others += sum(a != b for a, b in zip(ours, right, strict=True))
    others += [Solved()[seed] for seed in range(SEEDS)] != expected
    print(found, others)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
