"""The implicit system."""

import triton
import triton.language as tl

from .addressing import load_gradient, load_reg, load_weights, only_if, segment
from .exchange import EXCHANGE_TAIL, sum_over_programs
from .math import INFINITY, damping, times
from .outputs import plan_rows
from .runtime import kernel


@triton.jit
def apply_plan(
    at, ld, f, g_j, a, has_a, x_start, n, begin, end, columns, real, b_j, per_reg, z, load, mass, from_load, to_load,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """P^T t (M,) over a program's rows, t = (from_load load + to_load P z) / mass, in one pass over the plan."""
    T: tl.constexpr = at.dtype.element_ty
    partial = tl.zeros([BLOCK_N, BLOCK_M], T)
    for first in range(begin, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        mine = rows < end
        P, cost = plan_rows(at, rows, mine, columns, real, ld, f, g_j, a, has_a, x_start, n, b_j, per_reg)
        row_mass = tl.load(mass + rows, mask=mine, other=0)
        row_load = tl.load(load + rows, mask=mine, other=0)
        t = from_load * row_load + to_load * tl.sum(P * z[None, :], 1)
        partial += P * tl.where(row_mass > 0, t / tl.where(row_mass > 0, row_mass, 1), 0)[:, None]
    return tl.sum(partial, 0)


@triton.jit
def without_gauge(residual, column_mass, BALANCED):
    """The residual without its component along the null vector of a balanced problem, the constant."""
    total = tl.sum(column_mass)
    share = tl.sum(residual) / tl.where(total > 0, total, 1)
    return residual - tl.where(BALANCED, share, 0) * column_mass


@triton.jit
def over_mass(vector, column_mass):
    return tl.where(column_mass > 0, vector / tl.where(column_mass > 0, column_mass, 1), 0)


@kernel
def lift_kernel(
    C, G, f, g, state, x_lift, y_lift, a, b, x_layout, y_layout, exchange, counters, grad_linear,
    items, x_mode, x_size, x_rows, y_mode, y_size, y_rows, has_a, has_b, per_item, linear_step, has_plan,
    reg_items, reg: tl.float64, rho_x: tl.float64, rho_y: tl.float64, ld16, programs,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PEERS: tl.constexpr,
):  # fmt: skip
    """Solve [D_x P; P^T D_y] (s, t) = (Q 1, Q^T 1), Q = P S, D = mass / keep, for s (rows of x,) and t (rows of y,).

    s is eliminated; conjugate gradients, preconditioned with D_y, solve what is left for t. Kernels of the solver tell
    about layouts, `exchange` and `counters`; `state` (2, rows of x) keeps Q 1 and D_x, C and G are (rows of x, ld).
    """
    T: tl.constexpr = C.dtype.element_ty
    rank = tl.program_id(0) % programs
    group = tl.program_id(0) // programs
    parts = exchange + group * (2 * programs * (2 * BLOCK_M + EXCHANGE_TAIL))
    counter = counters + group
    epoch = 0
    ld = ld16 * 16
    columns = tl.arange(0, BLOCK_M)
    relax_x, relax_y = tl.full([], rho_x, T), tl.full([], rho_y, T)
    balanced = (relax_x == INFINITY) & (relax_y == INFINITY)
    if T == tl.float64:
        tolerance = 1e-28
    else:
        tolerance = 1e-14

    item = group
    while item < items:
        x_start, n, x_slot = segment(x_layout, x_mode, x_size, x_rows, item, items)
        y_start, m, y_slot = segment(y_layout, y_mode, y_size, y_rows, item, items)
        share = (n + programs - 1) // programs
        begin = rank * share
        end = tl.where(m > 0, tl.minimum(n, begin + share), 0)
        real = columns < m
        b_j = load_weights(b, has_b, y_start + columns, real, m)
        g_j = tl.load(g + y_start + columns, mask=real, other=0)
        epsilon = load_reg(reg, reg_items, per_item, item, T)
        per_reg = 1 / epsilon
        keep_x, keep_y = damping(epsilon, relax_x), damping(epsilon, relax_y)
        linear = load_gradient(grad_linear, linear_step, item, T)
        at = C + x_start * ld
        load, mass = state + x_start, state + x_rows + x_start

        partial = tl.zeros([BLOCK_N, BLOCK_M], T)
        partial_mass = tl.zeros([BLOCK_N, BLOCK_M], T)
        for first in range(begin, end, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            mine = rows < end
            P, cost = plan_rows(at, rows, mine, columns, real, ld, f, g_j, a, has_a, x_start, n, b_j, per_reg)
            inside = only_if(has_plan, mine[:, None] & real[None, :])
            places = (x_start + rows)[:, None] * ld + columns[None, :]
            S = tl.load(G + places, mask=inside, other=0) + tl.where(linear == 0, 0, linear * cost)
            Q = times(P, S)
            tl.store(load + rows, tl.sum(Q, 1), mask=mine)
            tl.store(mass + rows, tl.sum(P, 1) / keep_x, mask=mine)
            partial += Q
            partial_mass += P
        right, _, epoch = sum_over_programs(
            (tl.sum(partial, 0),), per_reg, parts, counter, epoch, rank, programs, BLOCK_M, BLOCK_M, PEERS
        )
        masses, _, epoch = sum_over_programs(
            (tl.sum(partial_mass, 0),), per_reg, parts, counter, epoch, rank, programs, BLOCK_M, BLOCK_M, PEERS
        )
        column_mass = masses[0] / keep_y
        zeros = tl.zeros([BLOCK_M], T)
        product = apply_plan(
            at, ld, f, g_j, a, has_a, x_start, n, begin, end, columns, real, b_j, per_reg, zeros, load, mass, 1.0, 0.0,
            BLOCK_N, BLOCK_M,
        )  # fmt: skip
        totals, _, epoch = sum_over_programs(
            (product,), per_reg, parts, counter, epoch, rank, programs, BLOCK_M, BLOCK_M, PEERS
        )
        residual = without_gauge(tl.where(column_mass > 0, right[0] - totals[0], 0), column_mass, balanced)
        solution = zeros
        direction = zeros
        energy = tl.sum(residual * over_mass(residual, column_mass))
        enough = energy * tolerance
        before = energy * 0
        left = tl.where(energy > enough, 4 * m + 40, 0)
        while left > 0:
            carry = tl.where(before > 0, energy / tl.where(before > 0, before, 1), 0)
            direction = over_mass(residual, column_mass) + carry * direction
            product = apply_plan(
                at, ld, f, g_j, a, has_a, x_start, n, begin, end, columns, real, b_j, per_reg, direction, load, mass,
                0.0, 1.0, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            totals, _, epoch = sum_over_programs(
                (product,), per_reg, parts, counter, epoch, rank, programs, BLOCK_M, BLOCK_M, PEERS
            )
            image = column_mass * direction - totals[0]
            curvature = tl.sum(direction * image)
            step = tl.where(curvature > 0, energy / tl.where(curvature > 0, curvature, 1), 0)
            solution += step * direction
            residual = without_gauge(residual - step * image, column_mass, balanced)
            before = energy
            energy = tl.sum(residual * over_mass(residual, column_mass))
            left = tl.where((energy > enough) & (curvature > 0), left - 1, 0)

        for first in range(begin, end, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            mine = rows < end
            P, cost = plan_rows(at, rows, mine, columns, real, ld, f, g_j, a, has_a, x_start, n, b_j, per_reg)
            row_mass = tl.load(mass + rows, mask=mine, other=0)
            lift = tl.load(load + rows, mask=mine, other=0) - tl.sum(P * solution[None, :], 1)
            tl.store(x_lift + x_start + rows, over_mass(lift, row_mass), mask=mine)
        if rank == 0:
            tl.store(y_lift + y_start + columns, solution, mask=real)
        tl.debug_barrier()
        item += tl.num_programs(0) // programs
