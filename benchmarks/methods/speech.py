"""The alignment path score against loops over items and layers: `python benchmarks speech` writes results/speech.csv."""

from __future__ import annotations

import argparse
import csv
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import environment
from otalign.speech import alignment_path_score

LAYERS, B, N, M, D = 32, 16, 300, 100, 1024
OUT = Path(__file__).resolve().parents[1] / "results" / "speech.csv"


@functools.cache
def data() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    xs, ys = ([torch.randn(B, size, D, generator=generator) for _ in range(LAYERS)] for size in (N, M))
    n, m = (torch.randint(size // 4, size + 1, (B,), generator=generator) for size in (N, M))
    return xs, ys, n, m


def ours() -> Tensor:
    return alignment_path_score(*data()).score


def as_written() -> Tensor:
    """The formula as written: a loop over items and layers, `cosine_similarity` of all pairs; the score alone."""
    xs, ys, n, m = data()
    scores = [
        [F.cosine_similarity(x[b, : n[b], None], y[b, None, : m[b]], dim=2).amax(0).mean() for b in range(B)]
        for x, y in zip(xs, ys, strict=True)
    ]
    return torch.tensor(scores).mean(0)


def with_products() -> Tensor:
    """The same loop with matrix products. It finds both paths, which consistency needs."""
    xs, ys, n, m = data()
    scores = []
    for x, y in zip(xs, ys, strict=True):
        for b in range(B):
            frames, tokens = x[b, : n[b]], y[b, : m[b]]
            best = (F.normalize(frames, dim=1) @ F.normalize(tokens, dim=1).T).max(0)
            (best.indices == torch.cdist(frames, tokens).argmin(0)).float().mean()
            scores.append(best.values.mean())
    return torch.stack(scores).view(LAYERS, B).mean(0)


def seconds(function: Callable[[], Tensor], expected: Tensor, repeats: int) -> float:
    """The fastest of several runs, after a first run that is checked."""
    torch.testing.assert_close(function(), expected, rtol=0, atol=1e-5)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser("python benchmarks speech", description=__doc__).parse_args(arguments)
    torch.set_num_threads(2)
    expected = ours()
    base = seconds(ours, expected, 5)
    about = environment.describe(threads=2, memory_kept=False)
    columns = ("contestant", "layers", "B", "N", "M", "D", "seconds", "ratio_to_otalign", *about)
    with OUT.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for function, repeats in ((ours, 5), (with_products, 5), (as_written, 1)):
            took = base if function is ours else seconds(function, expected, repeats)
            writer.writerow(
                (function.__name__, LAYERS, B, N, M, D, f"{took:.4g}", f"{took / base:.3g}", *about.values())
            )
            print(f"{function.__name__}: {took:.3g} s, {took / base:.3g} times otalign's")
    return 0
