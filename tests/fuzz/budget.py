"""How far a result may be from the oracle's: bounds of first order, from the rounding of numbers and the conditioning of the item.

u is the unit roundoff of the type that is computed in. An entry of the plan has the exponent (f + g - C) / reg, whose numbers are
rounded: this alone is a relative error of the plan, `relative`, in every entry. All other bounds are what such errors of the
plan become in sums, in the system of the adjoint, and in the gradients of the points.
"""

from __future__ import annotations

import numpy as np
import torch

from . import oracle
from .case import Item
from .oracle import Array, State

# Where the engines end the conjugate gradients of the adjoint: residuals in the norm of the masses' reciprocals.
ADJOINT_TOL = {torch.float32: 1e-7, torch.float64: 1e-14}
# An engine reads entries of the plan as zero that are below this share of the sums of their row and of their column: it
# iterates on a matrix whose numbers leave the range of floats (csrc/absorb.h).
LEFT_OUT = {torch.float32: np.exp(2 * 20 - 80), torch.float64: np.exp(2 * 200 - 650)}
# A potential is kept as an exponent and a factor of at most exp(this).
SCALING_RANGE = {torch.float32: 20, torch.float64: 200}
# In an exponent are rounded: the cost; its difference from the smallest of its row; the quotient by reg; each potential, when it
# is absorbed and when it is returned; the shift of the gauge.
ROUNDINGS = 8
UNDERFLOWS = 8  # Numbers in an entry of the plan or of a gradient that may be too small for the type.
FIRST_ORDER = 0.1  # Relative errors up to here are bounded by their first order, and a tenth of them.


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def cost_error(item: Item, word: str, dtype: torch.dtype) -> Array:
    """Of every entry of the cost, with the prior: sums of D products, in which the products may be of the points' size."""
    u, tiny = roundoff(dtype), torch.finfo(dtype).tiny
    largest = np.abs(np.where(np.isinf(item.C), 0, item.C))
    error = (
        2 * u * (largest + np.abs(np.where(np.isinf(item.prior), 0, item.prior))) if item.prior.any() else 0 * largest
    )
    if item.x is None or item.y is None:
        return error
    D = item.x.shape[-1]
    if word == "cosine":
        return error + u * ((2 * D + 16) * np.abs(oracle.unit(item.x)) @ np.abs(oracle.unit(item.y)).T + 2)
    products = np.abs(item.x) @ np.abs(item.y).T
    if word == "dot":
        return error + u * (D + 4) * products + D * tiny
    squares = (item.x**2).sum(-1)[:, None] + (item.y**2).sum(-1) + 2 * products
    squares = u * (D + 6) * squares + 2 * D * tiny
    if word == "sqeuclidean":
        return error + squares
    return error + np.minimum(squares / np.maximum(item.C, 1e-300), np.sqrt(squares)) + 2 * u * item.C


def matter(C: Array, across: Array, g: Array, reg: float) -> Array:
    """Which terms of an update, (n, m), are not too small beside the largest of their row."""
    terms = np.log(across) + (g - C) / reg
    top = terms.max(1, keepdims=True, initial=-np.inf)
    return np.isfinite(top) & (terms - np.where(np.isfinite(top), top, 0) >= -40)


