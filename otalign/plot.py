"""Pictures of alignments, for 5 frames or 3000. matplotlib is imported when the first one is drawn.

Each function draws on the matplotlib axes `ax`, or on new axes if `ax` is None, and returns the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import one_of
from .result import OTResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = 48  # lines with at most this many points get markers
LABELS = 24  # at most this many tokens get a label


def plan(
    plan: Tensor,
    *,
    tokens: Sequence[str] | None = None,
    seconds_per_frame: float | None = None,
    ax: Axes | None = None,
    **options: Any,
) -> Axes:
    """A transport plan as a heat map: time to the right, tokens upwards. Each token is scaled by its largest entry.

    Args:
        plan: `(N, M)`, one item without its padding: `result.plan()[b, :n, :m]`.
        tokens: M labels.
        seconds_per_frame: duration of a frame, for an axis in seconds; None = an axis in frames.
        ax: axes to draw on; None = new ones.
        options: of `Axes.imshow`.

    Raises:
        ValueError: for a plan of another shape, or another number of labels.

    Example:
        >>> ax = otalign.plot.plan(torch.eye(5), tokens=list("hello"), seconds_per_frame=0.04)
        >>> ax.get_xlabel()
        'time, s'
    """
    matrix = _matrix("plan", plan)
    ax = _axes(ax)
    relative = matrix / matrix.amax(0).clamp(min=torch.finfo(matrix.dtype).tiny)
    image = _image(ax, relative, seconds_per_frame, **{"cmap": "magma", "vmin": 0, "vmax": 1, **options})
    ax.figure.colorbar(image, ax=ax, label="plan, relative to each token")
    _label(ax, matrix.shape, tokens, seconds_per_frame)
    return ax


def path(
    similarity: Tensor,
    path: Tensor,
    *,
    metric: str = "cosine",
    tokens: Sequence[str] | None = None,
    seconds_per_frame: float | None = None,
    ax: Axes | None = None,
    **options: Any,
) -> Axes:
    """An alignment path over its similarities: bright is near.

    Args:
        similarity: `(N, M)` of one item and layer, such as `otalign.plot.cosines(speech, text)`; for `"euclidean"` distances,
            such as `torch.cdist(speech, text)`.
        path: `(M,)` the frame of each token, as `alignment_path` returns it; -1 is left out.
        metric: the contents of `similarity`: `"cosine"` or `"euclidean"`.
        tokens, seconds_per_frame, ax, options: as in `plan`.

    Raises:
        ValueError: for an unknown metric, similarities of another shape, or another number of labels.
    """
    one_of("metric", metric, ("cosine", "euclidean"))
    matrix, frames = _matrix("similarity", similarity), path.detach().cpu()
    ax = _axes(ax)
    far = metric == "euclidean"
    image = _image(ax, matrix, seconds_per_frame, low=far, **{"cmap": "viridis_r" if far else "viridis", **options})
    ax.figure.colorbar(image, ax=ax, label="distance" if far else "similarity")
    shown = frames >= 0
    at = (frames[shown].double() + 0.5) * (seconds_per_frame or 1)
    few = len(frames) <= MARKERS
    ax.plot(
        at,
        torch.arange(len(frames), device="cpu")[shown],
        color="white",
        marker="o",
        markersize=4 if few else 2.5,
        markeredgecolor="black",
        markeredgewidth=0.5,
        linestyle="-" if few else "",  # frames of successive tokens are independent
        linewidth=1,
        label="nearest frame",
    )
    ax.legend(loc="upper left", fontsize=8, framealpha=0.8, facecolor="0.7")
    _label(ax, matrix.shape, tokens, seconds_per_frame)
    return ax


def cosines(speech: Tensor, text: Tensor) -> Tensor:
    """Cosines between all frames `(N, D)` and all tokens `(M, D)`: `(N, M)` float32, detached."""
    return F.normalize(speech.detach().float(), dim=1) @ F.normalize(text.detach().float(), dim=1).T


def layers(
    curves: Mapping[str, Tensor | Sequence[float]],
    *,
    numbers: Sequence[int] | None = None,
    right: str | Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Quantities by layer, one line each, such as cosines, distances, alignment path scores or retrieval scores.

    Args:
        curves: values `(L,)` by label; or `(L, B)`, drawn as their mean in a band from the 10th to the 90th percentile of the
            items.
        numbers: numbers of the layers; None = 0 to L - 1.
        right: labels of the curves on a second axis, at the right, such as distances.
        ax: axes to draw on; None = new ones.

    Raises:
        ValueError: for a label in `right` without a curve.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    right = [right] if isinstance(right, str) else list(right)
    if unknown := [label for label in right if label not in curves]:
        raise ValueError(f"right: expected labels among {list(curves)}, got {unknown}")
    ax = _axes(ax)
    other, shaded = ax.twinx() if right else None, False
    for index, (label, values) in enumerate(curves.items()):
        values = (values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")).detach().cpu().double()
        x = list(range(len(values))) if numbers is None else list(numbers)
        on = other if other is not None and label in right else ax
        style: dict[str, Any] = {"color": f"C{index}", "linestyle": "--" if on is other else "-"}
        if values.dim() == 2:
            low, high = values.nanquantile(values.new_tensor([0.1, 0.9]), dim=1)
            on.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            values, shaded = values.nanmean(1), True
        on.plot(x, values, label=label, marker="o" if len(x) <= MARKERS else None, markersize=3, **style)
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if other is not None:
        other.set_ylabel(", ".join(right) + " (dashed)")
        # matplotlib draws the right axes last, over the legend; so put the left axes, with the legend, on top.
        ax.set_zorder(other.get_zorder() + 1)
        ax.patch.set_visible(False)
    drawn: list[Any] = [line for axes in (ax, other) if axes is not None for line in axes.get_lines()]
    if shaded:
        drawn.append(Patch(color="0.85", label="10 % to 90 % of items"))
    ax.legend(handles=drawn, framealpha=0.8, edgecolor="none")
    return ax


def potentials(result: OTResult, item: int = 0, *, ax: Axes | None = None) -> Axes:
    """The two dual potentials of an item over relative position. They are high where points are expensive to reach.

    Args:
        result: of a padded or packed batch.
        item: number of the item.
        ax: axes to draw on; None = new ones.
    """
    ax = _axes(ax)
    problem = result._problem
    sides = zip("fg", ("speech f", "text g"), result.potentials, (problem.x.segments, problem.y.segments), strict=True)
    for letter, label, values, segments in sides:
        length = int(segments.lengths[item])
        start = 0 if segments.starts is None else int(segments.starts[item])
        row = (values if segments.packed else values[item])[start : start + length].detach().cpu()
        position = torch.arange(length, dtype=torch.float32, device="cpu") / max(length - 1, 1)
        ax.plot(
            position,
            row,
            label=label,
            marker="o" if length <= MARKERS else None,
            markersize=3,
            color=f"C{'fg'.index(letter)}",
        )
    ax.set_xlabel("relative position")
    ax.set_ylabel("potential, in the unit of the cost")
    ax.legend(framealpha=0.8, edgecolor="none")
    return ax


def _axes(ax: Axes | None) -> Any:
    """The given axes, or those of a new figure, which pyplot does not know and so does not keep alive."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 4), layout="constrained").subplots()


