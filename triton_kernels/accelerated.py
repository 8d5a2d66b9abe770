"""Anderson's mixing: an item that has many plain iterations ahead takes faster steps of its column scalings in their place.

csrc/accelerate.h describes the policy, and policy.py has its constants. A pass starts at v, puts u exact at v, and gives the
plain update of v. Mixed steps move v elsewhere: by the update of log v less its combination with the last few updates. Then
u does not belong to v, and the error of the pass is that of the columns, sum_j b_j |v_j / v'_j - 1|, where v' is the plain
update. A step that falls behind what plain iterations would have reached is taken back. Where the error is within the
tolerance, the plain update is taken, and plain iterations go on: they measure the usual error, and end the item.

What mixing remembers lies in memory, not in registers, which the kernel matrix needs. Each program has its own copy. All
programs of an item read bit-identical sums, so they make the same decisions.

Sources: Anderson (1965); Walker and Ni, "Anderson acceleration for fixed-point iterations" (2011).
"""

import math

import triton
import triton.language as tl

from .math import INFINITY
from .policy import AHEAD, DEPTH, FAST, FIRST, LEAD, LINEAR, LONGEST, SLACK, USELESS, WARM, WINDOW

# The memory of a program: vectors of BLOCK_M elements, and numbers behind them.
CURRENT = tl.constexpr(0)  # v
NEXT = tl.constexpr(1)  # its plain update, then what is taken
WEIGHTS = tl.constexpr(2)  # of the columns that take part, else 0
RESIDUAL = tl.constexpr(3)  # the last update of log v
STEP = tl.constexpr(4)  # the last step of log v
KEPT = tl.constexpr(5)  # the plain update of where the last step came from
CHANGES = tl.constexpr(6)  # DEPTH vectors: what the last steps changed about the residual
MOVES = tl.constexpr(CHANGES.value + DEPTH.value)  # DEPTH vectors: those changes and the steps themselves
VECTORS = tl.constexpr(MOVES.value + DEPTH.value)

# The numbers. First the sums of a pass: products of its change of the residual with the changes in memory; from PRODUCTS on
# those of its residual.
PRODUCTS = tl.constexpr(8)
SQUARE = tl.constexpr(PRODUCTS.value + DEPTH.value)  # of the residual
ERROR = tl.constexpr(SQUARE.value + 1)  # of the columns
SUMS = tl.constexpr(16)
PAST = tl.constexpr(16)  # the errors of the last four plain passes
SLOT = tl.constexpr(20)  # of the last change
STARTED = tl.constexpr(21)  # 1 if there is a residual to compare with
WARMING = tl.constexpr(22)  # plain passes before the next mixed step
WAIT = tl.constexpr(23)  # as many as there were after the last one that failed
WAS = tl.constexpr(24)  # the last step: PLAIN, MIXED, or 0 = none
BEFORE = tl.constexpr(25)  # the error before it
BOUND = tl.constexpr(26)  # the error that plain iterations would have reached, ...
RATE = tl.constexpr(27)  # ... and the factor by which they reduce it
ZERO = tl.constexpr(28)  # the number zero, which the compiler does not know
GRAM = tl.constexpr(32)  # products of the changes, 8 numbers a row
NUMBERS = tl.constexpr(GRAM.value + 64)

PLAIN, MIXED = tl.constexpr(1), tl.constexpr(2)
MOST_RATIO = tl.constexpr(math.exp(LINEAR.value))  # of v and its update where mixing begins

# How an item goes on after a pass.
REDO = tl.constexpr(0)  # floats do not hold the pass: an exact pass follows at v
BACK = tl.constexpr(1)  # at the plain update of where the last step came from; u stays
ON = tl.constexpr(2)  # with a step
LEAVE = tl.constexpr(3)  # plainly, with the plain update


def memory_size(block_m: int) -> int:
    """The elements that a program needs."""
    return VECTORS.value * block_m + NUMBERS.value


