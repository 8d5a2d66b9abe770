"""Sinkhorn's iterations: multiply-adds on an absorbed kernel matrix, exact in the log domain wherever floats run out.

With potentials phi, gamma (in units of reg) absorbed, K_ij = exp(phi_i + gamma_j - C_ij / reg), an iteration is

    u = 1 / (K (b v)),   v = 1 / (K^T (a u)),

and phi + log u, gamma + log v are the potentials over reg; relaxed marginals damp them by rho / (rho + reg). While u, v and
the sums stay within exp(+-20), the entries of K that underflow below 2^-126 are far under the rounding of a sum. If an
iteration leaves that range, its result is discarded. The same iteration is made in the log domain from the stored cost, its
potentials are absorbed, and K is built anew. The first iteration of every item is made in this way too. So the result is
that of the log domain, at the price of multiply-adds.

One program solves an item, or several split its rows, run at the same time and exchange column sums (exchange.py). K stays
in registers for all iterations if a program's rows fit; else each iteration reads K once from memory. Every item stops by
itself: when its marginal error is at most `tol`, after `max_iter` iterations, or when the error is NaN.

If both sides are the same points with the same weights, C is symmetric, and so is the iteration: u = v, and the next v is
sqrt(v / (K^T (a v))), the mean of the potential and its update. Only column sums are needed, half of the work.

Some points take no part: those without mass, and those that are unreachable, because all points with mass on the other side
are at infinite cost. Their rows and columns of K are zero, and their sums count as one. While the iterations last, the
potential of an unreachable row is infinite. The last pass replaces it by `unreached_potential`, and computes the potentials
of points without mass from those of the other side.

Sources: Cuturi (2013); Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized transport problems" (2019)
for the absorption; Chizat et al. (2018) for relaxed marginals; Feydy et al. (2019) for the symmetric iteration.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .accelerated import BACK, NUMBERS, ON, VECTORS, WEIGHTS, advance
from .addressing import load_reg, load_weights, only_if, segment, up_to_four
from .exchange import group_of, log_sum_over_programs, sum_over_programs
from .math import (
    INFINITY,
    bounded,
    damping_exponent,
    dual_term,
    finite_top,
    logarithm,
    reciprocal,
    unreached_potential,
)
from .runtime import kernel

# Updates are multiply-adds while all scalings and sums stay within exp(+-20).
RANGE_LOW = tl.constexpr(2.0611536e-9)
RANGE_HIGH = tl.constexpr(4.8516520e8)


class Rows(NamedTuple):
    """A program's rows of an item, `begin` to `end`, counted from the item's first row."""

    costs: tl.tensor  # pointer to the item's costs (n, ld)
    ld: tl.tensor
    # Pointer to the item's first row in four vectors, each `stride` long: the absorbed potentials, the potentials that the
    # last exact pass made, and the scalings of two iterations, which take turns.
    state: tl.tensor
    stride: tl.tensor
    a: tl.tensor  # pointer to (rows of x,)
    has_a: tl.tensor
    x_start: tl.tensor  # first row of the item
    n: tl.tensor
    begin: tl.tensor
    end: tl.tensor
    m: tl.tensor  # columns of the item


class Limits(NamedTuple):
    """When an item ends."""

    tol: tl.tensor
    max_iter: tl.tensor


# Updates ---------------------------------------------------------------------------------------------------------------


@triton.jit
def exact_rows(cost, mask, G, log_b, inv_reg, damping):
    """The row update in the log domain: potentials (N,) over reg from `cost` (N, M) and `G` (M,); inf if unreachable."""
    H = tl.where(mask, (G + log_b)[None, :] - cost * inv_reg, -INFINITY)
    top = finite_top(tl.max(H, 1))
    sums = tl.sum(tl.exp(H - top[:, None]), 1)
    return tl.where(sums == 0, INFINITY, -damping * (top + logarithm(sums)))


@triton.jit
def exact_columns(cost, mask, F, log_a, inv_reg):
    """The tile's part of the column sums: their largest exponents and the sums over them, (M,) each."""
    H = tl.where(mask, (F + log_a)[:, None] - cost * inv_reg, -INFINITY)
    top = tl.max(H, 0)
    return top, tl.sum(tl.exp(H - finite_top(top)[None, :]), 0)


@triton.jit
def kernel_tile(cost, mask, F, G, inv_reg):
    """exp(F + G - C / reg), 0 outside the mask. The mask must leave out points without mass, whose entries may overflow."""
    return tl.exp(tl.where(mask, G[None, :] - (cost * inv_reg - F[:, None]), -INFINITY))


@triton.jit
def scaling(sums, absorbed, damping, UNBALANCED: tl.constexpr):
    """The scaling that an update gives for the sums of K: 1 / sum, or its relaxed form."""
    if UNBALANCED:
        return tl.exp(-(1 - damping) * absorbed - damping * tl.log(sums))
    else:
        return reciprocal(sums)


@triton.jit
def row_scaling(row_sums, u, phi, damping_x, UNBALANCED: tl.constexpr):
    """The next scalings of rows, the ratio of the old ones to them, and whether they are in range."""
    u_next = scaling(row_sums, phi, damping_x, UNBALANCED)
    if UNBALANCED:
        ratio = u / u_next
    else:
        ratio = u * row_sums
    return u_next, ratio, in_range(row_sums, u_next, UNBALANCED)


@triton.jit
def in_range(sums, scalings, UNBALANCED: tl.constexpr):
    """Whether sums are within exp(+-20), and so their reciprocals; if relaxed, whether the scalings are too."""
    if UNBALANCED:
        low, high = tl.minimum(sums, scalings), tl.maximum(sums, scalings)
    else:
        low, high = sums, sums
    return (low >= RANGE_LOW) & (high <= RANGE_HIGH)


