"""The plan, and what is read off it: barycentric projections and assignments.

The plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / reg) is not kept. Wherever a kernel needs a tile of it, the tile is
rebuilt from the stored cost and the potentials, and used at once.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .addressing import fill_tail, first_point, load_reg, load_weights, locate, segment, up_to_four
from .math import INFINITY, bounded, to_type
from .runtime import kernel

# Tiles of the plan -----------------------------------------------------------------------------------------------------


@triton.jit
def density_tile(cost, mask, f, g, a, b, inv_reg):
    """P / (a b) of a tile: exp((f + g - C) / reg), 0 outside the mask and between points that both have no mass."""
    some_mass = mask & ((a > 0) | (b > 0))
    return bounded(tl.exp(tl.where(some_mass, (f - cost + g) * inv_reg, -INFINITY)))


@triton.jit
def plan_tile(cost, mask, f_i, g_j, a_i, b_j, inv_reg):
    """P of a tile from the vectors of its rows and of its columns; 0 outside the mask."""
    both = mask & (a_i > 0)[:, None] & (b_j > 0)[None, :]
    density = density_tile(cost, both, f_i[:, None], g_j[None, :], a_i[:, None], b_j[None, :], inv_reg)
    return (a_i[:, None] * b_j[None, :]) * density


class ItemPlan(NamedTuple):
    """What rows of an item's plan are made from, for some columns."""

    costs: tl.tensor  # pointer to the item's (n, ld)
    ld: tl.tensor
    f: tl.tensor  # pointer to (rows of x,)
    a: tl.tensor  # pointer to (rows of x,)
    has_a: tl.tensor
    x_start: tl.tensor  # first row of the item
    n: tl.tensor
    m: tl.tensor
    columns: tl.tensor  # (M,) indices
    column_mask: tl.tensor  # (M,)
    g_j: tl.tensor  # (M,)
    b_j: tl.tensor  # (M,)
    inv_reg: tl.tensor


@triton.jit
def plan_rows(plan, rows, row_mask):
    """Some rows of the plan (N, M), and of the cost."""
    at = plan.costs + rows.to(tl.int64)[:, None] * plan.ld + plan.columns[None, :]
    cost = tl.load(at, mask=row_mask[:, None] & (plan.columns < up_to_four(plan.m))[None, :], other=0)
    mask = row_mask[:, None] & plan.column_mask[None, :]
    a_i = load_weights(plan.a, plan.has_a, plan.x_start + rows, row_mask, plan.n)
    f_i = tl.load(plan.f + plan.x_start + rows, mask=row_mask, other=0)
    return plan_tile(cost, mask, f_i, plan.g_j, a_i, plan.b_j, plan.inv_reg), cost


@triton.jit
def readable_pairs(rows, own_n, others, other_n, BY_Y: tl.constexpr):
    """Where a matrix (rows of x, ld) has a number for a side's `rows` (R,) and the `others` (K,): (R, K); see up_to_four."""
    if BY_Y:
        return (rows < up_to_four(own_n))[:, None] & (others < other_n)[None, :]
    else:
        return (rows < own_n)[:, None] & (others < up_to_four(other_n))[None, :]


@triton.jit
def pair_offsets(x_start, rows, others, ld, BY_Y: tl.constexpr):
    """Where a matrix (rows of x, ld) holds the pairs of a side's `rows` (R,) and the `others` (K,): (R, K)."""
    if BY_Y:
        return x_start * ld + rows.to(tl.int64)[:, None] + others.to(tl.int64)[None, :] * ld
    else:
        return x_start * ld + rows.to(tl.int64)[:, None] * ld + others.to(tl.int64)[None, :]


# Kernels ---------------------------------------------------------------------------------------------------------------


