"""Retrieval and inner layers, compared with plain loops, and what all methods have in common."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import otalign
from otalign.speech import (
    InnerAlignmentLoss,
    OTRegLoss,
    RetrievalCorpus,
    alignment_path_score,
    intervene,
    recipes,
    retrieval_scores,
    select_layers,
    sequence_similarity,
)

from ..helpers.problems import close, draw, identical, states


def plain_retrieval(x, y):
    """Mean reciprocal rank and recalls of means (B, D), both directions."""
    A = F.cosine_similarity(x[:, None], y[None], dim=2)
    ranks = torch.tensor(
        [1 + int((S[i] > S[i, i]).sum()) for S in (A, A.T) for i in range(len(A))], dtype=torch.float64
    )
    return [(1 / ranks).mean(), *((ranks <= k).double().mean() for k in (1, 5, 10))]


def test_retrieval_equals_a_plain_loop():
    n, m = [3 + i % 4 for i in range(14)], [2 + i % 3 for i in range(14)]
    xs, ys, n, m = states(2, n, m)
    ys = [y + 0.5 * x[:, :1] for x, y in zip(xs, ys, strict=True)]  # so that some partners are found
    found = retrieval_scores(xs, ys, n, m)
    for layer, (x, y) in enumerate(zip(xs, ys, strict=True)):
        pooled = [
            torch.stack([t[i, :k].mean(0) for i, k in enumerate(lengths.tolist())]) for t, lengths in ((x, n), (y, m))
        ]
        for actual, right in zip((score[layer] for score in found), plain_retrieval(*pooled), strict=True):
            close(actual, right, 1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_retrieval_over_a_corpus(chunk):
    """Batch by batch gives the same as all at once. Empty items do not count."""
    xs, ys, n, m = states(2, [5] * 12, [3] * 12)
    n[4], m[7] = 0, 0
    keep = [i for i in range(12) if i not in (4, 7)]
    expected = retrieval_scores([x[keep] for x in xs], [y[keep] for y in ys], n[keep], m[keep])
    corpus = RetrievalCorpus(chunk=chunk)
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        corpus.update([x[part] for x in xs], [y[part] for y in ys], n[part], m[part])
    for actual, right in zip(corpus.compute(), expected, strict=True):
        close(actual, right, 1e-6)


def test_retrieval_of_equal_states_is_chance():
    """If all states are equal, the scores are those of chance."""
    x = torch.ones(9, 4, 3)
    found = retrieval_scores(x, x)
    assert found.mrr.item() == pytest.approx(1 / 5)
    assert found.recall_at_1.item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_retrieval_of_non_finite_states(value):
    """A layer with non-finite states has no good score."""
    xs, ys, n, m = states(3, [5] * 8, [3] * 8)
    xs[1][2, 1, 0] = value
    found = retrieval_scores(xs, ys, n, m)
    expected = retrieval_scores([xs[0], xs[2]], [ys[0], ys[2]], n, m)
    for actual, right in zip(found, expected, strict=True):
        assert actual[1].isnan()
        close(actual[[0, 2]], right, 0)
    assert 1 not in select_layers(found, 2)


def test_retrieval_of_empty_batches():
    assert [tuple(score.shape) for score in RetrievalCorpus().compute()] == [(0,)] * 4
    xs, ys, *_ = states(2)
    nothing = torch.zeros(5, dtype=torch.int64)
    assert all(score.isnan().all() for score in retrieval_scores(xs, ys, nothing, nothing))


def test_select_layers():
    assert select_layers([0.1, 0.9, 0.5], 2) == [1, 2]
    assert select_layers([0.1, 0.9, 0.5], 2, always=(0,)) == [0, 1]
    assert select_layers({4: 0.2, 8: 0.2, 2: 0.1}, 2) == [4, 8]
    xs, ys, n, m = states(4)
    scores = retrieval_scores(xs, ys, n, m)
    assert select_layers(scores, 1) == [int(scores.mrr.argmax())]
    named = retrieval_scores({9: xs[0], 4: ys[1]}, {9: ys[0], 4: ys[1]}, m, m)
    assert named.layers == (9, 4)
    assert select_layers(named, 1) == [4]
    assert select_layers([math.nan, 0.5, 0.9], 3) == [2, 1, 0]
    with pytest.raises(ValueError, match="always"):
        select_layers([0.1], 1, always=(3,))
    with pytest.raises(ValueError, match="k: expected a number from 1 to 2"):
        select_layers([0.1, 0.2], 3, always=(0,))


@pytest.mark.parametrize("weights", [None, [2.0, 0.5]])
def test_inner_alignment_is_a_sum_over_layers(weights):
    xs, ys, n, m = states(4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in xs]
    criterion = InnerAlignmentLoss([2, 0], layer_weights=weights, reg=0.1, tol=0)
    loss = criterion(leaves, ys, n, m)
    shares = weights or [0.5, 0.5]
    expected = sum(
        share * otalign.sinkhorn_loss(xs[layer], ys[layer], n, m, reg=0.1, tol=0)
        for share, layer in zip(shares, (2, 0), strict=True)
    )
    close(loss, expected, 1e-12)
    actual = torch.autograd.grad(loss, leaves, allow_unused=True)
    right = torch.autograd.grad(expected, leaves, allow_unused=True)
    assert [g is None for g in actual] == [False, True, False, True]
    for layer in (0, 2):
        close(actual[layer], right[layer], 1e-10)
    # Layers that were not computed (None, as in transformers), negative layer numbers, weights by layer number.
    some = [xs[0], None, xs[2], None], [ys[0], None, ys[2], None], n, m
    identical(InnerAlignmentLoss([2, 0], layer_weights=weights, reg=0.1, tol=0)(*some), loss)
    identical(InnerAlignmentLoss([-2, -4], layer_weights=weights, reg=0.1, tol=0)(*some), loss)
    by_number = {0: shares[1], 2: shares[0]}
    identical(InnerAlignmentLoss([2, 0], layer_weights=by_number, reg=0.1, tol=0)(xs, ys, n, m), loss)
    with pytest.raises(ValueError, match=r"layer_weights: expected the layers \[2, 0\]"):
        InnerAlignmentLoss([2, 0], layer_weights={0: 0.5, 1: 0.5})
    with pytest.raises(ValueError, match="layers: expected a sequence"):
        InnerAlignmentLoss(0)
    with pytest.raises(ValueError, match=r"text_states\[2\]: expected 5 items"):
        criterion(xs, [y[:4] for y in ys])


def test_inner_alignment_makes_one_solve(monkeypatch):
    calls = []
    solver = otalign.backends.solver
    monkeypatch.setattr(otalign.backends, "solver", lambda name: lambda p: calls.append(p.items) or solver(name)(p))
    xs, ys, n, m = states(3)
    InnerAlignmentLoss([0, 1, 2])(dict(enumerate(xs)), dict(enumerate(ys)), n, m)
    assert calls == [15]


def test_inner_alignment_of_empty_items():
    x = torch.full((2, 3, 4), math.nan, requires_grad=True)
    loss = InnerAlignmentLoss([0])(x, torch.randn(2, 2, 4), torch.tensor([0, 0]), torch.tensor([2, 0]))
    assert loss == 0
    loss.backward()
    assert not x.grad.any()
    with pytest.raises(ValueError, match="speech_states: expected layers"):
        InnerAlignmentLoss([3])(x, torch.randn(2, 2, 4))


def losses_and_scores(x, y, n, m):
    """The outputs of each method for states of two layers: the differentiable ones, and the others."""
    xs, ys = [x, 2 * x.detach()], [y, y.flip(2)]
    ids = torch.arange(y.shape[1]).expand(len(y), -1)
    losses = [
        *(OTRegLoss(form=form, tol=0)(x, y, n, m, ids) for form in ("cost", "soft_target")),
        InnerAlignmentLoss([0, 1], tol=0)(xs, ys, n, m),
        recipes.siamese_pt(x, y, n, m),
        recipes.siamese_pt(x, y, n, m, schedule="released"),
        recipes.zeroswot(xs, ys, n, m, layers=[0, 1]),
        recipes.one_sided(x, y, n, m),
        *(recipe(x, y, n, m).loss.sum() for recipe in (recipes.cmot, recipes.opw, recipes.ipot)),
    ]
    scores = [recipes.arase_otalign(x, y, n, m), *retrieval_scores(x, y, n, m), intervene(x, y, n, m).detach()]
    for metric in ("cosine", "euclidean"):
        scores += [*alignment_path_score(x, y, n, m, metric=metric), sequence_similarity(x, y, n, m, metric=metric)]
    return losses, scores


def test_autocast_changes_nothing():
    batch = draw([9, 4, 7], [5, 3, 4], D=16, dtype=torch.float32)
    found = []
    for enabled in (False, True):
        x = batch.x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses, scores = losses_and_scores(x, batch.y, batch.x_lengths, batch.y_lengths)
        found.append([*losses, *(torch.autograd.grad(loss, x)[0] for loss in losses), *scores])
    for ours, theirs in zip(*found, strict=True):
        identical(ours, theirs)
