"""The float64 oracle: one item by its definitions, in NumPy. It shares no code with the package, nor with its reference.

P_ij = a_i b_j exp((f_i + g_j - C_ij) / reg), where C includes the prior, and `rho` is the relaxation of each marginal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

Array = np.ndarray


def cost(x: Array, y: Array, word: str) -> Array:
    """(n, m) between points (n, D) and (m, D)."""
    if word == "cosine":
        return 1 - unit(x) @ unit(y).T
    if word == "dot":
        return -x @ y.T
    squares = ((x[:, None] - y) ** 2).sum(-1)
    return squares if word == "sqeuclidean" else np.sqrt(squares)


def unit(x: Array) -> Array:
    """Points over their norms; zero stays zero."""
    x = x / nonzero(np.abs(x).max(-1, keepdims=True, initial=0))  # no square overflows or vanishes
    return x / nonzero(np.sqrt((x * x).sum(-1, keepdims=True)))


def norms(x: Array) -> Array:
    largest = nonzero(np.abs(x).max(-1, initial=0))
    return largest * np.sqrt(((x / largest[..., None]) ** 2).sum(-1))


def nonzero(divisor: Array) -> Array:
    return np.where(divisor > 0, divisor, 1)


def prior(kind: str, parameters: tuple[float, ...], n: int, m: int, reg: float) -> Array:
    """(n, m): Prior.quadratic, absolute, band, and order_preserving (Su and Hua 2017)."""
    d = np.abs(np.arange(n)[:, None] / max(n - 1, 1) - np.arange(m) / max(m - 1, 1))
    if kind == "band":
        widest = max(parameters[0], 0.5, 0.5 * (m - 1) / (n - 1) if n > 1 else np.inf)
        return np.where(d * (m - 1) <= widest + 1e-9 * m, 0, np.inf)
    if kind == "order_preserving":
        e2, (weight, delta) = ((np.arange(n)[:, None] + 1) / n - (np.arange(m) + 1) / m) ** 2, parameters
        return (
            -weight / (e2 + 1) + reg * e2 / (2 * delta**2 * (n**-2 + m**-2)) + reg * np.log(delta * np.sqrt(2 * np.pi))
        )
    return parameters[0] * d ** {"quadratic": 2, "absolute": 1}[kind]


def update(C: Array, across: Array, g: Array, reg: float, rho: float) -> Array:
    """f from g: -damping reg log sum_j b_j exp((g_j - C_ij) / reg); 0, or 40 rho if relaxed, where nothing is reached."""
    E = np.log(across) + (g - C) / reg
    top = E.max(1, initial=-1e300)
    sums = top + np.log(np.exp(E - top[:, None]).sum(1))
    return np.where(sums < -1e299, 0.0 if np.isinf(rho) else 40 * rho, -damping(reg, rho) * reg * sums)


def damping(reg: float, rho: float) -> float:
    return 1.0 if np.isinf(rho) else rho / (rho + reg)


class State(NamedTuple):
    """An item with its dual potentials, and what follows from them: the plan, its row and column sums, the values."""

    C: Array
    a: Array
    b: Array
    reg: float
    rho: tuple[float, float]
    f: Array
    g: Array
    P: Array
    rows: Array
    columns: Array
    value: float
    linear: float


def state(C: Array, a: Array, b: Array, reg: float, rho: tuple[float, float], f: Array, g: Array) -> State:
    both = a[:, None] * b
    P = np.where(both > 0, both * density(C, a, b, reg, f, g), 0)
    duals = (np.where(w > 0, w * dual(z, r), 0).sum() for w, z, r in ((a, f, rho[0]), (b, g, rho[1])))
    linear = (P * np.where(np.isinf(C), 0, C)).sum()
    return State(C, a, b, reg, rho, f, g, P, P.sum(1), P.sum(0), sum(duals) - reg * (P.sum() - 1), linear)


def density(C: Array, a: Array, b: Array, reg: float, f: Array, g: Array) -> Array:
    """P / (a b^T), which has no meaning where neither point has mass."""
    return np.where((a > 0)[:, None] | (b > 0), np.exp((f[:, None] + g - C) / reg), 0)


def dual(f: Array, rho: float) -> Array:
    """What a potential contributes to the dual objective by unit of mass."""
    return f if np.isinf(rho) else -rho * np.expm1(-f / rho)


def primal(s: State) -> float:
    """<P, C> + reg KL(P | a b^T) + rho_x KL(P 1 | a) + rho_y KL(P^T 1 | b)."""
    both = s.a[:, None] * s.b  # sums to less than 1 where points are unreachable
    pairs = [(s.P, both, s.reg), (s.rows, s.a, s.rho[0]), (s.columns, s.b, s.rho[1])]
    return s.linear + s.reg * (1 - both.sum()) + sum(r * kl(p, q) for p, q, r in pairs if np.isfinite(r))


def kl(p: Array, q: Array) -> float:
    return (np.where(p > 0, p * np.log(p / np.where(q > 0, q, 1)), 0) - p + q).sum()


def residual(s: State) -> Array:
    """Of every x, a_i |exp((f_i - f'_i) / reg) - 1| with the next update f': for strict marginals, |row sum - a_i|."""
    following = update(s.C, s.b, s.g, s.reg, s.rho[0])
    return np.where(s.a > 0, s.a * np.abs(np.expm1((s.f - following) / s.reg)), 0)


def iterates(
    C: Array, a: Array, b: Array, reg: float, rho: tuple[float, float], g: Array
) -> Iterator[tuple[Array, Array]]:
    """f and g after every iteration: f from g, then g from f."""
    while True:
        f = update(C, b, g, reg, rho[0])
        g = update(C.T, a, f, reg, rho[1])
        yield f, g


class Gradients(NamedTuple):
    C: Array
    a: Array
    b: Array
    adjoint: Array  # (n + m,)


def gradients(s: State, by_value: float, by_linear: float, by_plan: Array) -> Gradients:
    """Of by_value * value + by_linear * linear + <by_plan, P>.

    The value's by the envelope theorem; the others by implicit differentiation of f and g, which solve
    rows_i f_i / damping_x + sum_j P_ij g_j = sum_j P_ij C_ij + ..., and likewise for g: a symmetric system H.
    """
    E = density(s.C, s.a, s.b, s.reg, s.f, s.g)
    by_P = by_linear * np.where(np.isinf(s.C), 0, s.C) + by_plan
    W = s.P * by_P
    z = inverse(system(s)) @ np.concatenate([W.sum(1), W.sum(0)])
    u, v = z[: len(s.a)], z[len(s.a) :]
    by_C = (by_value + by_linear) * s.P + (s.P * (u[:, None] + v) - W) / s.reg
    by_a = by_value * (dual(s.f, s.rho[0]) - s.reg * E @ s.b) + ((by_P - v) * E) @ s.b
    by_b = by_value * (dual(s.g, s.rho[1]) - s.reg * s.a @ E) + s.a @ ((by_P - u[:, None]) * E)
    return Gradients(by_C, by_a, by_b, z)


def system(s: State) -> Array:
    """H, (n + m, n + m)."""
    x, y = (np.diag(mass / damping(s.reg, rho)) for mass, rho in zip((s.rows, s.columns), s.rho, strict=True))
    return np.block([[x, s.P], [s.P.T, y]])


def inverse(H: Array) -> Array:
    """The pseudo-inverse of the system, scaled to a diagonal of ones: masses may have any size."""
    scale = np.where(np.diag(H) > 0, 1 / np.sqrt(nonzero(np.diag(H))), 0)
    return scale[:, None] * np.linalg.pinv(scale[:, None] * H * scale, rcond=1e-13, hermitian=True) * scale


def cost_gradient(x: Array, y: Array, word: str) -> Array:
    """dC_ij / dx_i: (n, m, D)."""
    if word == "dot":
        return np.broadcast_to(-y, (len(x), *y.shape))
    if word == "cosine":
        along = unit(y) - (unit(x) @ unit(y).T)[:, :, None] * unit(x)[:, None]
        return -np.where(norms(x) > 0, 1 / nonzero(norms(x)), 0)[:, None, None] * along
    apart = x[:, None] - y
    if word == "sqeuclidean":
        return 2 * apart
    return apart / nonzero(norms(apart))[..., None]
