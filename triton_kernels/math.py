"""Arithmetic that the kernels share, and the temporal prior."""

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
def worth(potential, rho, UNBALANCED: tl.constexpr):
    """What a potential adds to the dual per unit of mass: itself, or -rho (exp(-f / rho) - 1) if relaxed."""
    if UNBALANCED:
        strict = rho == INFINITY
        relaxed = tl.where(strict, 1, rho)
        return tl.where(strict, potential, -relaxed * expm1(-potential / relaxed))
    else:
        return potential


@triton.jit
def damping(reg, rho):
    """The exponent rho / (rho + reg) of a relaxed update; 1 where the marginal is strict."""
    return tl.where(rho == INFINITY, 1, rho / tl.where(rho == INFINITY, 1, rho + reg))


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
def finite_top(top):
    """The largest exponent of a sum, 0 if the sum has no terms."""
    return tl.where(top == -INFINITY, 0, top)


@triton.jit
def times(mass, value):
    """Their product, 0 where there is no mass, whatever the value."""
    return tl.where(mass == 0, 0, mass * value)


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
