"""Tables and JSON as printed text."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> str:
    """Columns under their headers, aligned to the right. `left` has the numbers of columns to align to the left."""
    lines = [header, *rows]
    widths = [max(_width(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            _pad(cell, width, column in left) for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def fixed(number: float, digits: int) -> str:
    """A number with `digits` decimals; "-" for NaN."""
    return "-" if math.isnan(number) else f"{number:.{digits}f}"


def to_json(held: Any) -> str:
    """JSON, with null for NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(held), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(held: Any) -> Any:
    if isinstance(held, dict):
        return {key: _finite(value) for key, value in held.items()}
    if isinstance(held, (list, tuple)):
        return [_finite(value) for value in held]
    return None if isinstance(held, float) and not math.isfinite(held) else held


def _pad(cell: str, width: int, left: bool) -> str:
    space = " " * (width - _width(cell))
    return cell + space if left else space + cell


def _width(cell: str) -> int:
    """Width of a text in columns of a terminal: 2 for a wide character, 0 for a combining accent."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in cell)
