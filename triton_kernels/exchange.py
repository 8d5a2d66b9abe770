"""Sums over the programs that share an item. They exchange their parts through global memory.

Each program writes its part, waits at a barrier, and reads all parts in the order of ranks. All programs get bit-identical
sums, so each decides alone and they always agree. There are no floating-point atomics; the barrier counts in integers.

Two buffers in turn are enough. A program writes into a buffer again only after the next barrier, and every program has read
the buffer before it arrives there.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .math import finite_top, logarithm

COUNTER_STRIDE = tl.constexpr(32)  # int32 from a group's counter to the next: each has a cache line of its own
EXCHANGE_TAIL = tl.constexpr(16)  # elements behind the two vectors of a program's part; the first holds a scalar


class Group(NamedTuple):
    """The programs that share an item, as one of them sees it."""

    parts: tl.tensor  # pointer to 2 x programs x (2 * BLOCK_M + EXCHANGE_TAIL) elements: the two buffers
    counter: tl.tensor  # pointer to an int32: arrivals at the barriers of this launch
    rank: tl.tensor  # of this program
    programs: tl.tensor  # how many there are


@triton.jit
def group_of(exchange, counters, programs, BLOCK_M: tl.constexpr):
    """The group of this program: `programs` neighbours, each group with its own part of `exchange` and its counter.

    The first of the counters is no group's: it stays zero.
    """
    index = tl.program_id(0) // programs
    parts = exchange + index * (2 * programs * (2 * BLOCK_M + EXCHANGE_TAIL))
    return Group(parts, counters + (index + 1) * COUNTER_STRIDE, tl.program_id(0) % programs, programs)


@triton.jit
def barrier(counter, target):
    """Wait for `target` arrivals. The launch is cooperative: all programs run at the same time.

    Not for AMD's GPUs. There, a release waits for the stores of its own warp, and those of the other warps may still be on
    their way. On NVIDIA's, `debug_barrier` orders them before it.
    """
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while arrived < target:
        arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def sum_over_programs(
    values, scalar, group, epoch, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, MAX_PROGRAMS: tl.constexpr
):
    """`values`, a tuple of vectors of WIDTH that together have BLOCK_M elements, and `scalar`, summed over a group.

    `epoch` counts the barriers of a launch; the next one is returned. MAX_PROGRAMS bounds the programs of a group.
    """
    total = ()
    if MAX_PROGRAMS > 1:
        STRIDE: tl.constexpr = 2 * BLOCK_M + EXCHANGE_TAIL
        parts = group.parts + (epoch % 2) * (group.programs * STRIDE)
        ranks = tl.arange(0, MAX_PROGRAMS)
        own_part = parts + group.rank * STRIDE
        for s in tl.static_range(len(values)):
            tl.store(own_part + s * WIDTH + tl.arange(0, WIDTH), values[s])
        tl.store(own_part + 2 * BLOCK_M, scalar)
        barrier(group.counter, (epoch + 1) * group.programs)
        scalars_at = parts + ranks * STRIDE + 2 * BLOCK_M
        scalars = tl.load(scalars_at, mask=ranks < group.programs, other=0, cache_modifier=".cg")
        if MAX_PROGRAMS * WIDTH <= 8192:
            # All loads come before the first sum: a trip to the L2 cache takes longer than all the sums.
            loaded = ()
            for s in tl.static_range(len(values)):
                for rank in tl.static_range(MAX_PROGRAMS):
                    at = parts + rank * STRIDE + s * WIDTH + tl.arange(0, WIDTH)
                    exists = tl.full([WIDTH], rank, tl.int32) < group.programs
                    loaded = loaded + (tl.load(at, mask=exists, other=0, cache_modifier=".cg"),)
            for s in tl.static_range(len(values)):
                running = loaded[s * MAX_PROGRAMS]
                for rank in tl.static_range(1, MAX_PROGRAMS):
                    running += loaded[s * MAX_PROGRAMS + rank]
                total = total + (running,)
        else:  # too many elements to hold at once
            for s in tl.static_range(len(values)):
                running = tl.zeros_like(values[s])
                for rank in range(group.programs):
                    at = parts + rank * STRIDE + s * WIDTH + tl.arange(0, WIDTH)
                    running += tl.load(at, cache_modifier=".cg")
                total = total + (running,)
        scalar = tl.sum(scalars)
    else:
        total = values
        tl.debug_barrier()
    return total, scalar, epoch + 1


@triton.jit
def log_sum_over_programs(top, sums, scalar, group, epoch, BLOCK_M: tl.constexpr, MAX_PROGRAMS: tl.constexpr):
    """log of sum exp(top) sums (BLOCK_M,), and the sum of `scalar`, over a group; and the next epoch."""
    if MAX_PROGRAMS > 1:
        STRIDE: tl.constexpr = 2 * BLOCK_M + EXCHANGE_TAIL
        columns = tl.arange(0, BLOCK_M)
        parts = group.parts + (epoch % 2) * (group.programs * STRIDE)
        own_part = parts + group.rank * STRIDE
        tl.store(own_part + columns, top)
        tl.store(own_part + BLOCK_M + columns, sums)
        tl.store(own_part + 2 * BLOCK_M, scalar)
        barrier(group.counter, (epoch + 1) * group.programs)
        top = tl.load(parts + columns, cache_modifier=".cg")
        for rank in range(1, group.programs):
            top = tl.maximum(top, tl.load(parts + rank * STRIDE + columns, cache_modifier=".cg"))
        sums = tl.zeros_like(top)
        scalar = tl.sum(sums)
        for rank in range(group.programs):
            part = tl.load(parts + rank * STRIDE + columns, cache_modifier=".cg")
            part_sums = tl.load(parts + rank * STRIDE + BLOCK_M + columns, cache_modifier=".cg")
            sums += part_sums * tl.exp(part - finite_top(top))
            scalar += tl.load(parts + rank * STRIDE + 2 * BLOCK_M, cache_modifier=".cg")
    else:
        tl.debug_barrier()
    return finite_top(top) + logarithm(sums), scalar, epoch + 1
