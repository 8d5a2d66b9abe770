"""The plan, and what is read off it: projections and assignments."""

import triton
import triton.language as tl

from .addressing import load_reg, load_weights, locate, segment
from .math import INFINITY, bounded
from .runtime import kernel


@triton.jit
def density_tile(cost, inside, f, g, a, b, per_reg):
    """P / (a b) of a tile: exp((f + g - C) / reg), 0 outside and between points that both have no mass."""
    some = inside & ((a > 0) | (b > 0))
    return bounded(tl.exp(tl.where(some, (f - cost + g) * per_reg, -INFINITY)))


@triton.jit
def plan_rows(
    at, rows, mine, columns, real, ld, f, g_j, a, has_a, x_start, n, b_j, per_reg,
):  # fmt: skip
    """Some rows of the plan (rows, BLOCK_M), and of the cost."""
    inside = mine[:, None] & real[None, :]
    cost = tl.load(at + rows.to(tl.int64)[:, None] * ld + columns[None, :], mask=inside, other=0)
    a_i = load_weights(a, has_a, x_start + rows, mine, n)
    f_i = tl.load(f + x_start + rows, mask=mine, other=0)
    both = inside & (a_i > 0)[:, None] & (b_j > 0)[None, :]
    weights = a_i[:, None] * b_j[None, :]
    return weights * density_tile(cost, both, f_i[:, None], g_j[None, :], a_i[:, None], b_j[None, :], per_reg), cost


@triton.jit
def load_others(cost_at, inside, f, w, has_w, start, others, real, count):
    """The costs of a tile, and the potentials and weights of the points across."""
    cost = tl.load(cost_at, mask=inside, other=0)
    potentials = tl.load(f + start + others, mask=real, other=0)
    return cost, potentials, load_weights(w, has_w, start + others, real, count)


@kernel
def assign_kernel(
    out, C, f, g, a, b, x_layout, y_layout,
    items, x_mode, x_size, x_rows, y_mode, y_size, y_rows, has_a, has_b, per_item, reg_items, reg: tl.float64, ld16,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For every y the first x that gives it most mass, -1 where there is none: out (rows of y,) int64."""
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    item, tile = locate(tl.cdiv(y_size, BLOCK_K))
    x_start, n, x_slot = segment(x_layout, x_mode, x_size, x_rows, item, items)
    y_start, m, y_slot = segment(y_layout, y_mode, y_size, y_rows, item, items)
    columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    real = columns < m
    per_reg = 1 / load_reg(reg, reg_items, per_item, item, T)
    g_j = tl.load(g + y_start + columns, mask=real, other=0)
    b_j = load_weights(b, has_b, y_start + columns, real, m)
    most = tl.zeros([BLOCK_K], T)
    best = tl.zeros([BLOCK_K], tl.int64) - 1
    for first in range(0, n, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        P, cost = plan_rows(
            C + x_start * ld, rows, rows < n, columns, real, ld, f, g_j, a, has_a, x_start, n, b_j, per_reg
        )
        tile_most = tl.max(P, 0)
        where = tl.min(tl.where(P == tile_most[None, :], rows[:, None], n), 0)
        best = tl.where(tile_most > most, where.to(tl.int64), best)
        most = tl.maximum(most, tile_most)
    tl.store(out + y_start + columns, best, mask=columns < y_slot)
    span = tl.cdiv(y_size, BLOCK_K) * BLOCK_K
    columns += span
    while tl.min(columns, 0) < y_slot:
        tl.store(out + y_start + columns, tl.zeros([BLOCK_K], tl.int64) - 1, mask=columns < y_slot)
        columns += span
