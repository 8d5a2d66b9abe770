"""The tables and the plot of small `reg`, from results/small_reg.csv alone: `python benchmarks small-reg-table`.

Writes a table of all ratios into docs/performance.md, a short one into README.md, and docs/figures/small_reg.png.
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from collections.abc import Callable
from pathlib import Path

from common.tables import number, replace_block
from cpu.small_reg import ERRORS, OURS, PLAIN, RESULTS, SPOKEN, SSNS

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs" / "figures" / "small_reg.png"
COLOURS = {OURS: "#c8102e", PLAIN: "#7fa8c9", SSNS: "#1d3f5e"}
MARKS = {OURS: "o", PLAIN: "s", SSNS: "^"}
TRUSTED = ("ok", "PASS", "MISS")
Rows = list[dict[str, str]]


def read(path: Path = RESULTS) -> Rows:
    """The rows whose figure is right and was measured on a quiet machine."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["verdict"] in TRUSTED]


def ordered(rows: Rows, column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def cell(rows: Rows, column: str = "value", **wanted: str) -> str:
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return number(float(row[column]))
    return "-"


def table(rows: Rows) -> str:
    """Times, passes and ratios at the last error, and times at the others."""
    last = f"{ERRORS[-1]:.4g}"
    lines = [
        f"| costs | N x M | `reg` / range | {OURS}, ms | passes | plain, ms | passes | SSNS, ms | steps | times as fast as SSNS "
        f"| times fewer passes than plain | {OURS} / plain, time | to 1e-2, ms (SSNS) | to 1e-3, ms (SSNS) |",
        "|---" * 14 + "|",
    ]
    for costs in ordered(rows, "costs"):
        for size in ordered(rows, "size"):
            for reg in ordered([row for row in rows if row["costs"] == costs], "reg"):
                here = [row for row in rows if (row["costs"], row["size"], row["reg"]) == (costs, size, reg)]
                at = [row for row in here if row["error"] == last]
                cells = [costs, size.replace("x", " x "), reg]
                for name in (OURS, PLAIN, SSNS):
                    cells += [cell(at, name=name), cell(at, "passes", name=name)]
                for name in (f"{SSNS} / {OURS}", "passes, plain / otalign", f"{OURS} / {PLAIN}"):
                    cells.append(cell(at, name=name))
                for error in ERRORS[:-1]:
                    ours, peer = (cell(here, name=name, error=f"{error:.4g}") for name in (OURS, SSNS))
                    cells.append("-" if ours == "-" else f"{ours} ({peer})")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", conditions(rows)])


def short_table(rows: Rows) -> str:
    """How many times as fast as SSNS, and as plain iterations, at the last error."""
    at = [row for row in rows if row["costs"] == SPOKEN and row["error"] == f"{ERRORS[-1]:.4g}"]
    regs = ordered(at, "reg")
    lines = [
        "| time relative to otalign | " + " | ".join(f"`reg` {reg}" for reg in regs) + " |",
        "|---" * (len(regs) + 1) + "|",
    ]
    ratios: dict[str, Callable[[str, str], str]] = {
        SSNS: lambda size, reg: cell(at, size=size, reg=reg, name=f"{SSNS} / {OURS}"),
        "plain iterations": lambda size, reg: over(cell(at, size=size, reg=reg, name=f"{OURS} / {PLAIN}")),
    }
    for size in ordered(at, "size"):
        for name, ratio in ratios.items():
            cells = [ratio(size, reg) for reg in regs]
            lines.append(f"| {name}, {size.replace('x', ' x ')} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", conditions(rows)])


def over(cell: str) -> str:
    return "-" if cell == "-" else number(1 / float(cell))


def conditions(rows: Rows) -> str:
    """One sentence under the tables and the plot."""
    row = rows[0]
    return (
        f"One item, one thread, medians of the seeds, `reg` in ranges of the cost, to an L1 marginal error of {ERRORS[-1]:g}; "
        f"RegOT {row['RegOT']}; {row['cpu']}; {row['versions']}; commit {row['commit']}, {row['date'][:10]}."
    )


def draw(rows: Rows, path: Path) -> None:
    """Time over reg at the last error, one panel for each size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    at = [row for row in rows if row["costs"] == SPOKEN and row["error"] == f"{ERRORS[-1]:.4g}"]
    sizes, regs = ordered(at, "size"), [float(reg) for reg in ordered(at, "reg")]
    figure, panels = plt.subplots(1, len(sizes), figsize=(9, 3.7), sharey=True, squeeze=False)
    for panel, size in zip(panels[0], sizes, strict=True):
        for name, colour in COLOURS.items():
            here = [row for row in at if row["size"] == size and row["name"] == name]
            x = [float(row["reg"]) for row in here]
            y, low, high = ([float(row[column]) for row in here] for column in ("value", "low", "high"))
            panel.plot(x, y, color=colour, marker=MARKS[name], markersize=5, linewidth=1.5, label=name)
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set_title(size.replace("x", " x "), fontsize=10)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.invert_xaxis()
        panel.xaxis.set_major_locator(FixedLocator(regs))
        panel.xaxis.set_minor_locator(NullLocator())
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.tick_params(labelsize=8)
        panel.grid(which="major", linewidth=0.4, color="#e3e6e9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("milliseconds (logarithmic)", fontsize=9)
    figure.supxlabel("reg / range of the cost, falling", fontsize=9, y=0.16)
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, ncols=3, loc="upper left", fontsize=9)
    sentence = "Shaded: 20th to 80th percentile of the seeds. " + conditions(rows).replace("`", "")
    figure.text(0.01, 0.02, "\n".join(textwrap.wrap(sentence, 150)), fontsize=6.5, color="#555555")
    figure.subplots_adjust(left=0.07, right=0.99, top=0.82, bottom=0.27, wspace=0.06)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks small-reg-table", description=__doc__)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args(arguments)
    rows = read(args.csv)
    if not rows:
        raise SystemExit(f"{args.csv}: no figure that counts")
    replace_block(args.page, "bench:small-reg", table(rows))
    replace_block(args.readme, "bench:small-reg", short_table(rows))
    draw(rows, args.figure)
    return 0
