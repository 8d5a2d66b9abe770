"""The recipes, compared with plain implementations of the published formulas or with the packages that the originals use."""

from __future__ import annotations

import inspect
import math

import geomloss
import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F

import otalign
from otalign.speech import recipes

from ..helpers.problems import close, draw, identical

LENGTHS = ([9, 1, 6, 12], [4, 3, 6, 1])


def batch(D=6, dtype=torch.float64):
    return draw(*LENGTHS, D=D, dtype=dtype)


def positions(count):
    return torch.arange(count).double() / max(count - 1, 1)


@pytest.mark.parametrize("scaling", [0.5, 0.8])
@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_siamese_pt_equals_geomloss(weight, scaling):
    """Loss and gradient of every item, with the position as a coordinate and with GeomLoss's schedule."""
    b = batch().requires_grad()
    loss = recipes.siamese_pt(*b, position_weight=weight, schedule="released", scaling=scaling, reduction="none")
    original = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=scaling, backend="tensorized")
    for k, (x, y) in enumerate(b.items()):
        with_positions = (torch.cat([t, weight * positions(len(t))[:, None]], 1) for t in (x, y))
        expected = original(*with_positions)
        close(loss[k], expected, 1e-9)
        actual, right = (torch.autograd.grad(value, b.x, retain_graph=True)[0] for value in (loss[k], expected))
        close(actual, right, 1e-8)


def test_siamese_pt_with_the_norms_as_weights():
    """The other option of ZeroSwot, in both schedules."""
    b = batch()
    loss = recipes.siamese_pt(*b, schedule="released", a="norm", b="norm", reduction="none")
    original = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")
    optimum = recipes.siamese_pt(*b, a="norm", b="norm", reduction="none", tol=1e-8)
    norms = b.x.norm(dim=2), b.y.norm(dim=2)
    close(recipes.siamese_pt(*b, schedule="released", a=norms[0], b=norms[1], reduction="none"), loss, 1e-12)
    for k, (x, y) in enumerate(b.items()):
        weighted = (
            (t.norm(dim=1) / t.norm(dim=1).sum(), torch.cat([t, positions(len(t))[:, None]], 1)) for t in (x, y)
        )
        (a, x), (b_, y) = weighted
        close(loss[k], original(a, x, b_, y), 1e-9)
        close(loss[k], optimum[k], 0.2)
    with pytest.raises(TypeError, match="tol: for schedule='converged' only"):
        recipes.siamese_pt(*b, schedule="released", tol=1e-8)
    with pytest.raises(ValueError, match="a: expected shape"):
        recipes.siamese_pt(*b, schedule="released", a=norms[1])


def test_recipes_without_points():
    x, y = torch.randn(2, 3, 4), torch.randn(2, 0, 4)
    assert recipes.arase_otalign(x, y).shape == (2, 3, 0)
    close(recipes.mixup(x, y, torch.zeros(2, 3, 0), p=1.0), x, 0)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        recipes.ipot(x, x, steps=0)


def test_siamese_pt_converges_to_geomloss():
    """With a finer schedule, the original comes closer to the optimum of the solver."""
    b = batch()
    optimum = recipes.siamese_pt(*b, reduction="none", tol=1e-8)
    off = [
        (recipes.siamese_pt(*b, schedule="released", scaling=scaling, reduction="none") - optimum).abs().max()
        for scaling in (0.5, 0.9, 0.99, 0.998)
    ]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 1e-3


def test_siamese_pt_ignores_padding():
    """The original has a known bug: its uniform weights and positions include the padding."""
    b = batch()
    alone = [recipes.siamese_pt(x[None], y[None], tol=1e-8) for x, y in b.items()]
    close(recipes.siamese_pt(*b, reduction="none", tol=1e-8), torch.stack(alone), 1e-10)


def test_zeroswot_is_a_sum_of_layers():
    layers = [draw(*LENGTHS, D=6, seed=seed) for seed in range(3)]
    xs, ys = [b.x.requires_grad_() for b in layers], [b.y for b in layers]
    n, m = layers[0].x_lengths, layers[0].y_lengths
    loss = recipes.zeroswot(xs, ys, n, m, layers=[0, 2])
    expected = sum(0.1285 * recipes.siamese_pt(xs[k], ys[k], n, m, position_weight=10.0) for k in (0, 2))
    close(loss, expected, 1e-10)
    assert torch.autograd.grad(loss, xs, allow_unused=True)[1] is None
    for reduction in ("sum", "none"):
        found = recipes.zeroswot(xs, ys, n, m, layers=[0, 2], reduction=reduction)
        parts = [recipes.siamese_pt(xs[k], ys[k], n, m, position_weight=10.0, reduction=reduction) for k in (0, 2)]
        close(found, 0.1285 * sum(parts), 1e-10)
    with pytest.raises(ValueError, match="speech_states: expected layers"):
        recipes.zeroswot(xs, ys, n, m, layers=[7])