class Budget:
    """The bounds of an item at the potentials that a backend returned."""

    def __init__(
        self, item: Item, s: State, word: str, dtype: torch.dtype, n_iter: int = 0, normwise: bool = False
    ) -> None:
        self.normwise = normwise  # gradients only up to rounding of the largest: the reference's dense pseudo-inverse
        self.item, self.s, self.dtype, self.word = item, s, dtype, word
        self.u, self.tiny = roundoff(dtype), torch.finfo(dtype).tiny
        n, m = s.C.shape
        self.steps = self.u * (n + m + 16)  # of a sum, and of the functions in it
        finite = np.where(np.isinf(s.C), 0, s.C)
        self.of_cost = cost_error(item, word, dtype)
        # Before they get their gauge, potentials may be as large as the largest.
        largest = [np.abs(z).max(where=w > 0, initial=0) for z, w in ((s.f, s.a), (s.g, s.b))]
        sizes = np.maximum(np.abs(s.f), largest[0])[:, None] + np.maximum(np.abs(s.g), largest[1])
        if (
            np.isinf(s.C).any() and np.isinf(s.rho).all()
        ):  # There may be no such plan. Then f grows and g shrinks for ever.
            for z, C, w, across, other in ((s.f, s.C, s.a, s.b, s.g), (s.g, s.C.T, s.b, s.a, s.f)):
                step = np.abs(z - oracle.update(C, across, other, s.reg, np.inf))
                sizes = sizes + 2 * n_iter * np.max(step, where=w > 0, initial=0)
        # Exponents are rounded whenever a potential is absorbed: each time that it has moved by the range of a factor; and in
        # every iteration if a sum stays out of this range, as those of relaxed or unreached points may.
        absorbed = 2 * (largest[0] + largest[1]) / (s.reg * SCALING_RANGE[dtype])
        often = np.isinf(s.C).any() or not np.isinf(s.rho).all()
        absorbed = n_iter if often else min(n_iter, absorbed)
        rounded = self.u * (ROUNDINGS + absorbed) * (sizes + np.abs(finite))
        self.relative = 1.1 * (self.of_cost + rounded) / s.reg + self.steps + 2 * self.u * SCALING_RANGE[dtype]
        rows, columns = matter(s.C, s.b, s.g, s.reg), matter(s.C.T, s.a, s.f, s.reg).T
        counts = (self.tiny < s.P) | (rows & (s.a > 0)[:, None]) | (columns & (s.b > 0))
        self.worst = float(np.max(self.relative, where=counts, initial=self.steps))
        least = np.minimum(s.rows[:, None], s.columns)
        self.plan = (
            s.P * self.relative + 2 * LEFT_OUT[dtype] * (least + np.sqrt(s.a[:, None] * s.b)) + UNDERFLOWS * self.tiny
        )
        self.plan += (
            torch.finfo(dtype).smallest_normal * self.u * np.exp(SCALING_RANGE[dtype])
        )  # a product of a subnormal

    @property
    def meaningful(self) -> bool:
        """Whether the type has digits enough for this item."""
        return self.worst < FIRST_ORDER

    def value(self) -> float:
        s = self.s
        return float(self.duals() + s.reg * (self.plan.sum() + self.steps * (1 + s.P.sum())))

    def linear(self) -> float:
        finite = np.abs(np.where(np.isinf(self.s.C), 0, self.s.C))
        # The cost is read from the exponents again, in which numbers of the size of reg were added.
        sizes = finite + self.s.reg
        return float((self.plan * sizes + self.s.P * (self.of_cost + self.of_read_cost() + self.steps * sizes)).sum())

    def of_read_cost(self) -> Array:
        """Of the cost where an engine reads it from the plan again: f + g - reg (log P - log a - log b)."""
        logs = np.abs(np.log(np.maximum(self.s.a, 1e-300)))[:, None] + np.abs(np.log(np.maximum(self.s.b, 1e-300)))
        logs = logs + np.abs(np.log(np.maximum(self.s.P, 1e-300)))
        return self.s.reg * (np.where(np.isfinite(self.relative), self.relative, 0) + ROUNDINGS * self.u * logs)

    def error(self) -> float:
        """Of the marginal error, or the residual."""
        s = self.s
        following = oracle.update(s.C, s.b, s.g, s.reg, s.rho[0])
        growth = np.where(s.a > 0, np.exp(np.clip((s.f - following) / s.reg, -700, 700)), 0)
        of_rows = np.max(self.relative, axis=1, where=matter(s.C, s.b, s.g, s.reg), initial=self.steps)
        return float((s.a * growth * of_rows).sum() + self.steps + UNDERFLOWS * self.tiny * s.P.size)

    def gradients(self, by_value: float, by_linear: float, by_plan: Array, of_plan: Array, found: oracle.Gradients):
        """Of the gradients by C, a and b; None where the system is too close to a singular one. `of_plan`: error of `by_plan`."""
        s, n, relative = self.s, len(self.s.a), self.relative
        finite = np.where(np.isinf(s.C), 0, s.C)
        by_P = np.abs(by_linear * finite) + np.abs(by_plan)
        of_P = np.abs(by_linear) * (self.of_cost + self.of_read_cost()) + of_plan
        of_W = self.plan * by_P + s.P * of_P + UNDERFLOWS * self.tiny * self.u  # subnormal products
        H = oracle.system(s)
        free = self._free(H)
        if free is None:
            return None
        inverse = np.abs(oracle.inverse(H))
        z = np.abs(found.adjoint)
        of_H = np.block([[np.diag(self.plan.sum(1)), self.plan], [self.plan.T, np.diag(self.plan.sum(0))]])
        if by_P.any() and (inverse @ of_H).sum(1).max(initial=0) > 0.5:
            return None
        right = np.concatenate([of_W.sum(1), of_W.sum(0)])
        loads = np.concatenate([(s.P * by_P).sum(1), (s.P * by_P).sum(0)])
        masses = np.diag(H)
        norm = np.sqrt((loads**2 / np.where(masses > 0, masses, 1)).sum())
        stop = ADJOINT_TOL[self.dtype] * 2 * norm * np.sqrt(masses)
        of_z = 2 * inverse @ (right + of_H @ z + stop)
        u, v, of_u, of_v = z[:n], z[n:], of_z[:n], of_z[n:]
        sides = u[:, None] + v
        of_C = (abs(by_value) + abs(by_linear)) * self.plan
        of_C = of_C + (self.plan * sides + s.P * (of_u[:, None] + of_v) + of_W) / s.reg
        E = oracle.density(s.C, s.a, s.b, s.reg, s.f, s.g)
        both = s.a[:, None] * s.b
        of_E = np.where(both > 0, self.plan / oracle.nonzero(both), E * relative)
        of_a = np.abs(by_value) * (
            ROUNDINGS * self.u * np.abs(s.f) * np.exp(-s.f / s.rho[0]) + s.reg * (of_E @ s.b + self.steps)
        )
        of_a = of_a + ((of_P + of_v) * E + (by_P + v) * of_E) @ s.b
        of_b = np.abs(by_value) * (
            ROUNDINGS * self.u * np.abs(s.g) * np.exp(-s.g / s.rho[1]) + s.reg * (s.a @ of_E + self.steps)
        )
        of_b = of_b + s.a @ ((of_P + of_u[:, None]) * E + (by_P + u[:, None]) * of_E)
        # The gauge of an engine's adjoint may be as large as the adjoint.
        of_a, of_b = (
            of_a + 4 * self.steps * z.max(initial=0) * E @ s.b,
            of_b + 4 * self.steps * z.max(initial=0) * s.a @ E,
        )
        # An engine may use the adjoint of the point itself, which follows from those of the other side.
        of_a = of_a + np.where(s.a > 0, of_u * s.rows / oracle.nonzero(s.a), 0) / oracle.damping(s.reg, s.rho[0])
        of_b = of_b + np.where(s.b > 0, of_v * s.columns / oracle.nonzero(s.b), 0) / oracle.damping(s.reg, s.rho[1])
        if self.normwise:
            noise = 1000 * self.u
            of_C = of_C + of_C.max() + noise * (s.P * (1 + (by_P + sides) / s.reg)).max()
            of_a, of_b = of_a + of_a.max() + noise * z.max(initial=0), of_b + of_b.max() + noise * z.max(initial=0)
        told_x = np.max(relative, axis=1, where=matter(s.C, s.b, s.g, s.reg), initial=0) < FIRST_ORDER
        told_y = np.max(relative.T, axis=1, where=matter(s.C.T, s.a, s.f, s.reg), initial=0) < FIRST_ORDER
        of_a, of_b = np.where(told_x, of_a, np.inf), np.where(told_y, of_b, np.inf)
        for constants in 4 * z.max(initial=0) * free:
            c_x, c_y = constants[:n], constants[n:]
            of_C = of_C + s.P * np.abs(c_x[:, None] + c_y) / s.reg
            by_a, by_b = (E * c_y) @ s.b, s.a @ (E * c_x[:, None])
            of_a, of_b = of_a + np.abs(by_a - by_a @ s.a), of_b + np.abs(by_b - by_b @ s.b)
        return of_C, of_a, of_b

    def _free(self, H: Array) -> Array | None:
        """What the adjoint may gain without a change of its equations: a constant, of its own for each part of the plan.

        Two parts that hardly touch are one or two, depending on the last digit: None if they touch by just so much.
        """
        s, n = self.s, len(self.s.a)
        scale = np.where(np.diag(H) > 0, 1 / np.sqrt(oracle.nonzero(np.diag(H))), 0)
        scaled = scale[:, None] * H * scale
        values = np.linalg.eigvalsh(scaled)
        if ((values >= 1e-13) & (values < 8 * self.worst)).any():
            return None
        if not np.isinf(s.rho).all():
            return np.zeros((0, len(H)))
        # The eigenvalue between two parts is about the square of what is between them.
        null = int((values < 1e-13).sum()) - int((np.diag(H) <= 0).sum())
        for threshold in (1e-13, 1e-11, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4):
            joined = (scaled > threshold) | np.eye(len(H), dtype=bool)
            for _ in range(len(H).bit_length()):
                joined = joined @ joined
            parts = np.unique(joined[np.diag(H) > 0], axis=0)
            if len(parts) >= null:
                return parts * np.where(np.arange(len(H)) < n, 1.0, -1.0)
        return None

    def points_gradient(self, by_C: Array, of_C: Array, by_y: bool, output: torch.dtype, halves: bool) -> Array:
        """Of the gradient by the points of a side. `halves`: the plan's entries are rounded to the points' type for products."""
        x, y, C = self.item.x, self.item.y, self.item.C
        assert x is not None and y is not None
        if by_y:
            x, y, C, by_C, of_C = y, x, C.T, by_C.T, of_C.T
        slopes = np.abs(oracle.cost_gradient(x, y, self.word))
        terms = np.abs(x)[:, None] * (self.word != "dot") + np.abs(y)
        of_slopes = self.steps * 2 * terms
        if self.word == "cosine":
            norms = oracle.norms(x)
            per_norm = np.where(norms > 0, 1 / oracle.nonzero(norms), 0)[:, None, None]
            D = x.shape[-1]
            terms = per_norm * (np.abs(oracle.unit(y)) + np.abs(oracle.unit(x))[:, None])
            of_slopes = (2 * D + 16) * self.u * 2 * per_norm * (1 + np.abs(oracle.unit(y))) + self.steps * terms
            read = self.of_read_cost()  # for the part along x
            of_slopes = (
                of_slopes
                + ((read.T if by_y else read) * per_norm[:, :, 0])[:, :, None] * np.abs(oracle.unit(x))[:, None]
            )
        elif self.word == "euclidean":
            of_C_alone = cost_error(self.item._replace(prior=0 * self.item.prior), self.word, self.dtype)
            of_distance = (of_C_alone.T if by_y else of_C_alone)[:, :, None]
            distance = C[:, :, None]
            of_slopes = np.minimum(2, (self.steps * 2 * terms + of_distance) / np.maximum(distance, 1e-300))
            terms = terms / np.maximum(distance, 1e-300)
        bound = (of_C[:, :, None] * slopes + (np.abs(by_C) + of_C)[:, :, None] * of_slopes).sum(1)
        if halves:
            bound = bound + 2 * roundoff(output) * (np.abs(by_C)[:, :, None] * np.minimum(terms, 1e300)).sum(1)
        subnormal = np.abs(y).sum(0) + len(y) * np.abs(x)  # times factors that may be too small for the type
        return bound + UNDERFLOWS * self.tiny * self.u * subnormal + 4 * torch.finfo(output).tiny

    def duals(self) -> float:
        """What rounding the potentials, and their sum, changes in the dual objective."""
        s, total = self.s, 0.0
        for w, z, rho in ((s.a, s.f, s.rho[0]), (s.b, s.g, s.rho[1])):
            slope = np.exp(np.clip(-z / rho, -700, 700))
            each = w * (ROUNDINGS * self.u * np.abs(z) * slope + self.steps * np.abs(oracle.dual(z, rho)))
            total += np.where(w > 0, each, 0).sum()
        return float(total)
