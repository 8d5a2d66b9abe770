"""Interleaved timing on a shared, noisy machine."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

BURST = 0.01  # least seconds of the calls that count in a turn
PAUSE = 0.02  # seconds; OpenMP workers of the previous contestant may spin for about this long


class Spread(NamedTuple):
    """Median with the 20th and 80th percentile."""

    median: float
    low: float
    high: float


def spread(samples: np.ndarray) -> Spread:
    low, median, high = np.percentile(samples, (20, 50, 80))
    return Spread(float(median), float(low), float(high))


def keep_memory() -> bool:
    """Make glibc keep freed memory, as the allocators of long trainings do. Returns whether this succeeded.

    By default, glibc requests every block above 32 MB from the kernel, and smaller blocks after a trim. These page
    faults can take more time than the problem, and they affect only the contestants that allocate such blocks.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def _cpu_seconds() -> tuple[float, float]:
    """CPU time that the whole machine and that this process have used so far (both 0 where there is no /proc/stat)."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy, time.process_time()


class Times(dict[str, np.ndarray]):
    """Seconds a call, by contestant; entry i of all of them is from the same round.

    `others` is the share of the machine's CPUs that other processes took in this time. Above a few percent, ratios are
    wrong and not only noisy: many short parallel regions (torch's loops) wait far longer for a thread without a CPU
    than one long region does.
    """

    def __init__(self, samples: Mapping[str, list[float]], others: float) -> None:
        super().__init__({name: np.array(values) for name, values in samples.items()})
        self.others = others

    def ms(self, name: str) -> Spread:
        return spread(1e3 * self[name])

    def ratio(self, slow: str, fast: str) -> Spread:
        """The ratio of times within each round. A disturbance of a whole round cancels."""
        return spread(self[slow] / self[fast])


def _burst(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    while sum(seconds) < BURST:
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
        del result
    return float(np.median(seconds))


def interleave(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int, budget: float = 20.0, pause: float = PAUSE
) -> Times:
    """Time the contestants in turns (A B C A B C ...), for `rounds` rounds.

    After three rounds, it stops as soon as `budget` seconds are over.
    A turn begins with one call that does not count: it wakes the threads and fills the caches after the pause. Then
    calls are repeated for at least `BURST` seconds, and their median counts. All contestants are measured in a steady
    state.
    """
    for call in contestants.values():  # warm-up
        call()
        call()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    gc.collect()
    start, (busy, own) = time.perf_counter(), _cpu_seconds()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > budget:
                break
            shift = done % len(names)  # no contestant always follows the same one
            for name in names[shift:] + names[:shift]:
                time.sleep(pause)
                contestants[name]()
                samples[name].append(_burst(contestants[name]))
    finally:
        gc.enable()
    busy_now, own_now = _cpu_seconds()
    available = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return Times(samples, others=max(0.0, (busy_now - busy) - (own_now - own)) / available)
