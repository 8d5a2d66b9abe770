"""Gradients by points, weights and costs.

The gradient by the cost is

    H = P * (v + l - (S - s_i - t_j) / reg)

with v and l the incoming gradients by value and transport cost, S = l C + dL/dP, and (s, t) the solution of the adjoint
system (adjoint.py). Without S, if only the value has a gradient, H = v P and there is no system to solve. The plan P is
rebuilt tile by tile, as in outputs.py. Gradients by points take two launches: `coefficients_kernel` stores multiples of H, so
that they are made once, and `points_gradient_kernel` multiplies them with points.
"""

import triton
import triton.language as tl

from .addressing import (
    fill_tail,
    first_point,
    load_gradient,
    load_reg,
    load_weights,
    locate,
    only_if,
    segment,
    up_to_four,
)
from .cost import split_scale
from .math import bounded, dual_term, prior_tile, times, to_type
from .outputs import (
    ItemPlan,
    density_tile,
    pair_offsets,
    plan_rows,
    plan_tile,
    readable_pairs,
    store_dense,
    store_points,
)
from .runtime import kernel


@triton.jit
def load_plan_gradient(G, offsets, mask, has_plan, linear, cost):
    """S = l C + dL/dP of a tile."""
    plan_gradient = tl.load(G + offsets, mask=only_if(has_plan, mask), other=0)
    return plan_gradient + tl.where(linear == 0, 0, linear * cost)


@triton.jit
def cost_gradient(P, S, value, linear, own_adjoint, other_adjoint, inv_reg, IMPLICIT: tl.constexpr):
    """H of a tile; without S, which is not read, unless IMPLICIT."""
    if IMPLICIT:
        return times(P, value + linear - (S - own_adjoint - other_adjoint) * inv_reg)
    else:
        return times(P, value)


