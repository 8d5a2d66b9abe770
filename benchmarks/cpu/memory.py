"""Peak memory of one loss with both gradients, in a process of its own: `python benchmarks memory slm25` prints JSON.

The inputs, the loss and the gradients are not counted. There are two measures. Resident pages of the process include
allocations in C++, with a resolution of some hundred kB. torch's own allocations are exact, but do not include C++; they
are NaN if torch did not allocate the gradients either.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from common import peers
from common.shapes import SHAPES, SMALL, Batch, make_batch, repeat_items

BENCHMARKS = str(Path(__file__).resolve().parents[1])
RESOLVED = 8e6  # bytes of cost for which pages give a precise ratio; smaller batches are repeated up to this size


def measure(shape: str, contestant: str, *, threads: int, reg: float, tol: float) -> dict[str, float]:
    """Run this file in a fresh process."""
    options = ["--contestant", contestant, "--threads", str(threads), "--reg", str(reg), "--tol", str(tol)]
    done = subprocess.run(
        (sys.executable, BENCHMARKS, "memory", shape, *options),
        capture_output=True,
        text=True,
        cwd=Path.cwd(),
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"python benchmarks memory {shape} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _resident() -> int:
    """Resident bytes, counted page by page (the counters in /proc/self/status are late)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/smaps_rollup has no Rss line")


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM line")


def _peak_by_pages(run: Callable[[], tuple[Tensor, ...]]) -> int:
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # the run must not reuse freed memory, which would not count,
    libc.mallopt(-3, 2**16)  # nor keep it (M_MMAP_THRESHOLD): only live memory counts
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident()
    outputs = run()
    return _peak_resident() - before - sum(output.nbytes for output in outputs)


def _peak_by_torch(run: Callable[[], tuple[Tensor, ...]]) -> float:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peak = current = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    beyond = peak - sum(output.nbytes for output in outputs)
    return beyond if beyond >= 0 else math.nan  # torch did not record the outputs: they come from another allocator


def _loss(batch: Batch, contestant: str, reg: float, tol: float) -> Callable[[], tuple[Tensor, ...]]:
    x, y = batch.x.requires_grad_(), batch.y.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        if contestant == "torch log":
            loss = peers.CosineLoss.apply(x, y, batch, peers.torch_log(reg, tol))
        else:
            import otalign

            loss = otalign.sinkhorn_loss(x, y, batch.n, batch.m, reg=reg, tol=tol, max_iter=5000, backend=contestant)
        return loss.detach(), *torch.autograd.grad(loss, (x, y))

    return run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python benchmarks memory", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--contestant", default="cpu", help="an otalign backend, or 'torch log'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reg", type=float, default=0.05)
    parser.add_argument("--tol", type=float, default=1e-3)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)

    batch = make_batch(SHAPES[args.shape])
    for _ in range(math.ceil(math.log2(max(1.0, RESOLVED / (4 * batch.valid))))):
        batch = repeat_items(batch)
    # A small loss and products at full size load code and allocate thread stacks and BLAS's packing buffers beforehand.
    for _ in range(2):
        _loss(make_batch(SMALL), args.contestant, args.reg, args.tol)()
        peers.bare_products(batch, torch.zeros(len(batch.n), batch.x.shape[1], batch.y.shape[1]))()

    run = _loss(batch, args.contestant, args.reg, args.tol)
    cost = 4 * batch.valid
    print(json.dumps({"pages": _peak_by_pages(run) / cost, "torch": _peak_by_torch(run) / cost, "cost_bytes": cost}))
    return 0
