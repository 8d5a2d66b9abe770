"""The adjoint system of implicit differentiation, which gradients through the plan and the potentials need.

Sinkhorn's fixed point defines the potentials implicitly. With S = dL/dP and Q = P * S (by element), the adjoint variables
(s, t) solve

    [ D_x  P   ] [s]   [ Q 1   ]
    [ P^T  D_y ] [t] = [ Q^T 1 ],    D_x = diag(P 1 / damping_x),  D_y = diag(P^T 1 / damping_y)

with damping = rho / (rho + reg), 1 for a strict marginal. gradients.py makes the gradients from them. The rows are
eliminated; conjugate gradients, preconditioned with D_y, solve the Schur complement D_y - P^T D_x^-1 P for t. If both
marginals are strict, the constant (1, -1) is in the null space and is projected out.
"""

import triton
import triton.language as tl

from .addressing import load_gradient, load_reg, load_weights, only_if, segment, up_to_four
from .exchange import group_of, sum_over_programs
from .math import INFINITY, damping_exponent, times
from .outputs import ItemPlan, plan_rows
from .runtime import kernel


@triton.jit
def apply_plan(plan, begin, end, z, loads, masses, from_load, to_load, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """P^T r (M,) over a program's rows, r = D_x^-1 (from_load load + to_load P z), in one pass over the plan.

    `loads` and `masses` point to Q 1 and to the diagonal of D_x, one number for each row of the item.
    """
    partial = tl.zeros([BLOCK_N, BLOCK_M], z.dtype)
    for first in range(begin, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        row_mask = rows < end
        P, cost = plan_rows(plan, rows, row_mask)
        mass = tl.load(masses + rows, mask=row_mask, other=0)
        load = tl.load(loads + rows, mask=row_mask, other=0)
        r = from_load * load + to_load * tl.sum(P * z[None, :], 1)
        partial += P * over_mass(r, mass)[:, None]
    return tl.sum(partial, 0)


@triton.jit
def without_gauge(residual, column_mass, BALANCED):
    """The residual without its component along the null vector of a balanced problem, the constant."""
    total = tl.sum(column_mass)
    share = tl.sum(residual) / tl.where(total > 0, total, 1)
    return residual - tl.where(BALANCED, share, 0) * column_mass


@triton.jit
def over_mass(vector, mass):
    """vector / mass, 0 where there is no mass."""
    return tl.where(mass > 0, vector / tl.where(mass > 0, mass, 1), 0)


@kernel
def adjoint_kernel(
    C,  # (rows of x, ld), contiguous; in the units of reg
    G,  # (rows of x, ld), contiguous: dL/dP; read if has_plan
    f,  # (rows of x,) potentials, in the units of reg
    g,  # (rows of y,) potentials, in the units of reg
    state,  # scratch: (2, rows of x) Q 1, mass times dL/dP, and the diagonal of D_x, mass
    x_adjoint,  # out: (rows of x,) s, in the units of dL/dP
    y_adjoint,  # out: (rows of y,) t, in the units of dL/dP
    a,  # (rows of x,) weights, which sum to one for each item; read if has_a
    b,  # (rows of y,) weights, which sum to one for each item; read if has_b
    x_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if x_addressing > 0
    y_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if y_addressing > 0
    exchange,  # scratch: (items in flight, 2, programs, 2 * BLOCK_M + EXCHANGE_TAIL); see exchange.py
    counters,  # int32, zero at the start; see exchange.py
    grad_linear,  # (B,) with stride linear_step: the gradient l by the transport cost <P, C>; -1 = there is none
    items, x_addressing, x_size, x_rows, y_addressing, y_size, y_rows, has_a, has_b, per_item, linear_step, has_plan,
    reg_items,  # (B,) float64, in the units of the cost; read if per_item
    reg: tl.float64, rho_x: tl.float64, rho_y: tl.float64, ld16, programs,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Solve [D_x P; P^T D_y] (s, t) = (Q 1, Q^T 1) with Q = P * S, S = l C + G, for every item.

    Grid: groups of `programs` <= MAX_PROGRAMS programs. A group takes items in turn, and its programs split the rows.
    Source: implicit differentiation of the optimality conditions, as in Eisenberger et al., "A unified framework for
    implicit Sinkhorn differentiation" (2022).
    """
    T: tl.constexpr = C.dtype.element_ty
    group = group_of(exchange, counters, programs, BLOCK_M)
    epoch = 0
    ld = ld16 * 16
    columns = tl.arange(0, BLOCK_M)
    relax_x, relax_y = tl.full([], rho_x, T), tl.full([], rho_y, T)
    balanced = (relax_x == INFINITY) & (relax_y == INFINITY)
    if T == tl.float64:
        tolerance = 1e-28
        rounding = 2.2e-16
    else:
        tolerance = 1e-14
        rounding = 1.2e-7

    item = tl.program_id(0) // programs
    while item < items:
        x_start, n, x_slot = segment(x_offsets, x_addressing, x_size, x_rows, item, items)
        y_start, m, y_slot = segment(y_offsets, y_addressing, y_size, y_rows, item, items)
        share = (n + programs - 1) // programs
        begin = group.rank * share
        end = tl.where(m > 0, tl.minimum(n, begin + share), 0)
        column_mask = columns < m
        b_j = load_weights(b, has_b, y_start + columns, column_mask, m)
        g_j = tl.load(g + y_start + columns, mask=column_mask, other=0)
        item_reg = load_reg(reg, reg_items, per_item, item, T)
        damping_x, damping_y = damping_exponent(item_reg, relax_x), damping_exponent(item_reg, relax_y)
        linear = load_gradient(grad_linear, linear_step, item, T)
        plan = ItemPlan(C + x_start * ld, ld, f, a, has_a, x_start, n, m, columns, column_mask, g_j, b_j, 1 / item_reg)
        loads, masses = state + x_start, state + x_rows + x_start

        partial = tl.zeros([BLOCK_N, BLOCK_M], T)
        partial_mass = tl.zeros([BLOCK_N, BLOCK_M], T)
        for first in range(begin, end, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            row_mask = rows < end
            P, cost = plan_rows(plan, rows, row_mask)
            mask = only_if(has_plan, row_mask[:, None] & (columns < up_to_four(m))[None, :])
            S = tl.load(G + (x_start + rows)[:, None] * ld + columns[None, :], mask=mask, other=0)
            S += tl.where(linear == 0, 0, linear * cost)
            Q = times(P, S)
            tl.store(loads + rows, tl.sum(Q, 1), mask=row_mask)
            tl.store(masses + rows, tl.sum(P, 1) / damping_x, mask=row_mask)
            partial += Q
            partial_mass += P
        right, _, epoch = sum_over_programs(
            (tl.sum(partial, 0),), item_reg, group, epoch, BLOCK_M, BLOCK_M, MAX_PROGRAMS
        )
        column_masses, _, epoch = sum_over_programs(
            (tl.sum(partial_mass, 0),), item_reg, group, epoch, BLOCK_M, BLOCK_M, MAX_PROGRAMS
        )
        column_mass = column_masses[0] / damping_y
        zeros = tl.zeros([BLOCK_M], T)
        product = apply_plan(plan, begin, end, zeros, loads, masses, 1.0, 0.0, BLOCK_N, BLOCK_M)
        totals, _, epoch = sum_over_programs((product,), item_reg, group, epoch, BLOCK_M, BLOCK_M, MAX_PROGRAMS)
        # Over their size, since the squares of large costs leave the range of floats.
        size = tl.max(tl.abs(right[0]), 0)
        inv_size = tl.where(size > 0, 1 / tl.where(size > 0, size, 1), 0)
        residual = tl.where(column_mass > 0, (right[0] - totals[0]) * inv_size, 0)
        residual = without_gauge(residual, column_mass, balanced)
        solution = zeros
        direction = zeros
        energy = tl.sum(residual * over_mass(residual, column_mass))
        # Below the rounding of the loads, a residual has no direction. A column of hardly any mass counts as heavier:
        # rounding over its mass would be all there is.
        load = right[0] * inv_size
        heavy = tl.maximum(column_mass, tl.sum(column_mass) * rounding)
        largest = tl.maximum(tl.sum(residual * over_mass(residual, heavy)), tl.sum(load * over_mass(load, heavy)))
        enough = largest * tolerance
        before = energy * 0
        left = tl.where(energy > enough, 4 * m + 40, 0)  # iterations that are left
        while left > 0:
            carry = tl.where(before > 0, energy / tl.where(before > 0, before, 1), 0)
            direction = over_mass(residual, column_mass) + carry * direction
            product = apply_plan(plan, begin, end, direction, loads, masses, 0.0, 1.0, BLOCK_N, BLOCK_M)
            totals, _, epoch = sum_over_programs((product,), item_reg, group, epoch, BLOCK_M, BLOCK_M, MAX_PROGRAMS)
            image = column_mass * direction - totals[0]
            curvature = tl.sum(direction * image)
            step = tl.where(curvature > 0, energy / tl.where(curvature > 0, curvature, 1), 0)
            solution += step * direction
            residual = without_gauge(residual - step * image, column_mass, balanced)
            before = energy
            energy = tl.sum(residual * over_mass(residual, column_mass))
            left = tl.where((energy > enough) & (curvature > 0), left - 1, 0)
        solution *= size

        for first in range(begin, end, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            row_mask = rows < end
            P, cost = plan_rows(plan, rows, row_mask)
            mass = tl.load(masses + rows, mask=row_mask, other=0)
            s = tl.load(loads + rows, mask=row_mask, other=0) - tl.sum(P * solution[None, :], 1)
            tl.store(x_adjoint + x_start + rows, over_mass(s, mass), mask=row_mask)
        if group.rank == 0:
            tl.store(y_adjoint + y_start + columns, solution, mask=column_mask)
        tl.debug_barrier()
        item += tl.num_programs(0) // programs
