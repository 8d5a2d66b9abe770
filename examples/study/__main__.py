"""The papers' claims in small, on synthesised speech: `python -m examples.study`, from the root of the repository.

Writes the results to docs/study/, and from them the tables of docs/study.md and the figures beside it.
"""

import argparse
import os
import time
from pathlib import Path

from .design import Design
from .report import report
from .stages import study

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "study.md", help="its tables are written anew")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "out" / "study", help="for what is trained first and frozen"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help="only write tables and figures from the results")
    args = parser.parse_args()
    results = args.page.with_suffix("")
    if not args.report:
        began = time.perf_counter()
        study(Design(), args.work, results, args.workers)
        print(f"{(time.perf_counter() - began) / 60:.0f} minutes on {args.workers} cores")
    report(results, args.page)


if __name__ == "__main__":
    main()
