"""What all kernels share: where an item lies, the temporal prior, exchange between programs, and launching.

Every side of a batch has a *layout*: items lie in slots of `size` rows, full or with `lengths` (B,), or one behind the
other at `offsets` (B + 1,). One kernel reads all three; `mode` says which, at run time. Matrices with one row for each
point of x, such as the cost, are (rows of x, ld): they follow the layout of x, so that packed batches stay packed.
"""

import inspect

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when triton.jit decorated the kernels

# Updates are multiply-adds while all scalings and sums stay within exp(+-20): see sinkhorn.py.
NEAR_LOW = tl.constexpr(2.0611536e-9)
NEAR_HIGH = tl.constexpr(4.8516520e8)
INFINITY = tl.constexpr(float("inf"))
# Arguments that are integers. Triton compiles a kernel for each kind of integer (1, multiples of 16, others) and of
# pointer (aligned or not) unless told not to: only strides and the dimension gain anything by it.
STRIDES = ("x_row", "x_dim", "y_row", "y_dim", "dim")
COUNTS = ("items", "x_mode", "x_size", "x_rows", "y_mode", "y_size", "y_rows", "x_item", "y_item", "ld16")
COUNTS += ("has_a", "has_b", "has_init", "has_plan", "per_item", "value_step", "linear_step")
COUNTS += ("max_iter", "programs", "counters_size")
ANY_ALIGNMENT = ("f", "g", "a", "b", "init", "value", "linear", "error", "n_iter", "x_layout", "y_layout", "reg_items")
ANY_ALIGNMENT += ("x_scale", "y_scale", "x_lift", "y_lift", "grad_value", "grad_linear", "counters")

EXCHANGE_TAIL = tl.constexpr(16)  # numbers behind the vectors that a program hands to its group


def kernel(function):
    """Compile with Triton, for any counts and any alignment of small vectors."""
    names = inspect.signature(function).parameters
    counts, any_alignment = ([name for name in given if name in names] for given in (COUNTS, ANY_ALIGNMENT))
    return triton.jit(function, do_not_specialize=counts, do_not_specialize_on_alignment=any_alignment)


# Items -----------------------------------------------------------------------------------------------------------------


@triton.jit
def locate(tiles):
    """The item of this program, and which of the item's `tiles` it has."""
    program = tl.program_id(0)
    return program // tiles, program % tiles


@triton.jit
def segment(lengths, mode, size, rows, item, items):
    """First row of an item, its length, and the rows up to the next item: its slot, which outputs have to fill."""
    low = tl.load(lengths + item, mask=mode > 0, other=0)
    high = tl.load(lengths + item + 1, mask=mode == 2, other=0)
    packed = mode == 2
    low = tl.minimum(tl.maximum(low, 0), tl.where(packed, rows, size))
    high = tl.minimum(tl.maximum(high, low), rows)
    start = tl.where(packed, low, item.to(tl.int64) * size)
    length = tl.where(packed, high - low, tl.where(mode == 1, low, size))
    length = tl.minimum(length, size).to(tl.int32)
    slot = tl.where(packed, tl.where(item == items - 1, rows - start, high - low), size)
    return start, length, slot


@triton.jit
def only_if(flag, mask):
    """`mask`, or nothing unless `flag`, a number. (The interpreter cannot broadcast a truth value into a mask.)"""
    return mask.to(tl.int32) * flag != 0


@triton.jit
def load_weights(weights, given, rows, inside, length):
    """Weights of the points `rows`, uniform unless `given`; 0 outside."""
    T: tl.constexpr = weights.dtype.element_ty
    uniform = tl.full([], 1, T) / tl.maximum(length, 1).to(T)
    loaded = tl.load(weights + rows, mask=only_if(given, inside), other=0)
    return tl.where(inside, tl.where(given != 0, loaded, uniform), 0)


