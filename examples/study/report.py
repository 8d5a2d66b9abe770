"""The study's tables and figures, from its results alone."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

import otalign.plot

from .design import Design
from .stats import Paired, correlation, paired
from .world import TASKS

Row = dict[str, Any]
MEASURES = {
    "aps_cosine": "APS, cosine",
    "aps_euclidean": "APS, Euclidean",
    "sequence_cosine": "sequence cosine",
    "monotonicity": "monotonicity",
    "words_found": "words found",
}
NONE, OTREG, AISTA = "#7a828c", "#c8102e", "#1f6fb2"


def report(results: Path, page: Path) -> None:
    """Write the tables of `page` anew, between its markers, and the figures to `results`."""
    errors, layers = read(results / "errors.csv"), read(results / "layers.csv")
    facts = json.loads((results / "facts.json").read_text())
    tables = {
        "frozen": frozen_table(facts),
        "weights": weights_table(errors),
        "otreg": otreg_table(errors, facts["otreg"]),
        "aps": aps_table(errors),
        "layers": layers_table(layers, facts),
        "aista": aista_table(errors),
    }
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        text, count = re.subn(
            rf"(<!-- study:{name} -->\n).*?(<!-- /study:{name} -->)",
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            text,
            flags=re.S,
        )
        if count != 1:
            raise ValueError(f"{page}: expected one pair of markers study:{name}, found {count}")
    page.write_text(text, encoding="utf-8")
    draw_voices(errors, facts["otreg"], results / "voices.png")
    draw_gap(errors, facts["otreg"], results / "gap.png")
    draw_layers(errors, layers, facts["otreg"], results / "layers.png")


def read(path: Path) -> list[Row]:
    """Rows of a table, numbers as numbers."""
    words = {"stage", "arm", "split", "voice"}
    with path.open(newline="") as file:
        return [{k: v if k in words else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def select(rows: Sequence[Row], **where: Any) -> list[Row]:
    """Rows whose columns are as given: a value, or one of several in a set."""
    return [r for r in rows if all(r[k] in v if isinstance(v, set) else r[k] == v for k, v in where.items())]


def by(rows: Sequence[Row], keys: tuple[str, ...], value: Callable[[Row], float]) -> dict[tuple, float]:
    """Means of a value over the rows that have the keys in common."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(value(row))
    return {key: float(np.mean(values)) for key, values in groups.items()}


def final(rows: Sequence[Row]) -> list[Row]:
    """Of the last checkpoint."""
    last = max(row["step"] for row in rows)
    return select(rows, step=last)


def compare(rows: Sequence[Row], before: str, after: str, column: str) -> Paired:
    """Compare two arms over the seeds that both have."""
    a, b = (by(select(rows, arm=arm), ("seed",), lambda row: row[column]) for arm in (before, after))
    seeds = sorted(a.keys() & b.keys())
    return paired([a[s] for s in seeds], [b[s] for s in seeds])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(found: Paired, scale: float = 100, digits: int = 1) -> str:
    """A difference with its interval."""
    return f"{scale * found.difference:+.{digits}f} [{scale * found.low:+.{digits}f}, {scale * found.high:+.{digits}f}]"


def test_voices(design: Design) -> dict[str, set[str]]:
    """Names of the test voices by group."""
    groups = {
        "voices that the encoder knows": design.known_voices,
        "voices that are new to it": design.new_voices,
        "the training voice at other speeds": design.speeds,
        "all": design.test_voices,
    }
    return {name: {str(voice) for voice in voices} for name, voices in groups.items()}


def frozen_table(facts: Row) -> str:
    text = [f"language model, text, {task}: words wrong" for task in TASKS]
    rows = [[name, percent(facts["text_error"][task])] for name, task in zip(text, TASKS, strict=True)]
    rows += [[f"encoder, {voice}: characters wrong", percent(e)] for voice, e in facts["character_error"].items()]
    return table(["what is frozen", "error"], rows)


def weights_table(errors: Sequence[Row]) -> str:
    rows = select(errors, stage="choose")
    found = [(arm, *(by(rows, ("arm",), lambda r, t=t: r[f"{t}_error"])[arm,] for t in TASKS)) for arm in arms(rows)]
    return table(["development voices", *TASKS], [[name, *map(percent, values)] for name, *values in found])


