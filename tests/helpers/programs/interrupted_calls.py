"""`interrupted_calls.py NAME` makes one of the `CALLS`, each many seconds long, and sends itself SIGINT meanwhile.

Prints how long the answer took, and whether the engine works afterwards.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import otalign

OPTIONS: dict[str, Any] = {"backend": "cpu", "tol": 0}


def two_items(bad: int) -> Callable[[], object]:
    """A long item, and one that is done at once: its cost is NaN."""
    C = torch.rand(2, 1500, 1500)
    C[bad, 0, 0] = torch.nan
    lengths = torch.tensor([1500, 1499])
    return lambda: otalign.solve_cost(C, lengths, reg=0.01, max_iter=20_000, **OPTIONS)


def one_item() -> Callable[[], object]:
    C = torch.rand(1, 3000, 3000)
    return lambda: otalign.solve_cost(C, reg=0.01, max_iter=5000, **OPTIONS)


def implicit_system() -> Callable[[], object]:
    x, y = torch.randn(1, 3000, 8, requires_grad=True), torch.randn(1, 3000, 8, requires_grad=True)
    return otalign.sinkhorn_loss(x, y, objective="transport", reg=0.002, max_iter=30, **OPTIONS).backward


def products() -> Callable[[], object]:
    x, y = torch.randn(1, 3000, 16_000), torch.randn(1, 3000, 16_000)
    return lambda: otalign.sinkhorn_loss(x, y, max_iter=1, **OPTIONS)


def gradients_by_points() -> Callable[[], object]:
    x, y = torch.randn(1, 3000, 12_000, requires_grad=True), torch.randn(1, 3000, 12_000)
    return otalign.sinkhorn_loss(x, y, max_iter=1, **OPTIONS).backward


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "the other thread has the only long item": lambda: two_items(bad=0),
    "the other thread has the only long item, the first": lambda: two_items(bad=1),
    "one item": one_item,
    "the implicit system of one item": implicit_system,
    "products of one item": products,
    "gradients by the points of one item": gradients_by_points,
}


def main(name: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.manual_seed(0)
    otalign.solve_cost(torch.rand(1, 4, 4), reg=0.1, backend="cpu")
    call = CALLS[name]()
    sent = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    torch.set_num_threads(2)
    timer = threading.Timer(0.7, send)
    timer.start()
    try:
        call()
        print("finished")
    except KeyboardInterrupt:
        print("after", time.perf_counter() - sent[0])
    timer.join()
    print(otalign.solve_cost(torch.rand(1, 4, 4), reg=0.1, backend="cpu").converged.item())


if __name__ == "__main__":
    main(sys.argv[1])
