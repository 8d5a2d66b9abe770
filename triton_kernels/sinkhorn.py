"""Sinkhorn's iterations: multiply-adds on an absorbed kernel matrix, exact in the log domain wherever floats run out.

With potentials phi, gamma (in units of reg) absorbed, K_ij = exp(phi_i + gamma_j - C_ij / reg), an iteration is

    u = a / (K w) a^-1,   w = b v,   v = 1 / (K^T (a u)),

and phi + log u, gamma + log v are the potentials. While u, v and the sums stay within exp(+-20), what K has lost below
2^-126 is far under the rounding of a sum. An iteration that would leave that range is not made: the same iteration is
made in the log domain from the stored cost, its potentials are absorbed, and K is built anew. The first iteration of
every item is such a one. So the result is that of the log domain, at the price of multiply-adds.

An item belongs to one program, or is split by rows among several that run at the same time and exchange column sums.
K stays in registers for all iterations if a program's rows fit; else an iteration passes once over K in memory.
Every item stops by itself: when its marginal error is at most `tol`, at `max_iter`, or when it is not a number.

If both sides are the same points with the same weights, so that C is symmetric, so is the iteration: v = w and the next v is
sqrt(v / (K^T (a v))), the mean of the potential and its update. Then only column sums are made, half of the work.

Points without mass, and points that nothing reaches (all that have mass across are at infinite cost), take no part: their
rows and columns of K are zero, and their sums count as one. While the iterations last, the potential of a row that nothing
reaches is infinite; the last pass puts in its place what stands for it (`unreached_potential`), and finds the potentials of
points without mass from those across.
"""

import triton
import triton.language as tl

from .addressing import load_reg, load_weights, only_if, segment
from .exchange import EXCHANGE_TAIL, log_sum_over_programs, sum_over_programs
from .math import (
    INFINITY,
    bounded,
    damping,
    finite_top,
    logarithm,
    reciprocal,
    unreached_potential,
    worth,
)
from .runtime import kernel

# Updates are multiply-adds while all scalings and sums stay within exp(+-20): see sinkhorn.py.
NEAR_LOW = tl.constexpr(2.0611536e-9)
NEAR_HIGH = tl.constexpr(4.8516520e8)

# Updates ---------------------------------------------------------------------------------------------------------------


@triton.jit
def exact_rows(cost, inside, G, log_b, per_reg, keep):
    """The row update in the log domain: potentials (N,) over reg from `cost` (N, M) and `G` (M,); inf if unreached."""
    H = tl.where(inside, (G + log_b)[None, :] - cost * per_reg, -INFINITY)
    top = finite_top(tl.max(H, 1))
    sums = tl.sum(tl.exp(H - top[:, None]), 1)
    return tl.where(sums == 0, INFINITY, -keep * (top + logarithm(sums)))


@triton.jit
def exact_columns(cost, inside, F, log_a, per_reg):
    """The tile's part of the column sums: their largest exponents and the sums over them, (M,) each."""
    H = tl.where(inside, (F + log_a)[:, None] - cost * per_reg, -INFINITY)
    top = tl.max(H, 0)
    return top, tl.sum(tl.exp(H - finite_top(top)[None, :]), 0)


@triton.jit
def kernel_tile(cost, inside, F, G, per_reg):
    """exp(F + G - C / reg), 0 outside. (Where one of the points has no mass nothing bounds it: leave it out.)"""
    return tl.exp(tl.where(inside, G[None, :] - (cost * per_reg - F[:, None]), -INFINITY))


@triton.jit
def scaling(sums, absorbed, keep, UNBALANCED: tl.constexpr):
    """The scaling that an update gives for the sums of K: 1 / sum, or its relaxed form."""
    if UNBALANCED:
        return tl.exp(-(1 - keep) * absorbed - keep * tl.log(sums))
    else:
        return reciprocal(sums)


@triton.jit
def row_scaling(row_sums, u, phi, keep_x, UNBALANCED: tl.constexpr):
    """The next scalings of rows, the ratio of the old ones to them, and whether they stay in range."""
    u_next = scaling(row_sums, phi, keep_x, UNBALANCED)
    if UNBALANCED:
        ratio = u / u_next
    else:
        ratio = u * row_sums
    return u_next, ratio, in_range(row_sums, u_next, UNBALANCED)


@triton.jit
def in_range(sums, scalings, UNBALANCED: tl.constexpr):
    """Whether sums, and so their reciprocals, or also the scalings if relaxed, are within exp(+-20)."""
    if UNBALANCED:
        low, high = tl.minimum(sums, scalings), tl.maximum(sums, scalings)
    else:
        low, high = sums, sums
    return (low >= NEAR_LOW) & (high <= NEAR_HIGH)