@triton.jit
def row_errors(a, ratio):
    """a |u / u' - 1| of every row, 0 for rows without mass."""
    return tl.where(a > 0, a * tl.abs(ratio - 1), a)


@triton.jit
def or_unreached(potentials, unreached):
    """The potentials, with `unreached` where they are infinite."""
    return tl.where(potentials == INFINITY, unreached, potentials)


@triton.jit
def unreachable_mass(weights, unreachable, rho):
    """The mass of unreachable points whose marginal is strict: a part of the marginal error that no plan can avoid."""
    return tl.where(rho == INFINITY, tl.sum(tl.where((weights > 0) & unreachable, weights, 0)), 0)


@triton.jit
def should_stop(error, n_iter, limits):
    """Whether an item ends: error within tolerance, out of iterations, or NaN, which does not improve."""
    return ((error <= limits.tol) & (limits.tol > 0)) | (n_iter >= limits.max_iter) | (error != error)


@triton.jit
def verdict(new_error, error, n_iter, limits, columns_in_range):
    """After an iteration by multiply-adds: `active` (0 or 1), the error, and whether to accept it and make another.

    An infinite error means that the rows have left the range. Then an exact pass has to find their true error.
    """
    rows_in_range = new_error < INFINITY
    ends = rows_in_range & should_stop(new_error, n_iter, limits)
    accepted = rows_in_range & columns_in_range & (ends == 0)
    return tl.where(ends, 0, 1), tl.where(rows_in_range, new_error, error), accepted


# Results ---------------------------------------------------------------------------------------------------------------


@triton.jit
def gauge(G, b, FIXED: tl.constexpr):
    """The constant to move from G to F, so that <b, g> = 0 if the problem is balanced; 0 if FIXED."""
    if FIXED:
        return tl.sum(b * 0)
    else:
        return tl.sum(tl.where(b > 0, b * G, 0))


@triton.jit
def store_results(
    item, rank, columns, y_start, m, y_slot, filled, broken, G, b, sums, shift, reg, rho_y, n_iter, error,
    g, value, linear, error_out, n_iter_out, UNBALANCED: tl.constexpr,
):  # fmt: skip
    """Store an item's g and its numbers, by one program. `sums` holds mass, transport cost and the dual terms of x."""
    T: tl.constexpr = g.dtype.element_ty
    nan = tl.full([], float("nan"), T)
    if rank == 0:
        mass = tl.sum(tl.where(columns == 0, sums, 0))
        transport = tl.sum(tl.where(columns == 1, sums, 0))
        dual_x = tl.sum(tl.where(columns == 2, sums, 0))
        potential = reg * (G - shift)
        dual_y = tl.sum(tl.where(b > 0, b * dual_term(potential, rho_y, UNBALANCED), 0))
        total = dual_x + dual_y - reg * (mass - 1)
        bad = filled & (broken | (total != total))
        tl.store(value + item, tl.where(bad, nan, tl.where(filled, total, 0)))
        tl.store(linear + item, tl.where(bad, nan, tl.where(filled, transport, 0)))
        tl.store(error_out + item, tl.where(bad, nan, tl.where(filled, error, 0)))
        tl.store(n_iter_out + item, tl.where(bad, 0, n_iter))
        potential = tl.where(columns < m, tl.where(bad, nan, potential), 0)
        tl.store(g + y_start + columns, tl.where(filled, potential, 0), mask=columns < y_slot)
        row = columns + columns.shape[0]
        while tl.min(row, 0) < y_slot:  # the slot may be longer than the block
            tl.store(g + y_start + row, tl.zeros_like(potential), mask=row < y_slot)
            row += columns.shape[0]


@triton.jit
def clear_padding(f, x_start, begin, end, rank, programs, BLOCK_N: tl.constexpr):
    """Store zeros in the padding of an item. Its programs take turns."""
    row = begin + rank * BLOCK_N + tl.arange(0, BLOCK_N)
    while tl.min(row, 0) < end:
        tl.store(f + x_start + row, tl.zeros([BLOCK_N], f.dtype.element_ty), mask=row < end)
        row += programs * BLOCK_N


# Exact passes over a program's rows ------------------------------------------------------------------------------------


