"""The specification: entropic optimal transport in plain torch, one item at a time, and the oracle of every test.

Everything here works in the dtype of its input (float64 for the oracle) and in the log domain. The compiled backends
have to agree with this file; it has to agree with the papers, with other libraries and with finite differences.

For one item with cost C (n, m), weights a (n,), b (m,), both summing to one, and marginal relaxations rho:

    P_ij  = a_i b_j exp((f_i + g_j - C_ij) / reg)
    value = min_P <P, C> + reg KL(P | a b^T) + rho_x KL(P 1 | a) + rho_y KL(P^T 1 | b)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Segments
from ..options import Options
from ..problem import Problem, Solution

# The squared differences of all pairs take n * m * D elements. They are built in parts of this many.
_PAIRS_AT_A_TIME = 2**24


class Item(NamedTuple):
    """The solution of one item: `value`, `value_linear` and `plan_cost` (), `plan` (n, m), `f` (n,), `g` (m,)."""

    value: Tensor
    value_linear: Tensor
    plan_cost: Tensor
    plan: Tensor
    f: Tensor
    g: Tensor
    n_iter: int
    error: float


def cost_matrix(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """Ground cost between `x` (n, D) and `y` (m, D): (n, m)."""
    if cost == "cosine":
        return 1 - normalize(x) @ normalize(y).T
    if cost == "dot":
        return -x @ y.T
    rows = max(1, _PAIRS_AT_A_TIME // max(y.numel(), 1))
    squares = torch.cat([(part[:, None] - y).square().sum(-1) for part in x.split(rows)])
    if cost == "sqeuclidean":
        return squares
    apart = squares != 0
    return torch.where(apart, squares, 1).sqrt() * apart  # 0 with gradient 0 where points coincide


def normalize(x: Tensor) -> Tensor:
    """`x` (n, D) over its norms; all-zero rows stay zero and have zero gradient. Immune to overflow of the squares."""
    if x.shape[-1] == 0:
        return x
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    squares = x.square().sum(-1, keepdim=True)
    nonzero = squares > 0
    return x * torch.where(nonzero, squares, 1).rsqrt() * nonzero


def sinkhorn(
    C: Tensor, a: Tensor, b: Tensor, reg: float, rho: tuple[float, float], options: Options, g: Tensor | None
) -> tuple[Tensor, Tensor, int, float]:
    """Alternating log-domain updates from `g` (m,), until the marginal error is at most `tol`: f, g, n_iter, error.

    The error is sum_i a_i |exp((f_i - f'_i) / reg) - 1| with f' the update that would come next: in the balanced
    case, the L1 distance of the plan's row sums from a (the column sums have just been made exact).
    """
    f = update(C, b, torch.zeros_like(b) if g is None else g, reg, rho[0])
    n_iter, error = 0, math.nan
    for n_iter in range(1, options.max_iter + 1):
        g = update(C.T, a, f, reg, rho[1])
        f_next = update(C, b, g, reg, rho[0])
        error = residual(a, f, f_next, reg)
        if should_stop(error, n_iter, options):
            break
        f = f_next
    assert g is not None
    return torch.where(a > 0, f, f_next), g, n_iter, error


def symmetric_sinkhorn(C: Tensor, a: Tensor, reg: float, rho: float, options: Options) -> tuple[Tensor, int, float]:
    """The potential f = g of points with themselves, `C` (n, n) symmetric, by f <- (f + T f) / 2: f, n_iter, error.

    T is the update of `sinkhorn`. Averaging keeps the plan symmetric, and converges in a few iterations where alternating
    updates need many (Feydy et al. 2019, section 3.1).
    """
    f = torch.zeros_like(a)
    f_next = update(C, a, f, reg, rho)
    n_iter, error = 0, math.inf
    while not should_stop(error, n_iter, options):
        f = (f + f_next) / 2
        f_next = update(C, a, f, reg, rho)
        error = residual(a, f, f_next, reg)
        n_iter += 1
    return torch.where(a > 0, f, f_next), n_iter, error


def should_stop(error: float, n_iter: int, options: Options) -> bool:
    """Whether an item ends: error within tolerance, out of iterations, or NaN."""
    return (options.tol > 0 and error <= options.tol) or n_iter >= options.max_iter or math.isnan(error)


def update(C: Tensor, across: Tensor, g: Tensor, reg: float, rho: float) -> Tensor:
    """The potentials (n,) that follow from `g` (m,) of the points across, which have the weights `across` (m,).

    A point is unreachable if all points across that carry mass are at infinite cost. It carries no mass, and its potential
    would be infinite. It gets a finite potential of the same value: 0 if the marginal is strict; 40 rho if it is relaxed,
    where -rho (exp(-f / rho) - 1) is rho to the last digit, the cost of transporting no mass.
    """
    sums = log_sum(across.log() + (g - C) / reg)
    return torch.where(sums == -math.inf, 0.0 if math.isinf(rho) else 40 * rho, -damping(reg, rho) * reg * sums)


def residual(a: Tensor, f: Tensor, f_next: Tensor, reg: float) -> float:
    """sum_i a_i |exp((f_i - f'_i) / reg) - 1|, over the points with mass."""
    return float(torch.where(a > 0, a * ((f - f_next) / reg).expm1().abs(), 0).sum())


def reachable(C: Tensor, across: Tensor) -> Tensor:
    """Which points (n,) have a finite cost to a point across that has weight."""
    return (~C.isposinf() & (across > 0)).any(1)


def log_sum(exponents: Tensor) -> Tensor:
    """log sum_j exp(exponents_ij): (n,); -inf for rows without terms, whose derivative is then zero, not NaN."""
    top = exponents.detach().amax(1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    sums = (exponents - top).exp().sum(1)
    return torch.where(sums == 0, -math.inf, top[:, 0] + torch.where(sums == 0, 1, sums).log())


def damping(reg: float, rho: float) -> float:
    """The exponent rho / (rho + reg) of an update; 1 where the marginal is strict."""
    return 1.0 if math.isinf(rho) else rho / (rho + reg)


def density(C: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, reg: float) -> Tensor:
    """P / (a b^T): exp((f + g - C) / reg), (n, m); 0 where neither point has mass, since it has no bound there."""
    massless = (a == 0)[:, None] & (b == 0)
    exponents = ((f[:, None] + g - C) / reg).masked_fill(massless, -math.inf)
    return exponents.clamp(max=math.log(torch.finfo(C.dtype).max) - 1).exp()


def transition(C: Tensor, weights: Tensor, across: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    """The conditional plan of every point: (n, m), rows sum to 1; and the same divided by `weights` (m,).

    Rows of unreachable points are 0. The second can overflow where a weight is 0: it is bounded by the square root of the
    largest number.
    """
    exponents = (across - C) / reg
    terms = weights.log() + exponents
    top = terms.amax(1, keepdim=True)
    reached = top > -math.inf
    # By its largest term and a sum near one, not by one logarithm: rows sum to 1 up to rounding, however large the exponents.
    top = top.masked_fill(~reached, 0)
    sums = (terms - top).exp().sum(1, keepdim=True)
    sums = torch.where(reached, sums, 1)
    per_weight = (exponents - top).clamp(max=math.log(torch.finfo(C.dtype).max) / 2).exp() / sums
    shares = (terms - top).exp() / sums
    return torch.where(reached, shares, 0), torch.where(reached, per_weight, 0)


def transport_plan(C: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, reg: float) -> Tensor:
    """P (n, m), 0 wherever one of the two points has no mass; without a derivative by these entries."""
    both = (a > 0)[:, None] & (b > 0)
    exponents = ((f[:, None] + g - C) / reg).masked_fill(~both, -math.inf)
    return a[:, None] * b * exponents.exp()


class ImplicitPotentials(torch.autograd.Function):
    """The identity on converged potentials, with the derivative of the fixed point that they solve.

    f_i = -damping_x reg log sum_j b_j exp((g_j - C_ij) / reg), and g_j likewise, so with the row-stochastic pi = P / P 1
    and the column-stochastic omega = P / 1^T P, taken from the plan as it is (`transition`),

        df = damping_x (sum_j pi_ij dC_ij - pi dg - reg (pi / b) db),   dg = damping_y (...),

    and the adjoint needs one linear system on the side of y (the Schur complement). It is singular along the gauge
    (f + t, g - t) of a balanced problem, once for every part into which the plan falls; the right-hand side has no
    component there, and the pseudo-inverse projects it out. All operations are differentiable, so that second
    derivatives follow.
    """

    @staticmethod
    def forward(
        ctx: Any, C: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, reg: float, rho: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        f, g = f.clone(), g.clone()
        ctx.save_for_backward(C, a, b, f, g)
        ctx.reg, ctx.rho = reg, rho
        ctx.set_materialize_grads(False)
        return f, g

    @staticmethod
    def backward(ctx: Any, grad_f: Tensor | None, grad_g: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        C, a, b, f, g = ctx.saved_tensors
        if grad_f is None and grad_g is None:
            return (None,) * 7
        grad_f = torch.zeros_like(f) if grad_f is None else grad_f
        grad_g = torch.zeros_like(g) if grad_g is None else grad_g
        reg = ctx.reg
        damping_x, damping_y = (damping(reg, rho) for rho in ctx.rho)
        pi, pi_b = transition(C, b, g, reg)  # the second is pi / b
        omega, omega_a = (t.T for t in transition(C.T, a, f, reg))
        schur = torch.eye(len(b), dtype=b.dtype, device=b.device) - damping_x * damping_y * pi.T @ omega
        noise = 10 * len(b) * torch.finfo(b.dtype).eps  # of a matrix whose natural scale is one
        q = torch.linalg.pinv(schur, atol=noise, rtol=0) @ (grad_g - damping_x * pi.T @ grad_f)
        q = torch.where(b > 0, q, 0)  # as it is without rounding: the system has a row of its own for such points
        p = grad_f - damping_y * omega @ q
        grad_C = damping_x * p[:, None] * pi + damping_y * q * omega
        return grad_C, -reg * damping_y * omega_a @ q, -reg * damping_x * p @ pi_b, None, None, None, None


class Value(torch.autograd.Function):
    """The dual objective at the potentials, with the envelope theorem's gradient; differentiable twice.

    sum_i a_i phi(f_i) + sum_j b_j phi(g_j) - reg (sum_ij P_ij - 1), phi(f) = f, or -rho (exp(-f / rho) - 1) if relaxed.
    At the optimum it is the primal value; short of it, its error is of second order in the marginal error, where the
    primal expression's is of first. Its partial derivative by C is the plan itself at any potentials.
    """

    @staticmethod
    def forward(
        ctx: Any, C: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, reg: float, rho: tuple[float, float]
    ) -> Tensor:
        ctx.save_for_backward(C, a, b, f, g)
        ctx.reg, ctx.rho = reg, rho
        mass = transport_plan(C, a, b, f, g, reg).sum()
        return weighted_sum(a, dual_term(f, rho[0])) + weighted_sum(b, dual_term(g, rho[1])) - reg * (mass - 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        C, a, b, f, g = ctx.saved_tensors
        E = density(C, a, b, f, g, ctx.reg)
        grad_C = grad * transport_plan(C, a, b, f, g, ctx.reg)
        most = torch.finfo(C.dtype).max
        grad_a = grad * (dual_term(f, ctx.rho[0]) + ctx.reg * (1 - E @ b)).clamp(-most, most)
        grad_b = grad * (dual_term(g, ctx.rho[1]) + ctx.reg * (1 - a @ E)).clamp(-most, most)
        return grad_C, grad_a, grad_b, None, None, None, None


def dual_term(f: Tensor, rho: float) -> Tensor:
    """phi(f) of the dual: the contribution of a potential per unit of mass."""
    return f if math.isinf(rho) else -rho * torch.expm1(-f / rho)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """sum_i weights_i values_i; terms of weight 0 count 0, whatever their value."""
    return torch.where(weights > 0, weights * values, 0).sum()


def solve_item(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    reg: float,
    rho: tuple[float, float],
    options: Options,
    g: Tensor | None = None,
    *,
    symmetric: bool = False,
) -> Item:
    """Solve one item: `C` (n, m) with any prior added, `a` (n,), `b` (m,) summing to one, `g` (m,) to start from.

    `symmetric`: both sides are the same points, so that C is symmetric and a is b; solved by `symmetric_sinkhorn`.
    """
    n, m = C.shape
    if n == 0 or m == 0:
        zero = C.sum() + a[:0].sum() + b[:0].sum()  # attached to the graph
        return Item(zero, zero, zero, C, zero + C.new_zeros(n), zero + C.new_zeros(m), 0, 0.0)
    reachable_x, reachable_y = reachable(C, b), reachable(C.T, a)
    given_a, given_b = a, b
    a, b = torch.where(reachable_x, a, 0), torch.where(reachable_y, b, 0)
    with torch.no_grad():
        if symmetric:
            f, n_iter, error = symmetric_sinkhorn(C, a, reg, rho[0], options)
            g = f
        else:
            f, g, n_iter, error = sinkhorn(C, a, b, reg, rho, options, g)
        # The weights of unreachable points with a strict marginal: no plan can carry them.
        for weights, served, r in ((given_a, a, rho[0]), (given_b, b, rho[1])):
            error += float((weights - served).sum()) if math.isinf(r) else 0.0
        representable = bool(transport_plan(C, a, b, f, g, reg).sum().isfinite())
    if math.isnan(error) or not representable:
        nan = (C.sum() + a.sum() + b.sum()) * math.nan
        return Item(nan, nan, nan, C * math.nan + nan, f * math.nan, g * math.nan, 0, math.nan)
    return results(C, given_a, given_b, f, g, reg, rho, symmetric=symmetric)._replace(n_iter=n_iter, error=error)


def results(
    C: Tensor,
    given_a: Tensor,
    given_b: Tensor,
    f: Tensor,
    g: Tensor,
    reg: float,
    rho: tuple[float, float],
    *,
    symmetric: bool,
) -> Item:
    """What follows from the potentials of an item, with its derivatives at the fixed point."""
    reachable_x, reachable_y = reachable(C, given_b), reachable(C.T, given_a)
    a, b = torch.where(reachable_x, given_a, 0), torch.where(reachable_y, given_b, 0)
    f, g = ImplicitPotentials.apply(C, a, b, f, g, reg, rho)  # type: ignore[no-untyped-call]
    if math.isinf(rho[0]) and math.isinf(rho[1]) and not symmetric:
        shift = b @ g  # the gauge <b, g> = 0; points that no mass reaches have none
        f, g = torch.where(reachable(C, b), f + shift, f), torch.where(reachable(C.T, a), g - shift, g)
    plan = a[:, None] * b * density(C, a, b, f, g, reg)
    value = Value.apply(C, given_a, given_b, f, g, reg, rho)  # type: ignore[no-untyped-call]
    C = C.masked_fill(C.isposinf(), 0)  # where a band forbids mass; the plan is zero there
    return Item(value, (plan * C).sum(), (plan.detach() * C).sum(), plan, f, g, 0, 0.0)


def solve(problem: Problem) -> Solution:
    """Solve a batch item by item, and lay the results out as the problem is."""
    with torch.autocast(problem.device.type, enabled=False):
        items = list(_items(problem))
    stack = partial(_stack, problem)

    def vector(parts: list[Tensor], segments: Segments) -> Tensor:
        out = torch.zeros(segments.shape, dtype=problem.dtype, device=problem.device)
        for span, part in zip(segments.spans(), parts, strict=True):
            out[span] = part.detach()
        return out

    return Solution(
        value=stack([item.value for item in items]),
        value_linear=stack([item.value_linear for item in items]),
        plan_cost=partial(stack, [item.plan_cost for item in items]),
        f=vector([item.f for item in items], problem.x.segments),
        g=vector([item.g for item in items], problem.y.segments),
        n_iter=torch.tensor([item.n_iter for item in items], dtype=torch.int32, device=problem.device),
        error=torch.tensor([item.error for item in items], dtype=problem.dtype, device=problem.device),
        plan=partial(_plans, problem, [item.plan for item in items]),
    )


def _stack(problem: Problem, tensors: list[Tensor]) -> Tensor:
    if tensors:
        return torch.stack(tensors)
    inputs = (
        t
        for t in (problem.x.points, problem.y.points, problem.C, problem.x.weights, problem.y.weights)
        if t is not None
    )
    return sum(t.sum() for t in inputs).to(problem.dtype).expand(0)  # type: ignore[union-attr]


def _plans(problem: Problem, plans: list[Tensor]) -> Tensor:
    shape = (problem.x.segments.size, problem.y.segments.size)
    return _stack(problem, [_pad(plan, shape) for plan in plans]).reshape(problem.items, *shape)


def _pad(plan: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.nn.functional.pad(plan, (0, shape[1] - plan.shape[1], 0, shape[0] - plan.shape[0]))


def _items(p: Problem) -> Iterator[Item]:
    """The solutions of all items."""
    for C, a, b, reg, rho, ys in _costs(p):
        g = None if p.init is None else p.init[ys]
        yield solve_item(C, a, b, reg, rho, p.options, g, symmetric=p.symmetric)


def items_at(p: Problem, f: Tensor, g: Tensor) -> Iterator[Item]:
    """The items of a solved problem, at its potentials in the layouts of x and y."""
    for (C, a, b, reg, rho, ys), xs in zip(_costs(p), p.x.segments.spans(), strict=True):
        if C.numel() == 0:
            yield solve_item(C, a, b, reg, rho, p.options)
        elif C.isnan().any() or not f[xs].isfinite().all() or not g[ys].isfinite().all():
            nan = (C.sum() + a.sum() + b.sum()) * math.nan
            yield Item(nan, nan, nan, C * math.nan + nan, f[xs], g[ys], 0, math.nan)
        else:
            yield results(C, a, b, f[xs], g[ys], reg, rho, symmetric=p.symmetric)


def _costs(p: Problem) -> Iterator[tuple[Tensor, Tensor, Tensor, float, tuple[float, float], Any]]:
    """Of every item: C with any prior, NaN where it is not valid; a, b, reg, rho; and the place of its y."""
    x_spans, y_spans = p.x.segments.spans(), p.y.segments.spans()
    x_lengths, y_lengths = p.x.segments.lengths, p.y.segments.lengths
    options, rho = p.options, (p.x.rho, p.y.rho)
    for index, (xs, ys, reg) in enumerate(zip(x_spans, y_spans, p.regs.tolist(), strict=True)):
        if p.C is not None:
            n, m = int(x_lengths[index]), int(y_lengths[index])
            C = p.C[index, :n, :m].to(p.dtype)
        else:
            assert p.x.points is not None and p.y.points is not None
            C = cost_matrix(p.x.points[xs].to(p.dtype), p.y.points[ys].to(p.dtype), options.cost)
        n, m = C.shape
        # Infinity in a given cost forbids a pair; a cost of points that is infinite has overflown.
        valid = not bool((C.isnan() | C.isneginf()).any()) if p.C is not None else bool(C.isfinite().all())
        if options.prior is not None:
            C = C + options.prior.matrix(n, m, reg, dtype=p.dtype, device=C.device)
        a = C.new_full((n,), 1 / max(n, 1)) if p.x.weights is None else p.x.weights[xs]
        b = C.new_full((m,), 1 / max(m, 1)) if p.y.weights is None else p.y.weights[ys]
        yield C if valid else C * math.nan, a, b, reg, rho, ys