@kernel
def plan_kernel(
    out,  # out: (B, size of x, size of y), contiguous; 0 on the padding
    C,  # (rows of x, ld), contiguous; in the units of reg
    f,  # (rows of x,) potentials, in the units of reg
    g,  # (rows of y,) potentials, in the units of reg
    a,  # (rows of x,) weights, which sum to one for each item; read if has_a
    b,  # (rows of y,) weights, which sum to one for each item; read if has_b
    x_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if x_addressing > 0
    y_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if y_addressing > 0
    reg_items,  # (B,) float64, in the units of the cost; read if per_item
    items, x_addressing, x_size, x_rows, y_addressing, y_size, y_rows, has_a, has_b, per_item, reg: tl.float64, ld16,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / reg).

    Grid: one program for each tile (BLOCK_R, BLOCK_K) of each item. Source: otalign/backends/reference.py.
    """
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    tiles = tl.cdiv(y_size, BLOCK_K)
    item, tile = locate(tl.cdiv(x_size, BLOCK_R) * tiles)
    x_start, n, x_slot = segment(x_offsets, x_addressing, x_size, x_rows, item, items)
    y_start, m, y_slot = segment(y_offsets, y_addressing, y_size, y_rows, item, items)
    rows = (tile // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (tile % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    column_mask = columns < m
    inv_reg = 1 / load_reg(reg, reg_items, per_item, item, T)
    g_j = tl.load(g + y_start + columns, mask=column_mask, other=0)
    b_j = load_weights(b, has_b, y_start + columns, column_mask, m)
    plan = ItemPlan(C + x_start * ld, ld, f, a, has_a, x_start, n, m, columns, column_mask, g_j, b_j, inv_reg)
    P, cost = plan_rows(plan, rows, rows < n)
    P = tl.where((rows < n)[:, None] & column_mask[None, :], P, 0)  # also if weights are NaN
    store_dense(out, P, item, rows, columns, x_size, y_size)


@triton.jit
def store_dense(out, tile, item, rows, columns, x_size, y_size):
    """Store a tile of an item in `out` (B, x_size, y_size)."""
    out += item.to(tl.int64) * x_size * y_size
    at = out + rows.to(tl.int64)[:, None] * y_size + columns[None, :]
    tl.store(at, to_type(tile, out.dtype.element_ty), mask=(rows < x_size)[:, None] & (columns < y_size)[None, :])


@kernel
def barycentric_kernel(
    other_points,  # (B, size, D) or packed (rows, D), any strides in elements
    out,  # out: (rows of own, D), contiguous; 0 on the padding
    mass,  # out: (rows of own,) marginals of the plan; 0 on the padding
    C,  # (rows of x, ld), contiguous; in the units of reg
    own_f,  # (rows of own,) potentials, in the units of reg
    other_f,  # (rows of other,) potentials, in the units of reg
    own_weights,  # (rows of own,) weights, which sum to one for each item; read if has_own
    other_weights,  # (rows of other,) weights, which sum to one for each item; read if has_other
    own_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if own_addressing > 0
    other_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if other_addressing > 0
    reg_items,  # (B,) float64, in the units of the cost; read if per_item
    items, own_addressing, own_size, own_rows, other_addressing, other_size, other_rows, has_own, has_other, per_item,
    other_item, other_row, other_dim, dim, reg: tl.float64, ld16,
    BY_Y: tl.constexpr, PRECISION: tl.constexpr, SAME: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The barycentric projection of one side, own: x, or y if BY_Y, onto the points z of the other side.

        out_i = sum_j P_ij z_j / mass_i,  mass_i = sum_j P_ij

    Grid: one program for each tile (BLOCK_R, BLOCK_D) of each item's images. Source: Ferradans et al., "Regularized
    discrete optimal transport" (2014). `own` and `other` name the sides; see `Kernel`.
    """
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    tiles = tl.cdiv(dim, BLOCK_D)
    item, tile = locate(tl.cdiv(own_size, BLOCK_R) * tiles)
    own_start, own_n, slot = segment(own_offsets, own_addressing, own_size, own_rows, item, items)
    other_start, other_n, other_slot = segment(other_offsets, other_addressing, other_size, other_rows, item, items)
    points_at = first_point(other_points, other_addressing, other_start, item, other_item, other_row)
    begin = (tile // tiles) * BLOCK_R
    rows = begin + tl.arange(0, BLOCK_R)
    k = (tile % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask, dim_mask = rows < own_n, k < dim
    inv_reg = 1 / load_reg(reg, reg_items, per_item, item, T)
    f_i = tl.load(own_f + own_start + rows, mask=row_mask, other=0)
    a_i = load_weights(own_weights, has_own, own_start + rows, row_mask, own_n)

    sums = tl.zeros([BLOCK_R, BLOCK_D], T)
    row_sums = tl.zeros([BLOCK_R], T)
    for first in range(0, tl.where(begin < own_n, other_n, 0), BLOCK_K):
        others = first + tl.arange(0, BLOCK_K)
        other_mask = others < other_n
        mask = row_mask[:, None] & other_mask[None, :]
        at = C + pair_offsets(other_start if BY_Y else own_start, rows, others, ld, BY_Y)
        cost = tl.load(at, mask=readable_pairs(rows, own_n, others, other_n, BY_Y), other=0)
        g_j = tl.load(other_f + other_start + others, mask=other_mask, other=0)
        b_j = load_weights(other_weights, has_other, other_start + others, other_mask, other_n)
        P = plan_tile(cost, mask, f_i, g_j, a_i, b_j, inv_reg)
        row_sums += tl.sum(P, 1)
        offsets = others.to(tl.int64)[:, None] * other_row + k.to(tl.int64)[None, :] * other_dim
        points = tl.load(points_at + offsets, mask=other_mask[:, None] & dim_mask[None, :], other=0)
        if SAME:
            sums = tl.dot(P.to(points.dtype), points, sums, input_precision=PRECISION, out_dtype=T)
        else:
            sums = tl.dot(P, points.to(T), sums, input_precision=PRECISION, out_dtype=T)

    images = sums / tl.where(row_sums == 0, 1, row_sums)[:, None]
    if tile % tiles == 0:
        tl.store(mass + own_start + rows, tl.where(row_mask, row_sums, 0), mask=rows < slot)
    store_points(out + own_start * dim, images, rows, row_mask, k, dim, slot, tl.cdiv(own_size, BLOCK_R) * BLOCK_R)
    fill_tail(mass + own_start, rows, slot, tl.cdiv(own_size, BLOCK_R) * BLOCK_R, tl.zeros_like(row_sums))


@triton.jit
def store_points(out, tile, rows, row_mask, k, dim, slot, span):
    """Store a tile of a side's points (rows, k) in `out` (slot, dim): 0 on the padding, and behind the first `span` rows."""
    tile = to_type(tl.where(row_mask[:, None], tile, 0), out.dtype.element_ty)
    dim_mask = (k < dim)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * dim + k[None, :], tile, mask=(rows < slot)[:, None] & dim_mask)
    rows += span
    while tl.min(rows, 0) < slot:  # see fill_tail
        at = out + rows.to(tl.int64)[:, None] * dim + k[None, :]
        tl.store(at, tl.zeros_like(tile), mask=(rows < slot)[:, None] & dim_mask)
        rows += span


@kernel
def assign_kernel(
    out,  # out: (rows of y,) int64
    C,  # (rows of x, ld), contiguous; in the units of reg
    f,  # (rows of x,) potentials, in the units of reg
    g,  # (rows of y,) potentials, in the units of reg
    a,  # (rows of x,) weights, which sum to one for each item; read if has_a
    b,  # (rows of y,) weights, which sum to one for each item; read if has_b
    x_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if x_addressing > 0
    y_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if y_addressing > 0
    reg_items,  # (B,) float64, in the units of the cost; read if per_item
    items, x_addressing, x_size, x_rows, y_addressing, y_size, y_rows, has_a, has_b, per_item, reg: tl.float64, ld16,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The x of the largest entry in each column of the plan: argmax_i P_ij, the first of equals; -1 for a column of zeros.

    Grid: one program for each BLOCK_K points of y of each item. Source: otalign/backends/reference.py.
    """
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    item, tile = locate(tl.cdiv(y_size, BLOCK_K))
    x_start, n, x_slot = segment(x_offsets, x_addressing, x_size, x_rows, item, items)
    y_start, m, y_slot = segment(y_offsets, y_addressing, y_size, y_rows, item, items)
    columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    column_mask = columns < m
    inv_reg = 1 / load_reg(reg, reg_items, per_item, item, T)
    g_j = tl.load(g + y_start + columns, mask=column_mask, other=0)
    b_j = load_weights(b, has_b, y_start + columns, column_mask, m)
    plan = ItemPlan(C + x_start * ld, ld, f, a, has_a, x_start, n, m, columns, column_mask, g_j, b_j, inv_reg)
    largest = tl.zeros([BLOCK_K], T)
    best = tl.zeros([BLOCK_K], tl.int64) - 1
    for first in range(0, n, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        P, cost = plan_rows(plan, rows, rows < n)
        tile_largest = tl.max(P, 0)
        where = tl.min(tl.where(P == tile_largest[None, :], rows[:, None], n), 0)
        best = tl.where(tile_largest > largest, where.to(tl.int64), best)
        largest = tl.maximum(largest, tile_largest)
    tl.store(out + y_start + columns, best, mask=columns < y_slot)
    fill_tail(out + y_start, columns, y_slot, tl.cdiv(y_size, BLOCK_K) * BLOCK_K, tl.zeros([BLOCK_K], tl.int64) - 1)
