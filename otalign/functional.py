"""The public functions: validate, lay out, dispatch, reduce."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .convergence import warn_unconverged
from .groups import has_groups, solve_groups
from .layout import Lengths
from .options import GIVEN, OBJECTIVES, REDUCTIONS, Options, Unbalanced, one_of
from .prior import Prior
from .problem import Problem, Side, SideInput, Solution, from_cost, from_points, is_start
from .result import OTResult
from .warm_starts import Ids, Visit, WarmStarts, visit_of


def sinkhorn_loss(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    a: Tensor | str | None = None,
    b: Tensor | str | None = None,
    *,
    cu_seqlens_x: Lengths | None = None,
    cu_seqlens_y: Lengths | None = None,
    max_seqlen_x: int | None = None,
    max_seqlen_y: int | None = None,
    cost: str = "cosine",
    prior: Prior | None = None,
    reg: float | Tensor = 0.05,
    unbalanced: Unbalanced = None,
    max_iter: int = 200,
    tol: float = 1e-3,
    accelerate: bool = True,
    objective: str = "value",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Entropic optimal transport between two batches of sequences, as a loss.

    For every item, with `C` the ground cost between its points, `B` the prior and `rho` the marginal relaxation,

    .. math:: \min_P \langle P, C + B \rangle + \mathrm{reg}\,KL(P | a b^T)
              + \rho_x KL(P 1 | a) + \rho_y KL(P^T 1 | b)

    is solved by Sinkhorn's alternating updates (Cuturi 2013; in the log domain, Peyré and Cuturi 2019, remark 4.23;
    relaxed, Chizat et al. 2018).

    Args:
        x: `(B, N, D)` padded; `(total_x, D)` packed, with `cu_seqlens_x`; or a jagged nested tensor. float16, bfloat16,
            float32 or float64; computed in float32, or float64 if either side is.
        y: `(B, M, D)`, `(total_y, D)` or nested, of the same `D` and device. The layouts of `x` and `y` may differ.
        x_lengths: `(B,)` int32 or int64 in `[0, N]`, or a list of integers; None = full. Rows beyond
            an item's length are never read.
        y_lengths: likewise for `y`.
        a: weights of the points of `x`, `(B, N)` or `(total_x,)`, non-negative; normalised here over every item. Padded
            items also take `(1, N)` or `(N,)` for all items. None = uniform; `"norm"` = norms of the embeddings, detached.
        b: likewise for `y`.
        cu_seqlens_x: `(B + 1,)` int32 or int64 offsets of packed items, or a list, rising from 0 to at most `total_x`.
        cu_seqlens_y: likewise for `y`.
        max_seqlen_x: length of the longest item in packed `x`. Optional; it saves a device synchronisation and, under
            `torch.compile`, memory.
        max_seqlen_y: likewise for `y`.
        cost: `"cosine"` = 1 - cos, `"sqeuclidean"` = \|x - y\|^2, `"euclidean"`, or `"dot"` = -<x, y>.
        prior: a temporal term `B` added to the cost, see `Prior`.
        reg: strength of the entropic regularisation, in the unit of the cost; a number or `(B,)`. Not differentiated.
        unbalanced: marginal relaxation: None (both marginals strict), `rho`, or `(rho_x, rho_y)`; each may be None or
            `inf` (strict). A tensor `(B,)` in place of a number gives each item its own relaxation: Python reads it (this
            waits for a GPU), and items of equal relaxation are solved together.
        max_iter: largest number of iterations of an item: passes over its matrix, each with a row and a column update or
            with as much work for a Newton step.
        tol: an item stops when its L1 marginal error is at most `tol`; 0 = always make `max_iter` plain iterations.
        accelerate: whether an item with many iterations ahead takes faster steps in their place: Anderson mixing and
            Newton's method (the latter on the CPU and by the CUDA kernels). False = alternating updates alone.
        objective: `"value"` = the regularised optimum, gradient `P`; `"plan_cost"` = <stop_gradient(P), C + B>;
            `"transport"` = <P, C + B> with its exact gradient; `"divergence"` = the debiased
            `v(x, y) - (v(x, x) + v(y, y)) / 2` (Feydy et al. 2019).
        reduction: `"mean"` over the items that are not empty, `"sum"`, or `"none"` for `(B,)`.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.

    Returns:
        A scalar, or `(B,)`, in float32 (float64 for float64 input), with gradients for `x`, `y`, `a` and `b`.
        The loss of an empty item is 0. An item with NaN or Inf among its points gives NaN; other items do not change.

    Warns:
        ConvergenceWarning: if an item reaches `max_iter` with an error above `tol`; once for each line that calls. Not
            under `torch.compile`, and for tensors on a GPU only within `otalign.debug()`: read `SinkhornLoss.last` or the
            result's `converged` there.

    Raises:
        ValueError, TypeError: for bad input; the message names the argument, what was expected and what came.
        RuntimeError: if the backend is not available; the message gives the reason.

    Example:
        >>> speech, text = torch.randn(4, 75, 256, requires_grad=True), torch.randn(4, 20, 256)
        >>> loss = otalign.sinkhorn_loss(speech, text, torch.tensor([75, 60, 33, 75]), torch.tensor([20, 9, 12, 18]))
        >>> loss.backward()
        >>> speech.grad.shape
        torch.Size([4, 75, 256])
    """
    loss, _, _ = solved_loss(
        SideInput(x, x_lengths, a, cu_seqlens_x, max_seqlen_x),
        SideInput(y, y_lengths, b, cu_seqlens_y, max_seqlen_y),
        Options(cost, prior, reg, max_iter, tol, accelerate),
        unbalanced,
        objective,
        reduction,
        backend,
    )
    return loss


