"""Arithmetic that the kernels share: guarded logarithms and reciprocals, terms of the dual, and the temporal prior."""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


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
def times(mass, value):
    """mass * value, 0 where there is no mass, even if the value is infinite or NaN."""
    return tl.where(mass == 0, 0, mass * value)


@triton.jit
def to_type(x, TYPE: tl.constexpr):
    """`x` in another floating-point type. To 16 bits it goes by float32: neither the interpreter nor each GPU has the short way."""
    if x.dtype == tl.float64 and TYPE.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(TYPE)


@triton.jit
def bounded(x):
    """`x`, with the largest number in the place of infinity.

    For P / (a b): it overflows only where a b underflows, and there the mass is zero.
    """
    if x.dtype == tl.float64:
        largest = 1.7976931348623157e308
    else:
        largest = 3.4028234663852886e38
    return tl.where(x == INFINITY, largest, x)


@triton.jit
def finite_top(top):
    """The largest exponent of a sum of exponentials, 0 if the sum has no terms."""
    return tl.where(top == -INFINITY, 0, top)


@triton.jit
def damping_exponent(reg, rho):
    """rho / (rho + reg), the exponent of a relaxed update; 1 where the marginal is strict (rho infinite)."""
    return tl.where(rho == INFINITY, 1, rho / tl.where(rho == INFINITY, 1, rho + reg))


@triton.jit
def dual_term(potential, rho, UNBALANCED: tl.constexpr):
    """What a potential f adds to the dual per unit of mass: f, or -rho (exp(-f / rho) - 1) if the marginal is relaxed."""
    if UNBALANCED:
        strict = rho == INFINITY
        finite_rho = tl.where(strict, 1, rho)
        return tl.where(strict, potential, -finite_rho * expm1(-potential / finite_rho))
    else:
        return potential


@triton.jit
def unreached_potential(rho, inv_reg):
    """The finite potential, over reg, that replaces the infinite one of a point without a finite cost: see reference.py.

    It is at most 1e30, so that sums of potentials stay finite.
    """
    return tl.where(rho == INFINITY, 0, tl.minimum(40 * rho * inv_reg, 1e30))


@triton.jit
def prior_tile(i, j, n, m, reg, first, second, PRIOR: tl.constexpr, T: tl.constexpr):
    """The temporal prior (otalign.Prior) between points `i` (N, 1) of n and `j` (1, M) of m."""
    first = tl.full([], first, T)
    second = tl.full([], second, T)
    if PRIOR == "band":
        # In integers, so that a point on the edge of the band is inside on every machine.
        last_x, last_y = tl.maximum(n - 1, 0).to(tl.int64), tl.maximum(m - 1, 0).to(tl.int64)
        distance = tl.abs(i * last_y - j * last_x).to(T)
        span = tl.maximum(last_x, 1).to(T)
        if T == tl.float64:
            slack = 1e-9
        else:
            slack = 1e-6
        width = tl.maximum(first, 0.5) * span
        width = tl.maximum(width, 0.5 * last_y.to(T))
        # A single point of x reaches all points of y. A single point of y lies at the start; all points of x reach it.
        inside = (distance <= width * (1 + slack)) | (n == 1)
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
            tl.static_assert(PRIOR == "absolute", "PRIOR: expected one of otalign.prior.KINDS")
            return first * d