@triton.jit
def exact_pass(
    rows_of,
    turn,
    gamma,
    log_b,
    inv_reg,
    damping_x,
    rho_x,
    n_iter,
    columns,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One row update in the log domain.

    Returns this program's part of the column sums as (top, sums), of the marginal error, and of the unreachable mass. The
    error is NaN if any number of the item is NaN, even at a point without mass.
    """
    T: tl.constexpr = rows_of.costs.dtype.element_ty
    top = tl.full([BLOCK_M], -INFINITY, T)
    sums = tl.zeros([BLOCK_M], T)
    error = tl.zeros([BLOCK_N], T)
    unreachable = tl.sum(error)
    for first in range(rows_of.begin, rows_of.end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        row_mask = rows < rows_of.end
        cost, mask = load_costs(rows_of, rows, row_mask, columns)
        a_i = load_weights(rows_of.a, rows_of.has_a, rows_of.x_start + rows, row_mask, rows_of.n)
        F = tl.where(row_mask, exact_rows(cost, mask, gamma, log_b, inv_reg, damping_x), 0)
        tl.store(rows_of.state + rows_of.stride + rows, F, mask=row_mask)
        before = load_potentials(rows_of, turn, rows, only_if(n_iter, row_mask))
        ratio = tl.where(F == INFINITY, 1, tl.exp(before - F))
        error += tl.where(F == F, row_errors(a_i, ratio), F)
        unreachable += unreachable_mass(a_i, F == INFINITY, rho_x)
        tile_top, tile_sums = exact_columns(cost, mask, or_unreached(F, 0), logarithm(a_i), inv_reg)
        top, sums = add_columns(top, sums, tile_top, tile_sums)
    return top, sums, tl.sum(error), unreachable


@triton.jit
def load_costs(rows_of, rows, row_mask, columns):
    """The costs of some rows (N, M), 0 outside the item, and where the item is."""
    at = rows_of.costs + rows.to(tl.int64)[:, None] * rows_of.ld + columns[None, :]
    cost = tl.load(at, mask=row_mask[:, None] & (columns < up_to_four(rows_of.m))[None, :], other=0)
    return cost, row_mask[:, None] & (columns < rows_of.m)[None, :]


@triton.jit
def add_columns(top, sums, tile_top, tile_sums):
    """Column sums with those of a tile."""
    higher = tl.maximum(top, tile_top)
    base = finite_top(higher)
    return higher, sums * tl.exp(top - base) + tile_sums * tl.exp(tile_top - base)


@triton.jit
def load_potentials(rows_of, turn, rows, known):
    """The potentials of rows: those absorbed and the logarithms of the scalings since; 0 unless `known`.

    (A scaling of zero marks a row that takes no part.)
    """
    absorbed = tl.load(rows_of.state + rows, mask=known, other=0)
    scalings = tl.load(rows_of.state + (2 + turn) * rows_of.stride + rows, mask=known, other=1)
    return absorbed + tl.where(scalings == 0, 0, logarithm(scalings))


@triton.jit
def exact_column_pass(rows_of, turn, unreached, inv_reg, columns, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's part of the column sums with the last potentials of its rows, as (top, sums)."""
    T: tl.constexpr = rows_of.costs.dtype.element_ty
    top = tl.full([BLOCK_M], -INFINITY, T)
    sums = tl.zeros([BLOCK_M], T)
    for first in range(rows_of.begin, rows_of.end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        row_mask = rows < rows_of.end
        cost, mask = load_costs(rows_of, rows, row_mask, columns)
        a_i = load_weights(rows_of.a, rows_of.has_a, rows_of.x_start + rows, row_mask, rows_of.n)
        F = or_unreached(load_potentials(rows_of, turn, rows, row_mask), unreached)
        tile_top, tile_sums = exact_columns(cost, mask, F, logarithm(a_i), inv_reg)
        top, sums = add_columns(top, sums, tile_top, tile_sums)
    return top, sums


@triton.jit
def result_pass(
    rows_of, turn, G, b_j, shift, reg, damping_x, rho_x, filled, broken, f, columns,
    BLOCK_N: tl.constexpr, UNBALANCED: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Store f; sum the mass of the plan, its transport cost, and the dual terms of x."""
    T: tl.constexpr = rows_of.costs.dtype.element_ty
    nan = tl.full([], float("nan"), T)
    inv_reg = 1 / reg
    mass = tl.zeros([BLOCK_N], T)
    transport = tl.zeros([BLOCK_N], T)
    total = tl.zeros([BLOCK_N], T)
    for first in range(rows_of.begin, rows_of.end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        row_mask = rows < rows_of.end
        a_i = load_weights(rows_of.a, rows_of.has_a, rows_of.x_start + rows, row_mask, rows_of.n)
        cost, mask = load_costs(rows_of, rows, row_mask, columns)
        mask &= (b_j > 0)[None, :]
        F = load_potentials(rows_of, turn, rows, only_if(filled.to(tl.int32), row_mask))
        if not SYMMETRIC and tl.min(tl.where(row_mask, a_i, 1)) == 0:
            F = tl.where(row_mask & (a_i == 0), exact_rows(cost, mask, G, logarithm(b_j), inv_reg, damping_x), F)
        shift_i = tl.where(F == INFINITY, 0, shift)  # a point that no mass reaches has no gauge
        F = or_unreached(F, unreached_potential(rho_x, inv_reg))
        P = (a_i[:, None] * b_j[None, :]) * bounded(kernel_tile(cost, mask & (a_i > 0)[:, None], F, G, inv_reg))
        mass += tl.sum(P, 1)
        transport += tl.sum(tl.where(P > 0, P * cost, 0), 1)
        potential = reg * (F + shift_i)
        total += tl.where(a_i > 0, a_i * dual_term(potential, rho_x, UNBALANCED), 0)
        tl.store(f + rows_of.x_start + rows, tl.where(filled, tl.where(broken, nan, potential), 0), mask=row_mask)
    return tl.sum(mass), tl.sum(transport), tl.sum(total)


# K in memory -----------------------------------------------------------------------------------------------------------


@triton.jit
def build_in_memory(rows_of, kernel_at, turn, gamma, b_j, inv_reg, columns, BLOCK_N: tl.constexpr):
    """Absorb the potentials of the exact pass, and store K."""
    T: tl.constexpr = rows_of.costs.dtype.element_ty
    for first in range(rows_of.begin, rows_of.end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        row_mask = rows < rows_of.end
        cost, mask = load_costs(rows_of, rows, row_mask, columns)
        a_i = load_weights(rows_of.a, rows_of.has_a, rows_of.x_start + rows, row_mask, rows_of.n)
        phi = tl.load(rows_of.state + rows_of.stride + rows, mask=row_mask, other=0)
        part = (a_i > 0) & (phi < INFINITY)
        tl.store(rows_of.state + rows, phi, mask=row_mask)
        u = tl.where(part, tl.full([BLOCK_N], 1, T), 0)
        tl.store(rows_of.state + (2 + turn) * rows_of.stride + rows, u, mask=row_mask)
        tile = kernel_tile(cost, part[:, None] & (b_j > 0)[None, :], phi, gamma, inv_reg)
        offsets = rows.to(tl.int64)[:, None] * rows_of.ld + columns[None, :]
        tl.store(kernel_at + offsets, tile, mask=row_mask[:, None] & (columns < rows_of.ld)[None, :])
    tl.debug_barrier()


@triton.jit
def memory_pass(
    rows_of, kernel_at, turn, w, damping_x, columns,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNBALANCED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row update by multiply-adds, with w = b v: this program's part of the column sums and of the marginal error.

    The error is infinite if a row has left the range.
    """
    T: tl.constexpr = kernel_at.dtype.element_ty
    partial = tl.zeros([BLOCK_N, BLOCK_M], T)
    error = tl.zeros([BLOCK_N], T)
    for first in tl.range(rows_of.begin, rows_of.end, BLOCK_N, num_stages=STAGES):
        rows = first + tl.arange(0, BLOCK_N)
        row_mask = rows < rows_of.end
        offsets = rows.to(tl.int64)[:, None] * rows_of.ld + columns[None, :]
        tile = tl.load(kernel_at + offsets, mask=row_mask[:, None] & (columns < rows_of.ld)[None, :], other=0)
        a_i = load_weights(rows_of.a, rows_of.has_a, rows_of.x_start + rows, row_mask, rows_of.n)
        u = tl.load(rows_of.state + (2 + turn) * rows_of.stride + rows, mask=row_mask, other=0)
        part = u > 0
        if UNBALANCED:
            phi = tl.load(rows_of.state + rows, mask=part, other=0)
        else:
            phi = u  # not used
        row_sums = tl.where(part, tl.sum(tile * w[None, :], 1), 1)
        u_next, ratio, rows_in_range = row_scaling(row_sums, u, phi, damping_x, UNBALANCED)
        error += tl.where(part, tl.where(rows_in_range, row_errors(a_i, ratio), INFINITY), 0)
        u_next = tl.where(part, u_next, 0)
        tl.store(rows_of.state + (3 - turn) * rows_of.stride + rows, u_next, mask=row_mask)
        partial += tile * (a_i * u_next)[:, None]
    return tl.sum(partial, 0), tl.sum(error)


@triton.jit
def symmetric_memory_pass(
    rows_of, kernel_at, buffer, columns, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr
):
    """K^T (a u) with u in the buffer: this program's part of the column sums."""
    T: tl.constexpr = kernel_at.dtype.element_ty
    partial = tl.zeros([BLOCK_N, BLOCK_M], T)
    for first in tl.range(rows_of.begin, rows_of.end, BLOCK_N, num_stages=STAGES):
        rows = first + tl.arange(0, BLOCK_N)
        row_mask = rows < rows_of.end
        offsets = rows.to(tl.int64)[:, None] * rows_of.ld + columns[None, :]
        tile = tl.load(kernel_at + offsets, mask=row_mask[:, None] & (columns < rows_of.ld)[None, :], other=0)
        a_i = load_weights(rows_of.a, rows_of.has_a, rows_of.x_start + rows, row_mask, rows_of.n)
        partial += tile * (a_i * tl.load(buffer + rows, mask=row_mask, other=0))[:, None]
    return tl.sum(partial, 0)


@triton.jit
def iterate_in_memory(
    rows_of, kernel_at, buffer, turn, gamma, b_j, v, inv_reg, damping_x, damping_y, unreachable, n_iter, error, active,
    limits, group, epoch, columns, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
    UNBALANCED: tl.constexpr, SYMMETRIC: tl.constexpr, ACCELERATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Iterate by multiply-adds, with K in memory, until the item ends or leaves the range."""
    build_in_memory(rows_of, kernel_at, turn, gamma, b_j, inv_reg, columns, BLOCK_N)
    if ACCELERATE:
        tl.store(buffer + WEIGHTS * BLOCK_M + columns, b_j)
        mixing, seen = active * 0, active * 0
    accepted = active
    while accepted > 0:
        if SYMMETRIC:
            tl.store(buffer + columns, v)
            tl.debug_barrier()
            column_sums = symmetric_memory_pass(rows_of, kernel_at, buffer, columns, BLOCK_N, BLOCK_M, STAGES)
            totals, _, epoch = sum_over_programs((column_sums,), inv_reg, group, epoch, BLOCK_M, BLOCK_M, MAX_PROGRAMS)
            v_next, new_error = symmetric_scaling(totals, (b_j,), (v,), (gamma,), damping_y, 1, UNBALANCED)
            new_error += unreachable
            columns_in_range = accepted > 0
        else:
            column_sums, new_error = memory_pass(
                rows_of, kernel_at, turn, b_j * v, damping_x, columns, BLOCK_N, BLOCK_M, UNBALANCED, STAGES
            )
            totals, new_error, epoch = sum_over_programs(
                (column_sums,), new_error + unreachable, group, epoch, BLOCK_M, BLOCK_M, MAX_PROGRAMS
            )
            v_next, columns_in_range = column_scaling(totals, (b_j,), (gamma,), damping_y, BLOCK_M, 1, UNBALANCED)
        active, error, accept = verdict(new_error, error, n_iter, limits, columns_in_range)
        if ACCELERATE:
            active = tl.maximum(active, mixing)
            taken, way_on, mixing, seen = advance(
                (v,), v_next, buffer, mixing, seen, accept, (new_error < INFINITY) & columns_in_range, error, n_iter,
                limits, damping_x * damping_y, rows_of.m, BLOCK_M, 1, BLOCK_M, RANGE_LOW, RANGE_HIGH, UNBALANCED,
            )  # fmt: skip
            if way_on >= ON:
                turn = 1 - turn
            v = taken[0]
            accepted = tl.where(way_on >= BACK, 1, 0)
            n_iter += accepted
        else:
            if accept:
                if not SYMMETRIC:
                    turn = 1 - turn
                v = v_next[0]
                n_iter += accepted
            accepted = accept.to(tl.int32)
    return v, turn, n_iter, error, active, epoch


# K in registers --------------------------------------------------------------------------------------------------------
#
# The tile of a program is cut into GROUPS x SLABS patches of ROWS x SLAB, one tensor each. A thread has a few rows and
# columns of every patch, so that it holds a fraction of the row and column vectors, and most of a sum is its own.


@triton.jit
def build_in_registers(
    rows_of, b, has_b, y_start, buffer, inv_reg,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Absorb the potentials of the exact pass, and build K: weights, absorbed potentials and scalings of both sides, K.

    The buffer holds gamma, and -inf for columns that take no part. The weights and potentials of such points are zero.
    """
    T: tl.constexpr = rows_of.costs.dtype.element_ty
    weights_x, absorbed_x, u, weights_y, absorbed_y, v, kernel = (), (), (), (), (), (), ()
    for s in tl.static_range(SLABS):
        columns = s * SLAB + tl.arange(0, SLAB)
        gamma = tl.load(buffer + columns)
        part = gamma > -INFINITY
        weights_y = weights_y + (load_weights(b, has_b, y_start + columns, part, rows_of.m),)
        absorbed_y = absorbed_y + (tl.where(part, gamma, 0),)
        v = v + (tl.zeros([SLAB], T) + 1,)
    for r in tl.static_range(GROUPS):
        rows = rows_of.begin + r * ROWS + tl.arange(0, ROWS)
        row_mask = rows < rows_of.end
        a_i = load_weights(rows_of.a, rows_of.has_a, rows_of.x_start + rows, row_mask, rows_of.n)
        phi = tl.load(rows_of.state + rows_of.stride + rows, mask=row_mask, other=0)
        tl.store(rows_of.state + rows, phi, mask=row_mask)
        a_i = tl.where(phi < INFINITY, a_i, 0)
        phi = tl.where(a_i > 0, phi, 0)
        for s in tl.static_range(SLABS):
            columns = s * SLAB + tl.arange(0, SLAB)
            mask = row_mask[:, None] & (columns < up_to_four(rows_of.m))[None, :]
            cost = tl.load(rows_of.costs + rows[:, None] * rows_of.ld + columns[None, :], mask=mask, other=0)
            both = (a_i > 0)[:, None] & (weights_y[s] > 0)[None, :]
            kernel = kernel + (kernel_tile(cost, both, phi, absorbed_y[s], inv_reg),)
        weights_x = weights_x + (a_i,)
        absorbed_x = absorbed_x + (phi,)
        u = u + (tl.zeros([ROWS], T) + 1,)
    return weights_x, absorbed_x, u, weights_y, absorbed_y, v, kernel


@triton.jit
def register_pass(
    kernel, a, phi, u, b, v, damping_x, GROUPS: tl.constexpr, SLABS: tl.constexpr, UNBALANCED: tl.constexpr,
):  # fmt: skip
    """One row update by multiply-adds: the next scalings, and this program's part of column sums and marginal error.

    The error is infinite if a row has left the range.
    """
    u_next = ()
    error = tl.zeros_like(a[0])
    for r in tl.static_range(GROUPS):
        products = kernel[r * SLABS] * (b[0] * v[0])[None, :]
        for s in tl.static_range(1, SLABS):
            products += kernel[r * SLABS + s] * (b[s] * v[s])[None, :]
        row_sums = tl.where(a[r] > 0, tl.sum(products, 1), 1)
        scaled, ratio, rows_in_range = row_scaling(row_sums, u[r], phi[r], damping_x, UNBALANCED)
        error += tl.where(rows_in_range, row_errors(a[r], ratio), INFINITY)
        u_next = u_next + (scaled,)
    return u_next, column_sums_in_registers(kernel, a, u_next, GROUPS, SLABS), tl.sum(error)


@triton.jit
def column_sums_in_registers(kernel, a, u, GROUPS: tl.constexpr, SLABS: tl.constexpr):
    """K^T (a u) of the patches: this program's part of the column sums."""
    column_sums = ()
    for s in tl.static_range(SLABS):
        products = kernel[s] * (a[0] * u[0])[:, None]
        for r in tl.static_range(1, GROUPS):
            products += kernel[r * SLABS + s] * (a[r] * u[r])[:, None]
        column_sums = column_sums + (tl.sum(products, 0),)
    return column_sums


@triton.jit
def iterate_in_registers(
    rows_of, b, has_b, y_start, buffer, turn, gamma, b_j, inv_reg, damping_x, damping_y, unreachable, n_iter, error,
    active, limits, group, epoch, columns, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr, UNBALANCED: tl.constexpr, SYMMETRIC: tl.constexpr, ACCELERATE: tl.constexpr,
):  # fmt: skip
    """Iterate by multiply-adds, with K in registers, until the item ends or leaves the range."""
    SLAB: tl.constexpr = min(BLOCK_M, 32)
    SLABS: tl.constexpr = BLOCK_M // SLAB
    tl.store(buffer + columns, tl.where(b_j > 0, gamma, -INFINITY))
    tl.debug_barrier()
    weights_x, absorbed_x, u, weights_y, absorbed_y, v, kernel = build_in_registers(
        rows_of, b, has_b, y_start, buffer, inv_reg, ROWS, GROUPS, SLAB, SLABS
    )
    if ACCELERATE:
        for s in tl.static_range(SLABS):
            tl.store(buffer + WEIGHTS * BLOCK_M + s * SLAB + tl.arange(0, SLAB), weights_y[s])
        mixing, seen = active * 0, active * 0
    accepted = active
    while accepted > 0:
        if SYMMETRIC:
            u_next = ()
            for s in tl.static_range(SLABS):
                tl.store(buffer + s * SLAB + tl.arange(0, SLAB), v[s])
            tl.debug_barrier()
            for r in tl.static_range(GROUPS):
                rows = rows_of.begin + r * ROWS + tl.arange(0, ROWS)
                u_next = u_next + (tl.load(buffer + rows, mask=rows < rows_of.end, other=1),)
            column_sums, _, epoch = sum_over_programs(
                column_sums_in_registers(kernel, weights_x, u_next, GROUPS, SLABS),
                inv_reg, group, epoch, SLAB, BLOCK_M, MAX_PROGRAMS,
            )  # fmt: skip
            v_next, new_error = symmetric_scaling(column_sums, weights_y, v, absorbed_y, damping_y, SLABS, UNBALANCED)
            new_error += unreachable
            columns_in_range = accepted > 0
        else:
            u_next, column_sums, new_error = register_pass(
                kernel, weights_x, absorbed_x, u, weights_y, v, damping_x, GROUPS, SLABS, UNBALANCED
            )
            column_sums, new_error, epoch = sum_over_programs(
                column_sums, new_error + unreachable, group, epoch, SLAB, BLOCK_M, MAX_PROGRAMS
            )
            v_next, columns_in_range = column_scaling(
                column_sums, weights_y, absorbed_y, damping_y, SLAB, SLABS, UNBALANCED
            )
        active, error, accept = verdict(new_error, error, n_iter, limits, columns_in_range)
        if ACCELERATE:
            active = tl.maximum(active, mixing)
            v, way_on, mixing, seen = advance(
                v, v_next, buffer, mixing, seen, accept, (new_error < INFINITY) & columns_in_range, error, n_iter, limits,
                damping_x * damping_y, rows_of.m, SLAB, SLABS, BLOCK_M, RANGE_LOW, RANGE_HIGH, UNBALANCED,
            )  # fmt: skip
            if way_on >= ON:
                u = u_next
            accepted = tl.where(way_on >= BACK, 1, 0)
            n_iter += accepted
        else:
            if accept:
                u = u_next
                v = v_next
                n_iter += accepted
            accepted = accept.to(tl.int32)
    for r in tl.static_range(GROUPS):
        rows = rows_of.begin + r * ROWS + tl.arange(0, ROWS)
        tl.store(rows_of.state + (2 + turn) * rows_of.stride + rows, u[r], mask=rows < rows_of.end)
    for s in tl.static_range(SLABS):
        tl.store(buffer + s * SLAB + tl.arange(0, SLAB), v[s])
    tl.debug_barrier()
    return tl.load(buffer + columns), n_iter, error, active, epoch


@triton.jit
def column_scaling(
    column_sums, b, gamma, damping_y, WIDTH: tl.constexpr, COUNT: tl.constexpr, UNBALANCED: tl.constexpr
):
    """The next scalings of columns, a tuple of vectors, and whether they are in range."""
    v_next = ()
    out_of_range = tl.zeros([WIDTH], tl.int32)
    for s in tl.static_range(COUNT):
        sums = tl.where(b[s] > 0, column_sums[s], 1)
        scaled = scaling(sums, gamma[s], damping_y, UNBALANCED)
        out_of_range += tl.where(in_range(sums, scaled, UNBALANCED), 0, 1)
        v_next = v_next + (scaled,)
    return v_next, tl.max(out_of_range) == 0


# Symmetric problems ----------------------------------------------------------------------------------------------------


@triton.jit
def set_rows(rows_of, buffer, turn, BLOCK_N: tl.constexpr):
    """Give a program's rows the potentials in the buffer, as absorbed ones; -inf there marks an unreachable point."""
    T: tl.constexpr = buffer.dtype.element_ty
    tl.debug_barrier()
    for first in range(rows_of.begin, rows_of.end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        row_mask = rows < rows_of.end
        F = tl.load(buffer + rows, mask=row_mask, other=0)
        F = tl.where(F == -INFINITY, INFINITY, F)
        tl.store(rows_of.state + rows, F, mask=row_mask)
        tl.store(rows_of.state + rows_of.stride + rows, F, mask=row_mask)
        tl.store(rows_of.state + (2 + turn) * rows_of.stride + rows, tl.full([BLOCK_N], 1, T), mask=row_mask)
    tl.debug_barrier()


@triton.jit
def symmetric_scaling(column_sums, b, v, gamma, damping, COUNT: tl.constexpr, UNBALANCED: tl.constexpr):
    """The next scalings, a tuple of vectors, and the error of those before; infinite if the next ones leave the range."""
    v_next = ()
    error = tl.zeros_like(b[0])
    for s in tl.static_range(COUNT):
        sums = tl.where(b[s] > 0, column_sums[s], 1)
        updated = scaling(sums, gamma[s], damping, UNBALANCED)
        if UNBALANCED:
            ratio = v[s] / updated
        else:
            ratio = v[s] * sums
        scaled = tl.sqrt(v[s] * updated)
        both_in_range = in_range(sums, updated, UNBALANCED) & in_range(scaled, scaled, False)
        error += tl.where(both_in_range, row_errors(b[s], ratio), INFINITY)
        v_next = v_next + (scaled,)
    return v_next, tl.sum(error)


# The kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def exact_sums(
    rows_of, buffer, turn, gamma, b_j, inv_reg, damping_x, damping_y, rho_x, unreachable_y, n_iter, group, epoch, columns,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, MAX_PROGRAMS: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """The logarithms of the column sums after a row update in the log domain; the error and the unreachable mass before it.

    A symmetric problem needs no row update: its rows have the potentials of its columns.
    """
    if SYMMETRIC:
        tl.store(buffer + columns, gamma)
        set_rows(rows_of, buffer, turn, BLOCK_N)
        top, sums = exact_column_pass(rows_of, turn, 0, inv_reg, columns, BLOCK_N, BLOCK_M)
        column_logs, _, epoch = log_sum_over_programs(top, sums, inv_reg, group, epoch, BLOCK_M, MAX_PROGRAMS)
        ratio = tl.where(column_logs == -INFINITY, 1, tl.exp(gamma + damping_y * column_logs))
        errors = tl.where(column_logs == column_logs, row_errors(b_j, ratio), column_logs)
        error = tl.sum(tl.where(columns < rows_of.m, errors, 0)) + unreachable_y
        return column_logs, error, unreachable_y, epoch
    else:
        top, sums, part_error, unreachable = exact_pass(
            rows_of, turn, gamma, logarithm(b_j), inv_reg, damping_x, rho_x, tl.minimum(n_iter, 1), columns,
            BLOCK_N, BLOCK_M,
        )  # fmt: skip
        column_logs, error, epoch = log_sum_over_programs(
            top, sums, part_error + unreachable + unreachable_y, group, epoch, BLOCK_M, MAX_PROGRAMS
        )
        return column_logs, error, unreachable, epoch


@kernel
def sinkhorn_kernel(
    C,  # (rows of x, ld), contiguous; in the units of reg
    K,  # scratch: (rows of x, ld); not used if GROUPS > 0
    state,  # scratch: (4, rows of x); see Rows
    f,  # out: (rows of x,) potentials, in the units of reg; 0 on the padding
    g,  # out: (rows of y,) potentials, in the units of reg; 0 on the padding
    value,  # out: (B,) the regularised objective, in the units of reg
    linear,  # out: (B,) the transport cost <P, C>, in the units of reg
    error_out,  # out: (B,) the L1 error of the marginals, relative to a mass of one
    n_iter_out,  # out: (B,) int32
    a,  # (rows of x,) weights, which sum to one for each item; read if has_a
    b,  # (rows of y,) weights, which sum to one for each item; read if has_b
    init,  # (rows of y,) potentials to start from, in the units of reg; read if has_init
    x_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if x_addressing > 0
    y_offsets,  # (B,) lengths or (B + 1,) offsets in rows, int64; read if y_addressing > 0
    exchange,  # scratch: (items in flight, 2, programs, 2 * BLOCK_M + EXCHANGE_TAIL); see exchange.py
    buffers,  # scratch, a row for each program: BLOCK_M, where its threads exchange a vector; if ACCELERATE, memory_size()
    counters,  # int32, zero at the start; the first one stays zero; see exchange.py
    items, x_addressing, x_size, x_rows, y_addressing, y_size, y_rows, has_a, has_b, has_init, per_item, max_iter,
    reg_items,  # (B,) float64, in the units of the cost; read if per_item
    reg: tl.float64, rho_x: tl.float64, rho_y: tl.float64, tol: tl.float64, ld16, programs,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr, UNBALANCED: tl.constexpr, SYMMETRIC: tl.constexpr, ACCELERATE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Potentials f, g of every item, such that the plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / reg) solves

        min_P <P, C> + reg KL(P | a b^T) + rho_x KL(P 1 | a) + rho_y KL(P^T 1 | b)

    and its value, transport cost, marginal error and number of iterations. Infinite rho make a marginal strict.

    Grid: groups of `programs` <= MAX_PROGRAMS programs. A group takes items in turn, and its programs split the rows.
    Source: see the top of this file.

    If ACCELERATE, items that have many iterations ahead take mixed steps: see accelerated.py. Needs tol > 0.

    A tile (BLOCK_N, BLOCK_M) has whole rows: BLOCK_M is at least the longest y. If GROUPS > 0, K stays in registers,
    GROUPS x ROWS rows of it, as many as a program can have of an item; else it lies in memory.
    """
    T: tl.constexpr = C.dtype.element_ty
    group = group_of(exchange, counters, programs, BLOCK_M)
    if ACCELERATE:
        buffer = buffers + tl.program_id(0).to(tl.int64) * (VECTORS * BLOCK_M + NUMBERS)
    else:
        buffer = buffers + tl.program_id(0) * BLOCK_M
    epoch = 0
    ld = ld16 * 16
    columns = tl.arange(0, BLOCK_M)
    limits = Limits(tl.full([], tol, T), max_iter)
    relax_x, relax_y = tl.full([], rho_x, T), tl.full([], rho_y, T)

    item = tl.program_id(0) // programs
    while item < items:
        x_start, n, x_slot = segment(x_offsets, x_addressing, x_size, x_rows, item, items)
        y_start, m, y_slot = segment(y_offsets, y_addressing, y_size, y_rows, item, items)
        filled = (n > 0) & (m > 0)
        share = (n + programs - 1) // programs
        begin = group.rank * share
        end = tl.minimum(n, begin + share)
        column_mask = columns < m
        b_j = load_weights(b, has_b, y_start + columns, column_mask, m)
        item_reg = load_reg(reg, reg_items, per_item, item, T)
        inv_reg = 1 / item_reg
        damping_x, damping_y = damping_exponent(item_reg, relax_x), damping_exponent(item_reg, relax_y)
        cost_at = C + x_start * ld
        kernel_at = K + x_start * ld
        state_at = state + x_start

        gamma = tl.load(init + y_start + columns, mask=only_if(has_init, column_mask), other=0) * inv_reg
        if T == tl.float64:
            largest = 1e13
        else:
            largest = 1e5
        gamma = tl.where(tl.abs(gamma) <= largest, gamma, float("nan"))
        part_b = b_j  # the weights of columns that take part; all are loaded again where needed, to save registers
        unreachable_y = tl.sum(b_j * 0)
        v = tl.zeros([BLOCK_M], T) + 1
        n_iter = item * 0
        turn = n_iter.to(tl.int64)  # which of the two vectors of scalings is the last
        error = tl.sum(v * 0)
        # 2 before the first iteration, 1 while there are more to make, 0 when done. (Loops run on numbers that their bodies
        # read: Triton 3.6 cannot compile loops on truth values.)
        active = filled.to(tl.int32) * 2
        while active > 0:
            # A fence for the compiler. It cannot know that this number is 0, so it has to compute addresses inside this
            # loop. Without it, it keeps the addresses of a whole tile in registers through the inner loops.
            hidden_zero = tl.load(counters, volatile=True)
            begin += hidden_zero
            m += hidden_zero
            y_start += hidden_zero
            rows_of = Rows(cost_at, ld, state_at, x_rows, a, has_a, x_start, n, begin, end, m)
            b_j = load_weights(b, has_b, y_start + columns, columns < m, m)
            gamma += logarithm(v)
            v = tl.zeros([BLOCK_M], T) + 1
            column_logs, error, unreachable, epoch = exact_sums(
                rows_of, buffer, turn, gamma, b_j, inv_reg, damping_x, damping_y, relax_x, unreachable_y, n_iter, group,
                epoch, columns, BLOCK_N, BLOCK_M, MAX_PROGRAMS, SYMMETRIC,
            )  # fmt: skip
            first = (active == 2) & (error == error)
            active = tl.where(first | (should_stop(error, n_iter, limits) == 0), 1, 0)
            if active > 0:
                part_b = tl.where(column_logs > -INFINITY, b_j, 0)
                unreachable_y = unreachable_mass(b_j, column_logs == -INFINITY, relax_y)
                if SYMMETRIC:
                    unreachable_y *= 2
                    unreachable = unreachable_y
                    gamma = tl.where(part_b > 0, (gamma - damping_y * column_logs) / 2, 0)
                    tl.store(buffer + columns, tl.where((part_b > 0) | (b_j == 0), gamma, -INFINITY))
                    set_rows(rows_of, buffer, turn, BLOCK_N)
                else:
                    unreachable_y = tl.where(group.rank == 0, unreachable_y, 0)
                    unreachable += unreachable_y
                    gamma = tl.where(part_b > 0, -damping_y * column_logs, 0)
                n_iter += 1
                if GROUPS > 0:
                    v, n_iter, error, active, epoch = iterate_in_registers(
                        rows_of, b, has_b, y_start, buffer, turn, gamma, part_b, inv_reg, damping_x, damping_y,
                        unreachable, n_iter, error, active, limits, group, epoch, columns,
                        BLOCK_M, ROWS, GROUPS, MAX_PROGRAMS, UNBALANCED, SYMMETRIC, ACCELERATE,
                    )  # fmt: skip
                else:
                    v, turn, n_iter, error, active, epoch = iterate_in_memory(
                        rows_of, kernel_at, buffer, turn, gamma, part_b, v, inv_reg, damping_x, damping_y, unreachable,
                        n_iter, error, active, limits, group, epoch, columns,
                        BLOCK_N, BLOCK_M, MAX_PROGRAMS, UNBALANCED, SYMMETRIC, ACCELERATE, STAGES,
                    )  # fmt: skip
                tl.debug_barrier()

        rows_of = Rows(cost_at, ld, state_at, x_rows, a, has_a, x_start, n, begin, end, m)
        broken = error != error
        b_j = load_weights(b, has_b, y_start + columns, column_mask, m)
        unreached_y = tl.where(column_mask, unreached_potential(relax_y, inv_reg), 0)
        G = tl.where(part_b > 0, gamma + logarithm(v), unreached_y)
        if SYMMETRIC:
            tl.store(buffer + columns, G)
            set_rows(rows_of, buffer, turn, BLOCK_N)
        reached = tl.where(part_b > 0, 1, 0)
        if filled & (tl.max(tl.where(column_mask & (b_j == 0), 1, 0)) > 0):
            top, sums = exact_column_pass(
                rows_of, turn, unreached_potential(relax_x, inv_reg), inv_reg, columns, BLOCK_N, BLOCK_M
            )
            column_logs, _, epoch = log_sum_over_programs(top, sums, inv_reg, group, epoch, BLOCK_M, MAX_PROGRAMS)
            massless = tl.where(column_mask & (b_j == 0) & (column_logs > -INFINITY), 1, 0)
            G = tl.where(massless > 0, -damping_y * column_logs, G)
            reached += massless
            if SYMMETRIC:
                tl.store(buffer + columns, G)
                set_rows(rows_of, buffer, turn, BLOCK_N)
        shift = gauge(G, b_j, UNBALANCED or SYMMETRIC)
        mass, transport, dual_x = result_pass(
            rows_of, turn, G, b_j, shift, item_reg, damping_x, relax_x, filled, broken, f, columns,
            BLOCK_N, UNBALANCED, SYMMETRIC,
        )  # fmt: skip
        clear_padding(f, x_start, n, x_slot, group.rank, programs, BLOCK_N)
        sums = tl.where(columns == 0, mass, tl.where(columns == 1, transport, tl.where(columns == 2, dual_x, 0)))
        totals, _, epoch = sum_over_programs((sums,), mass, group, epoch, BLOCK_M, BLOCK_M, MAX_PROGRAMS)
        store_results(
            item, group.rank, columns, y_start, m, y_slot, filled, broken, G, b_j, totals[0], shift * reached, item_reg, relax_y,
            n_iter, error, g, value, linear, error_out, n_iter_out, UNBALANCED,
        )  # fmt: skip
        item += tl.num_programs(0) // programs