@triton.jit
def load_reg(reg, reg_items, per_item, item, T: tl.constexpr):
    """The regularisation of an item, from the number or the vector; NaN, and so is the item, where it is none.

    Below the smallest normal number its reciprocal is infinite.
    """
    loaded = tl.load(reg_items + item, mask=per_item != 0, other=1)
    epsilon = tl.where(per_item != 0, loaded.to(T), tl.full([], reg, T))
    if T == tl.float64:
        least = 2.2250738585072014e-308
    else:
        least = 1.1754943508222875e-38
    return tl.where((epsilon >= least) & (epsilon < INFINITY), epsilon, float("nan"))


@triton.jit
def damping(reg, rho):
    """The exponent rho / (rho + reg) of a relaxed update; 1 where the marginal is strict."""
    return tl.where(rho == INFINITY, 1, rho / tl.where(rho == INFINITY, 1, rho + reg))


# Numbers ---------------------------------------------------------------------------------------------------------------


@triton.jit
def logarithm(x):
    """log x, -inf for 0."""
    return tl.where(x == 0, -INFINITY, tl.log(tl.where(x == 0, 1, x)))


@triton.jit
def reciprocal(x):
    """1 / x by the fast reciprocal square root and a Newton step: a few instructions where a division takes eight."""
    root = tl.rsqrt(x)
    guess = root * root
    return guess + guess * (1 - x * guess)


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near 0."""
    small = tl.where(tl.abs(x) < 0.5, x, 0)
    series = small * 0 + 1
    for k in tl.static_range(15, 1, -1):
        series = 1 + series * small / k
    return tl.where(tl.abs(x) < 0.5, small * series, tl.exp(x) - 1)


@triton.jit
def worth(potential, rho, UNBALANCED: tl.constexpr):
    """What a potential adds to the dual per unit of mass: itself, or -rho (exp(-f / rho) - 1) if relaxed."""
    if UNBALANCED:
        strict = rho == INFINITY
        relaxed = tl.where(strict, 1, rho)
        return tl.where(strict, potential, -relaxed * expm1(-potential / relaxed))
    else:
        return potential


@triton.jit
def bounded(x):
    """`x`, with the largest number for infinity. (Of P / (a b): where a b is too small for a number, there is no mass.)"""
    if x.dtype == tl.float64:
        most = 1.7976931348623157e308
    else:
        most = 3.4028234663852886e38
    return tl.where(x == INFINITY, most, x)


@triton.jit
def unreached_potential(rho, per_reg):
    """What stands, over reg, for the infinite potential of a point that nothing reaches: see reference.py.

    (Bounded, so that it can be added to others.)
    """
    return tl.where(rho == INFINITY, 0, tl.minimum(40 * rho * per_reg, 1e30))


@triton.jit
def prior_tile(i, j, n, m, reg, first, second, PRIOR: tl.constexpr, T: tl.constexpr):
    """The temporal prior (otalign.Prior) between points `i` (N, 1) of n and `j` (1, M) of m."""
    first = tl.full([], first, T)
    second = tl.full([], second, T)
    if PRIOR == "band":
        # In integers, so that a point on the edge of the band is inside on every machine.
        last_x, last_y = tl.maximum(n - 1, 0).to(tl.int64), tl.maximum(m - 1, 0).to(tl.int64)
        apart = tl.abs(i * last_y - j * last_x).to(T)
        span = tl.maximum(last_x, 1).to(T)
        if T == tl.float64:
            slack = 1e-9
        else:
            slack = 1e-6
        width = tl.maximum(first, 0.5) * span
        width = tl.maximum(width, 0.5 * last_y.to(T))
        # One point of x reaches all of y; one of y sits at the start and is reached by all of x.
        inside = (apart <= width * (1 + slack)) | (n == 1)
        return tl.where(inside, 0.0, INFINITY).to(T)
    elif PRIOR == "order_preserving":
        x, y = n.to(T), m.to(T)
        e = (i + 1).to(T) / x - (j + 1).to(T) / y
        spread = 2 * second * second * (1 / (x * x) + 1 / (y * y))
        log_p = -e * e / spread - tl.log(second * 2.5066282746310002)
        return -first / (e * e + 1) - reg * log_p
    else:
        d = tl.abs(i.to(T) / tl.maximum(n - 1, 1).to(T) - j.to(T) / tl.maximum(m - 1, 1).to(T))
        if PRIOR == "quadratic":
            return first * d * d
        else:
            return first * d


# Programs that share an item -------------------------------------------------------------------------------------------
#
# They meet in global memory: each writes its part, all wait, each reads all parts in the order of their ranks. So they
# all hold the same bits afterwards, and need no word about what they decide from them. Two buffers in turn are enough:
# a program writes the second next part only after everybody has come to the next barrier, and so has read this one.


@triton.jit
def barrier(counter, target):
    """Wait for `target` arrivals. The launch is cooperative: all programs run at the same time."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < target:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def sum_over_programs(
    values, scalar, parts, counter, epoch, rank, programs,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, PEERS: tl.constexpr,
):  # fmt: skip
    """`values`, vectors of WIDTH that together are BLOCK_M long, and `scalar`, summed over the programs of an item."""
    total = ()
    if PEERS > 1:
        STRIDE: tl.constexpr = 2 * BLOCK_M + EXCHANGE_TAIL
        parts += (epoch % 2) * (programs * STRIDE)
        peer = tl.arange(0, PEERS)
        mine = parts + rank * STRIDE
        for s in tl.static_range(len(values)):
            tl.store(mine + s * WIDTH + tl.arange(0, WIDTH), values[s])
        tl.store(mine + 2 * BLOCK_M, scalar)
        barrier(counter, (epoch + 1) * programs)
        for s in tl.static_range(len(values)):
            columns = s * WIDTH + tl.arange(0, WIDTH)
            if PEERS * WIDTH <= 8192:
                at = parts + peer[:, None] * STRIDE + columns[None, :]
                all_parts = tl.load(at, mask=(peer < programs)[:, None], other=0, cache_modifier=".cg")
                total = total + (tl.sum(all_parts, 0),)
            else:
                one_by_one = tl.zeros_like(values[s])
                for other in range(programs):
                    one_by_one += tl.load(parts + other * STRIDE + columns, cache_modifier=".cg")
                total = total + (one_by_one,)
        scalars = tl.load(parts + peer * STRIDE + 2 * BLOCK_M, mask=peer < programs, other=0, cache_modifier=".cg")
        scalar = tl.sum(scalars)
    else:
        total = values
        tl.debug_barrier()
    return total, scalar, epoch + 1


