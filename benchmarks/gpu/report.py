"""The README's GPU table and its plot, from the results alone: `python benchmarks gpu-table README.md`.

Reads every benchmark.csv in benchmarks/results/<device>/. Rows of a dry run and rows without a time are left out.
`--add out/gpu` first copies the results of a `make gpu` from there.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import textwrap
from pathlib import Path

from common.tables import number, replace_block
from gpu.rows import read as read_all

RESULTS = Path(__file__).parents[1] / "results"
KEPT = ("summary.json", "first.csv", "tests.csv", "benchmark.csv", "forms.csv", "stages.csv", "targets.txt")
FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "gpu.png"
NOTHING = "Not measured on a GPU."
Rows = list[dict[str, str]]


def read(results: Path = RESULTS) -> Rows:
    """The rows with a time, of all devices."""
    rows: Rows = []
    for path in sorted(results.glob("*/benchmark.csv")):
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["median_us"] and "dry run" not in row["device"]]
    return rows


def add(session: Path, results: Path = RESULTS) -> Path:
    """Copy what a session measured into the folder of its device; refuses a rehearsal."""
    rows = [*read_all(session / "first.csv"), *read_all(session / "benchmark.csv")]
    devices = {str(row["device"]) for row in rows}
    if len(devices) != 1 or "dry run" in min(devices):
        raise SystemExit(
            f"{session}: expected the rows of one GPU, got those of {', '.join(sorted(devices)) or 'none'}"
        )
    folder = results / re.sub(r"[^a-z0-9]+", "-", devices.pop().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (session / name).exists():
            shutil.copy(session / name, folder / name)
    return folder


def ordered(rows: Rows, column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def medians(rows: Rows, **wanted: str) -> dict[str, float]:
    """Median by provider of the rows whose columns are `wanted`."""
    chosen = (row for row in rows if all(row[column] == value for column, value in wanted.items()))
    return {row["provider"]: float(row["median_us"]) for row in chosen}


def table(rows: Rows, mode: str = "full", dtype: str = "bf16") -> str:
    """A table for every device: microseconds of every provider, one line for each shape."""
    rows = [row for row in rows if row["mode"] == mode and row["dtype"] == dtype]
    if not rows:
        return NOTHING
    lines: list[str] = []
    for device in ordered(rows, "device"):
        here = [row for row in rows if row["device"] == device]
        providers = ordered(here, "provider")
        lines += ["| shape | " + " | ".join(f"{p} (us)" for p in providers) + " | floor (us) |"]
        lines += ["|---" * (len(providers) + 2) + "|"]
        for shape in ordered(here, "shape"):
            times = medians(here, shape=shape)
            floor = next(row["floor_us"] for row in here if row["shape"] == shape)
            cells = [number(times[p]) if p in times else "-" for p in providers]
            lines.append(f"| `{shape}` | " + " | ".join(cells) + f" | {number(float(floor))} |")
        lines += ["", conditions(here), ""]
    return "\n".join(lines).rstrip()


def conditions(rows: Rows) -> str:
    """One sentence under every table and plot."""
    row = rows[0]
    return (
        f"Loss and both gradients, {row['dtype']} points, cosine cost, reg {row['reg']}, 100 iterations, or with early exit "
        f"an L1 marginal error of 0.001; medians by CUDA events, L2 flushed; {row['device']}, driver {row['driver']}, CUDA "
        f"{row['cuda']}, torch {row['torch']}, Triton {row['triton']}; commit {row['commit']}, {row['date'][:10]}."
    )


def draw(rows: Rows, path: Path) -> None:
    """Time over floor of every provider, one group for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    rows = [row for row in rows if row["mode"] == "full" and row["dtype"] == "bf16"]
    shapes, providers = ordered(rows, "shape"), ordered(rows, "provider")
    figure, axes = plt.subplots(figsize=(8, 1 + 0.8 * len(shapes)))
    for place, provider in enumerate(providers):
        here = [row for row in rows if row["provider"] == provider]
        heights = [
            shapes.index(row["shape"]) + (place - (len(providers) - 1) / 2) * 0.8 / len(providers) for row in here
        ]
        axes.scatter([float(row["ratio_to_floor"]) for row in here], heights, s=30, label=provider, zorder=2)
    axes.set_yticks(range(len(shapes)), shapes, size=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("time over the floor of bytes and products (logarithmic), less is better")
    axes.grid(axis="x", which="both", linewidth=0.4, color="#e3e6e9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    figure.supxlabel("\n".join(textwrap.wrap(conditions(rows), 130)), size=6.5, x=0.02, ha="left", color="#555555")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks gpu-table", description=__doc__)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--add", type=Path, help="the RESULTS_DIR of a `make gpu` whose results are copied first")
    args = parser.parse_args(arguments)
    if args.add:
        print(f"results in {add(args.add, args.results)}")
    found = read(args.results)
    replace_block(args.readme, "bench:gpu", table(found))
    if found:
        draw(found, args.figure)
    return 0
