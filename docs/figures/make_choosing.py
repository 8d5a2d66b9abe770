"""Makes the pictures of docs/choosing.md, from the example and the setting that stand on that page: a few seconds on a CPU."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from torch import Tensor

import otalign

HERE = Path(__file__).parent
INK, TRUTH, BAR = "#22252b", "#e4572e", "#2a7fa8"
MASS = LinearSegmentedColormap.from_list("mass", ["#ffffff", "#a8d8dc", "#2a7fa8", "#12355b"])
COST = LinearSegmentedColormap.from_list("cost", ["#ffffff", "#f3d9b1", "#b8763a", "#3d2314"])
COST.set_over("#22252b")
PANELS, WIDTH = 4, 13.0


def example() -> dict[str, Any]:
    """The names that the page's first two blocks of Python define."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE.parent / "choosing.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks[:2]:
        exec(block, names)
    return names


PAGE = example()
WORDS, OWNER = PAGE["words"], torch.tensor(PAGE["owner"])
SPEECH, TEXT = PAGE["speech"], PAGE["text"]
SPOKEN = OWNER >= 0


def solved(speech: Tensor = SPEECH, **changes: Any) -> otalign.OTResult:
    result = otalign.solve(speech, TEXT, **{**PAGE["setting"], "max_iter": 5000, **changes})
    assert bool(result.converged), changes
    return result


def told(plan: Tensor) -> str:
    correct = int(((plan.argmax(1) == OWNER) & SPOKEN).sum())
    return f"{correct} of {int(SPOKEN.sum())} frames right"


def figure(rows: int, height: float, **options: Any) -> tuple[Any, Any]:
    return plt.subplots(
        rows, PANELS, figsize=(WIDTH, height), layout="constrained", sharex=True, sharey=True, squeeze=False, **options
    )


def draw_truth(axis: Any) -> None:
    for token in range(len(WORDS)):
        frames = (token == OWNER).nonzero().flatten().tolist()
        box = (frames[0], token - 0.5), frames[-1] + 1 - frames[0], 1
        axis.add_patch(Rectangle(*box, fill=False, edgecolor=TRUTH, linewidth=1.3))


def draw_matrix(axis: Any, matrix: Tensor, **options: Any) -> Any:
    n, m = matrix.shape
    image = axis.imshow(
        matrix.T.numpy(),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, n, -0.5, m - 0.5),
        **options,
    )
    draw_truth(axis)
    axis.set_yticks(range(m), WORDS)
    axis.set_xticks(range(0, n + 1, 15))
    axis.tick_params(length=2)
    return image


def draw_plan(axis: Any, plan: Tensor, title: str | None) -> Any:
    """A plan `(N, M)` as shares of what a frame would send if all sent alike."""
    image = draw_matrix(axis, plan * len(plan), cmap=MASS, vmin=0, vmax=1)
    if title is not None:
        axis.set_title(f"{title}\n{told(plan)}", fontsize=11, loc="left")
    return image


def save(fig: Any, name: str) -> None:
    fig.savefig(HERE / f"choosing_{name}.png", dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(fig)


def plans(name: str, panels: dict[str, dict[str, Any]]) -> None:
    fig, axes = figure(1, 3.9)
    for axis, (title, changes) in zip(axes[0], panels.items(), strict=True):
        image = draw_plan(axis, solved(**changes).plan()[0], title)
        axis.set_xlabel("frame")
    fig.colorbar(image, ax=axes, label="share of the frame's mass", pad=0.01, aspect=30)
    save(fig, name)


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}"


def costs() -> None:
    """The costs of frames of different loudness, and the plans: without a prior, so that the cost decides alone."""
    loudness = 1 + 1.5 * torch.sin(torch.arange(60) / 60 * 3 * math.pi).square()
    speech = SPEECH * loudness[None, :, None]
    fig, axes = figure(2, 7.2)
    for column, cost in enumerate(("cosine", "sqeuclidean", "euclidean", "dot")):
        matrix = otalign.speech.recipes.ground_cost(
            speech, TEXT, torch.ones(1, 60, dtype=torch.bool), torch.ones(1, 12, dtype=torch.bool), cost
        )[0] if cost != "dot" else -(speech @ TEXT.mT)[0]  # fmt: skip
        low, high = float(matrix.min()), float(matrix.max())
        reg = float(f"{(high - low) / 25:.1g}")
        image = draw_matrix(axes[0, column], matrix, cmap=COST, vmin=low, vmax=high)
        axes[0, column].set_title(f'cost="{cost}"\nfrom {number(low)} to {number(high)}', fontsize=11, loc="left")
        rho = 6 * reg
        plan = solved(speech, cost=cost, reg=reg, prior=None, unbalanced=(math.inf, rho)).plan()[0]
        mass = draw_plan(axes[1, column], plan, f"plan, reg={reg:g}")
        axes[1, column].set_xlabel("frame")
    bar = fig.colorbar(image, ax=axes[0], label="cost, each on its own scale", pad=0.01, aspect=30)
    bar.set_ticks([low, high], labels=["least", "most"])
    fig.colorbar(mass, ax=axes[1], label="share of the frame's mass", pad=0.01, aspect=30)
    save(fig, "cost")


