"""Heuristics: block sizes, warps and programs from sizes and types alone, without autotuning and with few variants.

Triton compiles a variant when it is first needed. So the heuristics choose from a short list, and sizes only pick from it.
The list comes from the compilers' reports (docs/performance.md has the table): a kernel matrix that stays in registers
takes about 96 of a thread's 255 registers, and Triton 3.9 compiles every tile in the list without a spill on NVIDIA chips.
"""

import functools
from typing import NamedTuple

MAX_PROGRAMS = 16  # that share an item: the exchange of column sums grows with them
EXCHANGE_SIZES = (1, 4, MAX_PROGRAMS)  # the exchange is compiled for these upper bounds of the number of programs
# Rows, and entries, of a step of the exact passes, where the kernel matrix is in registers: more would spill.
EXACT_ROWS, EXACT_ENTRIES = 32, 4096
MAX_SIZE_Y = 32768  # longest y: a program holds whole rows
MAX_THREADS = 1024  # of a program, on every chip


class TileShape(NamedTuple):
    """A tile of the kernel matrix that stays in registers: rows of at most `width` columns, `groups` x 8 x `warps` rows."""

    width: int
    groups: int
    warps: int
    # Programs an item for which the tile is used. Together with the exchange it may not fit, for which it fits alone.
    min_programs: int
    max_programs: int
    max_before_hopper: int  # as `max_programs`, on chips whose compiler needs a few registers more
    # Programs an item for which the variant that mixes has registers enough, with strict and with relaxed marginals. Before
    # Hopper, relaxed tiles wider than 32 do not mix. Where a warp has 64 lanes, all tiles do.
    mixing_programs: tuple[int, ...] = (1, 2, 4, 8, 16)
    mixing_relaxed: tuple[int, ...] = (1, 2, 4)

    @property
    def rows(self) -> int:
        return self.groups * 8 * self.warps


TILE_SHAPES = (
    TileShape(width=32, groups=4, warps=8, min_programs=1, max_programs=16, max_before_hopper=16),
    TileShape(width=64, groups=2, warps=8, min_programs=1, max_programs=1, max_before_hopper=1),
    TileShape(width=64, groups=4, warps=8, min_programs=1, max_programs=16, max_before_hopper=4, mixing_relaxed=(2, 4)),
    TileShape(width=128, groups=2, warps=8, min_programs=1, max_programs=1, max_before_hopper=4),
    TileShape(
        width=128, groups=3, warps=8, min_programs=2, max_programs=16, max_before_hopper=0, mixing_programs=(2, 4)
    ),
    TileShape(width=256, groups=1, warps=8, min_programs=2, max_programs=16, max_before_hopper=0),
)
MAX_PROGRAMS_RELAXED = 4  # of a relaxed problem, whose updates take more registers
# Where a warp has 64 lanes, eight warps leave 256 registers for a thread, and four leave 512. Relaxed problems, and iterations
# that mix, need more than 256 in tiles as wide as this.
WIDE_TILE = 128


class LaunchConfig(NamedTuple):
    """How a batch is solved: `programs` for every item, `in_flight` items at a time; the rest is compiled in."""

    programs: int
    in_flight: int
    block_n: int  # rows of a block of a pass over costs in memory
    block_m: int  # columns of every block: at least the longest y
    rows: int  # of a group
    groups: int  # of rows in registers; 0 if the kernel matrix lies in memory
    max_programs: int  # for which the exchange is compiled
    stages: int  # of the pipeline that loads the kernel matrix from memory
    warps: int
    mixes: bool = False  # whether the iterations mix: if that is asked for, and the variant has registers enough


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return 1 << (max(size, least) - 1).bit_length()


def leading_dimension(size_y: int) -> int:
    """Row pitch of costs: whole 128-byte lines."""
    return (size_y + 31) // 32 * 32