@triton.jit
def log_sum_over_programs(
    top, sums, scalar, parts, counter, epoch, rank, programs, BLOCK_M: tl.constexpr, PEERS: tl.constexpr
):
    """log of sum exp(top) sums (BLOCK_M,), and the sum of `scalar`, over the programs of an item."""
    if PEERS > 1:
        STRIDE: tl.constexpr = 2 * BLOCK_M + EXCHANGE_TAIL
        columns = tl.arange(0, BLOCK_M)
        parts += (epoch % 2) * (programs * STRIDE)
        tl.store(parts + rank * STRIDE + columns, top)
        tl.store(parts + rank * STRIDE + BLOCK_M + columns, sums)
        tl.store(parts + rank * STRIDE + 2 * BLOCK_M, scalar)
        barrier(counter, (epoch + 1) * programs)
        top = tl.load(parts + columns, cache_modifier=".cg")
        for other in range(1, programs):
            top = tl.maximum(top, tl.load(parts + other * STRIDE + columns, cache_modifier=".cg"))
        sums = tl.zeros_like(top)
        scalar = tl.sum(sums)
        for other in range(programs):
            part = tl.load(parts + other * STRIDE + columns, cache_modifier=".cg")
            part_sums = tl.load(parts + other * STRIDE + BLOCK_M + columns, cache_modifier=".cg")
            sums += part_sums * tl.exp(part - finite_top(top))
            scalar += tl.load(parts + other * STRIDE + 2 * BLOCK_M, cache_modifier=".cg")
    else:
        tl.debug_barrier()
    return finite_top(top) + logarithm(sums), scalar, epoch + 1


@triton.jit
def finite_top(top):
    """The largest exponent of a sum, 0 if the sum has no terms."""
    return tl.where(top == -INFINITY, 0, top)