def terms() -> None:
    """The four temporal priors themselves, each from its least value on."""
    prior = otalign.Prior
    panels = {
        "Prior.quadratic(1.0)": prior.quadratic(1.0),
        "Prior.absolute(1.0)": prior.absolute(1.0),
        "Prior.order_preserving(1.0, 2.0)": prior.order_preserving(1.0, 2.0),
        "Prior.band(2.0)": prior.band(2.0),
    }
    fig, axes = figure(1, 3.6)
    for axis, (title, term) in zip(axes[0], panels.items(), strict=True):
        matrix = term.matrix(60, 12, reg=PAGE["setting"]["reg"])
        matrix = (matrix - matrix.min()).clamp(max=2)  # infinity would be drawn as nothing
        image = draw_matrix(axis, matrix, cmap=COST, vmin=0, vmax=1)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("frame")
    fig.colorbar(image, ax=axes, label="added to the cost", pad=0.01, aspect=30, extend="max")
    save(fig, "terms")


def marginals() -> None:
    """Plans under relaxed marginals, with what each frame gives above and what each word gets at the right."""
    panels = {
        "None": None, "(inf, 0.3)": (math.inf, 0.3), "(0.1, inf)": (0.1, math.inf), "(0.1, 0.1)": (0.1, 0.1),
    }  # fmt: skip
    fig = plt.figure(figsize=(WIDTH, 8.6), layout="constrained")
    for panel, (title, unbalanced) in zip(fig.subfigures(2, 2).flat, panels.items(), strict=True):
        plan = solved(unbalanced=unbalanced).plan()[0]
        axes = panel.subplots(2, 2, sharex="col", sharey="row", width_ratios=[4, 1], height_ratios=[1, 4])
        axes[0, 1].set_visible(False)
        draw_plan(axes[1, 0], plan, None)
        axes[1, 0].set_xlabel("frame")
        axes[0, 0].bar(torch.arange(60) + 0.5, plan.sum(1) * 60, width=1, color=BAR)
        axes[0, 0].axhline(1, color=TRUTH, linewidth=1)
        axes[0, 0].set(ylim=(0, 6.3), yticks=[1, 5], ylabel="gives")
        axes[1, 1].barh(range(12), plan.sum(0) * 60, height=0.8, color=BAR)
        durations = [float((token == OWNER).sum()) for token in range(12)]
        axes[1, 1].plot(durations, range(12), "|", color=TRUTH, markersize=11, markeredgewidth=2)
        axes[1, 1].set(xlim=(0, 9.5), xticks=[0, 5], xlabel="gets, frames")
        mass = f"mass {float(plan.sum()):.2f}"
        axes[0, 0].set_title(f"unbalanced={title}: {told(plan)}, {mass}", fontsize=11, loc="left")
    save(fig, "unbalanced")


def main() -> None:
    torch.set_num_threads(1)
    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#9aa0a8"})
    plt.rcParams.update({"xtick.color": INK, "ytick.color": INK, "font.family": "DejaVu Sans", "axes.titlepad": 6})
    plans("reg", {f"reg={reg}": {"reg": reg} for reg in (0.5, 0.2, 0.05, 0.01)})
    costs()
    terms()
    prior = otalign.Prior
    plans(
        "prior",
        {
            "prior=None": {"prior": None},
            "Prior.quadratic(1.0)": {},
            "Prior.quadratic(100.0)": {"prior": prior.quadratic(100.0)},
            "Prior.band(2.0)": {"prior": prior.band(2.0)},
        },
    )
    marginals()


if __name__ == "__main__":
    main()
