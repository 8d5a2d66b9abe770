"""The GPU backends of otalign that can be measured here.

The session of `make gpu` names in OTALIGN_WITHOUT the backends that its first look found to hang or to crash. Every later
step leaves them out, so that one backend cannot block the results of the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

WITHOUT = "OTALIGN_WITHOUT"  # names of backends, separated by commas
ON_GPU = ("triton", "cuda")


def left_out(environment: Mapping[str, str] = os.environ) -> set[str]:
    """The backends that OTALIGN_WITHOUT names."""
    return {name.strip() for name in environment.get(WITHOUT, "").split(",")} - {""}


def without(environment: Mapping[str, str], *backends: str) -> dict[str, str]:
    """The variable that leaves out these backends as well."""
    return {WITHOUT: ",".join(sorted(left_out(environment).union(backends)))}


def reason_missing(backend: str) -> str | None:
    """Why this backend is not measured here; None if it is."""
    import otalign  # imported late: the session itself needs no torch

    return f"{WITHOUT} names it" if backend in left_out() else otalign.backends.available()[backend]


def usable() -> list[str]:
    """The GPU backends that are measured here."""
    return [name for name in ON_GPU if reason_missing(name) is None]