@pytest.mark.parametrize("window", [None, 2, 0.5])
@pytest.mark.parametrize("cost", ["euclidean", "cosine"])
def test_cmot_is_a_nearest_neighbour(cost, window):
    b = batch()
    found = recipes.cmot(*b, window=window, cost=cost)
    for k, (x, y) in enumerate(b.items()):
        C = torch.cdist(x, y) if cost == "euclidean" else 1 - F.cosine_similarity(x[:, None], y[None], dim=2)
        a = x.norm(dim=1) / x.norm(dim=1).sum()
        total, plan = 0.0, torch.zeros_like(found.plan[k])
        for i in range(len(x)):
            near = [j for j in range(len(y)) if window is None or abs(j - i * len(y) / len(x)) <= window]
            if near:  # a frame without a token sends nothing
                best = min(near, key=lambda j: float(C[i, j]))
                plan[i, best] = a[i]
                total += float(a[i] * C[i, best])
        close(found.loss[k], torch.tensor(total, dtype=torch.float64), 1e-6)
        close(found.plan[k], plan, 1e-12)


def test_cmot_mixup():
    b = batch()
    plan = recipes.cmot(*b).plan
    mixed = recipes.mixup(b.x, b.y, plan, p=1.0)
    for k, (x, y) in enumerate(b.items()):
        close(mixed[k, : len(x)], y[plan[k, : len(x)].argmax(1)], 0)
    same = recipes.mixup(b.x, b.y, plan, p=0.0)
    close(same, b.x, 0)
    share = (recipes.mixup(torch.zeros(1, 5000, 1), torch.ones(1, 1, 1), torch.ones(1, 5000, 1), p=0.2)).mean()
    assert abs(share - 0.2) < 0.03


def test_opw_follows_its_formula():
    """K = p exp((S - D) / lambda2), scaled twenty times; in float64 and with the paper's own positions."""
    b = batch(D=3)
    found = recipes.opw(*b)
    for k, (x, y) in enumerate(b.items()):
        n, m = len(x), len(y)
        i, j = np.mgrid[1 : n + 1, 1 : m + 1]
        apart = i / n - j / m
        D = torch.cdist(x, y).square().numpy()
        distance = np.abs(apart) / np.sqrt(1 / n**2 + 1 / m**2)
        log_p = -(distance**2) / 2 - np.log(math.sqrt(2 * math.pi))
        log_K = log_p + (50 / (apart**2 + 1) - D) / 0.1
        log_u, log_v = np.zeros(n), np.zeros(m)
        for _ in range(20):
            log_u = -math.log(n) - np.logaddexp.reduce(log_K + log_v, 1)
            log_v = -math.log(m) - np.logaddexp.reduce(log_K + log_u[:, None], 0)
        plan = np.exp(log_u[:, None] + log_K + log_v)
        close(found.plan[k, :n, :m], torch.from_numpy(plan), 1e-8)
        close(found.loss[k], torch.tensor((plan * D).sum()), 1e-8)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_ipot_follows_its_algorithm(beta):
    b = batch()
    found = recipes.ipot(*b, beta=beta, steps=20)
    for k, (x, y) in enumerate(b.items()):
        n, m = len(x), len(y)
        C = (1 - F.cosine_similarity(x[:, None], y[None], dim=2)).numpy()
        sigma, T, A = np.full(m, 1 / m), np.ones((n, m)), np.exp(-C / beta)
        for _ in range(20):
            Q = A * T
            delta = 1 / (n * (Q @ sigma))
            sigma = 1 / (m * (Q.T @ delta))
            T = delta[:, None] * Q * sigma
        close(found.plan[k, :n, :m], torch.from_numpy(T), 1e-9)
        close(found.loss[k], torch.tensor((T * C).sum()), 1e-9)


