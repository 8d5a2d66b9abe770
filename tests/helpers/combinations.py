"""Fewer combinations of parameters for long tests: every pair of values instead of every combination."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

Pair = frozenset[tuple[str, Hashable]]


def pairs(row: Mapping[str, Hashable]) -> set[Pair]:
    """The pairs of values of two parameters in a combination; for a single parameter, its value."""
    values = sorted(row.items(), key=lambda item: item[0])
    return {frozenset(pair) for pair in combinations(values, min(2, len(values)))}


def covering(rows: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """The indices, in order, of a subset of `rows` that contains every pair that occurs in `rows`.

    Greedy: the next row is the one with the most missing pairs, and the first among equals. Most faults that depend on
    parameters depend on one or two of them, so this choice finds them as well.
    """
    held = [pairs(row) for row in rows]
    missing = set().union(*held)
    chosen = [0] if rows and not missing else []
    while missing:
        best = max(range(len(rows)), key=lambda index: (len(held[index] & missing), -index))
        chosen.append(best)
        missing -= held[best]
    return sorted(chosen)
