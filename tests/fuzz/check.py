"""Runs a case on a backend, and compares everything that comes back with the oracle."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import otalign
from otalign.problem import LARGEST_START

from . import oracle
from .budget import FIRST_ORDER, ROUNDINGS, Budget
from .case import Call, Case, Item

MOST_ITERATIONS = 200  # that the oracle repeats, or spends on an optimum


class Fault(AssertionError):
    """A result outside of its budget."""

    def __init__(self, quantity: str, item: int | None, message: str) -> None:
        super().__init__(f"{quantity}{'' if item is None else f' of item {item}'}: {message}")
        self.quantity = quantity


@dataclass
class Record:
    """How close results came to their budgets."""

    shares: dict[str, float] = field(default_factory=dict)  # of the budget, the worst by quantity
    compared: dict[str, int] = field(default_factory=dict)  # numbers, by quantity
    items: int = 0
    beyond: int = 0  # items whose type has too few digits to say anything about the plan

    def compare(self, quantity: str, item: int | None, found: Any, expected: Any, budget: Any) -> None:
        """Raise Fault unless `found` is within `budget` of `expected`, number by number."""
        found, expected, budget = (np.asarray(t, dtype=float) for t in (found, expected, budget))
        if found.shape != expected.shape:
            raise Fault(quantity, item, f"shape {found.shape}, expected {expected.shape}")
        with np.errstate(invalid="ignore"):
            apart = np.abs(found - expected)
            share = np.where(found == expected, 0, apart / np.maximum(budget, 1e-320))
        share = np.where(np.isnan(expected) | (budget == np.inf), 0, np.where(np.isnan(share), np.inf, share))
        worst = float(share.max(initial=0))
        if worst > 1:
            at = np.unravel_index(int(share.argmax()), share.shape)
            limit = np.broadcast_to(budget, share.shape)[at]
            raise Fault(
                quantity, item, f"{found[at]!r} at {at}, expected {expected[at]!r} within {limit:.3g}: {worst:.3g}"
            )
        self.shares[quantity] = max(self.shares.get(quantity, 0), worst)
        self.compared[quantity] = self.compared.get(quantity, 0) + share.size

    def require(self, quantity: str, item: int | None, holds: Any, message: str) -> None:
        if not bool(holds):
            raise Fault(quantity, item, message)
        self.compared[quantity] = self.compared.get(quantity, 0) + 1

    def join(self, other: Record) -> None:
        for quantity, share in other.shares.items():
            self.shares[quantity] = max(self.shares.get(quantity, 0), share)
        for quantity, count in other.compared.items():
            self.compared[quantity] = self.compared.get(quantity, 0) + count
        self.items += other.items
        self.beyond += other.beyond


def run(case: Case, backend: str, record: Record | None = None, device: str = "cpu") -> Record:
    """Solve the case, and raise Fault if anything is outside of its budget."""
    from .properties import check_property

    record = Record() if record is None else record
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        call = Call(case, device)
        warnings.simplefilter("ignore", otalign.ConvergenceWarning)
        leaves = call.leaves()
        arguments = call.arguments(leaves, backend)
        items = call.items()
        message = refusal(call, items)
        if message:
            with pytest.raises(ValueError, match=message):
                solve(arguments)
            record.require("refusal", None, True, "")
            return record
        start = starting_potentials(call, arguments)
        if start is not None:
            arguments["init"] = start
            if starts_too_far(call, start):
                with pytest.raises(ValueError, match="init: expected finite potentials"):
                    solve(arguments)
                return record
        result = solve(arguments)
        checked = Checked(call, items, result, backend, record)
        checked.check_items(start)
        checked.check_gradients(leaves)
        if start is None and not call.given:
            check_objective(checked, leaves, arguments)
        check_property(checked, start)
    return record


def solve(arguments: dict[str, Any]) -> otalign.OTResult:
    return (otalign.solve_cost if "C" in arguments else otalign.solve)(**arguments)


def refusal(call: Call, items: list[Item]) -> str | None:
    """What the message of the refusal has to contain; None = the call is valid."""
    if call.case.max_iter == 0:
        return "max_iter: expected at least 1, got 0"
    if call.device != "cpu":
        return None  # Weights on a GPU are not read.
    for side, name in enumerate("ab"):
        for item in items:
            points, kind = (item.x, item.y)[side], (call.case.a, call.case.b)[side]
            if kind == "norm" and points is not None and len(points) and not points.any():
                return f"{name}: expected some positive weight in every item"
    return None


def starting_potentials(call: Call, arguments: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    kind, poison = call.case.start, call.case.poison
    if kind is None:
        return None
    if kind == "potentials":
        return solve(arguments | {"max_iter": 3}).potentials
    like = solve(arguments | {"max_iter": 1}).potentials
    vectors = []
    for side, potential in enumerate(like):
        vector = torch.full_like(potential, poison)
        for b, reg in enumerate(call.regs()):
            rows = call.rows(side, vector, b)
            drawn = call.random.standard_normal(len(rows)) * 5 * reg * (kind == "random")
            rows.copy_(torch.from_numpy(drawn))
        vectors.append(vector)
    return vectors[0], vectors[1]


def starts_too_far(call: Call, start: tuple[Tensor, Tensor]) -> bool:
    limit = LARGEST_START[call.type]
    for b, reg in enumerate(call.regs()):
        f, g = (call.rows(side, start[side], b) for side in (0, 1))
        if not bool((g.double().abs() <= reg * limit).all() and f.isfinite().all()):
            return True
    return False


class Checked:
    """A solved case: the item's states at the potentials that came back, and their budgets."""

    def __init__(self, call: Call, items: list[Item], result: otalign.OTResult, backend: str, record: Record) -> None:
        self.call, self.items, self.result, self.backend, self.record = call, items, result, backend, record
        self.plan = result.plan()
        self.states: list[oracle.State | None] = []  # None = empty, NaN, or not to be told
        self.budgets: list[Budget | None] = []
        self.expected_nan: list[bool | None] = []  # None = not to be told: numbers at the end of the type's range
        self.dropped: list[tuple[float, float]] = []  # weights of points that nothing can reach, by side
        self.halves = backend != "cpu" and backend != "reference"

    def check_items(self, start: tuple[Tensor, Tensor] | None) -> None:
        result, record = self.result, self.record
        B, N, M = len(self.items), *(self._size(side) for side in (0, 1))
        for name, tensor, shape in (
            ("value", result.value, (B,)), ("value_linear", result.value_linear, (B,)), ("n_iter", result.n_iter, (B,)),
            ("error", result.error, (B,)), ("converged", result.converged, (B,)), ("plan", self.plan, (B, N, M)),
        ):  # fmt: skip
            record.require(
                "shapes", None, tuple(tensor.shape) == shape, f"{name} {tuple(tensor.shape)}, expected {shape}"
            )
        for b, item in enumerate(self.items):
            self.states.append(None)
            self.budgets.append(None)
            self.dropped.append((0.0, 0.0))
            self.expected_nan.append(None)
            self._check_padding(b, item)
            if item.C.size == 0:
                self.expected_nan[b] = False
                self._check_empty(b)
            else:
                self._check_item(b, item, start)

    def _size(self, side: int) -> int:
        lengths = self.call.lengths[side]
        return max(lengths, default=0) + (self.call.case.padding if self.call.layouts[side] == "padded" else 0)

    def _check_padding(self, b: int, item: Item) -> None:
        n, m = item.C.shape
        inside = np.zeros(self.plan.shape[1:], bool)
        inside[:n, :m] = True
        self.record.require("padding", b, not self.plan[b].detach().cpu().numpy()[~inside].any(), "the plan is not 0")
        for side, name in enumerate("fg"):
            if self.call.layouts[side] == "padded":
                rest = self.result.potentials[side][b, (n, m)[side] :]
                self.record.require("padding", b, not rest.any(), f"{name} is not 0")

    def _check_empty(self, b: int) -> None:
        r = self.result
        found = [float(t[b]) for t in (r.value.detach(), r.value_linear.detach(), r.n_iter, r.error, r.converged)]
        self.record.require("empty items", b, found == [0, 0, 0, 0, 1], f"{found}")

    def _check_item(self, b: int, item: Item, start: tuple[Tensor, Tensor] | None) -> None:
        r, record, case = self.result, self.record, self.call.case
        record.items += 1
        value, linear, error = (float(t.detach()[b]) for t in (r.value, r.value_linear, r.error))
        n_iter, converged = int(r.n_iter[b]), bool(r.converged[b])
        record.require(
            "converged", b, converged == (error <= case.tol), f"{converged} with error {error}, tol {case.tol}"
        )
        expected = self.expected_nan[b] = is_nan(item, self.call)
        if expected is None:
            return
        if expected:
            found = math.isnan(value) and math.isnan(linear) and not converged
            return record.require("NaN", b, found, f"expected NaN, got {value}, {linear}, converged {converged}")
        C = item.C + item.prior
        a = np.where((~np.isinf(C) & (item.b > 0)).any(1), item.a, 0)
        b_ = np.where((~np.isinf(C) & (item.a > 0)[:, None]).any(0), item.b, 0)
        f, g = (self.call.rows(side, r.potentials[side], b).cpu().double().numpy() for side in (0, 1))
        s = oracle.state(C, a, b_, item.reg, item.rho, f, g)
        limit = torch.finfo(self.call.type).max
        if not (s.P.sum() < math.sqrt(limit) and abs(s.value) < limit / 4):
            self.expected_nan[b] = None  # The mass or the value may leave the range of the type.
            return
        record.require(
            "NaN", b, math.isfinite(value) and math.isfinite(linear), f"value {value}, linear {linear}, error {error}"
        )
        record.require("potentials", b, np.isfinite(f).all() and np.isfinite(g).all(), f"f {f}, g {g}")
        budget = Budget(item, s, case.cost, self.call.type, n_iter, normwise=self.backend == "reference")
        self.dropped[b] = lost = float((item.a - a).sum()), float((item.b - b_).sum())
        strict = sum(w for w, r in zip(lost, item.rho, strict=True) if math.isinf(r))
        record.require("n_iter", b, 1 <= n_iter <= case.max_iter, f"{n_iter} of {case.max_iter}")
        if case.tol == 0 or (not converged and strict == 0):
            record.require(
                "n_iter", b, n_iter == case.max_iter, f"{n_iter} of {case.max_iter}, error {error}, tol {case.tol}"
            )
        if not budget.meaningful:
            record.beyond += 1
            return
        self.states[b], self.budgets[b] = s, budget
        n, m = C.shape
        record.compare("plan", b, self.plan[b, :n, :m].detach().cpu().double().numpy(), s.P, budget.plan)
        more = sum(w * r for w, r in zip(lost, item.rho, strict=True) if math.isfinite(r))
        record.compare("value", b, value, s.value + more, budget.value() * (1 + 1e-9) + 16 * budget.u * more)
        record.compare("value_linear", b, linear, s.linear, budget.linear())
        transposed = oracle.State(s.C.T, s.b, s.a, s.reg, s.rho[::-1], s.g, s.f, s.P.T, s.columns, s.rows, 0, 0)
        residual = oracle.residual(s).sum() + oracle.residual(transposed).sum()
        of_error = budget.error() + Budget(transposed_item(item), transposed, case.cost, self.call.type, n_iter).error()
        if residual + of_error < torch.finfo(self.call.type).max / 4:
            record.compare("error", b, error, residual + strict, of_error)
        if all(map(math.isinf, item.rho)) and not any(lost):
            of_gauge = ROUNDINGS * budget.u * ((b_ * np.abs(g)).sum() + np.abs(f).max()) + budget.steps * (
                (b_ * np.abs(g)).sum() + s.reg
            )
            record.compare("gauge", b, (b_ * g).sum(), 0, of_gauge)
        self._check_massless(b, s, budget)
        if not case.accelerate or case.tol == 0:
            self._check_iterates(b, item, s, budget, start, n_iter)
        self._check_optimum(b, s, budget, error)
        self._check_images(b, item, s, budget)

    def _check_massless(self, b: int, s: oracle.State, budget: Budget) -> None:
        """The potential of a point without mass follows from those of the other side."""
        for name, C, own, z, across, other, rho in (
            ("f", s.C, s.a, s.f, s.b, s.g, s.rho[0]), ("g", s.C.T, s.b, s.g, s.a, s.f, s.rho[1]),
        ):  # fmt: skip
            none = own == 0
            if none.any():
                relative = budget.relative if name == "f" else budget.relative.T
                worst = np.max(relative, axis=1, where=(across > 0) & np.isfinite(C), initial=budget.steps)
                expected = oracle.update(C, across, other, s.reg, rho)
                bound = s.reg * worst + ROUNDINGS * budget.u * np.abs(z)
                self.record.compare("potentials of massless points", b, z[none], expected[none], bound[none])

    def _check_iterates(self, b: int, item: Item, s: oracle.State, budget: Budget, start: Any, n_iter: int) -> None:
        """Plain iterations: the potentials after as many, and that there are neither more nor fewer.

        An update is a weighted minimum: it moves no more than what it is made of. So errors add up, and no faster than that.
        """
        if n_iter > MOST_ITERATIONS:
            return
        record, case = self.record, self.call.case
        g = np.zeros(len(s.b)) if start is None else self.call.rows(1, start[1], b).cpu().double().numpy()
        path = list(islice(oracle.iterates(s.C, s.a, s.b, s.reg, s.rho, g), n_iter))
        within = (2 * n_iter + 2) * per_update(budget, max(np.abs(z).max() for pair in path for z in pair))
        f_end, g_end = path[-1]
        if all(map(math.isinf, item.rho)):
            shift = (s.b * g_end).sum()
            f_end, g_end = f_end + shift, g_end - shift
            within *= 2
        mass_x, mass_y = s.a > 0, s.b > 0
        record.compare("potentials", b, s.f[mass_x], f_end[mass_x], within)
        record.compare("potentials", b, s.g[mass_y], g_end[mass_y], within)
        if case.tol == 0 or 2 * within / s.reg > FIRST_ORDER:
            return
        for k, (f, g) in enumerate(path, 1):
            at = oracle.state(s.C, s.a, s.b, s.reg, s.rho, f, g)
            left = oracle.residual(at).sum()
            bound = 2.2 * within / s.reg * (at.rows.sum() + left) + budget.steps
            if k < n_iter and not (self.halves and any(self.dropped[b])):  # On a GPU, out of reach is out of tolerance.
                record.require("n_iter", b, left > case.tol - bound, f"{n_iter}, but after {k} the error is {left}")
            elif n_iter < case.max_iter:
                record.require("n_iter", b, left <= case.tol + bound, f"{n_iter}, when the error is {left}")

    def _check_optimum(self, b: int, s: oracle.State, budget: Budget, error: float) -> None:
        """The value and the plan at the optimum: the dual objective is concave, so gradients bound what is missing.

        D* - D(z) <= <grad D(z), z* - z>; and D* - D(z) is at least reg KL(P* | P), which bounds |P* - P| (Pinsker).
        """
        optimum = self.optimum(s)
        if optimum is None:
            return
        slope, of_slope = dual_slope(s), dual_slope(optimum)
        apart = distance(s, optimum)
        gap = max(slope, of_slope) * apart
        rounding = budget.value() + 1e-13 * (np.abs(s.f).max() + np.abs(s.g).max() + s.reg)
        missing = primal_gap(optimum)
        self.record.compare("value at the optimum", b, s.value, oracle.primal(optimum), gap + rounding + missing)
        kl = max(gap + of_slope * apart + rounding, 0) / s.reg
        bound = math.sqrt((2 / 3 * optimum.P.sum() + 4 / 3 * s.P.sum()) * kl) + of_slope
        self.record.compare("plan at the optimum", b, np.abs(s.P - optimum.P).sum(), 0, bound)

    def optimum(self, s: oracle.State) -> oracle.State | None:
        """The item solved by the oracle from zero; None if that takes too long, or if no plan has these marginals."""
        for f, g in islice(oracle.iterates(s.C, s.a, s.b, s.reg, s.rho, np.zeros(len(s.b))), 5, MOST_ITERATIONS, 8):
            at = oracle.state(s.C, s.a, s.b, s.reg, s.rho, f, g)
            if dual_slope(at) < 1e-9 * at.P.sum():
                return at
        return None

    def _check_images(self, b: int, item: Item, s: oracle.State, budget: Budget) -> None:
        functional, r = self.call.case.functional, self.result
        if functional in ("image x", "image y") and item.x is not None and item.y is not None:
            by_y = functional == "image y"
            found = (
                self.call.rows(int(by_y), (r.barycentric_y if by_y else r.barycentric_x)(), b)
                .detach()
                .cpu()
                .double()
                .numpy()
            )
            other = item.x if by_y else item.y
            P, bound = (s.P.T, budget.plan.T) if by_y else (s.P, budget.plan)
            expected = image(P, other)
            apart = np.abs(other - expected[:, None])
            mass = P.sum(1)
            bounds = (bound[:, :, None] * apart).sum(1) / oracle.nonzero(mass)[:, None]
            bounds = bounds + 2 * (budget.steps + self._half(other)) * np.abs(other).max(0, initial=0) + budget.tiny
            told = mass > math.sqrt(budget.tiny)  # Less may be lost among numbers that are too small.
            self.record.compare("images", b, found[told], expected[told], bounds[told])
        if functional == "apply":
            for to, P, bound in (("x", s.P, budget.plan), ("y", s.P.T, budget.plan.T)):
                found = (r.marginal_x if to == "x" else r.marginal_y)()
                found = self.call.rows("xy".index(to), found, b).detach().cpu().double().numpy()
                self.record.compare("marginals", b, found, P.sum(1), bound.sum(1) + budget.steps * P.sum(1))
            assigned = (
                self.call.rows(1, r.assign_y().flatten(), b) if self.call.layouts[1] != "padded" else r.assign_y()[b]
            )
            for j, i in enumerate(assigned[: len(s.b)].tolist()):
                if s.b[j] > 0 and s.columns[j] > math.sqrt(budget.tiny):
                    best = int(s.P[:, j].argmax())
                    self.record.compare(
                        "assignment", b, s.P[i, j], s.P[best, j], budget.plan[i, j] + budget.plan[best, j]
                    )

    def _half(self, points: np.ndarray) -> float:
        return 2.0**-8 if self.halves and self.call.case.x_type in ("float16", "bfloat16") else 0.0

    # Gradients -------------------------------------------------------------------------------------------------------

    def check_gradients(self, leaves: dict[str, Tensor]) -> None:
        """Of a random functional of the values, the plan or the images."""
        kind, random = self.call.case.functional, self.call.random
        total: Any = 0
        factors = []
        for b, item in enumerate(self.items):
            n, m = item.C.shape
            by_value = random.standard_normal() if kind in ("value", "all") else 0.0
            by_linear = random.standard_normal() if kind in ("linear", "all") else 0.0
            by_plan = self.call.typical * random.standard_normal((n, m)) * (kind in ("plan", "all"))
            if self.call.type == torch.float32:
                by_plan = by_plan.astype("float32").astype(float)
            if by_value:
                total = total + by_value * self.result.value[b]
            if by_linear:
                total = total + by_linear * self.result.value_linear[b]
            if by_plan.any():
                total = total + (torch.from_numpy(by_plan).to(self.plan) * self.plan[b, :n, :m]).sum()
            factors.append([by_value, by_linear, by_plan])
        images = kind in ("image x", "image y") and not self.call.given
        if images:
            by_y = kind == "image y"
            image_ = (self.result.barycentric_y if by_y else self.result.barycentric_x)()
            weights = torch.from_numpy(random.standard_normal(tuple(image_.shape))).to(image_)
            total = (torch.where(image_.isnan(), 0, image_) * weights).sum()
        if not isinstance(total, Tensor) or not leaves or not total.requires_grad:
            return
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        gradients = dict(zip(leaves, found, strict=True))
        for b, item in enumerate(self.items):
            own = None
            if images:
                side = int(kind == "image y")
                own = side, self.call.rows(side, weights, b).cpu().double().numpy()
            self.compare_gradients(b, item, gradients, *factors[b], image_weights=own)

    def compare_gradients(
        self, b: int, item: Item, gradients: dict[str, Any], by_value: float, by_linear: float, by_plan: np.ndarray,
        image_weights: tuple[int, np.ndarray] | None = None, name: str = "gradient", fixed_weights: bool = False,
    ) -> None:  # fmt: skip
        call, record, s, budget = self.call, self.record, self.states[b], self.budgets[b]
        n, m = item.C.shape
        for leaf, gradient in gradients.items():
            if gradient is not None and leaf in "Cxy":
                part = gradient[b, :n, :m] if leaf == "C" else call.rows("xy".index(leaf), gradient, b)
                rest = gradient[b] if leaf == "C" else None
                if rest is not None:
                    record.require("padding", b, not rest[n:].any() and not rest[:, m:].any(), f"{name} is not 0")
                if item.C.size == 0:
                    record.require("empty items", b, not part.any(), f"{name} by {leaf} is not 0")
                elif self.expected_nan[b] and (by_value or by_linear):
                    bad = bool(part.isnan().any()) or part.numel() == 0
                    record.require("NaN", b, bad, f"{name} by {leaf} has no NaN: {part}")
        if s is None or budget is None:
            return
        of_plan, explicit = 0 * s.P, None
        if image_weights is not None:
            by_plan, of_plan, explicit = self._image_gradients(item, s, budget, *image_weights)
            if by_plan is None:
                return
        expected = oracle.gradients(s, by_value, by_linear, by_plan)
        bounds = budget.gradients(by_value, by_linear, by_plan, of_plan, expected)
        if bounds is None:
            return
        of_C, of_a, of_b = bounds
        for side, leaf in enumerate("xy"):
            if gradients.get(leaf) is None:
                continue
            if item.x is None or item.y is None:
                continue
            points, other, by_C = (item.x, item.y, expected.C) if side == 0 else (item.y, item.x, expected.C.T)
            gradient = (by_C[:, :, None] * oracle.cost_gradient(points, other, call.case.cost)).sum(1)
            bound = budget.points_gradient(expected.C, of_C, side == 1, gradients[leaf].dtype, self.halves)
            if explicit is not None and explicit[0] == side:
                sizes = np.abs(gradient) + np.abs(explicit[1])  # added in the type of the points
                gradient, bound = (
                    gradient + explicit[1],
                    bound + explicit[2] + torch.finfo(gradients[leaf].dtype).eps * sizes,
                )
            found = call.rows(side, gradients[leaf], b).cpu().double().numpy()
            self._compare_held(f"{name} by points", b, found, gradient, bound, gradients[leaf].dtype)
        if gradients.get("C") is not None:
            dtype = gradients["C"].dtype
            found = gradients["C"][b, :n, :m].cpu().double().numpy()
            self._compare_held(f"{name} by C", b, found, expected.C, of_C, dtype)
        if fixed_weights or (self.backend == "reference" and any(self.dropped[b])):
            return  # The reference's gradient by weights counts points that are out of reach.
        for side, (leaf, by_w, of_w, w, normal) in enumerate(
            (("a", expected.a, of_a, item.weights[0], item.a), ("b", expected.b, of_b, item.weights[1], item.b))
        ):
            if gradients.get(leaf) is None or w is None:
                continue
            if np.abs(by_w).max() > 1e15:
                continue  # The derivative by a weight of nearly zero, which may be infinite, and is then bounded.
            largest = w.max()
            total = (w / largest).sum() * largest
            gradient = (by_w - (by_w * normal).sum()) / total
            bound = (
                of_w
                + np.where(normal > 0, of_w * normal, 0).sum()
                + 2 * budget.steps * (np.abs(by_w) + (np.abs(by_w) * normal).sum())
            ) / total
            found = call.rows(side, gradients[leaf], b).cpu().double().numpy()
            self._compare_held(f"{name} by weights", b, found, gradient, bound, gradients[leaf].dtype)

    def _compare_held(self, name: str, b: int, found: Any, expected: Any, bound: Any, dtype: torch.dtype) -> None:
        """Compare what the type can hold."""
        held = np.abs(expected) + bound < torch.finfo(dtype).max / 4
        bound = bound + torch.finfo(dtype).eps * (np.abs(expected) + bound) + torch.finfo(dtype).tiny
        self.record.compare(name, b, found[held], expected[held], bound[held])

    def _image_gradients(self, item: Item, s: oracle.State, budget: Budget, side: int, weights: np.ndarray) -> Any:
        """The derivative of <weights, image> by the plan and by the points of the other side, with their errors."""
        assert item.x is not None and item.y is not None
        other = item.y if side == 0 else item.x
        P, bound = (s.P, budget.plan) if side == 0 else (s.P.T, budget.plan.T)
        mass = P.sum(1)
        if (mass < math.sqrt(budget.tiny)).any():
            return None, None, None
        apart = other - image(P, other)[:, None]
        per_mass = weights[:, None] / mass[:, None, None]
        by_plan = (per_mass * apart).sum(-1)
        of_mass = bound.sum(1) / mass
        of_image = (bound[:, :, None] * np.abs(apart)).sum(1) / mass[:, None]
        size = np.abs(per_mass) * (np.abs(other) + np.abs(image(P, other))[:, None])
        rounding = 2 * budget.steps + self._half(other)
        of_plan = (
            np.abs(per_mass * apart) * of_mass[:, None, None] + np.abs(per_mass) * of_image[:, None] + rounding * size
        ).sum(-1)
        by_other = ((P / mass[:, None])[:, :, None] * weights[:, None]).sum(0)
        share = bound / mass[:, None] + P / mass[:, None] * (of_mass[:, None] + rounding)
        of_other = (share[:, :, None] * np.abs(weights)[:, None]).sum(0)
        return (
            (by_plan, of_plan, (1 - side, by_other, of_other))
            if side == 0
            else (by_plan.T, of_plan.T, (0, by_other, of_other))
        )


