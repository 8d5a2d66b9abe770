"""Runs scripts that the fuzzer has written.

python -m tests.fuzz.replay out/fuzz/*.py [--backend reference]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .__main__ import engine, prepare


def replay(case, backends) -> bool:  # type: ignore[no-untyped-def]
    """Run a case on backends; print what is wrong, and return whether nothing is."""
    right = True
    for backend in backends:
        prepare(backend)
        from .check import run

        with engine(backend) as device:
            try:
                run(case, backend, device=device)
            except Exception as error:
                right = False
                print(f"{backend}: {type(error).__name__}: {error}")
            else:
                print(f"{backend}: within its budget")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.replay", description=__doc__)
    parser.add_argument("scripts", type=Path, nargs="+")
    parser.add_argument("--backend", action="append", help="in place of those of the script")
    arguments = parser.parse_args()
    from .script import load

    right = True
    for path in arguments.scripts:
        case, backends = load(path)
        print(path)
        right &= replay(case, arguments.backend or backends)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
