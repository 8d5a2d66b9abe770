"""Relaxations that differ between the items of a batch: those that are equal are solved together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .layout import Segments
from .problem import Problem, Solution


def has_groups(problem: Problem) -> bool:
    """Whether the relaxation of a side is one for each item."""
    return any(isinstance(rho, tuple) for rho in problem.rho)


def solve_groups(problem: Problem, launch: Callable[[Problem], Solution]) -> Solution:
    """Solve a batch in as many calls of a backend as it has different relaxations. Each item is what it is alone.

    Everything is padded here, so that items can be picked by their numbers.
    """
    p = _padded(problem)
    of_x, of_y = (rho if isinstance(rho, tuple) else (rho,) * p.items for rho in p.rho)
    members: dict[tuple[float, float], list[int]] = {}
    for item, pair in enumerate(zip(of_x, of_y, strict=True)):
        members.setdefault(pair, []).append(item)
    order = [item for items in members.values() for item in items]
    parts = [launch(_picked(p, items, pair)) for pair, items in members.items()]
    places = torch.tensor(order, dtype=torch.int64, device=p.device).argsort()

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[places]

    return Solution(
        value=joined("value"),
        value_linear=joined("value_linear"),
        plan_cost=partial(_joined, [part.plan_cost for part in parts], places),
        f=problem.x_segments.from_padded(joined("f")),
        g=problem.y_segments.from_padded(joined("g")),
        n_iter=joined("n_iter"),
        error=joined("error"),
        plan=partial(_joined, [part.plan for part in parts], places),
    )


def _joined(makers: Sequence[Callable[[], Tensor]], places: Tensor) -> Tensor:
    return torch.cat([make() for make in makers])[places]


def _padded(p: Problem) -> Problem:
    x, y = p.x_segments, p.y_segments
    return dataclasses.replace(
        p,
        x=_padded_values(p.x, x),
        y=_padded_values(p.y, y),
        a=_padded_values(p.a, x),
        b=_padded_values(p.b, y),
        init=_padded_values(p.init, y),
        x_segments=_padded_segments(x),
        y_segments=_padded_segments(y),
    )


def _padded_values(values: Tensor | None, side: Segments) -> Tensor | None:
    return side.to_padded(values) if side.packed and values is not None else values


def _padded_segments(side: Segments) -> Segments:
    if not side.packed:
        return side
    return dataclasses.replace(side, rows=side.items * side.size, packed=False, layout=side.lengths)


def _picked(p: Problem, items: list[int], rho: tuple[float, float]) -> Problem:
    index = torch.tensor(items, dtype=torch.int64, device=p.device)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index]

    def pick_segments(side: Segments) -> Segments:
        counts = None if side.counts is None else [side.counts[item] for item in items]
        rows = len(items) * side.size
        return dataclasses.replace(side, items=len(items), rows=rows, layout=pick(side.layout), counts=counts)

    return dataclasses.replace(
        p,
        x=pick(p.x),
        y=pick(p.y),
        C=pick(p.C),
        a=pick(p.a),
        b=pick(p.b),
        init=pick(p.init),
        reg=p.reg[index] if isinstance(p.reg, Tensor) else p.reg,
        x_segments=pick_segments(p.x_segments),
        y_segments=pick_segments(p.y_segments),
        rho=rho,
    )