@functools.lru_cache(4096)
def launch_config(
    items: int,
    size_x: int,
    size_y: int,
    *,
    double: bool,
    relaxed: bool,
    processors: int,
    generation: int,
    lanes: int = 32,
    in_memory: bool = False,
    mixes: bool = False,
) -> LaunchConfig:
    """The launch of Sinkhorn's iterations.

    `processors` is how many programs certainly run at the same time: the number of multiprocessors if launches can be
    cooperative, else 1. `generation` is NVIDIA's compute capability, 90 for 9.0, or 0. `lanes` are the threads of a warp.
    `mixes` asks for iterations that mix.
    An item gets the fewest programs that keep the kernel matrix in registers. If no number of programs does, or with
    `in_memory`, the matrix lies in memory, and the item gets as many programs as are allowed, each reading its own rows.
    """
    most = MAX_PROGRAMS
    while most > max(1, processors // items):
        most //= 2
    if not double and not in_memory:
        programs = 1
        while programs <= (min(most, MAX_PROGRAMS_RELAXED) if relaxed else most):
            for tile in TILE_SHAPES:
                fits = size_y <= tile.width and size_x <= programs * tile.rows
                limit = tile.max_programs if generation >= 90 else tile.max_before_hopper
                if fits and tile.min_programs <= programs <= limit:
                    block_n = min(EXACT_ROWS, EXACT_ENTRIES // tile.width)
                    config = _config(items, programs, processors, block_n, tile.width, tile.groups, tile.warps, 1)
                    mixes = mixes and (lanes == 64 or _mixes(tile, programs, relaxed, generation))
                    config = config._replace(mixes=mixes)
                    wide = lanes == 64 and tile.width >= WIDE_TILE
                    return config._replace(warps=4) if wide and (relaxed or mixes) else config
            programs *= 2
    block_m = power_of_two(size_y, 32)
    if block_m > MAX_SIZE_Y:
        raise ValueError(
            f"y: expected items of up to {MAX_SIZE_Y} points, got {size_y}; exchange x and y, or give max_seqlen_y"
        )
    numbers = 2048 if double else 8192
    warps = 4 if block_m <= 64 else 8 if block_m <= 4096 else 16 if block_m <= 8192 else 32
    warps = min(warps, MAX_THREADS // lanes)
    block_n = max(1, min(64, numbers * min(warps, 8) // 8 // block_m))
    if mixes and double and lanes == 64 and block_m == 256:
        block_n //= 2  # with more rows, strict marginals need scratch on gfx942
    stages = 3 if generation and block_n > 1 else 1  # in shared memory, of which chips of other makers have less
    return _config(items, most, processors, block_n, block_m, 0, warps, stages)._replace(mixes=mixes)


def _mixes(tile: TileShape, programs: int, relaxed: bool, generation: int) -> bool:
    """Whether the variant that mixes has registers enough where a warp has 32 lanes."""
    if not relaxed:
        return programs in tile.mixing_programs
    return programs in tile.mixing_relaxed and (generation >= 90 or tile.width <= 32)


def _config(
    items: int,
    programs: int,
    processors: int,
    block_n: int,
    block_m: int,
    groups: int,
    warps: int,
    stages: int,
) -> LaunchConfig:
    return LaunchConfig(
        programs=programs,
        in_flight=items if programs == 1 else min(items, processors // programs),
        block_n=block_n,
        block_m=block_m,
        rows=8 * warps,
        groups=groups,
        max_programs=next(size for size in EXCHANGE_SIZES if programs <= size),
        stages=stages,
        warps=warps,
    )


class ProductTile(NamedTuple):
    """Block sizes of a matrix product: rows, columns, and the inner dimension, over which the product sums."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def roomy(generation: int) -> bool:
    """Whether a chip has 227 KiB of shared memory for a program, as Hopper's and Blackwell's of data centers.

    The others have 99 KiB or more, on AMD 64 KiB, and their tensor cores take the factors from registers.
    """
    return 90 <= generation < 120


def cost(size_y: int, *, bits: int, generation: int) -> ProductTile:
    """Tiles of the cost kernel. `bits` is the width of the numbers that are multiplied: 16, 32 or 64."""
    if bits == 64:
        return ProductTile(32, 32, 16, warps=4, stages=1)
    # Eight warps, because the kernel also sums squares by element; with four warps it runs out of registers.
    if bits == 32:
        return ProductTile(64, 32 if size_y <= 32 else 64, 32, warps=8, stages=3)
    if size_y <= 64:
        return ProductTile(64, 32 if size_y <= 32 else 64, 64 if roomy(generation) else 32, warps=8, stages=4)
    return ProductTile(64, 128, 32, warps=8, stages=4)


def points(dim: int, *, bits: int, generation: int) -> ProductTile:
    """Tiles of projections: rows, dimensions, and the points of the other side, which are summed over."""
    if bits == 64:
        return ProductTile(32, 32, 16, warps=4, stages=1)
    if bits == 32:
        return ProductTile(64, 64 if dim <= 64 else 128, 32, warps=8, stages=2)
    widest = 256 if roomy(generation) else 128
    return ProductTile(64, 64 if dim <= 64 else 128 if dim <= 128 else widest, 64, warps=8, stages=2)


def points_gradient(dim: int, own: int, other: int, *, bits: int, generation: int) -> ProductTile:
    """Tiles of gradients by points: rows, dimensions, and the points of the other side, which are summed over.

    `own` and `other` are the sizes of the sides. On roomy chips, two programs share a multiprocessor for short sums: one
    loads or stores while the other multiplies. Long sums read less with wider tiles, which take all registers.
    """
    if bits != 16 or not roomy(generation) or dim <= 64:
        return points(dim, bits=bits, generation=generation)
    rows = 64 if own <= 64 else 128
    if dim <= 128 or other <= 256:
        return ProductTile(rows, 128, 64, warps=8, stages=2)
    return ProductTile(rows, 256, 64, warps=8, stages=3)


# Plans, coefficients, and gradients by costs or weights are bound by memory: one size fits all.
PLAN = ProductTile(32, 128, 1, warps=4, stages=1)
WEIGHTS = ProductTile(32, 1, 128, warps=4, stages=1)
COEFFICIENTS = ProductTile(32, 1, 128, warps=8, stages=1)
ASSIGN = ProductTile(1, 128, 32, warps=4, stages=1)