def image(P: np.ndarray, other: np.ndarray) -> np.ndarray:
    mass = P.sum(1)
    return np.where(mass > 0, 1 / oracle.nonzero(mass), 0)[:, None] * (P @ other)


def is_nan(item: Item, call: Call) -> bool | None:
    """Whether an item has to be NaN; None where its numbers are near the end of the type's range."""
    limit = torch.finfo(call.type).max
    if item.x is None or item.y is None:
        if np.isnan(item.C).any() or np.isneginf(item.C).any():
            return True
    elif not (np.isfinite(item.x).all() and np.isfinite(item.y).all()):
        return True
    if np.isnan(item.a).any() or np.isnan(item.b).any():
        return True
    finite = np.where(np.isinf(item.C), 0, np.abs(item.C)) if item.x is None else np.abs(item.C)
    if item.x is not None and item.y is not None and call.case.cost != "cosine":
        squares = np.abs(item.x).max(initial=0) ** 2 + np.abs(item.y).max(initial=0) ** 2
        finite = np.maximum(finite, squares * 4 * max(call.case.dim, 1))
    if (finite > limit / 16).any():
        return None
    C = item.C + item.prior
    return None if (np.where(np.isinf(C), 0, np.abs(C)) > limit / 16).any() else False


def transposed_item(item: Item) -> Item:
    return Item(item.y, item.x, item.C.T, item.prior.T, item.weights[::-1], item.b, item.a, item.reg, item.rho[::-1])