@triton.jit
def row_errors(a, ratio):
    """a |u / u' - 1| of every row, 0 for rows without mass."""
    return tl.where(a > 0, a * tl.abs(ratio - 1), a)


@triton.jit
def or_unreached(potentials, unreached):
    """The potentials, with `unreached` where they are infinite."""
    return tl.where(potentials == INFINITY, unreached, potentials)


@triton.jit
def lost(weights, unreached, rho):
    """The weight of points that have to give or take it, but that nothing reaches."""
    return tl.where(rho == INFINITY, tl.sum(tl.where((weights > 0) & unreached, weights, 0)), 0)


@triton.jit
def should_stop(error, n_iter, tol, max_iter):
    """Whether an item ends: good enough, out of iterations, or not a number, which never gets better."""
    return ((error <= tol) & (tol > 0)) | (n_iter >= max_iter) | (error != error)


@triton.jit
def verdict(error, reached, made, tol, max_iter, columns_near):
    """After a row update by multiply-adds: iterations ahead (0 or 1), the error so far, and whether to go on so.

    The rows have left the range if the error is not finite; their true error is then for an exact pass to find.
    """
    rows_near = error < INFINITY
    ends = rows_near & should_stop(error, made, tol, max_iter)
    return tl.where(ends, 0, 1), tl.where(rows_near, error, reached), rows_near & columns_near & (ends == 0)


# Results ---------------------------------------------------------------------------------------------------------------


@triton.jit
def gauge(G, b, FIXED: tl.constexpr):
    """What moves from G to F, so that <b, g> = 0 if the problem is balanced; nothing if FIXED."""
    if FIXED:
        return tl.sum(b * 0)
    else:
        return tl.sum(tl.where(b > 0, b * G, 0))


@triton.jit
def store_results(
    item, rank, columns, y_start, m, y_slot, filled, broken, G, b, sums, shift, reg, rho_y, n_iter, reached,
    g, value, linear, error, n_iter_out, UNBALANCED: tl.constexpr,
):  # fmt: skip
    """What one program writes of an item: g and the numbers. `sums` holds mass, transport cost and worth of x."""
    T: tl.constexpr = g.dtype.element_ty
    nan = tl.full([], float("nan"), T)
    if rank == 0:
        mass = tl.sum(tl.where(columns == 0, sums, 0))
        transport = tl.sum(tl.where(columns == 1, sums, 0))
        worth_x = tl.sum(tl.where(columns == 2, sums, 0))
        potential = reg * (G - shift)
        worth_y = tl.sum(tl.where(b > 0, b * worth(potential, rho_y, UNBALANCED), 0))
        total = worth_x + worth_y - reg * (mass - 1)
        bad = filled & (broken | (total != total))
        tl.store(value + item, tl.where(bad, nan, tl.where(filled, total, 0)))
        tl.store(linear + item, tl.where(bad, nan, tl.where(filled, transport, 0)))
        tl.store(error + item, tl.where(bad, nan, tl.where(filled, reached, 0)))
        tl.store(n_iter_out + item, tl.where(bad, 0, n_iter))
        potential = tl.where(columns < m, tl.where(bad, nan, potential), 0)
        tl.store(g + y_start + columns, tl.where(filled, potential, 0), mask=columns < y_slot)
        row = columns + columns.shape[0]
        while tl.min(row, 0) < y_slot:  # the slot may be longer than the block
            tl.store(g + y_start + row, tl.zeros_like(potential), mask=row < y_slot)
            row += columns.shape[0]


@triton.jit
def clear_rows(f, x_start, begin, end, rank, programs, BLOCK_N: tl.constexpr):
    """Zeros for the padding of an item, its programs taking turns."""
    row = begin + rank * BLOCK_N + tl.arange(0, BLOCK_N)
    while tl.min(row, 0) < end:
        tl.store(f + x_start + row, tl.zeros([BLOCK_N], f.dtype.element_ty), mask=row < end)
        row += programs * BLOCK_N


# Passes over a program's rows ------------------------------------------------------------------------------------------
#
# `at` is the item's cost, `state` its rows of (4, x_rows): absorbed potentials, those that the last exact pass has made,
# and the scalings of two iterations, taking turns.


