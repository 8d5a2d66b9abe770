"""Fewer combinations of parameters: every pair of values, instead of every combination, of a test that takes long."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

Pair = frozenset[tuple[str, Hashable]]


def pairs(row: Mapping[str, Hashable]) -> set[Pair]:
    """The pairs of values of two parameters that a combination holds; of one parameter, its value."""
    values = sorted(row.items(), key=lambda item: item[0])
    return {frozenset(pair) for pair in combinations(values, min(2, len(values)))}


def covering(rows: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """The places of some of `rows` in which each pair occurs that occurs in any of them, in order.

    Greedy: the next is the one with the most pairs that are not there yet, the first of several. Most faults that depend on
    parameters depend on one or two of them, and so show in this choice as well.
    """
    held = [pairs(row) for row in rows]
    missing = set().union(*held)
    chosen = [0] if rows and not missing else []
    while missing:
        best = max(range(len(rows)), key=lambda index: (len(held[index] & missing), -index))
        chosen.append(best)
        missing -= held[best]
    return sorted(chosen)