def arms(rows: Sequence[Row]) -> list[str]:
    """Names of the arms, in order."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def otreg_table(errors: Sequence[Row], otreg: str) -> str:
    rows = final(select(errors, stage="compare", split="test"))
    lines = []
    for group, voices in test_voices(Design()).items():
        for task in TASKS:
            found = compare(select(rows, voice=voices), "none", otreg, f"{task}_error")
            lines.append([f"{task}, {group}", percent(found.before), percent(found.after), points(found), *sign(found)])
    for column, name in MEASURES.items():
        found = compare(rows, "none", otreg, column)
        lines.append([name, f"{found.before:.3f}", f"{found.after:.3f}", points(found, 1, 3), *sign(found)])
    header = ["measure", "without", "with OTReg", "difference, 95 % interval", "seeds with less", "sign test, p"]
    return table(header, lines)


def sign(found: Paired) -> list[str]:
    ties = f", {found.ties} equal" if found.ties else ""
    return [f"{found.below} of {found.seeds}{ties}", f"{found.p:.3f}"]


def gap(row: Row) -> float:
    """Word error with speech, mean of the three tasks. With text it is a constant (0 here, see `frozen_table`)."""
    return float(np.mean([row[f"{task}_error"] for task in TASKS]))


def observations(errors: Sequence[Row]) -> dict[str, tuple[list[Row], tuple[str, ...]]]:
    """Sets of rows for the correlation of the score and the gap, and the columns whose values identify a point."""
    test = select(errors, split="test")
    alone = select(test, stage="compare", arm="none")
    return {
        "training without regulariser: checkpoints": (alone, ("arm", "seed", "step")),
        "the same, trained: voices and speeds": (final(alone), ("arm", "seed", "voice")),
        "trained: arms": (final(test), ("arm", "seed")),
        "everything: arms, checkpoints, voices": (test, ("arm", "seed", "step", "voice")),
    }


def aps_table(errors: Sequence[Row]) -> str:
    lines = []
    for name, (rows, keys) in observations(errors).items():
        gaps = by(rows, keys, gap)
        for column in ("aps_cosine", "aps_euclidean", "sequence_cosine", "monotonicity"):
            scores = by(rows, keys, lambda row, column=column: row[column])
            seeds = [key[1] for key in gaps]
            c = correlation([scores[key] for key in gaps], list(gaps.values()), seeds)
            r2 = f"{c.r_squared:.2f} [{c.low:.2f}, {c.high:.2f}]"
            found = ["-"] * 3 if np.isnan(c.pearson) else [f"{c.pearson:+.2f}", r2, f"{c.spearman:+.2f}"]
            lines.append([name, MEASURES[column], str(c.points), *found])
    return table(["points", "score", "number", "Pearson", "R², 95 % interval", "Spearman"], lines)


def layers_table(layers: Sequence[Row], facts: Row) -> str:
    lines = []
    for split in ("development", "test"):
        rows = select(layers, stage="compare", split=split)
        for arm in ("none", facts["otreg"]):
            own = select(rows, arm=arm)
            for layer in sorted({row["layer"] for row in own}):
                at = select(own, layer=layer)
                values = (by(at, ("arm",), lambda r, c=c: r[c])[arm,] for c in LAYER_COLUMNS)
                lines.append([split, arm, f"{layer:.0f}", *(f"{v:.3f}" for v in values)])
    return table(["voices", "arm", "layer", *LAYER_COLUMNS.values()], lines)


LAYER_COLUMNS = {
    "mrr": "MRR",
    "recall_at_1": "recall@1",
    "aps_cosine": "APS, cosine",
    "aps_euclidean": "APS, Euclidean",
    "sequence_cosine": "sequence cosine",
}


def aista_table(errors: Sequence[Row]) -> str:
    inner = final(select(errors, stage="layers", split="test"))
    rows = inner + select(final(select(errors, stage="compare", split="test")), arm="none")
    lines = []
    for arm in arms(inner):
        for task in TASKS:
            found = compare(rows, "none", arm, f"{task}_error")
            lines.append([arm, task, percent(found.before), percent(found.after), points(found), *sign(found)])
    header = ["arm", "task", "without", "with", "difference, 95 % interval", "seeds with less", "sign test, p"]
    return table(header, lines)


def draw_voices(errors: Sequence[Row], otreg: str, path: Path) -> None:
    """Errors by voice and task, each seed a dot, each mean a bar."""
    rows = final(select(errors, stage="compare", split="test"))
    voices = list(dict.fromkeys(row["voice"] for row in rows))
    figure, axes = plt.subplots(
        1, len(TASKS), figsize=(12, 0.9 + 0.38 * len(voices)), sharey=True, layout="constrained"
    )
    for ax, task in zip(axes, TASKS, strict=True):
        for arm, colour, shift in (("none", NONE, 0.16), (otreg, OTREG, -0.16)):
            for place, voice in enumerate(reversed(voices)):
                values = [100 * row[f"{task}_error"] for row in select(rows, arm=arm, voice=voice)]
                label = ("without" if arm == "none" else f"with {arm}") if place == 0 else None
                ax.scatter(values, [place + shift] * len(values), s=9, color=colour, alpha=0.5, linewidth=0)
                ax.plot([np.mean(values)], [place + shift], "|", color=colour, ms=13, mew=2.5, label=label)
        ax.set_title(
            {"repeat": "repeat (trained)"}.get(task, f"{task} (never trained with speech)"), loc="left", size=10
        )
        ax.set_xlabel("words wrong, %")
        ax.set_xlim(left=0)
        ax.grid(axis="x", linewidth=0.4, color="#e3e6e9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(voices)), list(reversed(voices)), size=8)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, path)


def draw_gap(errors: Sequence[Row], otreg: str, path: Path) -> None:
    """The gap against the two scores, one dot for each run, checkpoint and voice."""
    rows = select(errors, split="test")
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for ax, column in zip(axes, ("aps_cosine", "aps_euclidean", "sequence_cosine"), strict=True):
        for label, colour, own in (
            ("AI-STA", AISTA, select(rows, stage="layers")),
            ("without", NONE, select(rows, arm="none")),
            (otreg, OTREG, select(rows, arm=otreg)),
        ):
            ax.scatter(
                [r[column] for r in own], [100 * gap(r) for r in own], s=7, color=colour, alpha=0.45, label=label, lw=0
            )
        ax.set_xlabel(MEASURES[column])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("words wrong with speech, % (with text: 0)")
    axes[0].legend(frameon=False, fontsize=8, markerscale=2)
    _save(figure, path)


def draw_layers(errors: Sequence[Row], layers: Sequence[Row], otreg: str, path: Path) -> None:
    """Retrieval and scores by layer; and what the choice of layers does."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    rows = select(layers, stage="compare", split="development")
    curves = {}
    for arm, name in (("none", "without"), (otreg, otreg)):
        for column in ("mrr", "aps_cosine"):
            found = by(select(rows, arm=arm), ("layer",), lambda row, column=column: row[column])
            curves[f"{LAYER_COLUMNS[column]}, {name}"] = list(found.values())
    otalign.plot.layers(curves, ax=left)
    left.set_title("development voices, by layer", loc="left", size=10)
    _draw_sets(right, errors)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _draw_sets(ax: Axes, errors: Sequence[Row]) -> None:
    inner = final(select(errors, stage="layers", split="test"))
    rows = inner + select(final(select(errors, stage="compare", split="test")), arm="none")
    names = arms(inner)
    for task, colour, shift in zip(TASKS, ("#2b2f36", "#1f6fb2", "#7fb3d9"), (0.2, 0, -0.2), strict=True):
        found = [compare(rows, "none", arm, f"{task}_error") for arm in names]
        centre = [100 * f.difference for f in found]
        reach = [100 * (f.high - f.difference) for f in found]
        ax.errorbar(centre, np.arange(len(names)) + shift, xerr=reach, fmt="o", ms=4, color=colour, label=task)
    ax.axvline(0, color="#9aa0a8", linewidth=0.8)
    ax.set_yticks(range(len(names)), names, size=8)
    ax.invert_yaxis()
    ax.set_xlabel("words wrong, difference to training without, points, with 95 % intervals")
    ax.set_title("all test voices, by layers aligned", loc="left", size=10)
    ax.legend(frameon=False, fontsize=8, ncols=len(TASKS), loc="lower right", bbox_to_anchor=(1, 1))


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