def _matrix(name: str, matrix: Tensor) -> Tensor:
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or 0 in matrix.shape:
        shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"{name}: expected a tensor of shape (N, M), one item that is not empty, got {shape}")
    return matrix.detach().cpu().float()


def _image(ax: Any, matrix: Tensor, seconds_per_frame: float | None, *, low: bool = False, **options: Any) -> Any:
    """Draw a matrix `(N, M)` with frames to the right and tokens upwards.

    A matrix with more entries than the axes have pixels is pooled by the largest entry, or by the smallest if `low`, so that a
    narrow ridge stays visible.
    """
    n, m = matrix.shape
    width, height = (max(int(0.75 * pixels), 16) for pixels in ax.get_window_extent().size)  # labels take the rest
    size = min(n, width), min(m, height)
    if size != (n, m):
        sign = -1 if low else 1
        matrix = sign * F.adaptive_max_pool2d(sign * matrix[None], size)[0]
    extent = (0, n * (seconds_per_frame or 1), -0.5, m - 0.5)
    options = {"origin": "lower", "aspect": "auto", "interpolation": "nearest", "extent": extent, **options}
    return ax.imshow(matrix.T.numpy(), **options)


def _label(ax: Any, shape: tuple[int, ...], tokens: Sequence[str] | None, seconds_per_frame: float | None) -> None:
    ax.set_xlabel("frame" if seconds_per_frame is None else "time, s")
    if tokens is None:
        ax.set_ylabel("token")
        return
    if len(tokens) != shape[1]:
        raise ValueError(f"tokens: expected {shape[1]} labels, got {len(tokens)}")
    every = -(-len(tokens) // LABELS)
    ax.set_yticks(range(0, len(tokens), every), list(tokens)[::every], fontsize=8, parse_math=False)
