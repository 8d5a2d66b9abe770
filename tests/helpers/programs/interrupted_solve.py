"""Prints "ready", then what a signal does to a solve of a minute, then whether the engine works afterwards."""

import signal
import time

import torch

import otalign


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they start in the background
    C = torch.rand(4000, 60, 60)
    otalign.solve_cost(C[:4], reg=0.01, backend="cpu")
    print("ready", flush=True)
    begin = time.perf_counter()
    try:
        otalign.solve_cost(C, reg=0.01, tol=0, max_iter=200_000, backend="cpu")
        print("finished")
    except KeyboardInterrupt:
        print("interrupted after", time.perf_counter() - begin)
    print(otalign.solve_cost(C[:4], reg=0.1, backend="cpu").converged.tolist())


if __name__ == "__main__":
    main()