@triton.jit
def advance(
    v, v_next, memory, mixing, seen, accepted, held, error, n_iter, limits, damping, m,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, BLOCK_M: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, UNBALANCED: tl.constexpr,
):  # fmt: skip
    """After a pass at `v` with the plain update `v_next`, tuples of COUNT vectors: what v becomes, and how to go on.

    `mixing` (0 or 1) and `seen`, the plain passes since mixing, are carried from pass to pass. `accepted` and `error` are
    the verdict of plain iterations; `held` says whether floats hold the pass; `damping` is the product of both dampings.
    """
    if (mixing == 0) & accepted:
        slow = is_slow(memory + VECTORS * BLOCK_M, seen, error, damping, limits, UNBALANCED)
        if slow & is_near(v, v_next, COUNT):
            begin(memory, BLOCK_M)
            mixing += 1
        seen += 1
    way_on = tl.where(accepted, ON, REDO)
    if mixing > 0:
        # A fence for the compiler, as in the kernel: without it, it keeps addresses in registers through all passes.
        memory += tl.load(memory + VECTORS * BLOCK_M + ZERO, volatile=True).to(tl.int32)
        for s in tl.static_range(COUNT):
            columns = s * WIDTH + tl.arange(0, WIDTH)
            tl.store(memory + CURRENT * BLOCK_M + columns, v[s])
            tl.store(memory + NEXT * BLOCK_M + columns, v_next[s])
        tl.debug_barrier()
        way_on = mix(memory, held, limits.max_iter - n_iter, limits, m, BLOCK_M, LOW, HIGH)
        tl.debug_barrier()
        at = memory + tl.where(way_on == REDO, CURRENT, NEXT) * BLOCK_M
        taken = ()
        for s in tl.static_range(COUNT):
            taken = taken + (tl.load(at + s * WIDTH + tl.arange(0, WIDTH)),)
        v = taken
        mixing = tl.where((way_on == BACK) | (way_on == ON), 1, 0)
        seen *= mixing
    else:
        if accepted:
            v = v_next
    return v, way_on, mixing, seen


# When to begin ---------------------------------------------------------------------------------------------------------


@triton.jit
def is_slow(numbers, seen, error, damping, limits, UNBALANCED: tl.constexpr):
    """Whether plain iterations have so many passes ahead, at their last rate, that they are worth leaving."""
    tl.store(numbers + PAST + seen % 4, error)
    judged = seen + 1 >= FIRST
    before = tl.load(numbers + PAST + (seen + 4 - WINDOW) % 4, mask=judged, other=1)
    distance = tl.log(error / limits.tol)
    fall = tl.log(before / error)
    ahead = tl.where(fall > 0, distance * WINDOW / fall, INFINITY)
    if UNBALANCED:  # each iteration contracts the largest norm at least by `damping`
        ahead = tl.where(damping < 1, tl.minimum(ahead, distance / -tl.log(damping)), ahead)
    return judged & (ahead > AHEAD)


@triton.jit
def is_near(v, v_next, COUNT: tl.constexpr):
    """Whether all updates of log v are short enough to be nearly linear."""
    far = tl.zeros_like(v[0])
    for s in tl.static_range(COUNT):
        far += tl.where((v_next[s] <= v[s] * MOST_RATIO) & (v[s] <= v_next[s] * MOST_RATIO), 0, 1)
    return tl.max(far) == 0


@triton.jit
def begin(memory, BLOCK_M: tl.constexpr):
    """Start to mix, with nothing in memory."""
    numbers = memory + VECTORS * BLOCK_M
    forget(memory, BLOCK_M)
    tl.store(numbers + ZERO, 0)
    tl.store(numbers + SLOT, 0)
    tl.store(numbers + STARTED, 0)
    tl.store(numbers + WARMING, WARM)
    tl.store(numbers + WAIT, WARM)
    tl.store(numbers + WAS, 0)
    tl.store(numbers + BEFORE, 1)
    tl.store(numbers + BOUND, 0)
    tl.store(numbers + RATE, 1)
    tl.debug_barrier()


@triton.jit
def forget(memory, BLOCK_M: tl.constexpr):
    """Clear the changes, the moves, and the products."""
    T: tl.constexpr = memory.dtype.element_ty
    CHUNK: tl.constexpr = min(BLOCK_M, 64)
    for first in range(CHANGES * BLOCK_M, VECTORS * BLOCK_M, CHUNK):
        tl.store(memory + first + tl.arange(0, CHUNK), tl.zeros([CHUNK], T))
    tl.store(memory + VECTORS * BLOCK_M + GRAM + tl.arange(0, 64), tl.zeros([64], T))


# A pass while mixing ---------------------------------------------------------------------------------------------------


