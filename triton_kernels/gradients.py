"""What is made of a solution: gradients, the plan, barycentric projections and assignments.

The plan is never kept. Wherever it is needed, a tile of it is rebuilt from the stored cost and the potentials, and used.

The gradient by the cost is H = P (v + l - (S - s_i - t_j) / reg), with v and l the gradients by value and transport cost,
S = l C + dL/dP, and the lifts s, t that solve the implicit system (see lift_kernel); without S, H = v P.
"""

import triton
import triton.language as tl

from .addressing import load_gradient, load_reg, load_weights, locate, only_if, segment
from .cost import split_scale
from .math import bounded, prior_tile, times, worth
from .outputs import density_tile, load_others
from .runtime import kernel


@triton.jit
def cost_gradient(
    P, cost, places, inside, G, has_plan, value, linear, own_lift, other_lift, per_reg, IMPLICIT: tl.constexpr
):
    """H of a tile."""
    if IMPLICIT:
        S = tl.load(G + places, mask=only_if(has_plan, inside), other=0) + tl.where(linear == 0, 0, linear * cost)
        return times(P, value + linear - (S - own_lift - other_lift) * per_reg)
    else:
        return times(P, value)


@triton.jit
def round_like(W, points, SAME: tl.constexpr):
    """`W`, rounded to the type of the points if it is to be multiplied in that."""
    if SAME:
        W = W.to(points.dtype.element_ty).to(W.dtype)
    return W