@triton.jit
def exact_pass(
    at, ld, state, x_rows, turn, a, has_a, x_start, n, begin, end, m, gamma, log_b, per_reg, keep_x, relax_x, made,
    columns, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One row update in the log domain: its part of the column sums as (top, sums), of the marginal error, of what is lost.

    The error is NaN if any number of the item is, be it at a point without mass.
    """
    T: tl.constexpr = at.dtype.element_ty
    top = tl.full([BLOCK_M], -INFINITY, T)
    sums = tl.zeros([BLOCK_M], T)
    error = tl.zeros([BLOCK_N], T)
    missing = tl.sum(error)
    for first in range(begin, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        mine = rows < end
        inside = mine[:, None] & (columns < m)[None, :]
        cost = tl.load(at + rows.to(tl.int64)[:, None] * ld + columns[None, :], mask=inside, other=0)
        a_i = load_weights(a, has_a, x_start + rows, mine, n)
        F = tl.where(mine, exact_rows(cost, inside, gamma, log_b, per_reg, keep_x), 0)
        tl.store(state + x_rows + rows, F, mask=mine)
        before = load_potentials(state, x_rows, turn, rows, only_if(made, mine))
        ratio = tl.where(F == INFINITY, 1, tl.exp(before - F))
        error += tl.where(F == F, row_errors(a_i, ratio), F)
        missing += lost(a_i, F == INFINITY, relax_x)
        tile_top, tile_sums = exact_columns(cost, inside, or_unreached(F, 0), logarithm(a_i), per_reg)
        top, sums = more_columns(top, sums, tile_top, tile_sums)
    return top, sums, tl.sum(error), missing


@triton.jit
def more_columns(top, sums, tile_top, tile_sums):
    """Column sums with those of a tile."""
    higher = tl.maximum(top, tile_top)
    base = finite_top(higher)
    return higher, sums * tl.exp(top - base) + tile_sums * tl.exp(tile_top - base)


@triton.jit
def load_potentials(state, x_rows, turn, rows, known):
    """The potentials of rows: those absorbed and the logarithms of the scalings since; 0 unless `known`.

    (A scaling of zero marks a row that takes no part.)
    """
    absorbed = tl.load(state + rows, mask=known, other=0)
    scalings = tl.load(state + (2 + turn) * x_rows + rows, mask=known, other=1)
    return absorbed + tl.where(scalings == 0, 0, logarithm(scalings))


@triton.jit
def late_columns(
    at, ld, state, x_rows, turn, a, has_a, x_start, n, begin, end, m, unreached, per_reg,
    columns, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program's part of the column sums with the last potentials of its rows, as (top, sums)."""
    T: tl.constexpr = at.dtype.element_ty
    top = tl.full([BLOCK_M], -INFINITY, T)
    sums = tl.zeros([BLOCK_M], T)
    for first in range(begin, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        mine = rows < end
        inside = mine[:, None] & (columns < m)[None, :]
        cost = tl.load(at + rows.to(tl.int64)[:, None] * ld + columns[None, :], mask=inside, other=0)
        a_i = load_weights(a, has_a, x_start + rows, mine, n)
        F = or_unreached(load_potentials(state, x_rows, turn, rows, mine), unreached)
        tile_top, tile_sums = exact_columns(cost, inside, F, logarithm(a_i), per_reg)
        top, sums = more_columns(top, sums, tile_top, tile_sums)
    return top, sums


@triton.jit
def last_pass(
    at, ld, state, x_rows, turn, a, has_a, x_start, n, begin, end, m, G, b_j, shift, epsilon, keep_x, relax_x, filled,
    broken, f, columns, BLOCK_N: tl.constexpr, UNBALANCED: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Write f; sum the mass of the plan, its transport cost, and what the potentials of x are worth."""
    T: tl.constexpr = at.dtype.element_ty
    nan = tl.full([], float("nan"), T)
    per_reg = 1 / epsilon
    mass = tl.zeros([BLOCK_N], T)
    transport = tl.zeros([BLOCK_N], T)
    total = tl.zeros([BLOCK_N], T)
    for first in range(begin, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        mine = rows < end
        a_i = load_weights(a, has_a, x_start + rows, mine, n)
        inside = mine[:, None] & ((columns < m) & (b_j > 0))[None, :]
        cost = tl.load(at + rows.to(tl.int64)[:, None] * ld + columns[None, :], mask=inside, other=0)
        F = load_potentials(state, x_rows, turn, rows, only_if(filled.to(tl.int32), mine))
        if not SYMMETRIC and tl.min(tl.where(mine, a_i, 1)) == 0:
            F = tl.where(mine & (a_i == 0), exact_rows(cost, inside, G, logarithm(b_j), per_reg, keep_x), F)
        F = or_unreached(F, unreached_potential(relax_x, per_reg))
        P = (a_i[:, None] * b_j[None, :]) * bounded(kernel_tile(cost, inside & (a_i > 0)[:, None], F, G, per_reg))
        mass += tl.sum(P, 1)
        transport += tl.sum(tl.where(P > 0, P * cost, 0), 1)
        potential = epsilon * (F + shift)
        total += tl.where(a_i > 0, a_i * worth(potential, relax_x, UNBALANCED), 0)
        tl.store(f + x_start + rows, tl.where(filled, tl.where(broken, nan, potential), 0), mask=mine)
    return tl.sum(mass), tl.sum(transport), tl.sum(total)


@triton.jit
def build_pass(
    at, kernel_at, ld, state, x_rows, turn, a, has_a, x_start, n, begin, end, m, gamma, b_j, per_reg,
    columns, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Absorb what the exact pass has made, and write K."""
    T: tl.constexpr = at.dtype.element_ty
    for first in range(begin, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        mine = rows < end
        place = rows.to(tl.int64)[:, None] * ld + columns[None, :]
        inside = mine[:, None] & (columns < m)[None, :]
        cost = tl.load(at + place, mask=inside, other=0)
        a_i = load_weights(a, has_a, x_start + rows, mine, n)
        phi = tl.load(state + x_rows + rows, mask=mine, other=0)
        part = (a_i > 0) & (phi < INFINITY)
        tl.store(state + rows, phi, mask=mine)
        tl.store(state + (2 + turn) * x_rows + rows, tl.where(part, tl.full([BLOCK_N], 1, T), 0), mask=mine)
        tile = kernel_tile(cost, part[:, None] & (b_j > 0)[None, :], phi, gamma, per_reg)
        tl.store(kernel_at + place, tile, mask=mine[:, None] & (columns < ld)[None, :])
    tl.debug_barrier()


@triton.jit
def scaling_pass(
    kernel_at, ld, state, x_rows, turn, a, has_a, x_start, n, begin, end, w, keep_x,
    columns, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNBALANCED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row update by multiply-adds: its part of the column sums, and of the marginal error (see row_scaling)."""
    T: tl.constexpr = kernel_at.dtype.element_ty
    partial = tl.zeros([BLOCK_N, BLOCK_M], T)
    error = tl.zeros([BLOCK_N], T)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = first + tl.arange(0, BLOCK_N)
        mine = rows < end
        place = rows.to(tl.int64)[:, None] * ld + columns[None, :]
        tile = tl.load(kernel_at + place, mask=mine[:, None] & (columns < ld)[None, :], other=0)
        a_i = load_weights(a, has_a, x_start + rows, mine, n)
        u = tl.load(state + (2 + turn) * x_rows + rows, mask=mine, other=0)
        part = u > 0
        if UNBALANCED:
            phi = tl.load(state + rows, mask=part, other=0)
        else:
            phi = u  # not used
        row_sums = tl.where(part, tl.sum(tile * w[None, :], 1), 1)
        u_next, ratio, near = row_scaling(row_sums, u, phi, keep_x, UNBALANCED)
        error += tl.where(part, tl.where(near, row_errors(a_i, ratio), INFINITY), 0)
        u_next = tl.where(part, u_next, 0)
        tl.store(state + (3 - turn) * x_rows + rows, u_next, mask=mine)
        partial += tile * (a_i * u_next)[:, None]
    return tl.sum(partial, 0), tl.sum(error)


# K in registers --------------------------------------------------------------------------------------------------------
#
# The tile of a program is cut into GROUPS x SLABS patches of ROWS x SLAB, one tensor each. A thread has a few rows and
# columns of every patch, so that it holds a fraction of the row and column vectors, and most of a sum is its own.


@triton.jit
def build_patches(
    at, ld, state, x_rows, a, has_a, x_start, n, begin, end, b, has_b, y_start, m, desk, per_reg,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Absorb what the exact pass has made, and build K: weights, absorbed potentials and scalings of both sides, K.

    The weights are zero, and the potentials, of points that take no part; on the desk such a column has -inf.
    """
    T: tl.constexpr = at.dtype.element_ty
    weights_x, absorbed_x, u, weights_y, absorbed_y, v, kernel = (), (), (), (), (), (), ()
    for s in tl.static_range(SLABS):
        columns = s * SLAB + tl.arange(0, SLAB)
        gamma = tl.load(desk + columns)
        part = gamma > -INFINITY
        weights_y = weights_y + (load_weights(b, has_b, y_start + columns, part, m),)
        absorbed_y = absorbed_y + (tl.where(part, gamma, 0),)
        v = v + (tl.zeros([SLAB], T) + 1,)
    for r in tl.static_range(GROUPS):
        rows = begin + r * ROWS + tl.arange(0, ROWS)
        mine = rows < end
        a_i = load_weights(a, has_a, x_start + rows, mine, n)
        phi = tl.load(state + x_rows + rows, mask=mine, other=0)
        tl.store(state + rows, phi, mask=mine)
        a_i = tl.where(phi < INFINITY, a_i, 0)
        phi = tl.where(a_i > 0, phi, 0)
        for s in tl.static_range(SLABS):
            columns = s * SLAB + tl.arange(0, SLAB)
            inside = mine[:, None] & (columns < m)[None, :]
            cost = tl.load(at + rows[:, None] * ld + columns[None, :], mask=inside, other=0)
            both = (a_i > 0)[:, None] & (weights_y[s] > 0)[None, :]
            kernel = kernel + (kernel_tile(cost, both, phi, absorbed_y[s], per_reg),)
        weights_x = weights_x + (a_i,)
        absorbed_x = absorbed_x + (phi,)
        u = u + (tl.zeros([ROWS], T) + 1,)
    return weights_x, absorbed_x, u, weights_y, absorbed_y, v, kernel


@triton.jit
def patch_pass(
    kernel, a, phi, u, b, v, keep_x, GROUPS: tl.constexpr, SLABS: tl.constexpr, UNBALANCED: tl.constexpr,
):  # fmt: skip
    """One row update by multiply-adds: the next scalings, and this program's part of column sums and marginal error."""
    u_next, column_sums = (), ()
    error = tl.zeros_like(a[0])
    for r in tl.static_range(GROUPS):
        products = kernel[r * SLABS] * (b[0] * v[0])[None, :]
        for s in tl.static_range(1, SLABS):
            products += kernel[r * SLABS + s] * (b[s] * v[s])[None, :]
        row_sums = tl.where(a[r] > 0, tl.sum(products, 1), 1)
        scaled, ratio, near = row_scaling(row_sums, u[r], phi[r], keep_x, UNBALANCED)
        error += tl.where(near, row_errors(a[r], ratio), INFINITY)
        u_next = u_next + (scaled,)
    for s in tl.static_range(SLABS):
        products = kernel[s] * (a[0] * u_next[0])[:, None]
        for r in tl.static_range(1, GROUPS):
            products += kernel[r * SLABS + s] * (a[r] * u_next[r])[:, None]
        column_sums = column_sums + (tl.sum(products, 0),)
    return u_next, column_sums, tl.sum(error)


@triton.jit
def column_scaling(column_sums, b, gamma, keep_y, WIDTH: tl.constexpr, COUNT: tl.constexpr, UNBALANCED: tl.constexpr):
    """The next scalings of columns, a tuple of vectors, and whether they stay in range."""
    v_next = ()
    far = tl.zeros([WIDTH], tl.int32)
    for s in tl.static_range(COUNT):
        sums = tl.where(b[s] > 0, column_sums[s], 1)
        scaled = scaling(sums, gamma[s], keep_y, UNBALANCED)
        far += tl.where(in_range(sums, scaled, UNBALANCED), 0, 1)
        v_next = v_next + (scaled,)
    return v_next, tl.max(far) == 0


# Symmetric problems ----------------------------------------------------------------------------------------------------


@triton.jit
def put_rows(desk, state, x_rows, turn, begin, end, BLOCK_N: tl.constexpr):
    """Give a program's rows the potentials on its desk, as absorbed ones; -inf there marks a point that nothing reaches."""
    T: tl.constexpr = desk.dtype.element_ty
    tl.debug_barrier()
    for first in range(begin, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        mine = rows < end
        F = tl.load(desk + rows, mask=mine, other=0)
        F = tl.where(F == -INFINITY, INFINITY, F)
        tl.store(state + rows, F, mask=mine)
        tl.store(state + x_rows + rows, F, mask=mine)
        tl.store(state + (2 + turn) * x_rows + rows, tl.full([BLOCK_N], 1, T), mask=mine)
    tl.debug_barrier()


@triton.jit
def symmetric_patches(kernel, a, u, GROUPS: tl.constexpr, SLABS: tl.constexpr):
    """K^T (a u) of the patches: this program's part of the column sums."""
    column_sums = ()
    for s in tl.static_range(SLABS):
        products = kernel[s] * (a[0] * u[0])[:, None]
        for r in tl.static_range(1, GROUPS):
            products += kernel[r * SLABS + s] * (a[r] * u[r])[:, None]
        column_sums = column_sums + (tl.sum(products, 0),)
    return column_sums


@triton.jit
def symmetric_pass(
    kernel_at, ld, desk, a, has_a, x_start, n, begin, end, columns,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """K^T (a u) with K in memory and u on the desk: this program's part of the column sums."""
    T: tl.constexpr = kernel_at.dtype.element_ty
    partial = tl.zeros([BLOCK_N, BLOCK_M], T)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = first + tl.arange(0, BLOCK_N)
        mine = rows < end
        place = rows.to(tl.int64)[:, None] * ld + columns[None, :]
        tile = tl.load(kernel_at + place, mask=mine[:, None] & (columns < ld)[None, :], other=0)
        a_i = load_weights(a, has_a, x_start + rows, mine, n)
        partial += tile * (a_i * tl.load(desk + rows, mask=mine, other=0))[:, None]
    return tl.sum(partial, 0)


@triton.jit
def symmetric_scaling(
    column_sums, b, v, gamma, keep, WIDTH: tl.constexpr, COUNT: tl.constexpr, UNBALANCED: tl.constexpr
):
    """The next scalings, a tuple of vectors, and the marginal error of those before, infinite if the next leave the range."""
    v_next = ()
    error = tl.zeros_like(b[0])
    for s in tl.static_range(COUNT):
        sums = tl.where(b[s] > 0, column_sums[s], 1)
        updated = scaling(sums, gamma[s], keep, UNBALANCED)
        if UNBALANCED:
            ratio = v[s] / updated
        else:
            ratio = v[s] * sums
        scaled = tl.sqrt(v[s] * updated)
        near = in_range(sums, updated, UNBALANCED) & in_range(scaled, scaled, False)
        error += tl.where(near, row_errors(b[s], ratio), INFINITY)
        v_next = v_next + (scaled,)
    return v_next, tl.sum(error)


# The kernel ------------------------------------------------------------------------------------------------------------


@kernel
def sinkhorn_kernel(
    C, K, state, f, g, value, linear, error, n_iter, a, b, init, x_layout, y_layout, exchange, desks, counters,
    items, x_mode, x_size, x_rows, y_mode, y_size, y_rows, has_a, has_b, has_init, per_item, max_iter,
    reg_items, reg: tl.float64, rho_x: tl.float64, rho_y: tl.float64, tol: tl.float64, ld16,
    programs, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, PEERS: tl.constexpr,
    UNBALANCED: tl.constexpr, SYMMETRIC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Solve a batch: C (rows of x, ld) costs; f, a (rows of x,), g, b, init (rows of y,); the others (B,).

    A tile (BLOCK_N, BLOCK_M) has whole rows: BLOCK_M is at least the longest y. If GROUPS > 0, K stays in registers,
    GROUPS x ROWS rows of it, as many as a program can have of an item; else it lies in memory (rows of x, ld). `state`
    (4, rows of x), `exchange` and `desks` are scratch memory, `counters` zeros, ld is 16 `ld16`. An item has `programs`
    <= PEERS programs.
    """
    T: tl.constexpr = C.dtype.element_ty
    rank = tl.program_id(0) % programs
    group = tl.program_id(0) // programs
    parts = exchange + group * (2 * programs * (2 * BLOCK_M + EXCHANGE_TAIL))
    desk = desks + tl.program_id(0) * BLOCK_M
    counter = counters + group
    nothing = counters + tl.num_programs(0)
    epoch = 0
    ld = ld16 * 16
    columns = tl.arange(0, BLOCK_M)
    SLAB: tl.constexpr = min(BLOCK_M, 32)
    SLABS: tl.constexpr = BLOCK_M // SLAB
    tolerance = tl.full([], tol, T)
    relax_x, relax_y = tl.full([], rho_x, T), tl.full([], rho_y, T)

    item = group
    while item < items:
        x_start, n, x_slot = segment(x_layout, x_mode, x_size, x_rows, item, items)
        y_start, m, y_slot = segment(y_layout, y_mode, y_size, y_rows, item, items)
        filled = (n > 0) & (m > 0)
        share = (n + programs - 1) // programs
        begin = rank * share
        end = tl.minimum(n, begin + share)
        real = columns < m
        b_j = load_weights(b, has_b, y_start + columns, real, m)
        epsilon = load_reg(reg, reg_items, per_item, item, T)
        per_reg = 1 / epsilon
        keep_x, keep_y = damping(epsilon, relax_x), damping(epsilon, relax_y)
        cost_at = C + x_start * ld
        kernel_at = K + x_start * ld
        rows_at = state + x_start

        gamma = tl.load(init + y_start + columns, mask=only_if(has_init, real), other=0) * per_reg
        if T == tl.float64:
            farthest = 1e13
        else:
            farthest = 1e5
        gamma = tl.where(tl.abs(gamma) <= farthest, gamma, float("nan"))
        part_b = b_j  # the weights of columns that take part; all are loaded again where needed, to save registers
        missing_y = tl.sum(b_j * 0)
        v = tl.zeros([BLOCK_M], T) + 1
        made = item * 0
        turn = made.to(tl.int64)  # which of the two vectors of scalings is the last
        reached = tl.sum(v * 0)
        # 2 before the first iteration, 1 while there are more to make, 0 when done. (Loops run on numbers that their bodies
        # read: Triton 3.6 cannot compile loops on truth values.)
        ahead = filled.to(tl.int32) * 2
        while ahead > 0:
            # Unknown to the compiler this adds 0: else it would keep the addresses of a whole tile through the loops within.
            zero = tl.load(nothing, volatile=True)
            begin += zero
            m += zero
            y_start += zero
            b_j = load_weights(b, has_b, y_start + columns, columns < m, m)
            gamma += logarithm(v)
            v = tl.zeros([BLOCK_M], T) + 1
            if SYMMETRIC:
                tl.store(desk + columns, gamma)
                put_rows(desk, rows_at, x_rows, turn, begin, end, BLOCK_N)
                top, sums = late_columns(
                    cost_at, ld, rows_at, x_rows, turn, a, has_a, x_start, n, begin, end, m, 0, per_reg,
                    columns, BLOCK_N, BLOCK_M,
                )  # fmt: skip
                missing = missing_y
                column_logs, _, epoch = log_sum_over_programs(
                    top, sums, per_reg, parts, counter, epoch, rank, programs, BLOCK_M, PEERS
                )
                ratio = tl.where(column_logs == -INFINITY, 1, tl.exp(gamma + keep_y * column_logs))
                errors = tl.where(column_logs == column_logs, row_errors(b_j, ratio), column_logs)
                off = tl.sum(tl.where(real, errors, 0))
                reached = off + missing
            else:
                top, sums, off, missing = exact_pass(
                    cost_at, ld, rows_at, x_rows, turn, a, has_a, x_start, n, begin, end, m, gamma, logarithm(b_j),
                    per_reg, keep_x, relax_x, tl.minimum(made, 1), columns, BLOCK_N, BLOCK_M,
                )  # fmt: skip
                column_logs, reached, epoch = log_sum_over_programs(
                    top, sums, off + missing + missing_y, parts, counter, epoch, rank, programs, BLOCK_M, PEERS
                )
            goes_on = (ahead == 2) & (reached == reached)
            ahead = tl.where(goes_on | (should_stop(reached, made, tolerance, max_iter) == 0), 1, 0)
            if ahead > 0:
                part_b = tl.where(column_logs > -INFINITY, b_j, 0)
                missing_y = lost(b_j, column_logs == -INFINITY, relax_y)
                if SYMMETRIC:
                    missing_y *= 2
                    missing = missing_y
                    gamma = tl.where(part_b > 0, (gamma - keep_y * column_logs) / 2, 0)
                    tl.store(desk + columns, tl.where((part_b > 0) | (b_j == 0), gamma, -INFINITY))
                    put_rows(desk, rows_at, x_rows, turn, begin, end, BLOCK_N)
                else:
                    missing_y = tl.where(rank == 0, missing_y, 0)
                    missing += missing_y
                    gamma = tl.where(part_b > 0, -keep_y * column_logs, 0)
                made += 1
                near = ahead
                if GROUPS > 0:
                    tl.store(desk + columns, tl.where(part_b > 0, gamma, -INFINITY))
                    tl.debug_barrier()
                    weights_x, absorbed_x, u, weights_y, absorbed_y, slab_v, kernel = build_patches(
                        cost_at, ld, rows_at, x_rows, a, has_a, x_start, n, begin, end, b, has_b, y_start, m, desk,
                        per_reg, ROWS, GROUPS, SLAB, SLABS,
                    )  # fmt: skip
                    while near > 0:
                        if SYMMETRIC:
                            u_next = ()
                            for s in tl.static_range(SLABS):
                                tl.store(desk + s * SLAB + tl.arange(0, SLAB), slab_v[s])
                            tl.debug_barrier()
                            for r in tl.static_range(GROUPS):
                                rows = begin + r * ROWS + tl.arange(0, ROWS)
                                u_next = u_next + (tl.load(desk + rows, mask=rows < end, other=1),)
                            column_sums, _, epoch = sum_over_programs(
                                symmetric_patches(kernel, weights_x, u_next, GROUPS, SLABS),
                                per_reg, parts, counter, epoch, rank, programs, SLAB, BLOCK_M, PEERS,
                            )  # fmt: skip
                            v_next, off = symmetric_scaling(
                                column_sums, weights_y, slab_v, absorbed_y, keep_y, SLAB, SLABS, UNBALANCED
                            )
                            off += missing
                            columns_near = near > 0
                        else:
                            u_next, column_sums, off = patch_pass(
                                kernel, weights_x, absorbed_x, u, weights_y, slab_v, keep_x, GROUPS, SLABS, UNBALANCED
                            )
                            column_sums, off, epoch = sum_over_programs(
                                column_sums, off + missing, parts, counter, epoch, rank, programs, SLAB, BLOCK_M, PEERS
                            )
                            v_next, columns_near = column_scaling(
                                column_sums, weights_y, absorbed_y, keep_y, SLAB, SLABS, UNBALANCED
                            )
                        ahead, reached, accept = verdict(off, reached, made, tolerance, max_iter, columns_near)
                        if accept:
                            u = u_next
                            slab_v = v_next
                            made += near
                        near = accept.to(tl.int32)
                    for r in tl.static_range(GROUPS):
                        rows = begin + r * ROWS + tl.arange(0, ROWS)
                        tl.store(rows_at + (2 + turn) * x_rows + rows, u[r], mask=rows < end)
                    for s in tl.static_range(SLABS):
                        tl.store(desk + s * SLAB + tl.arange(0, SLAB), slab_v[s])
                    tl.debug_barrier()
                    v = tl.load(desk + columns)
                else:
                    build_pass(
                        cost_at, kernel_at, ld, rows_at, x_rows, turn, a, has_a, x_start, n, begin, end, m, gamma,
                        part_b, per_reg, columns, BLOCK_N, BLOCK_M,
                    )  # fmt: skip
                    while near > 0:
                        if SYMMETRIC:
                            tl.store(desk + columns, v)
                            tl.debug_barrier()
                            column_sums = symmetric_pass(
                                kernel_at, ld, desk, a, has_a, x_start, n, begin, end, columns, BLOCK_N, BLOCK_M, STAGES
                            )
                            totals, _, epoch = sum_over_programs(
                                (column_sums,), per_reg, parts, counter, epoch, rank, programs, BLOCK_M, BLOCK_M, PEERS
                            )
                            v_next, off = symmetric_scaling(
                                totals, (part_b,), (v,), (gamma,), keep_y, BLOCK_M, 1, UNBALANCED
                            )
                            off += missing
                            columns_near = near > 0
                        else:
                            column_sums, off = scaling_pass(
                                kernel_at, ld, rows_at, x_rows, turn, a, has_a, x_start, n, begin, end, part_b * v,
                                keep_x, columns, BLOCK_N, BLOCK_M, UNBALANCED, STAGES,
                            )  # fmt: skip
                            totals, off, epoch = sum_over_programs(
                                (column_sums,), off + missing, parts, counter, epoch, rank, programs, BLOCK_M, BLOCK_M,
                                PEERS,
                            )  # fmt: skip
                            v_next, columns_near = column_scaling(
                                totals, (part_b,), (gamma,), keep_y, BLOCK_M, 1, UNBALANCED
                            )
                        ahead, reached, accept = verdict(off, reached, made, tolerance, max_iter, columns_near)
                        if accept:
                            if not SYMMETRIC:
                                turn = 1 - turn
                            v = v_next[0]
                            made += near
                        near = accept.to(tl.int32)
                tl.debug_barrier()

        broken = reached != reached
        b_j = load_weights(b, has_b, y_start + columns, real, m)
        G = tl.where(part_b > 0, gamma + logarithm(v), tl.where(real, unreached_potential(relax_y, per_reg), 0))
        if SYMMETRIC:
            tl.store(desk + columns, G)
            put_rows(desk, rows_at, x_rows, turn, begin, end, BLOCK_N)
        if filled & (tl.max(tl.where(real & (b_j == 0), 1, 0)) > 0):
            top, sums = late_columns(
                cost_at, ld, rows_at, x_rows, turn, a, has_a, x_start, n, begin, end, m,
                unreached_potential(relax_x, per_reg), per_reg, columns, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            column_logs, _, epoch = log_sum_over_programs(
                top, sums, per_reg, parts, counter, epoch, rank, programs, BLOCK_M, PEERS
            )
            late = tl.where(real & (b_j == 0) & (column_logs > -INFINITY), 1, 0)
            G = tl.where(late > 0, -keep_y * column_logs, G)
            if SYMMETRIC:
                tl.store(desk + columns, G)
                put_rows(desk, rows_at, x_rows, turn, begin, end, BLOCK_N)
        shift = gauge(G, b_j, UNBALANCED or SYMMETRIC)
        mass, transport, worth_x = last_pass(
            cost_at, ld, rows_at, x_rows, turn, a, has_a, x_start, n, begin, end, m, G, b_j, shift, epsilon, keep_x,
            relax_x, filled, broken, f, columns, BLOCK_N, UNBALANCED, SYMMETRIC,
        )  # fmt: skip
        clear_rows(f, x_start, n, x_slot, rank, programs, BLOCK_N)
        sums = tl.where(columns == 0, mass, tl.where(columns == 1, transport, tl.where(columns == 2, worth_x, 0)))
        totals, _, epoch = sum_over_programs(
            (sums,), mass, parts, counter, epoch, rank, programs, BLOCK_M, BLOCK_M, PEERS
        )
        store_results(
            item, rank, columns, y_start, m, y_slot, filled, broken, G, b_j, totals[0], shift, epsilon, relax_y, made,
            reached, g, value, linear, error, n_iter, UNBALANCED,
        )  # fmt: skip
        item += tl.num_programs(0) // programs
