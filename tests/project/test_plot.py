"""Plots: what they show, and that they work for the shortest and the longest items."""

from __future__ import annotations

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

import otalign
from otalign import plot
from otalign.speech import alignment_path

from ..helpers.problems import close

matplotlib.use("Agg")


def drawn(ax) -> None:
    """Render the plot: some errors appear only then."""
    figure = ax.figure
    figure.canvas.draw()


@pytest.mark.parametrize(("n", "m"), [(5, 3), (1, 1), (3000, 512)])
def test_plan(n, m):
    result = otalign.solve(torch.randn(1, n, 8), torch.randn(1, m, 8), max_iter=5)
    ax = plot.plan(result.plan()[0], tokens=[f"t{j}" for j in range(m)], seconds_per_frame=0.02)
    drawn(ax)
    assert ax.get_xlim() == pytest.approx((0, 0.02 * n))
    assert ax.get_ylim() == pytest.approx((-0.5, m - 0.5))
    assert 1 <= len(ax.get_yticklabels()) <= 24
    assert ax.get_yticklabels()[0].get_text() == "t0"


def test_a_narrow_ridge_stays_visible():
    """There are fewer pixels than the 3000 frames: a single large entry must not be averaged away."""
    plan = torch.zeros(3000, 10)
    plan[1234, 4] = 1e-3
    (image,) = plot.plan(plan).get_images()
    assert image.get_array().max() == 1
    row, column = divmod(int(image.get_array().argmax()), image.get_array().shape[1])
    assert row == 4
    assert column == pytest.approx(1234 / 3000 * image.get_array().shape[1], abs=1)


def test_plan_is_relative_to_each_token():
    plan = torch.tensor([[1.0, 0.0], [0.5, 0.1], [0.0, 0.2]])
    (image,) = plot.plan(plan).get_images()
    close(torch.tensor(image.get_array()), torch.tensor([[1, 0.5, 0], [0, 0.5, 1]]), 1e-6)


@pytest.mark.parametrize(("n", "m"), [(5, 3), (3000, 200)])
def test_path(n, m):
    speech, text = torch.randn(1, n, 8), torch.randn(1, m, 8)
    found = alignment_path(speech, text).path[0, 0]
    ax = plot.path(plot.cosines(speech[0], text[0]), found, seconds_per_frame=0.1)
    drawn(ax)
    (line,) = ax.get_lines()
    assert line.get_xdata() == pytest.approx((found + 0.5) * 0.1)
    assert list(line.get_ydata()) == list(range(m))


def test_path_leaves_out_the_padding():
    ax = plot.path(torch.rand(4, 3), torch.tensor([2, 0, -1]))
    assert len(ax.get_lines()[0].get_xdata()) == 2


def test_the_nearest_frame_stays_visible():
    """Of several frames in one pixel, the nearest is shown."""
    distances = torch.rand(3000, 10) + 1
    distances[1234, 4] = 0
    ax = plot.path(distances, distances.argmin(0), metric="euclidean")
    (image,) = ax.get_images()
    assert image.get_array().min() == 0
    assert ax.figure.axes[1].get_ylabel() == "distance"
    with pytest.raises(ValueError, match="metric"):
        plot.path(distances, distances.argmin(0), metric="dot")


def test_tokens_are_not_read_as_formulas():
    drawn(plot.plan(torch.rand(5, 3), tokens=["$$", "$_$", "$x_2$"]))


def test_layers():
    curves = {"cosine": torch.rand(6), "distance": torch.rand(6, 9), "MRR": [0.1] * 6}
    ax = plot.layers(curves, right=["distance"], numbers=[0, 2, 4, 6, 8, 10])
    drawn(ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "cosine",
        "MRR",
        "distance",
        "10 % to 90 % of items",
    ]
    left, right = ax.figure.axes
    assert left.get_lines()[0].get_ydata() == pytest.approx(curves["cosine"])
    assert right.get_lines()[0].get_ydata() == pytest.approx(curves["distance"].mean(1))
    assert plot.layers({"distance": [1.0, 2.0]}, right="distance").figure.axes[1].get_ylabel() == "distance (dashed)"
    with pytest.raises(ValueError, match=r"right: expected labels among \['APS'\], got \['typo'\]"):
        plot.layers({"APS": [0.1]}, right=["typo"])
    assert left.get_zorder() > right.get_zorder()  # the left axes have the legend


def test_potentials_padded_and_packed():
    x, y, n, m = torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.tensor([9, 6]), torch.tensor([5, 2])
    padded = plot.potentials(otalign.solve(x, y, n, m), 1)
    packed = {"cu_seqlens_x": torch.tensor([0, 9, 15]), "cu_seqlens_y": torch.tensor([0, 5, 7])}
    result = otalign.solve(torch.cat([x[0], x[1, :6]]), torch.cat([y[0], y[1, :2]]), **packed)
    for a, b in zip(padded.get_lines(), plot.potentials(result, 1).get_lines(), strict=True):
        assert a.get_ydata() == pytest.approx(b.get_ydata(), abs=1e-5)
    drawn(padded)


def test_axes_that_are_given_are_used():
    axes = Figure().subplots(2, 2).ravel()
    result = otalign.solve(torch.randn(1, 5, 4), torch.randn(1, 3, 4))
    assert plot.plan(result.plan()[0], ax=axes[0]) is axes[0]
    assert plot.path(torch.rand(5, 3), torch.tensor([0, 1, 2]), ax=axes[1]) is axes[1]
    assert plot.layers({"APS": torch.rand(3)}, ax=axes[2]) is axes[2]
    assert plot.potentials(result, ax=axes[3]) is axes[3]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"plan: expected a tensor of shape \(N, M\)"):
        plot.plan(torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="tokens: expected 3 labels, got 2"):
        plot.plan(torch.rand(2, 3), tokens=["a", "b"])