def solved_loss(
    x: SideInput,
    y: SideInput,
    options: Options,
    unbalanced: Unbalanced,
    objective: str,
    reduction: str,
    backend: str,
    warm_starts: WarmStarts | None = None,
    ids: Ids | None = None,
) -> tuple[Tensor, Problem, Solution]:
    """`sinkhorn_loss`, together with the problem and its solution."""
    one_of("objective", objective, OBJECTIVES)
    one_of("reduction", reduction, REDUCTIONS)
    problem = from_points(x, y, options, unbalanced)
    losses, solution = _objective(problem, objective, backend, visit_of(warm_starts, ids, problem.items))
    return _reduce(problem, losses, reduction), problem, solution


def solve(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    a: Tensor | str | None = None,
    b: Tensor | str | None = None,
    *,
    cu_seqlens_x: Lengths | None = None,
    cu_seqlens_y: Lengths | None = None,
    max_seqlen_x: int | None = None,
    max_seqlen_y: int | None = None,
    cost: str = "cosine",
    prior: Prior | None = None,
    reg: float | Tensor = 0.05,
    unbalanced: Unbalanced = None,
    max_iter: int = 200,
    tol: float = 1e-3,
    accelerate: bool = True,
    init: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> OTResult:
    """Solve a batch of problems and return everything known about the solution. Arguments as in `sinkhorn_loss`.

    Args:
        init: potentials `(f, g)` to start from, such as `result.potentials` of an earlier solve with the same layout.
            Finite, and g within 1e5 `reg` in float32 (1e13 in float64). The solver starts from g; f follows from it.

    Example:
        >>> result = otalign.solve(torch.randn(2, 50, 64), torch.randn(2, 10, 64), reg=0.1)
        >>> result.plan().shape, result.assign_y().shape
        (torch.Size([2, 50, 10]), torch.Size([2, 10]))
    """
    problem = from_points(
        SideInput(x, x_lengths, a, cu_seqlens_x, max_seqlen_x),
        SideInput(y, y_lengths, b, cu_seqlens_y, max_seqlen_y),
        Options(cost, prior, reg, max_iter, tol, accelerate),
        unbalanced,
        init,
    )
    return _result(problem, backend)


def solve_cost(
    C: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: float | Tensor,
    prior: Prior | None = None,
    unbalanced: Unbalanced = None,
    max_iter: int = 200,
    tol: float = 1e-3,
    accelerate: bool = True,
    init: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> OTResult:
    """Solve a batch of problems whose ground cost is given. Other arguments as in `sinkhorn_loss`.

    Args:
        C: `(B, N, M)` float; the cost of item b is `C[b, :x_lengths[b], :y_lengths[b]]`, and entries outside are never
            read. Differentiable. Plus infinity forbids a pair: `C.masked_fill(~allowed, math.inf)`. A point whose pairs are
            all forbidden carries no mass; if its marginal is strict, `converged` is False.

    Example:
        >>> result = otalign.solve_cost(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), reg=0.01)
        >>> result.plan()
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    sides = SideInput(None, x_lengths, a), SideInput(None, y_lengths, b)
    problem = from_cost(C, *sides, Options(GIVEN, prior, reg, max_iter, tol, accelerate), unbalanced, init)
    return _result(problem, backend)


class ItemLosses(NamedTuple):
    """A loss before its reduction, with the iterations and the error of its solve: `(B,)` each."""

    loss: Tensor
    n_iter: Tensor
    error: Tensor


def item_losses(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None,
    y_lengths: Lengths | None,
    b: Tensor | None = None,
    *,
    objective: str,
    backend: str = "auto",
    warm_starts: WarmStarts | None = None,
    ids: Ids | None = None,
    **options: Any,
) -> ItemLosses:
    """`sinkhorn_loss` of padded items, not reduced, for losses that report how well they were solved."""
    one_of("objective", objective, OBJECTIVES)
    x_side, y_side = SideInput(x, x_lengths, None), SideInput(y, y_lengths, b)
    problem = from_points(x_side, y_side, Options.pick(options), options["unbalanced"])
    losses, solution = _objective(problem, objective, backend, visit_of(warm_starts, ids, problem.items))
    return ItemLosses(losses, solution.n_iter, solution.error)


def item_plans(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None,
    y_lengths: Lengths | None,
    b: Tensor | None = None,
    *,
    backend: str = "auto",
    warm_starts: WarmStarts | None = None,
    ids: Ids | None = None,
    **options: Any,
) -> OTResult:
    """`solve` of padded items, for losses that are made of plans."""
    x_side, y_side = SideInput(x, x_lengths, None), SideInput(y, y_lengths, b)
    problem = from_points(x_side, y_side, Options.pick(options), options["unbalanced"])
    return _result(problem, backend, visit_of(warm_starts, ids, problem.items))


def _result(problem: Problem, backend: str, visit: Visit | None = None) -> OTResult:
    solution = _solve_visited(problem, backend, visit)
    return OTResult(
        value=solution.value,
        value_linear=solution.value_linear,
        potentials=(solution.f, solution.g),
        n_iter=solution.n_iter,
        error=solution.error,
        converged=solution.error <= problem.options.tol,
        _problem=problem,
        _solution=solution,
    )


def _solve_visited(problem: Problem, backend: str, visit: Visit | None) -> Solution:
    """Solve a batch from the warm start of this visit, and keep the potentials for the next one; None = solve it from zero."""
    if visit is None:
        return _solve(problem, backend)
    solution = _solve(visit.started(problem), backend)
    visit.end(problem, solution)
    return solution


def _solve(problem: Problem, backend: str, accepted: float | None = None) -> Solution:
    """Solve a batch; an error of at most `accepted` needs no warning (None = `tol`)."""
    name = backends.resolve(backend, problem.device)
    if name != "cpu" and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"backend: torch.func transforms 'cpu' alone, got {name!r}; loss.backward() and torch.autograd.grad take any"
        )
    solver = backends.solver(name)
    solution = solve_groups(problem, solver) if has_groups(problem) else solver(problem)
    options = problem.options
    warn_unconverged(solution.error, options.tol if accepted is None else accepted, options.max_iter)
    return solution


def _objective(problem: Problem, objective: str, backend: str, visit: Visit | None) -> tuple[Tensor, Solution]:
    """The loss of every item, `(B,)`, and the solution behind it. The divergence has no visit: its own start is better."""
    if objective == "plan_cost":
        x, y = (replace(side, weights=_constant(side.weights)) for side in (problem.x, problem.y))
        solution = _solve_visited(replace(problem, x=x, y=y, fixed_plan=True), backend, visit)
        return solution.plan_cost(), solution
    if objective == "divergence":
        return _divergence(problem, backend)
    solution = _solve_visited(problem, backend, visit)
    return (solution.value if objective == "value" else solution.value_linear), solution


def _divergence(problem: Problem, backend: str) -> tuple[Tensor, Solution]:
    """v(x, y) - (v(x, x) + v(y, y)) / 2 of every item, `(B,)`, and the solution of v(x, y) (Feydy et al. 2019, eq. 3).

    The potential of y with itself starts the solve of v(x, y). Where x and y are the same points, this start is the solution,
    and the gradient is zero up to rounding.
    """
    x, y = problem.x, problem.y
    x_term, _ = _self_term(replace(problem, y=x, symmetric=True), backend)
    y_term, start = _self_term(replace(problem, x=y, symmetric=True), backend)
    start = torch.where(is_start(start, problem.options.reg, y.segments), start, 0)
    solution = _solve(replace(problem, init=start), backend)
    return torch.where(_filled(problem), solution.value - (x_term + y_term) / 2, 0), solution


def _self_term(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """The value of a symmetric problem, `(B,)`, and its potential.

    The plan is symmetric, so both sides have the same gradient: a compiled backend computes one, which counts twice.
    """
    options = problem.options
    # Averaged updates converge fast, and their error is the error of the gradient where x and y are the same points.
    tol = max(options.tol * 1e-3, 4 * torch.finfo(problem.dtype).eps) if options.tol > 0 else 0.0
    if backends.resolve(backend, problem.device) == "reference":  # in plain torch both sides have their own gradients
        solution = _solve(replace(problem, options=options._replace(tol=tol)), backend, accepted=options.tol)
        return solution.value, solution.g
    y = problem.y
    fixed = Side(_constant(y.points), y.segments, _constant(y.weights), y.rho)
    solution = _solve(replace(problem, y=fixed, options=options._replace(tol=tol)), backend, accepted=options.tol)
    value = solution.value
    return 2 * value - value.detach(), solution.g


def _constant(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _reduce(problem: Problem, losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    n, m = problem.x.segments.counts, problem.y.segments.counts
    if n is None or m is None:
        return losses.sum() / _filled(problem).sum().clamp(min=1)
    return losses.sum() / max(sum(bool(i and j) for i, j in zip(n, m, strict=True)), 1)


def _filled(problem: Problem) -> Tensor:
    """Which items are not empty: (B,)."""
    return (problem.x.segments.lengths > 0) & (problem.y.segments.lengths > 0)