@triton.jit
def mix(memory, held, left, limits, m, BLOCK_M: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """After a pass, with `left` more to make: choose how to go on, and put the next v in the place of the plain update."""
    numbers = memory + VECTORS * BLOCK_M
    started = tl.load(numbers + STARTED) > 0
    slot = tl.load(numbers + SLOT).to(tl.int32)
    slot = tl.where(started, (slot + 1) % DEPTH, slot)
    observe(memory, slot, started, m, BLOCK_M)
    warming, wait, was = tl.load(numbers + WARMING), tl.load(numbers + WAIT), tl.load(numbers + WAS)
    before, bound, rate = tl.load(numbers + BEFORE), tl.load(numbers + BOUND), tl.load(numbers + RATE)
    error = tl.where(held, tl.load(numbers + ERROR), INFINITY)

    was_mixed = was == MIXED
    rate = tl.where(was == PLAIN, tl.minimum(error / before, 1), rate)
    bound = tl.where(was == PLAIN, tl.maximum(bound * rate, error * (1 + SLACK)), bound)
    bound = tl.where(was_mixed, bound * rate, bound)
    fails = was_mixed & ((error <= bound) == 0)
    leaves = (error <= limits.tol) | (left <= 2)
    way_on = tl.where(fails, BACK, tl.where(held, tl.where(leaves, LEAVE, ON), REDO))
    tl.debug_barrier()
    if way_on == ON:
        mixed = (warming <= 0) & (left >= 4) & (rate >= FAST)
        if mixed:
            mixed = combine(memory, error < bound * LEAD, m, BLOCK_M, LOW, HIGH)
            tl.debug_barrier()
        take(memory, mixed, m, BLOCK_M)
        tl.store(numbers + SLOT, slot)
        tl.store(numbers + STARTED, 1)
        tl.store(numbers + WARMING, warming - 1)
        tl.store(numbers + WAS, tl.where(mixed, MIXED, PLAIN))
        tl.store(numbers + BEFORE, error)
        tl.store(numbers + BOUND, bound)
        tl.store(numbers + RATE, rate)
    elif way_on == BACK:
        CHUNK: tl.constexpr = min(BLOCK_M, 64)
        for first in range(0, m, CHUNK):
            at = memory + first + tl.arange(0, CHUNK)
            tl.store(at + NEXT * BLOCK_M, tl.load(at + KEPT * BLOCK_M))
        forget(memory, BLOCK_M)
        tl.store(numbers + STARTED, 0)
        tl.store(numbers + WARMING, 2 * wait)
        tl.store(numbers + WAIT, 2 * wait)
        tl.store(numbers + WAS, 0)
        tl.store(numbers + BOUND, bound)
    return way_on


@triton.jit
def observe(memory, slot, started, m, BLOCK_M: tl.constexpr):
    """Compute the residual; remember, in `slot`, what the last step changed about it; sum the products and the error."""
    T: tl.constexpr = memory.dtype.element_ty
    CHUNK: tl.constexpr = min(BLOCK_M, 64)
    index = tl.arange(0, SUMS)
    row = index % PRODUCTS
    products = tl.zeros([SUMS, CHUNK], T)
    for first in range(0, m, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        at = memory + columns
        b, v, v_next = tl.load(at + WEIGHTS * BLOCK_M), tl.load(at + CURRENT * BLOCK_M), tl.load(at + NEXT * BLOCK_M)
        residual = tl.log(tl.where(b > 0, v_next / v, 1))
        change = tl.where(started, residual - tl.load(at + RESIDUAL * BLOCK_M), 0)
        move = tl.where(started, change + tl.load(at + STEP * BLOCK_M), 0)
        apart = tl.abs(tl.where(b > 0, v / v_next, 1) - 1)
        changes_at = memory + (row + CHANGES)[:, None] * BLOCK_M + columns[None, :]
        changes = tl.load(changes_at, mask=(row < DEPTH)[:, None], other=0)
        tl.debug_barrier()  # several threads may have read what one of them replaces
        tl.store(at + RESIDUAL * BLOCK_M, residual)
        tl.store(at + (slot + CHANGES) * BLOCK_M, change)
        tl.store(at + (slot + MOVES) * BLOCK_M, move)
        changes = tl.where((row == slot)[:, None], change[None, :], changes)
        left = tl.where((index < PRODUCTS)[:, None], change[None, :], residual[None, :])
        right = tl.where((index == SQUARE)[:, None], residual[None, :], changes)
        product = tl.where((index == ERROR)[:, None], apart[None, :], left * right)
        products += b[None, :] * product
    sums = tl.sum(products, 1)
    numbers = memory + VECTORS * BLOCK_M
    tl.store(numbers + index, sums)
    tl.store(numbers + GRAM + slot * 8 + index, sums, mask=index < DEPTH)
    tl.store(numbers + GRAM + index * 8 + slot, sums, mask=index < DEPTH)
    tl.debug_barrier()


@triton.jit
def coefficients(numbers):
    """The c that minimise the weighted squares of residual - sum_k c_k change_k, last one first; the part that remains.

    By the normal equations and Cholesky's factors, with a ridge that bounds c where changes depend on each other. The part
    is infinite if no change is known.
    """
    if numbers.dtype.element_ty == tl.float64:
        RIDGE: tl.constexpr = 1e-14
    else:
        RIDGE: tl.constexpr = 1e-6
    trace = tl.load(numbers + GRAM)
    for i in tl.static_range(1, DEPTH):
        trace += tl.load(numbers + GRAM + 9 * i)
    ridge = RIDGE * trace
    factor, inverse, rest = (), (), ()  # `factor` holds the rows below the diagonal, and 0 in its place
    for i in tl.static_range(DEPTH):
        for j in tl.static_range(i + 1):
            value = tl.load(numbers + GRAM + 8 * i + j)
            for k in tl.static_range(j):
                value -= factor[i * (i + 1) // 2 + k] * factor[j * (j + 1) // 2 + k]
            if i == j:
                inverse = inverse + (tl.rsqrt(tl.maximum(value + ridge, ridge)),)
                factor = factor + (trace * 0,)
            else:
                factor = factor + (value * inverse[j],)
        value = tl.load(numbers + PRODUCTS + i)
        for k in tl.static_range(i):
            value -= factor[i * (i + 1) // 2 + k] * rest[k]
        rest = rest + (value * inverse[i],)
    square = tl.load(numbers + SQUARE)
    remains = square
    found = ()
    for back in tl.static_range(DEPTH):
        value = rest[DEPTH - 1 - back]
        for k in tl.static_range(back):
            value -= factor[(DEPTH - 1 - k) * (DEPTH - k) // 2 + DEPTH - 1 - back] * found[k]
        value *= inverse[DEPTH - 1 - back]
        remains -= value * tl.load(numbers + PRODUCTS + DEPTH - 1 - back)
        found = found + (value,)
    part = tl.sqrt(tl.maximum(remains, 0) / square)
    return found, tl.where(ridge > 0, part, INFINITY)


@triton.jit
def combine(memory, bold, m, BLOCK_M: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Compute the mixed step. Returns whether to take it.

    It has to promise something, unless `bold`, to be short, and to leave v between LOW and HIGH.
    """
    T: tl.constexpr = memory.dtype.element_ty
    CHUNK: tl.constexpr = min(BLOCK_M, 64)
    c, part = coefficients(memory + VECTORS * BLOCK_M)
    longest = tl.zeros([CHUNK], T)
    promises = (part <= USELESS) | (bold & (part < INFINITY))
    if promises:
        for first in range(0, m, CHUNK):
            at = memory + first + tl.arange(0, CHUNK)
            step = tl.load(at + RESIDUAL * BLOCK_M)
            for k in tl.static_range(DEPTH):
                step -= c[k] * tl.load(at + (MOVES + DEPTH - 1 - k) * BLOCK_M)
            moved = tl.load(at + CURRENT * BLOCK_M) * tl.exp(step)
            in_range = (moved >= LOW) & (moved <= HIGH)
            longest = tl.maximum(longest, tl.where(in_range, tl.abs(step), INFINITY))
            tl.store(at + STEP * BLOCK_M, step)
    return promises & (tl.max(longest) <= LONGEST)


@triton.jit
def take(memory, mixed, m, BLOCK_M: tl.constexpr):
    """Take the mixed step or the plain update, and keep the plain update."""
    CHUNK: tl.constexpr = min(BLOCK_M, 64)
    for first in range(0, m, CHUNK):
        at = memory + first + tl.arange(0, CHUNK)
        v, v_next = tl.load(at + CURRENT * BLOCK_M), tl.load(at + NEXT * BLOCK_M)
        step = tl.load(at + STEP * BLOCK_M)
        residual = tl.load(at + RESIDUAL * BLOCK_M)
        tl.debug_barrier()  # several threads may have read what one of them replaces
        tl.store(at + STEP * BLOCK_M, tl.where(mixed, step, residual))
        tl.store(at + KEPT * BLOCK_M, v_next)
        tl.store(at + NEXT * BLOCK_M, tl.where(mixed, v * tl.exp(step), v_next))
