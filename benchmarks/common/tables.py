"""Numbers and tables in Markdown."""

from __future__ import annotations

import math
import re
from pathlib import Path


def number(value: float) -> str:
    """Three significant digits; an exponent only for very small numbers."""
    return "-" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def replace_block(document: Path, name: str, body: str) -> None:
    """Put `body` between the markers <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text, count = re.subn(
        f"{begin}.*?{end}", lambda _: f"{begin}\n{body}\n{end}", document.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{document} needs the markers {begin} and {end} once, found {count}")
    document.write_text(text)
