"""Rows of the CPU benchmark: printed, written as CSV, and read from the CSV for the README's table.

`python benchmarks cpu-table README.md` replaces the text between its `bench:cpu` markers.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.tables import number, replace_block

RESULTS = Path(__file__).parents[1] / "results" / "cpu.csv"
NAN = math.nan
SPEED_UP = "speed-up over the faster of POT log, torch log"
BUSY = 0.08  # a time gets no verdict if other processes took more than this share of the CPUs


@dataclass(frozen=True)
class Row:
    """One figure. A time has a check; a target has a bound and a verdict."""

    experiment: str
    shape: str
    name: str
    value: float
    low: float = NAN  # 20th percentile
    high: float = NAN  # 80th percentile
    unit: str = "ms"
    bound: str = ""
    verdict: str = ""
    others: float = NAN  # share of the CPUs that other processes took
    n_iter: int = 0
    marginal_error: float = NAN
    loss_error: float = NAN
    dx_error: float = NAN
    dy_error: float = NAN


COLUMNS = [field.name for field in fields(Row)]


def judge(value: float = NAN, bound: str = "", *, trusted: bool = True, others: float = 0.0) -> str:
    """PASS or MISS for a bound such as ">= 6" or "<= 1.6"; "ok" without a bound.

    RED if the check of the figure failed, BUSY if other processes used the machine.
    """
    if not trusted:
        return "RED"
    if others > BUSY:
        return "BUSY"
    if not bound:
        return "ok"
    sign, limit = bound.split()
    return "PASS" if (value >= float(limit) if sign == ">=" else value <= float(limit)) else "MISS"


def format_row(row: Row) -> str:
    value = number(row.value)
    interval = "" if math.isnan(row.low) else f"[{number(row.low)} {number(row.high)}]"
    line = f"{row.shape:<10}{row.experiment:<10}{row.name:<48}{value:>9} {row.unit:<3}{interval:<18}"
    if row.bound:
        return f"{line}{row.bound:>8}  {row.verdict}"
    errors = (row.marginal_error, row.loss_error, row.dx_error, row.dy_error)
    check = "".join(f"{'' if math.isnan(error) else f'{error:.0e}':>8}" for error in errors)
    return f"{line}{row.n_iter or '':>5}{check}  {row.verdict}"


HEADER = (
    f"{'shape':<10}{'what':<10}{'':<48}{'median':>9}    {'[20 % 80 %]':<18}"
    f"{'iters':>5}{'margin':>8}{'loss':>8}{'dx':>8}{'dy':>8}  check"
)


def write_csv(path: Path, rows: Iterable[Row], environment: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *environment], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            figures = {k: _cell(v) for k, v in asdict(row).items()}
            writer.writerow({**figures, **environment})


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return value


def read_csv(path: Path = RESULTS) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def conditions(rows: list[dict[str, str]]) -> str:
    """One sentence under every plot and table."""
    row = rows[0]
    versions = dict(word.split("=") for word in row["versions"].split())
    return (
        f"Loss and both gradients, float32, {row['threads']} threads of {row['cpu']}; cosine cost, reg {row['reg']}, every "
        f"contestant stopped at an L1 marginal error of {row['tol']}, lengths between a quarter and the whole of the maximum; "
        f"torch {versions['torch']}, POT {versions['POT']}; commit {row['commit']}, {row['date'][:10]}."
    )


def select(rows: list[dict[str, str]], **wanted: str) -> dict[str, float]:
    """Values, by name, of the rows whose columns are `wanted`, without rows that are RED or BUSY."""
    chosen = (row for row in rows if all(row[column] == value for column, value in wanted.items()))
    return {
        row["name"]: float(row["value"]) for row in chosen if row["value"] and row["verdict"] not in ("RED", "BUSY")
    }


def shapes_in(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def readme_table(rows: list[dict[str, str]]) -> str:
    """The README's table: milliseconds of every contestant, one line for each shape."""
    columns = ["otalign", "POT log", "torch log", "torch absorbed", "bare products"]
    lines = [
        "| shape | " + " | ".join(f"{column}, ms" for column in columns) + " | faster than POT and torch log by |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for shape in shapes_in(rows):
        times = select(rows, shape=shape, experiment="loss", unit="ms")
        gain = select(rows, shape=shape, experiment="loss", unit="x").get(SPEED_UP)
        cells = [number(times.get(column, NAN)) for column in columns]
        lines.append(f"| `{shape}` | " + " | ".join(cells) + f" | {f'{gain:.1f}x' if gain else '-'} |")
    return "\n".join([*lines, "", conditions(rows)])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python benchmarks cpu-table", description="Render the README's table from the CSV."
    )
    parser.add_argument("readme", type=Path)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    replace_block(args.readme, "bench:cpu", readme_table(read_csv(args.csv)))
    return 0
