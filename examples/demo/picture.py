"""The demo's picture: a spectrogram, and under it the transport plan against the synthesiser's word times."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from speech import HOP, SAMPLE_RATE, Utterance
from torch import Tensor

INK, TRUTH = "#22252b", "#e4572e"
MASS = LinearSegmentedColormap.from_list("mass", ["#ffffff", "#a8d8dc", "#2a7fa8", "#12355b"])


def draw(
    path: Path, utterance: Utterance, columns: dict[str, tuple[Tensor, tuple[float, float]]], *, frame: float
) -> None:
    """Write `path`. `columns` maps a name to a plan `(frames, characters)` and the figures over all held-out words."""
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#9aa0a8"})
    plt.rcParams.update({"xtick.color": INK, "ytick.color": INK, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(
        2, len(columns), figsize=(13, 8.4), sharex=True, sharey="row", layout="constrained", height_ratios=[1, 3.2]
    )
    for column, (name, (plan, (error, share))) in enumerate(columns.items()):
        draw_spectrogram(axes[0, column], utterance)
        image = draw_plan(axes[1, column], utterance, plan, frame)
        axes[0, column].set_title(
            f"{name}: held-out words off by {error:.0f} ms on average, {share:.0%} within 100 ms",
            fontsize=10.5,
            loc="left",
            pad=20,
        )
    figure.colorbar(image, ax=axes[1, :], label="share of a frame's mass", pad=0.01, aspect=40)
    axes[0, 0].set_ylabel("mel channel")
    axes[1, 0].set_ylabel("transcript")
    figure.suptitle(
        "Speech aligned to its transcript by optimal transport, on a sentence that was not trained on",
        fontsize=14,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw_spectrogram(axis: plt.Axes, utterance: Utterance) -> None:
    hop = HOP / SAMPLE_RATE
    mel = utterance.mel.numpy().T
    low, high = np.quantile(mel, [0.03, 0.995])
    extent = (-hop / 2, (mel.shape[1] - 0.5) * hop, 0, len(mel))
    axis.imshow(mel, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=high)
    for first, last, start, end in utterance.words:
        axis.axvline(start, color="white", linewidth=0.6, alpha=0.7)
        axis.text((start + end) / 2, len(mel) + 3, utterance.text[first:last], ha="center", fontsize=8, clip_on=False)
    axis.set_yticks([0, 40, 80])


def draw_plan(axis: plt.Axes, utterance: Utterance, plan: Tensor, frame: float) -> AxesImage:
    """Every column of pixels is one frame and sums to one; the boxes are the words' true times."""
    share = (plan / plan.sum(1, keepdim=True)).numpy().T
    count = len(utterance.text)
    extent = (-frame / 2, (share.shape[1] - 0.5) * frame, count - 0.5, -0.5)
    image = axis.imshow(share, aspect="auto", extent=extent, cmap=MASS, vmin=0, vmax=1, interpolation="nearest")
    for first, last, start, end in utterance.words:
        box = Rectangle((start, first - 0.5), end - start, last - first, fill=False, edgecolor=TRUTH, linewidth=1.3)
        box.set_clip_on(False)
        axis.add_patch(box)
    axis.set_yticks(
        range(count), [c if c != " " else "·" for c in utterance.text], fontsize=8, family="DejaVu Sans Mono"
    )
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("time (s)")
    axis.plot([], [], "s", markersize=9, markerfacecolor="none", color=TRUTH, label="word, as the synthesiser timed it")
    axis.legend(loc="lower left", frameon=False)
    return image
