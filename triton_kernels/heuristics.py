"""Block sizes, warps and programs by rule, from sizes and types alone: no autotuning, and few variants.

A variant is compiled when first needed, so what a rule may choose is a short list, and sizes only pick from it. The
figures come from the compilers' reports (docs/performance.md has the table): a kernel matrix that stays in registers
takes about 96 of a thread's 255, and what is listed here is what Triton 3.9 compiles without a spill.
"""

import functools
from typing import NamedTuple

MOST_PROGRAMS = 16  # that share an item: the exchange of column sums grows with them
PEERS = (1, 4, MOST_PROGRAMS)  # the exchange is compiled for so many at most
SLOTS = 32768  # longest y: a program holds whole rows


class Resident(NamedTuple):
    """A tile of the kernel matrix that stays in registers: rows of at most `width` columns, `groups` x 8 x `warps` rows."""

    width: int
    groups: int
    warps: int
    fewest: int  # programs an item: the same tile fits together with one exchange, but not with another
    most: int
    before_hopper: int  # as `most`, on chips whose compiler needs a few registers more

    @property
    def rows(self) -> int:
        return self.groups * 8 * self.warps


RESIDENT = (
    Resident(width=32, groups=4, warps=8, fewest=1, most=16, before_hopper=16),
    Resident(width=64, groups=2, warps=8, fewest=1, most=1, before_hopper=1),
    Resident(width=64, groups=4, warps=8, fewest=1, most=16, before_hopper=4),
    Resident(width=128, groups=2, warps=8, fewest=1, most=1, before_hopper=4),
    Resident(width=128, groups=3, warps=8, fewest=2, most=16, before_hopper=0),
    Resident(width=256, groups=1, warps=8, fewest=2, most=16, before_hopper=0),
)
MOST_RELAXED = 4  # programs of a relaxed problem, whose updates take more registers


class Solver(NamedTuple):
    """How a batch is solved: `programs` for every item, `in_flight` items at a time; the rest is compiled in."""

    programs: int
    in_flight: int
    block_n: int
    block_m: int
    rows: int
    groups: int  # of rows in registers; 0 if the kernel matrix lies in memory
    peers: int
    stages: int
    warps: int


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return 1 << (max(size, least) - 1).bit_length()


def leading_dimension(size_y: int) -> int:
    """Row pitch of costs: whole 128-byte lines."""
    return (size_y + 31) // 32 * 32


@functools.lru_cache(4096)
def solver(
    items: int,
    size_x: int,
    size_y: int,
    *,
    double: bool,
    relaxed: bool,
    processors: int,
    generation: int,
    in_memory: bool = False,
) -> Solver:
    """The rule for Sinkhorn's iterations.

    `processors` is how many programs certainly run at the same time: the number of multiprocessors if launches can be
    cooperative, else 1; `generation` is NVIDIA's compute capability, 90 for 9.0, or 0. An item gets the fewest programs
    that keep the kernel matrix in registers; if none do, as many as there may be, each reading its rows from memory, as
    where the matrix is to be `in_memory` at any rate.
    """
    most = MOST_PROGRAMS
    while most > max(1, processors // items):
        most //= 2
    if not double and not in_memory:
        programs = 1
        while programs <= (min(most, MOST_RELAXED) if relaxed else most):
            for tile in RESIDENT:
                fits = size_y <= tile.width and size_x <= programs * tile.rows
                if fits and tile.fewest <= programs <= (tile.most if generation >= 90 else tile.before_hopper):
                    block_n = 8 if tile.width > 64 else 16
                    return _solver(items, programs, processors, block_n, tile.width, tile.groups, tile.warps, 1)
            programs *= 2
    block_m = power_of_two(size_y, 32)
    if block_m > SLOTS:
        raise ValueError(
            f"y: expected items of up to {SLOTS} points, got {size_y}; exchange x and y, or give max_seqlen_y"
        )
    numbers = 2048 if double else 8192
    warps = 4 if block_m <= 64 else 8 if block_m <= 4096 else 16 if block_m <= 8192 else 32
    block_n = max(1, min(64, numbers * min(warps, 8) // 8 // block_m))
    stages = 3 if generation and block_n > 1 else 1  # in shared memory, of which others have less
    return _solver(items, most, processors, block_n, block_m, 0, warps, stages)


def _solver(
    items: int,
    programs: int,
    processors: int,
    block_n: int,
    block_m: int,
    groups: int,
    warps: int,
    stages: int,
) -> Solver:
    return Solver(
        programs=programs,
        in_flight=items if programs == 1 else min(items, processors // programs),
        block_n=block_n,
        block_m=block_m,
        rows=8 * warps,
        groups=groups,
        peers=next(peers for peers in PEERS if programs <= peers),
        stages=stages,
        warps=warps,
    )


class Tile(NamedTuple):
    """Block sizes of a product: rows, columns, and what is summed over."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def cost(size_y: int, *, bits: int) -> Tile:
    """Tiles of the cost, from the width of the numbers that are multiplied: 16, 32 or 64 bits."""
    if bits == 64:
        return Tile(32, 32, 16, warps=4, stages=1)
    # Eight warps, since squares are summed by element beside the product: with four, the registers do not suffice.
    if bits == 32:
        return Tile(64, 32 if size_y <= 32 else 64, 32, warps=8, stages=3)
    if size_y <= 64:
        return Tile(64, 32 if size_y <= 32 else 64, 64, warps=8, stages=4)
    return Tile(64, 128, 32, warps=8, stages=4)


def project(dim: int, *, bits: int) -> Tile:
    """Tiles of gradients by points and of projections: rows, dimensions, and the points that are summed over."""
    if bits == 64:
        return Tile(32, 32, 16, warps=4, stages=1)
    if bits == 32:
        return Tile(64, 64 if dim <= 64 else 128, 32, warps=8, stages=2)
    return Tile(64, 64 if dim <= 64 else 128 if dim <= 128 else 256, 64, warps=8, stages=2)


# Plans and gradients by costs or weights move numbers and little else: one size does for all.
DENSE = Tile(32, 128, 1, warps=4, stages=1)
WEIGHTS = Tile(32, 1, 128, warps=4, stages=1)
ASSIGN = Tile(1, 128, 32, warps=4, stages=1)
