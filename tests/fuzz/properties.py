"""Metamorphic properties: another problem, whose solution follows from that of the case.

Plain iterations are compared step by step: the potentials after as many iterations are the same, up to the rounding that
`per_update` bounds. Results with the case's own options are compared by their values: both are near the optimum, and the dual
objective's gradient at either bounds how far they are apart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import otalign

from . import oracle
from .budget import Budget
from .case import Call, Case, Item

if TYPE_CHECKING:
    from .check import Checked

PLAIN = 12  # iterations


class Problem(NamedTuple):
    """One item: points, or a cost in place of them; weights, reg and relaxations."""

    x: np.ndarray | None
    y: np.ndarray | None
    C: np.ndarray
    a: np.ndarray
    b: np.ndarray
    reg: float
    rho: tuple[float, float]


class Solved(NamedTuple):
    f: np.ndarray
    g: np.ndarray
    value: float
    n_iter: int


def check_property(checked: Checked, start: tuple[Tensor, Tensor] | None) -> None:
    case = checked.call.case
    known = [b for b, s in enumerate(checked.states) if s is not None]
    if case.property == "none" or not known:
        return
    b = known[0]
    if case.property == "alone":
        return check_alone(checked, b, start)
    item, dtype = checked.items[b], checked.call.type
    C = (item.C + item.prior).astype("float64" if dtype == torch.float64 else "float32").astype(float)
    points = (item.x, item.y) if case.prior == "none" and not checked.call.given else (None, None)
    one = Problem(*points, C, item.a, item.b, item.reg, item.rho)
    other = transformed(one, case, checked.call)
    if other is None:
        return
    for plain in (True, False):
        if plain and case.property == "swap":
            continue  # The updates go in the other order.
        found, expected = (solved(p, case, checked.backend, dtype, checked.call.device, plain) for p in (other[0], one))
        if found is None or expected is None:
            continue
        f, g = other[1](found.f, found.g)
        compare(checked, b, one, expected, Solved(f, g, other[2](found.value), found.n_iter), plain)


def transformed(p: Problem, case: Case, call: Call) -> Any:
    """The other problem, and the functions that take its potentials and its value back; None where there is no such property."""
    n, m = p.C.shape
    random, same = np.random.default_rng(case.seed), lambda value: value
    if case.property == "permutation":
        rows, columns = random.permutation(n), random.permutation(m)
        q = p._replace(
            x=taken(p.x, rows), y=taken(p.y, columns), C=p.C[np.ix_(rows, columns)], a=p.a[rows], b=p.b[columns]
        )
        return q, lambda f, g: (f[np.argsort(rows)], g[np.argsort(columns)]), same
    if case.property == "swap":
        return Problem(p.y, p.x, p.C.T, p.b, p.a, p.reg, p.rho[::-1]), lambda f, g: (g, f), same
    if case.property == "scale":
        factor = 2.0 ** random.integers(-8, 9)
        q = p._replace(x=None, y=None, C=p.C * factor, reg=p.reg * factor, rho=(p.rho[0] * factor, p.rho[1] * factor))
        return q, lambda f, g: (f / factor, g / factor), lambda value: value / factor
    if case.property == "offset" and all(map(math.isinf, p.rho)):
        by = 2.0 ** np.round(np.log2(max(np.abs(np.where(np.isinf(p.C), 0, p.C)).max(), 1e-30)))
        return p._replace(x=None, y=None, C=p.C + by), lambda f, g: (f - by, g), lambda value: value - by
    if case.property in ("split", "absent"):
        i = int(random.integers(0, n))
        rows = np.append(np.arange(n), i)
        a = np.append(p.a, 0.0)
        if case.property == "split":
            a[[i, n]] = p.a[i] / 2
        return p._replace(x=taken(p.x, rows), C=p.C[rows], a=a), lambda f, g: (f[:n], g), same
    return None


def taken(points: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if points is None else points[rows]


def solved(p: Problem, case: Case, backend: str, dtype: torch.dtype, device: str, plain: bool) -> Solved | None:
    least = torch.finfo(dtype).tiny
    if not p.a.any() or not p.b.any() or p.reg < least * 2:
        return None
    a, b = (torch.from_numpy(w).to(device, dtype)[None] for w in (p.a, p.b))
    if plain:
        options: dict[str, Any] = {"max_iter": min(case.max_iter, PLAIN), "tol": 0.0, "accelerate": False}
    else:
        options = {"max_iter": case.max_iter, "tol": case.tol, "accelerate": case.accelerate}
    options |= {"reg": p.reg, "unbalanced": p.rho, "backend": backend}
    if p.x is not None and p.y is not None:
        x, y = (torch.from_numpy(np.ascontiguousarray(t)).to(device, dtype)[None] for t in (p.x, p.y))
        r = otalign.solve(x, y, a=a, b=b, cost=case.cost, **options)
    else:
        r = otalign.solve_cost(torch.from_numpy(p.C).to(device, dtype)[None], a=a, b=b, **options)
    if not r.value.isfinite().all():
        return None
    f, g = (t[0].cpu().double().numpy() for t in r.potentials)
    return Solved(f, g, float(r.value), int(r.n_iter))


def compare(checked: Checked, b: int, p: Problem, one: Solved, other: Solved, plain: bool) -> None:
    from .check import distance, dual_slope, per_update

    call, record = checked.call, checked.record
    name = f"property {call.case.property}"
    reached = (~np.isinf(p.C) & (p.b > 0)).any(1), (~np.isinf(p.C) & (p.a > 0)[:, None]).any(0)
    a, b_ = np.where(reached[0], p.a, 0), np.where(reached[1], p.b, 0)
    item = Item(p.x, p.y, p.C, 0 * np.where(np.isinf(p.C), 0, p.C), (None, None), a, b_, p.reg, p.rho)
    states = [oracle.state(p.C, a, b_, p.reg, p.rho, z.f, z.g) for z in (one, other)]
    budgets = [Budget(item, s, "given" if p.x is None else call.case.cost, call.type) for s in states]
    if not all(budget.meaningful for budget in budgets):
        return
    if plain:
        largest = max(np.abs(z).max(initial=0) for s in (one, other) for z in (s.f, s.g))
        updates = per_update(budgets[0], max(largest, np.abs(np.where(np.isinf(p.C), 0, p.C)).max()))
        within = 4 * (2 * one.n_iter + 2) * updates * (2 if np.isinf(p.rho).all() else 1)
        record.compare(name, b, other.f[a > 0], one.f[a > 0], within)
        record.compare(name, b, other.g[b_ > 0], one.g[b_ > 0], within)
        return
    if (a < p.a).any() or (b_ < p.b).any():
        return  # No plan has these marginals, and the value depends on the gauge.
    gap = max(map(dual_slope, states)) * distance(*states)
    rounding = (
        sum(budget.value() for budget in budgets) + 16 * budgets[0].u * np.abs(np.where(np.isinf(p.C), 0, p.C)).max()
    )
    record.compare(name, b, other.value, one.value, gap + rounding)


def check_alone(checked: Checked, b: int, start: tuple[Tensor, Tensor] | None) -> None:
    """An item alone, dense and without padding, has the bits that it has in its batch; of other engines, the numbers."""
    call, item = checked.call, checked.items[b]
    if start is not None or any(isinstance(w, Tensor) or w == "norm" for w in call.weights):
        return  # Packed weights are normalised in another order.
    reg, rho = item.reg, item.rho
    options: dict[str, Any] = {"reg": reg, "unbalanced": rho, "prior": call.prior(), "backend": checked.backend}
    options |= {"max_iter": call.case.max_iter, "tol": call.case.tol, "accelerate": call.case.accelerate}
    n, m = item.C.shape
    if call.C is not None:
        r = otalign.solve_cost(call.C[b : b + 1, :n, :m].contiguous(), **options)
    else:
        x, y = (call.rows(side, points, b).contiguous()[None] for side, points in enumerate(call.points))  # type: ignore[arg-type]
        r = otalign.solve(x, y, cost=call.case.cost, **options)
    theirs, ours = checked.plan[b, :n, :m].detach(), r.plan()[0].detach()
    if checked.backend == "cpu":
        same = bool((theirs == ours).all()) and float(r.value.detach()) == float(checked.result.value.detach()[b])
        checked.record.require(
            "property alone", b, same and int(r.n_iter) == int(checked.result.n_iter[b]), "other bits"
        )
    elif int(r.n_iter) == int(checked.result.n_iter[b]) and checked.budgets[b] is not None:
        steps = 4 * (int(r.n_iter) + 1)
        checked.record.compare("property alone", b, ours.cpu(), theirs.cpu(), steps * checked.budgets[b].plan)  # type: ignore[union-attr]