@kernel
def coefficients_kernel(
    W,  # out: (rows of x, ld), contiguous; in the type that is multiplied with the points
    diagonal,  # out: (2, rows of own): d, and for the cosine 1 where points of the other side have to be scaled
    C,  # (rows of x, ld), contiguous; in the units of reg
    G,  # (rows of x, ld), contiguous: dL/dP; read if has_plan
    own_f,  # (rows of own,) potentials, in the units of reg
    other_f,  # (rows of other,) potentials, in the units of reg
    other_scale,  # cosine only: (rows of other,) reciprocal norms
    own_adjoint,  # (rows of own,) adjoint variables, in the units of dL/dP; read if IMPLICIT
    other_adjoint,  # (rows of other,) adjoint variables, in the units of dL/dP; read if IMPLICIT
    own_weights,  # (rows of own,) weights, which sum to one for each item; read if has_own
    other_weights,  # (rows of other,) weights, which sum to one for each item; read if has_other
    own_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if own_addressing > 0
    other_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if other_addressing > 0
    grad_value,  # (B,) with stride value_step: the gradient v by the value; -1 = there is none
    grad_linear,  # (B,) with stride linear_step: the gradient l by the transport cost; -1 = there is none
    reg_items,  # (B,) float64, in the units of the cost; read if per_item
    items, own_addressing, own_size, own_rows, other_addressing, other_size, other_rows, has_own, has_other, per_item,
    value_step, linear_step, has_plan, reg: tl.float64, prior_first: tl.float64, prior_second: tl.float64, ld16,
    COST: tl.constexpr, PRIOR: tl.constexpr, IMPLICIT: tl.constexpr, BY_Y: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The coefficients W and d of the gradient by the points of one side, own; see `points_gradient_kernel`.

    Grid: one program for each BLOCK_R points of each item. W is zero up to the next multiple of eight columns, for
    `readable_coefficients`. `own` and `other` name the sides; see `Kernel`.
    """
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    item, tile = locate(tl.cdiv(own_size, BLOCK_R))
    own_start, own_n, slot = segment(own_offsets, own_addressing, own_size, own_rows, item, items)
    other_start, other_n, other_slot = segment(other_offsets, other_addressing, other_size, other_rows, item, items)
    begin = tile * BLOCK_R
    rows = begin + tl.arange(0, BLOCK_R)
    row_mask = rows < own_n
    item_reg = load_reg(reg, reg_items, per_item, item, T)
    inv_reg = 1 / item_reg
    value = load_gradient(grad_value, value_step, item, T)
    linear = load_gradient(grad_linear, linear_step, item, T)
    unused = (value == 0) & (linear == 0) & (has_plan == 0)
    count = tl.where(unused, 0, other_n)
    f_i = tl.load(own_f + own_start + rows, mask=row_mask, other=0)
    a_i = load_weights(own_weights, has_own, own_start + rows, row_mask, own_n)
    if IMPLICIT:
        adjoint_i = tl.load(own_adjoint + own_start + rows, mask=row_mask, other=0)
    else:
        adjoint_i = f_i

    # Sum by element and reduce once: a reduction in every step would make all warps wait.
    sums = tl.zeros([BLOCK_R, BLOCK_K], T)
    scaled = tl.zeros([BLOCK_K], T)
    for first in range(0, tl.where(begin < own_n, count, 0), BLOCK_K):
        others = first + tl.arange(0, BLOCK_K)
        other_mask = others < other_n
        mask = row_mask[:, None] & other_mask[None, :]
        offsets = pair_offsets(other_start if BY_Y else own_start, rows, others, ld, BY_Y)
        readable = readable_pairs(rows, own_n, others, other_n, BY_Y)
        cost = tl.load(C + offsets, mask=readable, other=0)
        g_j = tl.load(other_f + other_start + others, mask=other_mask, other=0)
        b_j = load_weights(other_weights, has_other, other_start + others, other_mask, other_n)
        P = plan_tile(cost, mask, f_i, g_j, a_i, b_j, inv_reg)
        if IMPLICIT:
            adjoint_j = tl.load(other_adjoint + other_start + others, mask=other_mask, other=0)
            S = load_plan_gradient(G, offsets, readable, has_plan, linear, cost)
        else:
            adjoint_j, S = g_j, cost
        H = cost_gradient(P, S, value, linear, adjoint_i[:, None], adjoint_j[None, :], inv_reg, IMPLICIT)
        if PRIOR != "none" and (COST == "cosine" or COST == "euclidean"):
            i, j = rows[:, None], others[None, :]
            if BY_Y:
                cost -= prior_tile(j, i, other_n, own_n, item_reg, prior_first, prior_second, PRIOR, T)
            else:
                cost -= prior_tile(i, j, own_n, other_n, item_reg, prior_first, prior_second, PRIOR, T)
        # Sum on the diagonal exactly what is multiplied, rounding included: where points are close, the two cancel.
        if COST == "cosine":
            factor_j, unit_j = split_scale(tl.load(other_scale + other_start + others, mask=other_mask, other=0))
            scaled = tl.where(factor_j == 1, scaled, 1)
            norm_j = tl.where(unit_j > 0, 1 / tl.where(unit_j > 0, unit_j, 1), 0)
            rounded = to_type(H * unit_j[None, :], W.dtype.element_ty)
            sums += times(rounded.to(T) * norm_j[None, :], 1 - cost)
        elif COST == "euclidean":
            quotient = tl.where(cost == 0, 0, H / tl.where(cost == 0, 1, cost))
            rounded = to_type(tl.where(H == 0, 0, quotient), W.dtype.element_ty)
            sums += rounded.to(T)
        elif COST == "sqeuclidean":
            rounded = to_type(2 * H, W.dtype.element_ty)
            sums += rounded.to(T)
        else:
            tl.static_assert(COST == "dot", "COST: expected one of otalign.options.COSTS")
            rounded = to_type(H, W.dtype.element_ty)
        tl.store(W + offsets, rounded, mask=readable_coefficients(rows, own_n, others, other_n, BY_Y))
    if COST != "dot":
        tl.store(diagonal + own_start + rows, tl.sum(sums, 1), mask=row_mask)
    if COST == "cosine":
        flags = tl.zeros([BLOCK_R], T) + tl.max(scaled, 0)
        tl.store(diagonal + own_rows + own_start + rows, flags, mask=row_mask)


@triton.jit
def readable_coefficients(rows, own_n, others, other_n, BY_Y: tl.constexpr):
    """As `readable_pairs`, for coefficients: they go up to a multiple of eight columns, 16 bytes of 16-bit numbers."""
    if BY_Y:
        return (rows < (own_n + 7) // 8 * 8)[:, None] & (others < other_n)[None, :]
    else:
        return (rows < own_n)[:, None] & (others < (other_n + 7) // 8 * 8)[None, :]


@triton.jit
def add_products(
    sums, W, w, scale, start, count, rows, own_n, k, dim, row_stride, dim_stride, ld,
    SCALED: tl.constexpr, BY_Y: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums + W w (R, D) for some rows of W and some dimensions of w. If SCALED, of w times its factors; see split_scale."""
    T: tl.constexpr = sums.dtype
    for first in tl.range(0, count, BLOCK_K, num_stages=1 if SCALED else None):
        others = first + tl.arange(0, BLOCK_K)
        inside = (others < count)[:, None] & (k < dim)[None, :]
        readable = readable_coefficients(rows, own_n, others, count, BY_Y)
        tile = tl.load(W + pair_offsets(start, rows, others, ld, BY_Y), mask=readable, other=0)
        offsets = others.to(tl.int64)[:, None] * row_stride + k.to(tl.int64)[None, :] * dim_stride
        points = tl.load(w + offsets, mask=inside, other=0)
        if SCALED:
            factor, unit = split_scale(tl.load(scale + others, mask=others < count, other=0))
            points = (points.to(T) * factor[:, None]).to(points.dtype)
        if not SAME:
            tile, points = tile.to(T), points.to(T)
        sums = tl.dot(tile, points, sums, input_precision=PRECISION, out_dtype=T)
    return sums


@kernel
def points_gradient_kernel(
    own_points,  # (B, size, D) or packed (rows of own, D), any strides in elements
    other_points,  # (B, size, D) or packed (rows of other, D), any strides in elements
    out,  # out: (rows of own, D), contiguous; 0 on the padding
    W,  # (rows of x, ld), contiguous: coefficients
    diagonal,  # (2, rows of own); see coefficients_kernel
    own_scale,  # cosine only: (rows of own,) reciprocal norms
    other_scale,  # cosine only: (rows of other,) reciprocal norms
    own_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if own_addressing > 0
    other_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if other_addressing > 0
    grad_value,  # (B,) with stride value_step: the gradient v by the value; -1 = there is none
    grad_linear,  # (B,) with stride linear_step: the gradient l by the transport cost; -1 = there is none
    items, own_addressing, own_size, own_rows, other_addressing, other_size, other_rows, value_step, linear_step,
    has_plan, own_item, own_row, own_dim, other_item, other_row, other_dim, dim, ld16,
    COST: tl.constexpr, BY_Y: tl.constexpr, PRECISION: tl.constexpr, SAME: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient by the points z of one side, own: x, or y if BY_Y. The points of the other side are w.

        out_i = sum_j H_ij dC_ij / dz_i
        cosine:       sum_j H_ij (|z_i|^-2 <z_i, w_j> z_i - w_j) / (|z_i| |w_j|) = |z_i|^-1 (d_i |z_i|^-1 z_i - sum_j W_ij w_j)
                      with W_ij = H_ij / |w_j|,  d_i = sum_j H_ij (1 - C_ij)
        sqeuclidean:  d_i z_i - sum_j W_ij w_j  with W = 2 H,    d = W 1
        euclidean:    d_i z_i - sum_j W_ij w_j  with W = H / C,  d = W 1
        dot:          - sum_j W_ij w_j          with W = H

    Grid: one program for each tile (BLOCK_R, BLOCK_D) of each item's gradient. Source: the chain rule; H is explained at
    the top of this file. `own` and `other` name the sides; see `Kernel`.
    """
    T: tl.constexpr = diagonal.dtype.element_ty
    ld = ld16 * 16
    tiles = tl.cdiv(dim, BLOCK_D)
    item, tile = locate(tl.cdiv(own_size, BLOCK_R) * tiles)
    own_start, own_n, slot = segment(own_offsets, own_addressing, own_size, own_rows, item, items)
    other_start, other_n, other_slot = segment(other_offsets, other_addressing, other_size, other_rows, item, items)
    own_at = first_point(own_points, own_addressing, own_start, item, own_item, own_row)
    other_at = first_point(other_points, other_addressing, other_start, item, other_item, other_row)
    begin = (tile // tiles) * BLOCK_R
    rows = begin + tl.arange(0, BLOCK_R)
    k = (tile % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = rows < own_n
    value = load_gradient(grad_value, value_step, item, T)
    linear = load_gradient(grad_linear, linear_step, item, T)
    # An item whose loss is not used gets zeros, even if its numbers are NaN.
    unused = (value == 0) & (linear == 0) & (has_plan == 0)
    count = tl.where((begin < own_n) & (unused == 0), other_n, 0)

    # The sum starts with the diagonal, so that no tile of z has to lie in registers beside that of the sums.
    sums = tl.zeros([BLOCK_R, BLOCK_D], T)
    if COST != "dot":
        offsets = rows.to(tl.int64)[:, None] * own_row + k.to(tl.int64)[None, :] * own_dim
        points = tl.load(own_at + offsets, mask=row_mask[:, None] & (k < dim)[None, :], other=0).to(T)
        d_i = tl.load(diagonal + own_start + rows, mask=row_mask, other=0)
        if COST == "cosine":
            factor, scale = split_scale(tl.load(own_scale + own_start + rows, mask=row_mask, other=0))
            points *= factor[:, None]
            d_i *= scale
        sums -= d_i[:, None] * points
    start = other_start if BY_Y else own_start
    scaled = 0.0
    if COST == "cosine":
        scaled = tl.max(tl.load(diagonal + own_rows + own_start + rows, mask=row_mask, other=0), 0)
    if scaled > 0:
        sums = add_products(
            sums, W, other_at, other_scale + other_start, start, count, rows, own_n, k, dim, other_row, other_dim, ld,
            True, BY_Y, SAME, PRECISION, 16,  # few at a time: this loop is rare, and must not take registers from the other
        )  # fmt: skip
    else:
        sums = add_products(
            sums, W, other_at, other_scale + other_start, start, count, rows, own_n, k, dim, other_row, other_dim, ld,
            False, BY_Y, SAME, PRECISION, BLOCK_K,
        )  # fmt: skip
    result = -sums
    if COST == "cosine":
        result = result * scale[:, None] * factor[:, None]
    row_mask &= count > 0
    store_points(out + own_start * dim, result, rows, row_mask, k, dim, slot, tl.cdiv(own_size, BLOCK_R) * BLOCK_R)


@kernel
def weights_gradient_kernel(
    out,  # out: (rows of own,); 0 on the padding
    C,  # (rows of x, ld), contiguous; in the units of reg
    G,  # (rows of x, ld), contiguous: dL/dP; read if has_plan
    own_f,  # (rows of own,) potentials, in the units of reg
    other_f,  # (rows of other,) potentials, in the units of reg
    other_adjoint,  # (rows of other,) adjoint variables, in the units of dL/dP; read if IMPLICIT
    own_weights,  # (rows of own,) weights, which sum to one for each item; read if has_own
    other_weights,  # (rows of other,) weights, which sum to one for each item; read if has_other
    own_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if own_addressing > 0
    other_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if other_addressing > 0
    grad_value,  # (B,) with stride value_step: the gradient v by the value; -1 = there is none
    grad_linear,  # (B,) with stride linear_step: the gradient l by the transport cost; -1 = there is none
    reg_items,  # (B,) float64, in the units of the cost; read if per_item
    items, own_addressing, own_size, own_rows, other_addressing, other_size, other_rows, has_own, has_other, per_item,
    value_step, linear_step, has_plan, reg: tl.float64, own_rho: tl.float64, ld16,
    IMPLICIT: tl.constexpr, BY_Y: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient by the weights of one side, own: x, or y if BY_Y.

        out_i = v (phi(f_i) + reg (1 - sum_j E_ij)) + sum_j E_ij (S_ij - t_j)
        E_ij = P_ij / a_i = b_j exp((f_i + g_j - C_ij) / reg),  phi(f) = f, or -rho (exp(-f / rho) - 1) if relaxed

    Grid: one program for each BLOCK_R points of each item. Source: the derivative of the dual, and implicit
    differentiation; see otalign/backends/reference.py. `own` and `other` name the sides; see `Kernel`.
    """
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    item, tile = locate(tl.cdiv(own_size, BLOCK_R))
    own_start, own_n, slot = segment(own_offsets, own_addressing, own_size, own_rows, item, items)
    other_start, other_n, other_slot = segment(other_offsets, other_addressing, other_size, other_rows, item, items)
    begin = tile * BLOCK_R
    rows = begin + tl.arange(0, BLOCK_R)
    row_mask = rows < own_n
    item_reg = load_reg(reg, reg_items, per_item, item, T)
    relaxation = tl.full([], own_rho, T)
    value = load_gradient(grad_value, value_step, item, T)
    linear = load_gradient(grad_linear, linear_step, item, T)
    unused = ((value == 0) & (linear == 0) & (has_plan == 0)) | (other_n == 0)
    count = tl.where(unused, 0, other_n)
    f_i = tl.load(own_f + own_start + rows, mask=row_mask, other=0)
    a_i = load_weights(own_weights, has_own, own_start + rows, row_mask, own_n)
    mass = tl.zeros([BLOCK_R], T)
    through_plan = tl.zeros([BLOCK_R], T)
    for first in range(0, tl.where(begin < own_n, count, 0), BLOCK_K):
        others = first + tl.arange(0, BLOCK_K)
        other_mask = others < other_n
        mask = row_mask[:, None] & other_mask[None, :]
        offsets = pair_offsets(other_start if BY_Y else own_start, rows, others, ld, BY_Y)
        readable = readable_pairs(rows, own_n, others, other_n, BY_Y)
        cost = tl.load(C + offsets, mask=readable, other=0)
        g_j = tl.load(other_f + other_start + others, mask=other_mask, other=0)
        b_j = load_weights(other_weights, has_other, other_start + others, other_mask, other_n)
        some_mass = mask & (b_j > 0)[None, :]
        density = density_tile(cost, some_mass, f_i[:, None], g_j[None, :], a_i[:, None], b_j[None, :], 1 / item_reg)
        E = b_j[None, :] * density
        mass += tl.sum(E, 1)
        if IMPLICIT:
            adjoint_j = tl.load(other_adjoint + other_start + others, mask=other_mask, other=0)
            S = load_plan_gradient(G, offsets, readable, has_plan, linear, cost)
            through_plan += tl.sum(times(E, S - adjoint_j[None, :]), 1)
    by_value = value * (dual_term(f_i, relaxation, True) + item_reg * (1 - mass))
    result = tl.where(value == 0, 0, by_value) + through_plan
    # The derivative at a weight of zero may be infinite. Keep it finite: infinity times a weight of zero would be NaN.
    result = tl.where(result < 0, -bounded(-result), bounded(result))
    result = tl.where(unused, 0, tl.where(row_mask, result, 0))
    tl.store(out + own_start + rows, result, mask=rows < slot)
    fill_tail(out + own_start, rows, slot, tl.cdiv(own_size, BLOCK_R) * BLOCK_R, tl.zeros_like(result))


@kernel
def cost_gradient_kernel(
    out,  # out: (B, size of x, size of y), contiguous; 0 on the padding
    C,  # (rows of x, ld), contiguous; in the units of reg
    G,  # (rows of x, ld), contiguous: dL/dP; read if has_plan
    f,  # (rows of x,) potentials, in the units of reg
    g,  # (rows of y,) potentials, in the units of reg
    x_adjoint,  # (rows of x,) adjoint variables s, in the units of dL/dP; read if IMPLICIT
    y_adjoint,  # (rows of y,) adjoint variables t, in the units of dL/dP; read if IMPLICIT
    a,  # (rows of x,) weights, which sum to one for each item; read if has_a
    b,  # (rows of y,) weights, which sum to one for each item; read if has_b
    x_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if x_addressing > 0
    y_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if y_addressing > 0
    grad_value,  # (B,) with stride value_step: the gradient v by the value; -1 = there is none
    grad_linear,  # (B,) with stride linear_step: the gradient l by the transport cost; -1 = there is none
    reg_items,  # (B,) float64, in the units of the cost; read if per_item
    items, x_addressing, x_size, x_rows, y_addressing, y_size, y_rows, has_a, has_b, per_item, value_step, linear_step,
    has_plan, reg: tl.float64, ld16,
    IMPLICIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient by a given cost: H, explained at the top of this file.

    Grid: one program for each tile (BLOCK_R, BLOCK_K) of each item.
    """
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    tiles = tl.cdiv(y_size, BLOCK_K)
    item, tile = locate(tl.cdiv(x_size, BLOCK_R) * tiles)
    x_start, n, x_slot = segment(x_offsets, x_addressing, x_size, x_rows, item, items)
    y_start, m, y_slot = segment(y_offsets, y_addressing, y_size, y_rows, item, items)
    rows = (tile // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (tile % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask, column_mask = rows < n, columns < m
    inv_reg = 1 / load_reg(reg, reg_items, per_item, item, T)
    g_j = tl.load(g + y_start + columns, mask=column_mask, other=0)
    b_j = load_weights(b, has_b, y_start + columns, column_mask, m)
    plan = ItemPlan(C + x_start * ld, ld, f, a, has_a, x_start, n, m, columns, column_mask, g_j, b_j, inv_reg)
    P, cost = plan_rows(plan, rows, row_mask)
    value = load_gradient(grad_value, value_step, item, T)
    linear = load_gradient(grad_linear, linear_step, item, T)
    adjoint_i, adjoint_j, S = tl.zeros([BLOCK_R], T), g_j, cost
    if IMPLICIT:
        adjoint_i = tl.load(x_adjoint + x_start + rows, mask=row_mask, other=0)
        adjoint_j = tl.load(y_adjoint + y_start + columns, mask=column_mask, other=0)
        offsets = (x_start + rows)[:, None] * ld + columns[None, :]
        readable = row_mask[:, None] & (columns < up_to_four(m))[None, :]
        S = load_plan_gradient(G, offsets, readable, has_plan, linear, cost)
    H = cost_gradient(P, S, value, linear, adjoint_i[:, None], adjoint_j[None, :], inv_reg, IMPLICIT)
    # An item whose loss is not used gets zeros, even if its numbers are NaN.
    H = tl.where((value == 0) & (linear == 0) & (has_plan == 0), 0, H)
    store_dense(out, H, item, rows, columns, x_size, y_size)
