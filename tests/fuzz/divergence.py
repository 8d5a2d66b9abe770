"""The debiased divergence against the oracle: three optima, of which the caller sees only the sum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

import otalign

from . import oracle
from .budget import Budget

if TYPE_CHECKING:
    from .case import Item
    from .check import Checked

MOST = 300  # averaged updates of the oracle for a self term


def check_divergence(checked: Checked, leaves: dict[str, Tensor], arguments: dict[str, Any]) -> None:
    from .check import dual_slope, primal_gap

    call, record = checked.call, checked.record
    options = {
        k: arguments[k] for k in ("cost", "prior", "reg", "unbalanced", "max_iter", "tol", "accelerate", "backend")
    }
    criterion = otalign.SinkhornLoss(**options, objective="divergence", reduction="none")
    losses = criterion(**{k: v for k, v in arguments.items() if k not in options})
    assert criterion.last is not None
    for b, item in enumerate(checked.items):
        found = float(losses[b].detach())
        if item.C.size == 0:
            record.require("empty items", b, found == 0, f"divergence {found}")
        elif checked.expected_nan[b]:
            record.require("NaN", b, math.isnan(found), f"divergence {found}")
        error, tol = float(criterion.last.error[b]), call.case.tol
        if checked.states[b] is None or tol == 0 or not error <= tol or call.case.max_iter < 50:
            continue
        s = checked.optimum(checked.states[b])  # type: ignore[arg-type]
        selves = [self_term(item, side, call.case.cost, checked) for side in (0, 1)]
        if s is None or None in selves or any(np.isinf(t[0].C).any() for t in [(s,), *selves]):  # type: ignore[misc]
            continue
        expected = oracle.primal(s) - sum(oracle.primal(t[0]) for t in selves) / 2  # type: ignore[index]
        bound = 0.0
        for state, of_item, weight, left in (
            (s, item, 1.0, error), (*selves[0], 0.5, tol * 2e-3), (*selves[1], 0.5, tol * 2e-3)  # type: ignore[misc]
        ):  # fmt: skip
            budget = Budget(of_item, state, call.case.cost, call.type)
            apart = potential_error(state, left)
            slope = dual_slope(state)
            left *= slope_of_residual(state)
            bound += weight * (budget.value() + apart * (left + slope) + primal_gap(state))
            if not budget.meaningful:
                bound = math.inf
        record.compare("divergence", b, found, expected, bound)


def self_term(item: Item, side: int, word: str, checked: Checked) -> tuple[oracle.State, Item] | None:
    """The optimum of a side with itself, by f <- (f + T f) / 2."""
    points, w, rho = (item.x, item.a, item.rho[0]) if side == 0 else (item.y, item.b, item.rho[1])
    assert points is not None
    C = oracle.cost(points, points, word)
    term, prior = 0 * C, checked.call.prior()
    if prior is not None:
        term = oracle.prior(prior.kind, prior.parameters, *C.shape, item.reg)
    own = item._replace(x=points, y=points, C=C, prior=term, a=w, b=w, rho=(rho, rho))
    f = np.zeros(len(w))
    for _ in range(MOST):
        following = oracle.update(C + term, w, f, item.reg, rho)
        if np.abs(following - f).max() < 1e-12 * item.reg:
            return oracle.state(C + term, w, w, item.reg, (rho, rho), f, f), own
        f = (f + following) / 2
    return None


def potential_error(s: oracle.State, error: float) -> float:
    """How far potentials with a marginal error may be from those of the optimum.

    Balanced: an update's values differ by no more than the costs of their rows do. Relaxed: updates contract.
    """
    if all(map(math.isinf, s.rho)):
        return float(2 * max(np.ptp(s.C, axis=0).max(), np.ptp(s.C, axis=1).max()))
    contraction = oracle.damping(s.reg, s.rho[0]) * oracle.damping(s.reg, s.rho[1])
    least = min(w[w > 0].min() for w in (s.a, s.b))
    if error > 0.5 * least:
        return math.inf
    return float(s.reg * -math.log1p(-error / least) / (1 - contraction))


def slope_of_residual(s: oracle.State) -> float:
    """The dual objective's gradient by a relaxed potential, over the residual of its update."""
    growth = [np.exp(-z / rho).max() * (1 + s.reg / rho) for z, rho in ((s.f, s.rho[0]), (s.g, s.rho[1]))]
    return float(max(1.0, *growth))
