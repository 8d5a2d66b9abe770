"""The README's plot, from the CSV alone: `python benchmarks cpu-plot` writes docs/figures/cpu.png."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from common.shapes import SHAPES
from common.tables import number
from cpu.report import RESULTS, conditions, read_csv, select, shapes_in

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "cpu.png"
COLOURS = {  # bottom to top within a group
    "bare products": "#b8bec5",
    "otalign": "#c8102e",
    "torch absorbed": "#7fa8c9",
    "torch log": "#3f74a3",
    "POT log": "#1d3f5e",
}


def draw(rows: list[dict[str, str]], path: Path) -> None:
    shapes = shapes_in(rows)
    figure, axes = plt.subplots(figsize=(8, 0.6 + 1.1 * len(shapes)))
    height = 0.8 / len(COLOURS)
    for group, shape in enumerate(reversed(shapes)):
        times = select(rows, shape=shape, experiment="loss", unit="ms")
        for place, (name, colour) in enumerate(COLOURS.items()):
            if name in times:
                y = group + (place - (len(COLOURS) - 1) / 2) * height
                label = name if group == 0 else None
                axes.scatter(times[name], y, s=36, color=colour, label=label, zorder=2)
                axes.annotate(
                    number(times[name]), (times[name], y), (7, 0), textcoords="offset points", va="center", size=7
                )
    names = [f"{s}\nB {SHAPES[s].B}, N {SHAPES[s].N}\nM {SHAPES[s].M}, D {SHAPES[s].D}" for s in reversed(shapes)]
    axes.set_yticks(range(len(shapes)), names, size=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("milliseconds (logarithmic), less is better")
    axes.grid(axis="x", which="both", linewidth=0.4, color="#e3e6e9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        frameon=False,
        ncols=len(labels),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        fontsize=8,
    )
    axes.set_xmargin(0.08)
    figure.supxlabel("\n".join(textwrap.wrap(conditions(rows), 130)), size=6.5, x=0.02, ha="left", color="#555555")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks cpu-plot", description=__doc__)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=FIGURE)
    args = parser.parse_args(arguments)
    draw(read_csv(args.csv), args.out)
    return 0
