"""Sums over the programs that share an item, which meet in global memory.

Each writes its part, all wait, each reads all parts in the order of their ranks. So they all hold the same bits
afterwards, and need no word about what they decide from them. Two buffers in turn are enough: a program writes the
second next part only after everybody has come to the next barrier, and so has read this one.
"""

import triton
import triton.language as tl

from .math import finite_top, logarithm

EXCHANGE_TAIL = tl.constexpr(16)  # numbers behind the vectors that a program hands to its group


@triton.jit
def barrier(counter, target):
    """Wait for `target` arrivals. The launch is cooperative: all programs run at the same time."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < target:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def sum_over_programs(
    values, scalar, parts, counter, epoch, rank, programs,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, PEERS: tl.constexpr,
):  # fmt: skip
    """`values`, vectors of WIDTH that together are BLOCK_M long, and `scalar`, summed over the programs of an item."""
    total = ()
    if PEERS > 1:
        STRIDE: tl.constexpr = 2 * BLOCK_M + EXCHANGE_TAIL
        parts += (epoch % 2) * (programs * STRIDE)
        peer = tl.arange(0, PEERS)
        mine = parts + rank * STRIDE
        for s in tl.static_range(len(values)):
            tl.store(mine + s * WIDTH + tl.arange(0, WIDTH), values[s])
        tl.store(mine + 2 * BLOCK_M, scalar)
        barrier(counter, (epoch + 1) * programs)
        for s in tl.static_range(len(values)):
            columns = s * WIDTH + tl.arange(0, WIDTH)
            if PEERS * WIDTH <= 8192:
                at = parts + peer[:, None] * STRIDE + columns[None, :]
                all_parts = tl.load(at, mask=(peer < programs)[:, None], other=0, cache_modifier=".cg")
                total = total + (tl.sum(all_parts, 0),)
            else:
                one_by_one = tl.zeros_like(values[s])
                for other in range(programs):
                    one_by_one += tl.load(parts + other * STRIDE + columns, cache_modifier=".cg")
                total = total + (one_by_one,)
        scalars = tl.load(parts + peer * STRIDE + 2 * BLOCK_M, mask=peer < programs, other=0, cache_modifier=".cg")
        scalar = tl.sum(scalars)
    else:
        total = values
        tl.debug_barrier()
    return total, scalar, epoch + 1


@triton.jit
def log_sum_over_programs(
    top, sums, scalar, parts, counter, epoch, rank, programs, BLOCK_M: tl.constexpr, PEERS: tl.constexpr
):
    """log of sum exp(top) sums (BLOCK_M,), and the sum of `scalar`, over the programs of an item."""
    if PEERS > 1:
        STRIDE: tl.constexpr = 2 * BLOCK_M + EXCHANGE_TAIL
        columns = tl.arange(0, BLOCK_M)
        parts += (epoch % 2) * (programs * STRIDE)
        tl.store(parts + rank * STRIDE + columns, top)
        tl.store(parts + rank * STRIDE + BLOCK_M + columns, sums)
        tl.store(parts + rank * STRIDE + 2 * BLOCK_M, scalar)
        barrier(counter, (epoch + 1) * programs)
        top = tl.load(parts + columns, cache_modifier=".cg")
        for other in range(1, programs):
            top = tl.maximum(top, tl.load(parts + other * STRIDE + columns, cache_modifier=".cg"))
        sums = tl.zeros_like(top)
        scalar = tl.sum(sums)
        for other in range(programs):
            part = tl.load(parts + other * STRIDE + columns, cache_modifier=".cg")
            part_sums = tl.load(parts + other * STRIDE + BLOCK_M + columns, cache_modifier=".cg")
            sums += part_sums * tl.exp(part - finite_top(top))
            scalar += tl.load(parts + other * STRIDE + 2 * BLOCK_M, cache_modifier=".cg")
    else:
        tl.debug_barrier()
    return finite_top(top) + logarithm(sums), scalar, epoch + 1
