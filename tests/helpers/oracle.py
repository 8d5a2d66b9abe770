"""A second oracle, in NumPy and float64, that shares no code with the reference backend: the definition, written out.

Massless points, and points without allowed pairs, are removed. Plain alternating updates in the log domain then solve the rest
until the potentials stop changing. All outputs are computed from their definitions on the plan.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Optimum(NamedTuple):
    """`value` and `linear` are numbers, `plan` (n, m), `f` (n,), `g` (m,); the potentials have no fixed gauge."""

    value: float
    linear: float
    plan: np.ndarray
    f: np.ndarray
    g: np.ndarray


def solve(C, a, b, reg, rho=(np.inf, np.inf), sweeps=200_000) -> Optimum:
    """The optimum of one item: cost `C` (n, m), which may hold +inf, weights `a` (n,) and `b` (m,) that sum to one."""
    C, a, b = (np.asarray(t, dtype=np.float64) for t in (C, a, b))
    rows = (a > 0) & (np.isfinite(C) & (b > 0)).any(1)
    columns = (b > 0) & (np.isfinite(C) & (a > 0)[:, None]).any(0)
    kept, log_a, log_b = C[np.ix_(rows, columns)], np.log(a[rows]), np.log(b[columns])
    damping_x, damping_y = (1.0 if np.isinf(r) else r / (r + reg) for r in rho)
    f, g = np.zeros(rows.sum()), np.zeros(columns.sum())
    for _ in range(sweeps if kept.size else 0):
        before = f
        f = -damping_x * reg * log_sum(log_b + (g - kept) / reg, 1)
        g = -damping_y * reg * log_sum(log_a[:, None] + (f[:, None] - kept) / reg, 0)
        if np.abs(f - before).max() <= 1e-14 * (1 + np.abs(f).max()):
            break
    plan = np.zeros_like(C)
    plan[np.ix_(rows, columns)] = np.exp(log_a[:, None] + log_b + (f[:, None] + g - kept) / reg)
    linear = (plan * np.where(np.isfinite(C), C, 0)).sum()
    value = linear + reg * kl(plan, np.outer(a, b))
    for marginal, weights, r in ((plan.sum(1), a, rho[0]), (plan.sum(0), b, rho[1])):
        value += 0 if np.isinf(r) else r * kl(marginal, weights)
    all_f, all_g = np.zeros(len(a)), np.zeros(len(b))
    all_f[rows], all_g[columns] = f, g
    with np.errstate(divide="ignore"):
        other_f = -damping_x * reg * log_sum(log_b + (g - C[:, columns]) / reg, 1)
        other_g = -damping_y * reg * log_sum(log_a[:, None] + (f[:, None] - C[rows]) / reg, 0)
    return Optimum(value, linear, plan, np.where(rows, all_f, other_f), np.where(columns, all_g, other_g))


def log_sum(exponents: np.ndarray, axis: int) -> np.ndarray:
    """log of the sum of exp along an axis; -inf for an empty sum."""
    top = exponents.max(axis, keepdims=True, initial=-1e308)
    with np.errstate(divide="ignore"):
        return (top + np.log(np.exp(exponents - top).sum(axis, keepdims=True))).squeeze(axis)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Generalised Kullback-Leibler divergence, 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float((np.where(p > 0, p * np.log(p / q), 0) - p + q).sum())