def dual_slope(s: oracle.State) -> float:
    """The L1 norm of the dual objective's gradient."""
    total = 0.0
    for w, z, rho, mass in ((s.a, s.f, s.rho[0], s.rows), (s.b, s.g, s.rho[1], s.columns)):
        total += np.where(w > 0, np.abs(w * np.exp(np.clip(-z / rho, -700, 700)) - mass), 0).sum()
    return float(total)


def per_update(budget: Budget, largest: float) -> float:
    """What rounding adds to the potentials in an update, where potentials are at most `largest`."""
    finite = np.where(np.isinf(budget.s.C), 0, ROUNDINGS * budget.u * np.abs(budget.s.C) + budget.of_cost)
    return float(1.1 * (ROUNDINGS * budget.u * 2 * largest + finite.max(initial=0)) + budget.s.reg * budget.steps)


def primal_gap(s: oracle.State) -> float:
    """How far the primal objective is from the dual one, at most, near the optimum."""
    return 2 * dual_slope(s) * (np.abs(s.f).max() + np.abs(s.g).max() + s.reg + sum(r for r in s.rho if r < math.inf))


def distance(one: oracle.State, two: oracle.State) -> float:
    """The largest difference of the potentials of points with mass; balanced, up to a constant."""
    f, g = (two.f - one.f)[one.a > 0], (two.g - one.g)[one.b > 0]
    if f.size == 0 or g.size == 0:
        return 0.0
    if all(map(math.isinf, one.rho)):
        middle = (f.max() + f.min()) / 2
        f, g = f - middle, g + middle
    return float(max(np.abs(f).max(), np.abs(g).max()))


