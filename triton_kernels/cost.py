"""The ground cost, with the temporal prior, of every pair of points: norms and products in one pass over the embeddings."""

import triton
import triton.language as tl

from .addressing import load_reg, locate, segment
from .math import INFINITY, prior_tile
from .runtime import kernel


@triton.jit
def load_tile(points, rows, inside, stride, k, dim, dim_stride, SAME: tl.constexpr, T: tl.constexpr):
    """Rows of points, (rows, BLOCK_D), 0 outside; as they are if a tensor core takes them so, else in T."""
    places = rows.to(tl.int64)[:, None] * stride + k.to(tl.int64)[None, :] * dim_stride
    tile = tl.load(points + places, mask=inside[:, None] & (k < dim)[None, :], other=0)
    if not SAME:
        tile = tile.to(T)
    return tile


@triton.jit
def products(
    x, y, rows, columns, mine, real, x_row, x_dim, y_row, y_dim, dim, x_scale, y_scale,
    SAME: tl.constexpr, T: tl.constexpr, SQUARES: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x, y> (BLOCK_N, BLOCK_M) and, if SQUARES, |x|^2 and |y|^2, of points times their scales if SCALED."""
    dots = tl.zeros([BLOCK_N, BLOCK_M], T)
    # Squares are summed by element and reduced once: a reduction in every step costs more than the tensor cores' work.
    xx = tl.zeros([BLOCK_N, BLOCK_D], T)
    yy = tl.zeros([BLOCK_M, BLOCK_D], T)
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        x_tile = load_tile(x, rows, mine, x_row, k, dim, x_dim, SAME and not SCALED, T)
        y_tile = load_tile(y, columns, real, y_row, k, dim, y_dim, SAME and not SCALED, T)
        if SCALED:
            x_tile *= x_scale[:, None]
            y_tile *= y_scale[:, None]
        if SQUARES:
            x_wide, y_wide = x_tile.to(T), y_tile.to(T)
            xx += x_wide * x_wide
            yy += y_wide * y_wide
        dots = tl.dot(x_tile, tl.trans(y_tile), dots, input_precision=PRECISION, out_dtype=T)
    return dots, tl.sum(xx, 1), tl.sum(yy, 1)


@triton.jit
def largest(points, rows, inside, stride, dim_stride, dim, T: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The largest magnitude in every row; 1 for rows of zeros or not of numbers."""
    most = tl.zeros([BLOCK, BLOCK_D], T)
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        most = tl.maximum(most, tl.abs(load_tile(points, rows, inside, stride, k, dim, dim_stride, False, T)))
    row = tl.max(most, 1)
    return tl.where((row > 0) & (row < INFINITY), row, 1)


@triton.jit
def growth(largest):
    """1 / largest, as far as floats can hold it: enough to bring the squares of any number into their range."""
    if largest.dtype == tl.float64:
        limit = 4.49423283715579e307  # 2^1022
    else:
        limit = 8.507059173023462e37  # 2^126
    return tl.where(largest * limit > 1, tl.where(largest < limit, 1 / largest, 1 / limit), limit)


@triton.jit
def kept_scale(over, grow):
    """The reciprocal norm of a point that was `grow` times as long; where floats cannot hold it, minus `over`."""
    if over.dtype == tl.float64:
        limit = 4.49423283715579e307
    else:
        limit = 8.507059173023462e37
    return tl.where(grow == limit, -over, over * grow)


@triton.jit
def split_scale(scale):
    """A kept scale as the factor that brings a point to a length from which squares are safe, and what is left.

    The factor is 1 wherever the length is so already.
    """
    if scale.dtype == tl.float64:
        safe, most, limit = 1e140, 1022.0, 4.49423283715579e307
    else:
        safe, most, limit = 1e15, 126.0, 8.507059173023462e37
    wild = (scale > safe) | ((scale > 0) & (scale * safe < 1))
    power = tl.floor(tl.log2(tl.where(wild, scale, 1)))
    power = tl.exp2(tl.minimum(tl.maximum(power, -most), most))
    factor = tl.where(scale < 0, limit, power).to(scale.dtype)
    return factor, tl.where(scale < 0, -scale, scale / factor)


@triton.jit
def square_distances(
    x, y, rows, columns, mine, real, x_row, x_dim, y_row, y_dim, dim,
    T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """sum_k (x_k - y_k)^2, one dimension at a time: slow, and exact where points are close."""
    squares = tl.zeros([BLOCK_N, BLOCK_M], T)
    x_at = x + rows.to(tl.int64) * x_row
    y_at = y + columns.to(tl.int64) * y_row
    for _ in range(0, dim):
        apart = tl.load(x_at, mask=mine, other=0).to(T)[:, None] - tl.load(y_at, mask=real, other=0).to(T)[None, :]
        squares += apart * apart
        x_at += x_dim
        y_at += y_dim
    return squares


@triton.jit
def reciprocal_norm(squares):
    """1 / sqrt(squares), 0 for 0."""
    return tl.where(squares > 0, 1 / tl.sqrt(tl.where(squares > 0, squares, 1)), squares)


@kernel
def cost_kernel(
    x, y, C, x_scale, y_scale, counters, x_layout, y_layout, reg_items,
    items, x_mode, x_size, x_rows, y_mode, y_size, y_rows,
    x_item, x_row, x_dim, y_item, y_row, y_dim, dim, ld16, per_item, counters_size,
    reg: tl.float64, prior_first: tl.float64, prior_second: tl.float64,
    COST: tl.constexpr, PRIOR: tl.constexpr, PRECISION: tl.constexpr, SAME: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """C (rows of x, ld) of points x (rows of x, dim), y (rows of y, dim) with any strides, or of a given cost x.

    For a given cost, x is (B, N, M) with strides x_item, x_row, x_dim, and y is not read. `x_scale` (rows of x,) and
    `y_scale` (rows of y,) get the reciprocal norms for the cosine. Entries that are not finite, or not so over reg,
    become NaN, except for infinities that are given or that the prior adds: these forbid pairs. The first program sets
    `counters` to zero for the solver.
    """
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    tiles_y = tl.cdiv(y_size, BLOCK_M)
    item, tile = locate(tl.cdiv(x_size, BLOCK_N) * tiles_y)
    if tl.program_id(0) == 0:
        index = tl.arange(0, 128)
        while tl.min(index, 0) < counters_size:
            tl.store(counters + index, tl.zeros([128], tl.int32), mask=index < counters_size)
            index += 128
    x_start, n, x_slot = segment(x_layout, x_mode, x_size, x_rows, item, items)
    y_start, m, y_slot = segment(y_layout, y_mode, y_size, y_rows, item, items)
    row = (tile // tiles_y) * BLOCK_N
    column = (tile % tiles_y) * BLOCK_M
    if (row < n) & (column < m):
        rows = row + tl.arange(0, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_M)
        mine, real = rows < n, columns < m
        inside = mine[:, None] & real[None, :]
        if COST == "given":
            x += item.to(tl.int64) * x_item
            places = rows.to(tl.int64)[:, None] * x_row + columns.to(tl.int64)[None, :] * x_dim
            cost = tl.load(x + places, mask=inside, other=0).to(T)
        else:
            x += tl.where(x_mode == 2, x_start * x_row, item.to(tl.int64) * x_item)
            y += tl.where(y_mode == 2, y_start * y_row, item.to(tl.int64) * y_item)
            ones_x, ones_y = tl.zeros([BLOCK_N], T) + 1, tl.zeros([BLOCK_M], T) + 1
            dots, xx, yy = products(
                x, y, rows, columns, mine, real, x_row, x_dim, y_row, y_dim, dim, ones_x, ones_y,
                SAME, T, COST != "dot", False, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            )  # fmt: skip
            if COST == "cosine":
                least = tl.minimum(tl.min(tl.where(mine, xx, 1), 0), tl.min(tl.where(real, yy, 1), 0))
                most = tl.maximum(tl.max(tl.where(mine, xx, 1), 0), tl.max(tl.where(real, yy, 1), 0))
                grow_x, grow_y = ones_x, ones_y
                if (least < 1e-30) | (most > 1e30):
                    # The cosine does not know lengths, but their squares leave the range of floats: divide them out.
                    grow_x = growth(largest(x, rows, mine, x_row, x_dim, dim, T, BLOCK_N, BLOCK_D))
                    grow_y = growth(largest(y, columns, real, y_row, y_dim, dim, T, BLOCK_M, BLOCK_D))
                    dots, xx, yy = products(
                        x, y, rows, columns, mine, real, x_row, x_dim, y_row, y_dim, dim, grow_x, grow_y,
                        SAME, T, True, True, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
                    )  # fmt: skip
                over_x, over_y = reciprocal_norm(xx), reciprocal_norm(yy)
                cost = 1 - dots * over_x[:, None] * over_y[None, :]
                if column == 0:
                    tl.store(x_scale + x_start + rows, kept_scale(over_x, grow_x), mask=mine)
                if row == 0:
                    tl.store(y_scale + y_start + columns, kept_scale(over_y, grow_y), mask=real)
            elif COST == "dot":
                cost = -dots
            else:
                total = xx[:, None] + yy[None, :]
                cost = total - 2 * dots
                # A distance below this share of the norms has lost too many digits in the product.
                if tl.max(tl.max(tl.where(inside & (cost < total * 0.015625), 1, 0), 1), 0) > 0:
                    exact = square_distances(
                        x, y, rows, columns, mine, real, x_row, x_dim, y_row, y_dim, dim, T, BLOCK_N, BLOCK_M
                    )
                    cost = tl.where(cost < total * 0.015625, exact, cost)
                if COST == "euclidean":
                    cost = tl.sqrt(cost)
        epsilon = load_reg(reg, reg_items, per_item, item, T)
        valid = tl.abs(cost * (1 / epsilon)) < INFINITY
        if COST == "given":
            valid |= cost == INFINITY
        cost = tl.where(valid, cost, float("nan"))
        if PRIOR != "none":
            i, j = rows[:, None], columns[None, :]
            cost += prior_tile(i, j, n, m, epsilon, prior_first, prior_second, PRIOR, T)
        # Rows end with zeros up to the next multiple of four: the CUDA kernels read four numbers at once.
        ends = columns < (m + 3) // 4 * 4
        tl.store(
            C + (x_start + rows)[:, None] * ld + columns[None, :],
            tl.where(inside, cost, 0),
            mask=mine[:, None] & ends[None, :],
        )
