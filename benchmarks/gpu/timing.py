"""Time and memory of a call on a GPU, and calls that are captured in CUDA graphs."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]
FLUSHED = 2**28  # bytes, several times the L2 cache of any GPU
ROUND = 10  # runs between two synchronisations


class Times(NamedTuple):
    """Microseconds: the median with the 20th and 80th percentile."""

    median: float
    low: float
    high: float


class Clock:
    """Times runs by CUDA events, and fills the L2 cache with other data before each run.

    The host runs ahead of the device, as in training. Its time counts only where it exceeds the device's: a call that
    takes the host longer than the device is measured at the host's time.
    """

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self.on_gpu = device.type == "cuda"
        self.other = torch.zeros(FLUSHED if self.on_gpu else 2**20, dtype=torch.uint8, device=device)

    def time(self, run: Callable[[], object]) -> Times:
        """Time 10 runs, and up to 200 within the budget. Without a budget: a single run without warm-up."""
        if not self.budget:
            return self._times(self._round(run, 1))
        for _ in range(3):
            run()
        start, samples = time.perf_counter(), self._round(run, ROUND)
        while len(samples) < 200 and time.perf_counter() - start < self.budget:
            samples += self._round(run, ROUND)
        return self._times(samples)

    def _times(self, samples: list[float]) -> Times:
        low, median, high = np.percentile(samples, (20, 50, 80))
        return Times(float(median), float(low), float(high))

    def _round(self, run: Callable[[], object], runs: int) -> list[float]:
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return [1e6 * (time.perf_counter() - start)]
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for begin, end in pairs:
            self.other.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]


def peak_mb(run: Callable[[], object], device: torch.device) -> float:
    """The peak of memory during a run, above the memory before it, in MB."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def captured(run: Call) -> Call:
    """The call in a CUDA graph."""
    warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return replaying(graph, outputs)


def captured_backward(forward: Callable[[], Tensor], backward: Callable[[Tensor], tuple[Tensor, ...]]) -> Call:
    """The backward pass in a CUDA graph of its own, for the forward pass in another."""
    warm_up(lambda: backward(forward()))
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        loss = forward()
    with torch.cuda.graph(second, pool=first.pool()):
        gradients = backward(loss)
    first.replay()  # fills what the backward pass reads
    return replaying(second, (loss.detach(), *gradients), kept=(first, loss))


def warm_up(run: Callable[[], object]) -> None:
    """Run on another stream, which torch requires before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)


def replaying(graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...], kept: tuple[object, ...] = ()) -> Call:
    """A call that replays the graph. It keeps `kept` alive, because the graph reads that memory."""

    def replay(_kept: tuple[object, ...] = kept) -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer, once Python runs its next instruction."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def watched(seconds: float, stuck: Callable[[], None]) -> Iterator[None]:
    """Call `stuck` from another thread if a block takes longer, even while Python waits for the GPU and runs nothing."""
    timer = threading.Timer(seconds, stuck)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a thread that Python stops at its end can abort the process
