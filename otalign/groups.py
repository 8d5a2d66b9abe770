"""Batches whose items have different marginal relaxations: items of equal relaxation are solved together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .layout import Segments
from .problem import Problem, Side, Solution


def has_groups(problem: Problem) -> bool:
    """Whether a side has one relaxation for each item."""
    return isinstance(problem.x.rho, tuple) or isinstance(problem.y.rho, tuple)


def solve_groups(problem: Problem, solve: Callable[[Problem], Solution]) -> Solution:
    """Solve a batch with one call of a backend for each different relaxation. Items do not influence each other.

    Packed sides are padded first, so that items can be picked by index.
    """
    init = problem.init if problem.init is None else problem.y.segments.to_padded(problem.init)
    p = replace(problem, x=_padded(problem.x), y=_padded(problem.y), init=init)
    rho_x, rho_y = (rho if isinstance(rho, tuple) else (rho,) * p.items for rho in (p.x.rho, p.y.rho))
    members: dict[tuple[float, float], list[int]] = {}
    for item, pair in enumerate(zip(rho_x, rho_y, strict=True)):
        members.setdefault(pair, []).append(item)
    order = [item for items in members.values() for item in items]
    parts = [solve(_picked(p, items, pair)) for pair, items in members.items()]
    places = torch.tensor(order, dtype=torch.int64, device=p.device).argsort()

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[places]

    return Solution(
        value=joined("value"),
        value_linear=joined("value_linear"),
        plan_cost=partial(_joined, [part.plan_cost for part in parts], places),
        f=problem.x.segments.from_padded(joined("f")),
        g=problem.y.segments.from_padded(joined("g")),
        n_iter=joined("n_iter"),
        error=joined("error"),
        plan=partial(_joined, [part.plan for part in parts], places),
    )


def _joined(makers: Sequence[Callable[[], Tensor]], places: Tensor) -> Tensor:
    return torch.cat([make() for make in makers])[places]


def _padded(side: Side) -> Side:
    s = side.segments
    if not s.packed:
        return side
    points, weights = (None if values is None else s.to_padded(values) for values in (side.points, side.weights))
    segments = replace(s, rows=s.items * s.size, packed=False, layout=s.lengths)
    return replace(side, points=points, segments=segments, weights=weights)


def _picked(p: Problem, items: list[int], rho: tuple[float, float]) -> Problem:
    index = torch.tensor(items, dtype=torch.int64, device=p.device)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index]

    def pick_segments(segments: Segments) -> Segments:
        counts = None if segments.counts is None else [segments.counts[item] for item in items]
        rows = len(items) * segments.size
        return replace(segments, items=len(items), rows=rows, layout=pick(segments.layout), counts=counts)

    x, y = (
        Side(pick(side.points), pick_segments(side.segments), pick(side.weights), rho_of_side)
        for side, rho_of_side in zip((p.x, p.y), rho, strict=True)
    )
    reg = p.options.reg
    options = p.options._replace(reg=reg[index] if isinstance(reg, Tensor) else reg)
    return replace(p, x=x, y=y, C=pick(p.C), options=options, init=pick(p.init))
