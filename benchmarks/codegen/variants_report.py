"""The table of compiled variants in docs/performance.md, from variants.csv: `python benchmarks variants-table`.

The CSV is what `python benchmarks variants --arch 80 90 100 120 gfx942 gfx950 --out benchmarks/results/variants.csv` writes.
With `--update --only "sinkhorn.*GROUPS=[1-9]"`, only the variants that keep the kernel matrix in registers are compiled anew.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

from common.tables import replace_block

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, str]]
PROGRAMS = "MAX_PROGRAMS|PEERS"  # the name now, and in results of earlier commits


def constant(row: dict[str, str], name: str) -> str:
    return re.search(rf"\b(?:{name})=(\w+)", row["label"])[1]  # type: ignore[index]


def in_registers(row: dict[str, str]) -> bool:
    return row["kernel"] == "sinkhorn_kernel" and constant(row, "GROUPS") != "0"


def mixes(row: dict[str, str]) -> bool:
    return "ACCELERATE=True" in row["label"]


def resident_table(rows: Rows) -> list[str]:
    """A line for every variant that keeps the kernel matrix in registers: registers and spills on every chip."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    found: dict[tuple[int, int, int, str, str], dict[str, str]] = defaultdict(dict)
    for row in filter(in_registers, rows):
        held = int(constant(row, "GROUPS")) * int(constant(row, "ROWS"))
        marginals = "relaxed" if constant(row, "UNBALANCED") == "True" else "strict"
        iterations = "mixed" if mixes(row) else "plain"
        key = (int(constant(row, "BLOCK_M")), held, int(constant(row, PROGRAMS)), marginals, iterations)
        found[key][row["arch"]] = f"{row['registers']} / {row['spills']}"
    titles = ["columns", "rows a program", "programs, up to", "marginals", "iterations", *map(chip, archs)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for (columns, held, programs, marginals, iterations), cells in sorted(found.items()):
        cells_text = " | ".join(cells.get(arch, "-") for arch in archs)
        lines.append(f"| {columns} | {held} | {programs} | {marginals} | {iterations} | {cells_text} |")
    return lines


def summary_table(rows: Rows) -> list[str]:
    """A line for every kernel and chip: the most that any of its variants uses."""
    groups: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in rows:
        name = row["kernel"].removesuffix("_kernel")
        if name == "sinkhorn":
            name += (", in registers" if in_registers(row) else ", in memory") + (", mixed" if mixes(row) else "")
        groups[name, row["arch"]].append(row)
    lines = ["| kernel | chip | variants | registers, at most | shared memory, at most | spilling | bytes, at most |"]
    lines.append("|---" * 7 + "|")
    for (name, arch), group in sorted(groups.items()):
        most = {column: max(int(row[column]) for row in group) for column in ("registers", "shared", "spills")}
        spilling = sum(int(row["spills"]) > 0 for row in group)
        shared = f"{most['shared'] / 1024:.0f} KiB"
        lines.append(
            f"| {name} | {chip(arch)} | {len(group)} | {most['registers']} | {shared} | {spilling} | {most['spills']} |"
        )
    return lines


def chip(arch: str) -> str:
    return f"sm_{arch}" if arch.isdigit() else arch


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks variants-table", description=__doc__)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "variants.csv")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args(arguments)
    with args.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tables = [*resident_table(rows), "", *summary_table(rows)]
    replace_block(args.document, "variants", "\n".join(tables))
    return 0