@kernel
def project_kernel(
    x, y, out, C, G, f, g, x_scale, y_scale, x_lift, y_lift, a, b, x_layout, y_layout, grad_value, grad_linear,
    items, x_mode, x_size, x_rows, y_mode, y_size, y_rows, has_a, has_b, per_item, value_step, linear_step, has_plan,
    x_item, x_row, x_dim, y_item, y_row, y_dim, dim, reg_items, reg: tl.float64,
    prior_first: tl.float64, prior_second: tl.float64, ld16,
    COST: tl.constexpr, PRIOR: tl.constexpr, IMPLICIT: tl.constexpr, BY_Y: tl.constexpr, PRECISION: tl.constexpr,
    SAME: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient by x, or by y if BY_Y, as out (rows, dim): a product of a matrix made of H with the other side.

    With COST "average", instead, the barycentric projection: the mean of the other side's points, weighted by the plan,
    with the points' masses in the place of their scales.
    """
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    tiles = tl.cdiv(dim, BLOCK_D)
    if BY_Y:
        item, tile = locate(tl.cdiv(y_size, BLOCK_R) * tiles)
    else:
        item, tile = locate(tl.cdiv(x_size, BLOCK_R) * tiles)
    x_start, n, x_slot = segment(x_layout, x_mode, x_size, x_rows, item, items)
    y_start, m, y_slot = segment(y_layout, y_mode, y_size, y_rows, item, items)
    x_at = x + tl.where(x_mode == 2, x_start * x_row, item.to(tl.int64) * x_item)
    y_at = y + tl.where(y_mode == 2, y_start * y_row, item.to(tl.int64) * y_item)
    if BY_Y:
        own_start, own_n, slot, size, own_at, own_row, own_dim = y_start, m, y_slot, y_size, y_at, y_row, y_dim
        other_start, other_n, other_at, other_row, other_dim = x_start, n, x_at, x_row, x_dim
        own_f, other_f, own_scale, other_scale, own_lift, other_lift = g, f, y_scale, x_scale, y_lift, x_lift
        own_w, other_w, has_own, has_other = b, a, has_b, has_a
        own_step, other_step = ld * 0 + 1, ld
    else:
        own_start, own_n, slot, size, own_at, own_row, own_dim = x_start, n, x_slot, x_size, x_at, x_row, x_dim
        other_start, other_n, other_at, other_row, other_dim = y_start, m, y_at, y_row, y_dim
        own_f, other_f, own_scale, other_scale, own_lift, other_lift = f, g, x_scale, y_scale, x_lift, y_lift
        own_w, other_w, has_own, has_other = a, b, has_a, has_b
        own_step, other_step = ld, ld * 0 + 1

    begin = (tile // tiles) * BLOCK_R
    rows = begin + tl.arange(0, BLOCK_R)
    k = (tile % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    mine = rows < own_n
    epsilon = load_reg(reg, reg_items, per_item, item, T)
    per_reg = 1 / epsilon
    value = load_gradient(grad_value, value_step, item, T)
    linear = load_gradient(grad_linear, linear_step, item, T)
    if COST == "average":
        count = other_n
    else:
        # Nothing flows into an item whose loss is not used, were it not a number.
        idle = (value == 0) & (linear == 0) & (has_plan == 0)
        count = tl.where(idle, 0, other_n)
    f_i = tl.load(own_f + own_start + rows, mask=mine, other=0)
    a_i = load_weights(own_w, has_own, own_start + rows, mine, own_n)
    if IMPLICIT:
        lift_i = tl.load(own_lift + own_start + rows, mask=mine, other=0)
    else:
        lift_i = f_i

    sums = tl.zeros([BLOCK_R, BLOCK_D], T)
    diagonal = tl.zeros([BLOCK_R], T)
    for first in range(0, tl.where(begin < own_n, count, 0), BLOCK_K):
        others = first + tl.arange(0, BLOCK_K)
        real = others < other_n
        inside = mine[:, None] & real[None, :]
        places = x_start * ld + rows.to(tl.int64)[:, None] * own_step + others.to(tl.int64)[None, :] * other_step
        cost, g_j, b_j = load_others(
            C + places, inside, other_f, other_w, has_other, other_start, others, real, other_n
        )
        both = inside & (a_i > 0)[:, None] & (b_j > 0)[None, :]
        P = (a_i[:, None] * b_j[None, :]) * density_tile(
            cost, both, f_i[:, None], g_j[None, :], a_i[:, None], b_j[None, :], per_reg
        )
        if COST == "average":
            W = P
            diagonal += tl.sum(P, 1)
        else:
            if IMPLICIT:
                lift_j = tl.load(other_lift + other_start + others, mask=real, other=0)
            else:
                lift_j = g_j
            H = cost_gradient(
                P, cost, places, inside, G, has_plan, value, linear, lift_i[:, None], lift_j[None, :], per_reg, IMPLICIT
            )
            if PRIOR != "none" and (COST == "cosine" or COST == "euclidean"):
                own, other = rows[:, None], others[None, :]
                if BY_Y:
                    cost -= prior_tile(other, own, n, m, epsilon, prior_first, prior_second, PRIOR, T)
                else:
                    cost -= prior_tile(own, other, n, m, epsilon, prior_first, prior_second, PRIOR, T)
            # What is summed on the diagonal is what is multiplied, rounding and all: where points are close, the two cancel.
            if COST == "cosine":
                factor_j, unit_j = split_scale(tl.load(other_scale + other_start + others, mask=real, other=0))
                scale_j = unit_j[None, :]
                W = round_like(H * scale_j, other_at, SAME)
                H = tl.where(scale_j > 0, W / tl.where(scale_j > 0, scale_j, 1), 0)
                diagonal += tl.sum(times(H, 1 - cost), 1)
            elif COST == "euclidean":
                W = tl.where(cost == 0, 0, H / tl.where(cost == 0, 1, cost))
                W = round_like(tl.where(H == 0, 0, W), other_at, SAME)
                diagonal += tl.sum(W, 1)
            elif COST == "sqeuclidean":
                W = round_like(2 * H, other_at, SAME)
                diagonal += tl.sum(W, 1)
            else:
                W = H
        other_places = others.to(tl.int64)[:, None] * other_row + k.to(tl.int64)[None, :] * other_dim
        points = tl.load(other_at + other_places, mask=real[:, None] & (k < dim)[None, :], other=0)
        if COST == "cosine":  # noqa: SIM102 - other costs have no such factor
            if tl.max(tl.where(factor_j == 1, 0, 1), 0) > 0:
                points = (points.to(T) * factor_j[:, None]).to(points.dtype)
        if SAME:
            sums = tl.dot(W.to(points.dtype), points, sums, input_precision=PRECISION, out_dtype=T)
        else:
            sums = tl.dot(W, points.to(T), sums, input_precision=PRECISION, out_dtype=T)

    if COST == "average":
        result = sums / tl.where(diagonal == 0, 1, diagonal)[:, None]
        if tile % tiles == 0:
            tl.store(own_scale + own_start + rows, tl.where(mine, diagonal, 0), mask=rows < slot)
    else:
        result = -sums
        if COST != "dot":
            own_places = rows.to(tl.int64)[:, None] * own_row + k.to(tl.int64)[None, :] * own_dim
            points = tl.load(own_at + own_places, mask=mine[:, None] & (k < dim)[None, :], other=0).to(T)
            if COST == "cosine":
                factor, scale = split_scale(tl.load(own_scale + own_start + rows, mask=mine, other=0))
                points *= factor[:, None]
                result = (result + (diagonal * scale)[:, None] * points) * scale[:, None] * factor[:, None]
            else:
                result += diagonal[:, None] * points
        if count == 0:
            result = tl.zeros([BLOCK_R, BLOCK_D], T)
    out_at = out + own_start * dim
    result = tl.where(mine[:, None], result, 0).to(out.dtype.element_ty)
    tl.store(
        out_at + rows.to(tl.int64)[:, None] * dim + k[None, :], result, mask=(rows < slot)[:, None] & (k < dim)[None, :]
    )
    # Rows behind the last item of a packed batch.
    span = tl.cdiv(size, BLOCK_R) * BLOCK_R
    rows += span
    while tl.min(rows, 0) < slot:
        if COST == "average":
            tl.store(own_scale + own_start + rows, tl.zeros_like(diagonal), mask=rows < slot)
        at = out_at + rows.to(tl.int64)[:, None] * dim + k[None, :]
        tl.store(at, tl.zeros_like(result), mask=(rows < slot)[:, None] & (k < dim)[None, :])
        rows += span


@kernel
def weights_kernel(
    out, C, G, f, g, x_lift, y_lift, a, b, x_layout, y_layout, grad_value, grad_linear,
    items, x_mode, x_size, x_rows, y_mode, y_size, y_rows, has_a, has_b, per_item, value_step, linear_step, has_plan,
    reg_items, reg: tl.float64, rho: tl.float64, ld16,
    IMPLICIT: tl.constexpr, BY_Y: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient by the weights of x, or of y if BY_Y, whose relaxation is `rho`: out (rows,)."""
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    if BY_Y:
        item, tile = locate(tl.cdiv(y_size, BLOCK_R))
    else:
        item, tile = locate(tl.cdiv(x_size, BLOCK_R))
    x_start, n, x_slot = segment(x_layout, x_mode, x_size, x_rows, item, items)
    y_start, m, y_slot = segment(y_layout, y_mode, y_size, y_rows, item, items)
    if BY_Y:
        own_start, own_n, slot, size, other_start, other_n = y_start, m, y_slot, y_size, x_start, n
        own_f, other_f, own_w, other_w, has_own, has_other, other_lift = g, f, b, a, has_b, has_a, x_lift
        own_step, other_step = ld * 0 + 1, ld
    else:
        own_start, own_n, slot, size, other_start, other_n = x_start, n, x_slot, x_size, y_start, m
        own_f, other_f, own_w, other_w, has_own, has_other, other_lift = f, g, a, b, has_a, has_b, y_lift
        own_step, other_step = ld, ld * 0 + 1
    begin = tile * BLOCK_R
    rows = begin + tl.arange(0, BLOCK_R)
    mine = rows < own_n
    epsilon = load_reg(reg, reg_items, per_item, item, T)
    relax = tl.full([], rho, T)
    value = load_gradient(grad_value, value_step, item, T)
    linear = load_gradient(grad_linear, linear_step, item, T)
    idle = ((value == 0) & (linear == 0) & (has_plan == 0)) | (other_n == 0)
    count = tl.where(idle, 0, other_n)
    f_i = tl.load(own_f + own_start + rows, mask=mine, other=0)
    a_i = load_weights(own_w, has_own, own_start + rows, mine, own_n)
    mass = tl.zeros([BLOCK_R], T)
    load = tl.zeros([BLOCK_R], T)
    for first in range(0, tl.where(begin < own_n, count, 0), BLOCK_K):
        others = first + tl.arange(0, BLOCK_K)
        real = others < other_n
        inside = mine[:, None] & real[None, :]
        places = x_start * ld + rows.to(tl.int64)[:, None] * own_step + others.to(tl.int64)[None, :] * other_step
        cost, g_j, b_j = load_others(
            C + places, inside, other_f, other_w, has_other, other_start, others, real, other_n
        )
        have = inside & (b_j > 0)[None, :]
        E = b_j[None, :] * density_tile(cost, have, f_i[:, None], g_j[None, :], a_i[:, None], b_j[None, :], 1 / epsilon)
        mass += tl.sum(E, 1)
        if IMPLICIT:
            lift_j = tl.load(other_lift + other_start + others, mask=real, other=0)
            S = tl.load(G + places, mask=only_if(has_plan, inside), other=0) + tl.where(linear == 0, 0, linear * cost)
            load += tl.sum(times(E, S - lift_j[None, :]), 1)
    result = tl.where(value == 0, 0, value * (worth(f_i, relax, True) + epsilon * (1 - mass))) + load
    # Nothing bounds what a first bit of weight would do; infinity times a weight of zero would be NaN later.
    result = tl.where(result < 0, -bounded(-result), bounded(result))
    result = tl.where(idle, 0, tl.where(mine, result, 0))
    tl.store(out + own_start + rows, result, mask=rows < slot)
    span = tl.cdiv(size, BLOCK_R) * BLOCK_R
    rows += span
    while tl.min(rows, 0) < slot:
        tl.store(out + own_start + rows, tl.zeros_like(result), mask=rows < slot)
        rows += span


@kernel
def dense_kernel(
    out, C, G, f, g, x_lift, y_lift, a, b, x_layout, y_layout, grad_value, grad_linear,
    items, x_mode, x_size, x_rows, y_mode, y_size, y_rows, has_a, has_b, per_item, value_step, linear_step, has_plan,
    reg_items, reg: tl.float64, ld16,
    GRADIENT: tl.constexpr, IMPLICIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The plan, or with GRADIENT the gradient by the cost, as out (B, size of x, size of y), 0 on the padding."""
    T: tl.constexpr = C.dtype.element_ty
    ld = ld16 * 16
    tiles = tl.cdiv(y_size, BLOCK_K)
    item, tile = locate(tl.cdiv(x_size, BLOCK_R) * tiles)
    x_start, n, x_slot = segment(x_layout, x_mode, x_size, x_rows, item, items)
    y_start, m, y_slot = segment(y_layout, y_mode, y_size, y_rows, item, items)
    rows = (tile // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (tile % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    mine, real = rows < n, columns < m
    inside = mine[:, None] & real[None, :]
    epsilon = load_reg(reg, reg_items, per_item, item, T)
    per_reg = 1 / epsilon
    f_i = tl.load(f + x_start + rows, mask=mine, other=0)
    g_j = tl.load(g + y_start + columns, mask=real, other=0)
    a_i = load_weights(a, has_a, x_start + rows, mine, n)
    b_j = load_weights(b, has_b, y_start + columns, real, m)
    places = (x_start + rows)[:, None] * ld + columns[None, :]
    cost = tl.load(C + places, mask=inside, other=0)
    both = inside & (a_i > 0)[:, None] & (b_j > 0)[None, :]
    P = (a_i[:, None] * b_j[None, :]) * density_tile(
        cost, both, f_i[:, None], g_j[None, :], a_i[:, None], b_j[None, :], per_reg
    )
    if GRADIENT:
        value = load_gradient(grad_value, value_step, item, T)
        linear = load_gradient(grad_linear, linear_step, item, T)
        lift_i, lift_j = f_i, g_j
        if IMPLICIT:
            lift_i = tl.load(x_lift + x_start + rows, mask=mine, other=0)
            lift_j = tl.load(y_lift + y_start + columns, mask=real, other=0)
        P = cost_gradient(
            P, cost, places, inside, G, has_plan, value, linear, lift_i[:, None], lift_j[None, :], per_reg, IMPLICIT
        )
        P = tl.where((value == 0) & (linear == 0) & (has_plan == 0), 0, P)
    out += item.to(tl.int64) * x_size * y_size
    at = out + rows.to(tl.int64)[:, None] * y_size + columns[None, :]
    tl.store(
        at, tl.where(inside, P, 0).to(out.dtype.element_ty), mask=(rows < x_size)[:, None] & (columns < y_size)[None, :]
    )