def check_objective(checked: Checked, leaves: dict[str, Tensor], arguments: dict[str, Any]) -> None:
    """The loss, its reduction, and its gradient for an incoming one other than 1."""
    from .divergence import check_divergence

    call, case, record = checked.call, checked.call.case, checked.record
    if case.objective == "divergence":
        return check_divergence(checked, leaves, arguments)
    loss = otalign.sinkhorn_loss(**arguments, objective=case.objective, reduction=case.reduction)
    result = checked.result
    per_item = (result.value if case.objective == "value" else result.value_linear).detach().cpu().double().numpy()
    filled = np.array([item.C.size > 0 for item in checked.items], dtype=bool)
    known = [s is not None or n is not None for s, n in zip(checked.states, checked.expected_nan, strict=True)]
    coefficients = call.random.standard_normal(len(checked.items) if case.reduction == "none" else 1)
    if case.reduction == "none":
        expected: Any = per_item
        each = coefficients
    else:
        expected = per_item.sum() / (max(filled.sum(), 1) if case.reduction == "mean" else 1)
        each = coefficients[0] / (max(filled.sum(), 1) if case.reduction == "mean" else 1) * np.ones(len(checked.items))
    if all(known):
        size = np.abs(per_item).sum() if case.reduction != "none" else np.abs(per_item)
        eps = torch.finfo(call.type).eps
        found = loss.detach().cpu().double().numpy()
        record.require(
            "loss", None, np.isnan(found).tolist() == np.isnan(expected).tolist(), f"{found}, expected {expected}"
        )
        record.compare(
            "loss", None, found, expected, 2 * eps * (len(checked.items) + 1) * size + torch.finfo(call.type).tiny
        )
    if not leaves:
        return
    grad_output = torch.from_numpy(coefficients).to(loss).reshape(loss.shape)
    gradients = torch.autograd.grad(loss, list(leaves.values()), grad_output, allow_unused=True)
    by_leaf = dict(zip(leaves, gradients, strict=True))
    for b, item in enumerate(checked.items):
        value, linear = (0.0, each[b]) if case.objective == "transport" else (each[b], 0.0)
        fixed = case.objective == "plan_cost"
        checked.compare_gradients(
            b, item, by_leaf, value, linear, 0 * item.C, name="gradient of the loss", fixed_weights=fixed
        )
