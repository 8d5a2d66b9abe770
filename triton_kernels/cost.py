"""The cost of every pair of points, with the temporal prior: norms and products in one pass over the embeddings."""

import triton
import triton.language as tl

from .addressing import first_point, load_reg, locate, segment, up_to_four
from .math import INFINITY, prior_tile
from .runtime import kernel


@triton.jit
def load_tile(points, rows, inside, stride, k, dim, dim_stride, SAME: tl.constexpr, T: tl.constexpr):
    """Some rows and dimensions of points, (rows, BLOCK_D), 0 outside: in their own type if SAME, else in T."""
    offsets = rows.to(tl.int64)[:, None] * stride + k.to(tl.int64)[None, :] * dim_stride
    tile = tl.load(points + offsets, mask=inside[:, None] & (k < dim)[None, :], other=0)
    if not SAME:
        tile = tile.to(T)
    return tile


@triton.jit
def products(
    x, y, rows, columns, row_mask, column_mask, x_row, x_dim, y_row, y_dim, dim, x_scale, y_scale,
    SAME: tl.constexpr, T: tl.constexpr, SQUARES: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x, y> (BLOCK_N, BLOCK_M); if SQUARES also |x|^2 (BLOCK_N,) and |y|^2 (BLOCK_M,). If SCALED, of points times scales."""
    dots = tl.zeros([BLOCK_N, BLOCK_M], T)
    # Sum squares by element and reduce once: a reduction in every step costs more than the product on tensor cores.
    xx = tl.zeros([BLOCK_N, BLOCK_D], T)
    yy = tl.zeros([BLOCK_M, BLOCK_D], T)
    for start in tl.range(0, dim, BLOCK_D, num_stages=1 if SCALED else None):
        k = start + tl.arange(0, BLOCK_D)
        x_tile = load_tile(x, rows, row_mask, x_row, k, dim, x_dim, SAME and not SCALED, T)
        y_tile = load_tile(y, columns, column_mask, y_row, k, dim, y_dim, SAME and not SCALED, T)
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
    """The largest magnitude in every row; 1 for rows of zeros and for rows with infinity or NaN."""
    most = tl.zeros([BLOCK, BLOCK_D], T)
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        most = tl.maximum(most, tl.abs(load_tile(points, rows, inside, stride, k, dim, dim_stride, False, T)))
    row = tl.max(most, 1)
    return tl.where((row > 0) & (row < INFINITY), row, 1)


@triton.jit
def growth(largest):
    """About 1 / largest, within 2^-126 and 2^126: a factor that brings the squares of a row into the range of floats.

    In float32 it is a power of two, so that a 16-bit number times it still fits into TF32 without rounding.
    """
    if largest.dtype == tl.float64:
        limit = 4.49423283715579e307  # 2^1022
        return tl.where(largest * limit > 1, tl.where(largest < limit, 1 / largest, 1 / limit), limit)
    else:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255  # plus 127
        return ((254 - tl.minimum(tl.maximum(exponent, 1), 253)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def stored_scale(norm_inv, growth):
    """The reciprocal norm of a point whose multiple by `growth` has the reciprocal norm `norm_inv`.

    Where floats cannot hold it, `-norm_inv`: a negative sign stands for the factor `limit`. See split_scale.
    """
    if norm_inv.dtype == tl.float64:
        limit = 4.49423283715579e307
    else:
        limit = 8.507059173023462e37
    return tl.where(growth == limit, -norm_inv, norm_inv * growth)


@triton.jit
def split_scale(scale):
    """A stored scale as a product of two factors: one that makes the squares of the point safe to compute, and the rest.

    The first factor is a power of two, and 1 wherever the squares are safe already.
    """
    if scale.dtype == tl.float64:
        safe, max_power, limit = 1e140, 1022.0, 4.49423283715579e307
    else:
        safe, max_power, limit = 1e15, 126.0, 8.507059173023462e37
    unsafe = (scale > safe) | ((scale > 0) & (scale * safe < 1))
    power = tl.floor(tl.log2(tl.where(unsafe, scale, 1)))
    power = tl.exp2(tl.minimum(tl.maximum(power, -max_power), max_power))
    factor = tl.where(scale < 0, limit, power).to(scale.dtype)
    return factor, tl.where(scale < 0, -scale, scale / factor)


@triton.jit
def square_distances(
    x, y, rows, columns, row_mask, column_mask, x_row, x_dim, y_row, y_dim, dim,
    T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """sum_k (x_k - y_k)^2 (BLOCK_N, BLOCK_M), one dimension at a time: slow, and exact where points are close."""
    squares = tl.zeros([BLOCK_N, BLOCK_M], T)
    x_at = x + rows.to(tl.int64) * x_row
    y_at = y + columns.to(tl.int64) * y_row
    for _ in range(0, dim):
        difference = (
            tl.load(x_at, mask=row_mask, other=0).to(T)[:, None]
            - tl.load(y_at, mask=column_mask, other=0).to(T)[None, :]
        )
        squares += difference * difference
        x_at += x_dim
        y_at += y_dim
    return squares


@triton.jit
def reciprocal_norm(squares):
    """1 / sqrt(squares); 0 for 0, NaN for NaN."""
    return tl.where(squares > 0, 1 / tl.sqrt(tl.where(squares > 0, squares, 1)), squares)


@kernel
def cost_kernel(
    x,  # (B, N, D) or packed (rows of x, D), any strides in elements; for COST "given" the cost itself, (B, N, M)
    y,  # (B, M, D) or packed (rows of y, D), any strides in elements; not read for COST "given"
    C,  # out: (rows of x, ld), contiguous; cost plus prior, in the units of reg
    x_scale,  # out, cosine only: (rows of x,) reciprocal norms
    y_scale,  # out, cosine only: (rows of y,) reciprocal norms
    counters,  # out: (counters_size,) int32, set to zero
    x_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if x_addressing > 0
    y_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if y_addressing > 0
    reg_items,  # (B,) float64, in the units of the cost; read if per_item
    items, x_addressing, x_size, x_rows, y_addressing, y_size, y_rows,
    x_item, x_row, x_dim, y_item, y_row, y_dim, dim, ld16, per_item, counters_size,
    reg: tl.float64, prior_first: tl.float64, prior_second: tl.float64,
    COST: tl.constexpr, PRIOR: tl.constexpr, PRECISION: tl.constexpr, SAME: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The cost of every pair of points, plus the temporal prior.

        C_ij = 1 - <x_i, y_j> / (|x_i| |y_j|), |x_i - y_j|^2, |x_i - y_j|, -<x_i, y_j>, or a given matrix; + prior(i, j)

    Grid: one program for each tile (BLOCK_N, BLOCK_M) of each item. Source: the definitions in otalign/backends/reference.py.

    Entries that are not finite, or not finite over reg, become NaN. Infinities that are given or that the prior adds stay:
    they forbid pairs. The first program sets `counters` to zero for the kernel that follows. With SAME the tensor cores
    multiply 16-bit points as they are.
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
    x_start, n, x_slot = segment(x_offsets, x_addressing, x_size, x_rows, item, items)
    y_start, m, y_slot = segment(y_offsets, y_addressing, y_size, y_rows, item, items)
    row = (tile // tiles_y) * BLOCK_N
    column = (tile % tiles_y) * BLOCK_M
    if (row < n) & (column < m):
        rows = row + tl.arange(0, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_M)
        row_mask, column_mask = rows < n, columns < m
        inside = row_mask[:, None] & column_mask[None, :]
        if COST == "given":
            x += item.to(tl.int64) * x_item
            offsets = rows.to(tl.int64)[:, None] * x_row + columns.to(tl.int64)[None, :] * x_dim
            cost = tl.load(x + offsets, mask=inside, other=0).to(T)
        else:
            x = first_point(x, x_addressing, x_start, item, x_item, x_row)
            y = first_point(y, y_addressing, y_start, item, y_item, y_row)
            ones_x, ones_y = tl.zeros([BLOCK_N], T) + 1, tl.zeros([BLOCK_M], T) + 1
            dots, xx, yy = products(
                x, y, rows, columns, row_mask, column_mask, x_row, x_dim, y_row, y_dim, dim, ones_x, ones_y,
                SAME, T, COST != "dot", False, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            )  # fmt: skip
            if COST == "cosine":
                least = tl.minimum(tl.min(tl.where(row_mask, xx, 1), 0), tl.min(tl.where(column_mask, yy, 1), 0))
                most = tl.maximum(tl.max(tl.where(row_mask, xx, 1), 0), tl.max(tl.where(column_mask, yy, 1), 0))
                growth_x, growth_y = ones_x, ones_y
                if (least < 1e-30) | (most > 1e30):
                    # The squares leave the range of floats. The cosine does not depend on lengths, so scale the points first.
                    # The tiles are small: this is rare, and must not take registers from the product above.
                    exact: tl.constexpr = "tf32" if SAME and PRECISION != "ieee" else PRECISION
                    growth_x = growth(largest(x, rows, row_mask, x_row, x_dim, dim, T, BLOCK_N, 16))
                    growth_y = growth(largest(y, columns, column_mask, y_row, y_dim, dim, T, BLOCK_M, 16))
                    dots, xx, yy = products(
                        x, y, rows, columns, row_mask, column_mask, x_row, x_dim, y_row, y_dim, dim, growth_x, growth_y,
                        SAME, T, True, True, BLOCK_N, BLOCK_M, 16, exact,
                    )  # fmt: skip
                norm_inv_x, norm_inv_y = reciprocal_norm(xx), reciprocal_norm(yy)
                cost = 1 - dots * norm_inv_x[:, None] * norm_inv_y[None, :]
                if column == 0:
                    tl.store(x_scale + x_start + rows, stored_scale(norm_inv_x, growth_x), mask=row_mask)
                if row == 0:
                    tl.store(y_scale + y_start + columns, stored_scale(norm_inv_y, growth_y), mask=column_mask)
            elif COST == "dot":
                cost = -dots
            else:
                tl.static_assert(
                    COST == "sqeuclidean" or COST == "euclidean", "COST: expected one of otalign.options.COSTS"
                )
                total = xx[:, None] + yy[None, :]
                cost = total - 2 * dots
                # A distance below this share of the squared norms has lost too many digits to cancellation.
                if tl.max(tl.max(tl.where(inside & (cost < total * 0.015625), 1, 0), 1), 0) > 0:
                    distances = square_distances(
                        x, y, rows, columns, row_mask, column_mask, x_row, x_dim, y_row, y_dim, dim, T, BLOCK_N, BLOCK_M
                    )
                    cost = tl.where(cost < total * 0.015625, distances, cost)
                if COST == "euclidean":
                    cost = tl.sqrt(cost)
        item_reg = load_reg(reg, reg_items, per_item, item, T)
        valid = tl.abs(cost * (1 / item_reg)) < INFINITY
        if COST == "given":
            valid |= cost == INFINITY
        cost = tl.where(valid, cost, float("nan"))
        if PRIOR != "none":
            i, j = rows[:, None], columns[None, :]
            cost += prior_tile(i, j, n, m, item_reg, prior_first, prior_second, PRIOR, T)
        tl.store(
            C + (x_start + rows)[:, None] * ld + columns[None, :],
            tl.where(inside, cost, 0),
            mask=row_mask[:, None] & (columns < up_to_four(m))[None, :],
        )