def test_ipot_comes_close_to_transport_without_entropy():
    b = batch()
    found = recipes.ipot(*b, steps=300)
    for k, (x, y) in enumerate(b.items()):
        C = (1 - F.cosine_similarity(x[:, None], y[None], dim=2)).numpy()
        exact = ot.emd2(np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y)), C)
        assert exact - 1e-6 <= float(found.loss[k]) <= exact + 0.02


def otalign_cost(x, y, kappa):
    """The released code: (1 + cos) / 2, distorted, scaled to [0, 1], and subtracted from 1."""
    similarity = (F.normalize(x) @ F.normalize(y).T + 1) / 2
    if len(x) > 1 and len(y) > 1 and kappa:
        apart = positions(len(x))[:, None] - positions(len(y))[None]
        similarity = similarity * (1 - kappa * apart**2)
    low, high = similarity.min(), similarity.max()
    return (1 - (similarity - low + 1e-10) / (high - low + 1e-10)).numpy()


@pytest.mark.parametrize("weights", ["uniform", "norm"])
@pytest.mark.parametrize("kappa", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "partial"])
def test_otalign_is_what_pot_gives(kind, kappa, weights):
    b = draw([9, 2, 6, 12], [4, 3, 6, 5], D=6)
    found = recipes.arase_otalign(*b, kind=kind, kappa=kappa, weights=weights, tau=0.7, tol=1e-10, max_iter=5000)
    for k, (x, y) in enumerate(b.items()):
        C = otalign_cost(x, y, kappa)
        p, q = (np.ones(len(t)) if weights == "uniform" else t.norm(dim=1).numpy() for t in (x, y))
        if kind == "balanced":
            plan = ot.bregman.sinkhorn_log(p / p.sum(), q / q.sum(), C, reg=0.1, stopThr=1e-12, numItermax=5000)
        elif kind == "unbalanced":
            plan = ot.unbalanced.sinkhorn_stabilized_unbalanced(
                p, q, C, reg=0.1, reg_m=0.7, reg_type="entropy", stopThr=1e-12, numItermax=5000
            )
        else:
            mass = 0.7 * min(p.sum(), q.sum())
            plan = ot.partial.entropic_partial_wasserstein(p, q, C, reg=0.1, m=mass, stopThr=0, numItermax=5000)
        plan = (plan - plan.min() + 1e-10) / (plan.max() - plan.min() + 1e-10)
        close(found[k, : len(x), : len(y)], torch.from_numpy(plan), 1e-4)
        assert not found[k, len(x) :].any()
        assert not found[k, :, len(y) :].any()


def test_the_old_name_of_arase_otalign_is_deprecated():
    x, y = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    with pytest.warns(DeprecationWarning, match=r"use otalign\.speech\.recipes\.arase_otalign") as warned:
        found = recipes.otalign(x, y, kappa=0.1)
    assert [warning.filename for warning in warned] == [__file__]
    identical(found, recipes.arase_otalign(x, y, kappa=0.1))
    assert inspect.signature(recipes.otalign) == inspect.signature(recipes.arase_otalign)


def test_one_sided_drops_frames_but_no_token():
    x = torch.cat([torch.randn(1, 6, 8), 30 * torch.ones(1, 2, 8)], 1).double()  # two frames far from all tokens
    y = x[:, :6] + 0.1 * torch.randn(1, 6, 8).double()
    loss = recipes.one_sided(x, y, rho=0.5, cost="sqeuclidean", tol=1e-10, max_iter=5000)
    result = otalign.solve(x, y, unbalanced=(0.5, INF), cost="sqeuclidean", tol=1e-10, max_iter=5000)
    close(loss, result.value.mean(), 1e-12)
    plan = result.plan()[0]
    close(plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), 1e-8)
    assert plan[6:].sum() < 1e-8


INF = math.inf


@pytest.mark.parametrize("name", ["siamese_pt", "cmot", "opw", "ipot", "otalign"])
def test_empty_items_and_poison(name):
    """Padding is never read; an empty item has no plan and no loss."""
    b = draw([5, 0, 4], [3, 2, 0], D=4, dtype=torch.float64)
    found = getattr(recipes, name)(*b)
    for tensor in found if isinstance(found, tuple) else (found,):
        assert tensor.isfinite().all()
    if isinstance(found, tuple):
        assert not found[0][1:].any()
        assert not found[1][1:].any()
