"""Where the time of a loss with both gradients goes, kernel by kernel: stages.csv, from torch's profiler."""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch

import otalign
from gpu import FIXED, LARGE, REG, Case, describe, make
from shapes import SMALL


def stages(case: Case, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Microseconds of every kernel, by name, in the order of the runs."""
    batch = make(case, device)
    x, y = batch.x.requires_grad_(), batch.y.requires_grad_()
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU

    def full() -> None:
        iterations = FIXED if device.type == "cuda" else 2
        loss = otalign.sinkhorn_loss(x, y, reg=REG, tol=0, max_iter=iterations, backend="triton")
        torch.autograd.grad(loss, (x, y))

    full()
    found: dict[str, list[float]] = defaultdict(list)
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(repeats):
            full()
        if device.type == "cuda":
            torch.cuda.synchronize()
    for event in profile.events():
        if device.type != "cuda" or event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time if device.type == "cuda" else event.cpu_time)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--dry", action="store_true", help="a toy size, on the CPU if there is no GPU")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [SMALL._replace(B=2, N=9, M=5)] if args.dry else [LARGE["A"], LARGE["B"]]
    about = describe(device)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "stages.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shape", "dtype", "kernel", "calls", "median_us", *about])
        for shape in shapes:
            for dtype in ("bf16", "fp32"):
                repeats = 1 if args.dry else 20
                for name, times in stages(Case(shape, False, dtype, 0.0), device, repeats).items():
                    calls = len(times) / repeats
                    row = [shape.name, dtype, name, f"{calls:g}", f"{statistics.median(times):.2f}", *about.values()]
                    writer.writerow(row)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
