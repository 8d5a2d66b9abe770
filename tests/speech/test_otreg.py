"""OTReg and its unique tokens, compared with plain loops over the formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import otalign
from otalign.speech import (
    InnerAlignmentLoss,
    OTRegLoss,
    intervene,
    recipes,
    unique_tokens,
)

from ..helpers.problems import close, draw


@given(st.lists(st.lists(st.integers(-3, 5), max_size=9), min_size=1, max_size=5), st.data())
def test_unique_tokens(rows, data):
    size = max(map(len, rows)) + data.draw(st.integers(0, 2))
    lengths = torch.tensor([len(row) for row in rows])
    padded = [row + [data.draw(st.integers(-3, 5))] * (size - len(row)) for row in rows]
    ids = torch.tensor(padded, dtype=torch.int64).view(len(rows), size)
    found = unique_tokens(ids, lengths)
    for row, index, length, counts in zip(rows, *found, strict=True):
        expected = list(dict.fromkeys(row))
        assert length == len(expected)
        assert [row[i] for i in index[:length]] == expected
        assert index[:length].tolist() == [row.index(token) for token in expected]
        assert counts[:length].tolist() == [row.count(token) for token in expected]
        assert not counts[length:].any()


def test_unique_tokens_without_lengths_and_of_extreme_ids():
    largest = torch.iinfo(torch.int64).max
    found = unique_tokens(torch.tensor([[largest, 2, largest], [5, 5, 5]]))
    assert found.lengths.tolist() == [2, 1]
    assert found.counts.tolist() == [[2, 1, 0], [3, 0, 0]]
    with pytest.raises(TypeError, match="expected integers"):
        unique_tokens(torch.rand(2, 3))


def one_by_one(criterion: OTRegLoss, batch, ids, form: str) -> torch.Tensor:
    """The formula in the docstring, item by item, in float64."""
    losses = []
    for x, y, tokens in zip(*zip(*batch.items(), strict=True), ids, strict=True):
        if not len(x) or not len(y):
            continue
        kept = list(dict.fromkeys(tokens[: len(y)].tolist()))
        y = y[[tokens.tolist().index(token) for token in kept]].detach()
        counts = torch.tensor([tokens.tolist().count(token) for token in kept]).double()
        b = counts / counts.sum() if criterion.token_weights == "count" else None
        cosines = F.cosine_similarity(x[:, None], y[None], dim=2)
        options = {"reg": criterion.options["reg"], "tol": 0, "max_iter": 200, "backend": "reference"}
        plan = otalign.solve(x[None], y[None], None, None, None, None if b is None else b[None], **options).plan()[0]
        if criterion.detach_plan:
            plan = plan.detach()
        if form == "cost":
            losses.append((plan * (1 - cosines)).sum())
        else:
            losses.append(-(plan * (cosines / criterion.temperature).log_softmax(1)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("detach_plan", [True, False])
@pytest.mark.parametrize("token_weights", ["uniform", "count"])
@pytest.mark.parametrize("form", ["cost", "soft_target"])
def test_otreg_follows_its_formula(form, token_weights, detach_plan):
    batch = draw([9, 4, 0, 6], [5, 3, 2, 4], D=6)
    ids = torch.tensor([[3, 1, 3, 2, 1, 9, 9], [4, 4, 4, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0], [5, 6, 7, 5, 0, 0, 0]])
    # Counts include only the tokens of the item.
    ids = ids[:, : batch.y.shape[1]]
    criterion = OTRegLoss(form=form, token_weights=token_weights, detach_plan=detach_plan, tol=0, reg=0.1)
    ours, theirs = batch.requires_grad(), batch.requires_grad()
    loss = criterion(*ours, ids)
    own_ids = [row[:m] for row, m in zip(ids, batch.y_lengths.tolist(), strict=True)]
    expected = one_by_one(criterion, theirs, own_ids, form)
    close(loss, expected, 1e-10)
    (gradient,) = torch.autograd.grad(3 * loss, ours.x)
    (right,) = torch.autograd.grad(3 * expected, theirs.x)
    close(gradient, right, 1e-8)
    assert not gradient[2].any()


def test_otreg_pulls_frames_to_their_tokens():
    """Frames start at the embedding of their token plus noise of twice its norm, and end at the embedding."""
    torch.manual_seed(0)
    text = torch.randn(1, 6, 64)
    token = torch.arange(24) // 4
    speech = (text[:, token] + 2 * torch.randn(1, 24, 64)).requires_grad_()
    optimiser = torch.optim.Adam([speech], lr=0.05)
    criterion = OTRegLoss(unique=False)

    def cosines():
        return F.cosine_similarity(speech[0, :, None].detach(), text[0, None], dim=2)

    before = cosines()[range(24), token]
    for _ in range(150):
        optimiser.zero_grad()
        criterion(speech, text).backward()
        optimiser.step()
    assert before.max() < 0.7
    assert cosines()[range(24), token].min() > 0.95
    assert cosines().argmax(1).equal(token)


def test_otreg_schedule_and_state():
    criterion = OTRegLoss(weight=2.0, start_step=2, warmup_steps=4, unique=False)
    speech, text = torch.randn(1, 5, 4), torch.randn(1, 3, 4)
    full = OTRegLoss(unique=False)(speech, text)
    weights = [float(criterion(speech, text) / full) for _ in range(8)]
    assert weights == pytest.approx([0, 0, 0.5, 1, 1.5, 2, 2, 2])
    resumed = OTRegLoss(weight=2.0, start_step=2, warmup_steps=4, unique=False)
    resumed.load_state_dict(criterion.state_dict())
    assert int(resumed.step) == 8
    resumed.set_step(3)
    assert float(resumed.current_weight()) == 1.0
    resumed.eval()
    resumed(speech, text)
    assert int(resumed.step) == 3
    manual = OTRegLoss(count_calls=False, unique=False)
    manual(speech, text)
    assert int(manual.step) == 0


@pytest.mark.parametrize("form", ["cost", "soft_target"])
def test_otreg_on_nothing(form):
    """A batch of empty items gives a zero that is attached to the graph, for any padding."""
    speech = torch.full((2, 3, 4), math.nan, requires_grad=True)
    lengths = torch.tensor([0, 0])
    loss = OTRegLoss(form=form)(speech, torch.randn(2, 5, 4), lengths, torch.tensor([5, 0]), torch.ones(2, 5).long())
    assert loss == 0
    loss.backward()
    assert not speech.grad.any()


@pytest.mark.parametrize("form", ["cost", "soft_target"])
def test_otreg_of_zero_frames(form):
    speech = torch.randn(1, 4, 3)
    speech[0, 1] = 0
    speech.requires_grad_()
    OTRegLoss(form=form, unique=False)(speech, torch.randn(1, 3, 3)).backward()
    assert speech.grad.isfinite().all()
    assert not speech.grad[0, 1].any()


def test_otreg_bad_arguments():
    speech, text = torch.randn(1, 4, 3), torch.randn(1, 3, 3)
    for options, message in (
        ({"form": "plan"}, "form"),
        ({"token_weights": "idf"}, "token_weights"),
        ({"temperature": 0}, "temperature"),
        ({"form": "soft_target", "cost": "dot"}, "cost"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            OTRegLoss(**options)
    with pytest.raises(ValueError, match="token_weights"):
        OTRegLoss(token_weights="count")(speech, text)
    with pytest.raises(ValueError, match="needs unique=True"):
        OTRegLoss(unique=False, token_weights="count")(speech, text, text_ids=torch.ones(1, 3).long())
    with pytest.raises(ValueError, match="sample_weight: expected a tensor of shape"):
        OTRegLoss()(speech, text, sample_weight=torch.ones(2))
    with pytest.raises(ValueError, match="text_ids: expected shape"):
        OTRegLoss()(speech, text, text_ids=torch.ones(1, 2).long())
    with pytest.raises(TypeError, match=r"text_ids: expected a torch.Tensor, got list"):
        OTRegLoss()(speech, text, text_ids=[[1, 2, 3]])


@pytest.mark.parametrize(
    "method", [OTRegLoss(), recipes.cmot, intervene], ids=lambda m: getattr(m, "__name__", "otreg")
)
def test_errors_name_the_arguments_of_the_call(method):
    speech, text = torch.randn(2, 4, 3), torch.randn(2, 3, 3)
    for arguments, message in (
        ((speech[0], text), r"speech: expected a tensor of shape \(B, N, D\), got \(4, 3\)"),
        ((speech, text[:, :, :2]), "text: expected 2 items of dimension 3"),
        ((speech, text[:1]), "text: expected 2 items"),
        ((speech, text, torch.tensor([5, 1])), "speech_lengths"),
        ((speech, text, None, torch.tensor([1, 2, 3])), "text_lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            method(*arguments)


@pytest.mark.parametrize("form", ["cost", "soft_target"])
def test_weights_make_accumulation_exact(form):
    """Weighted losses of parts of a batch, divided by the normaliser of the whole, add up to the loss of the whole."""
    batch = draw([9, 4, 0, 6], [5, 3, 2, 4], D=6)
    x, y, n, m = batch.x.double(), batch.y.double(), batch.x_lengths, batch.y_lengths
    tokens = torch.tensor([7.0, 2.0, 5.0, 4.0])
    otreg, inner = OTRegLoss(form=form, weight=0.3), InnerAlignmentLoss([0, 1])
    for loss in (otreg, lambda x, y, *rest, **options: inner([x, 2 * x], [y, y.flip(2)], *rest, **options)):
        whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss(whole, y, n, m, sample_weight=tokens).backward()
        for part in (slice(0, 1), slice(1, 4)):
            shares = {"sample_weight": tokens[part], "normalizer": tokens.sum() - tokens[2]}
            loss(parts[part], y[part], n[part], m[part], **shares).backward()
        close(parts.grad, whole.grad, 1e-12)
        single = [loss(x[k : k + 1], y[k : k + 1], n[k : k + 1], m[k : k + 1]) for k in range(4)]
        expected = sum(t * value for t, value in zip(tokens, single, strict=True)) / (tokens.sum() - tokens[2])
        close(loss(x, y, n, m, sample_weight=tokens), expected, 1e-12)


def test_weight_zero_excludes_an_item():
    x, y = torch.randn(3, 5, 4), torch.randn(3, 4, 4)
    x[1, 2] = math.nan
    x.requires_grad_()
    loss = OTRegLoss()(x, y, sample_weight=torch.tensor([1.0, 0.0, 1.0]))
    close(loss, OTRegLoss()(x[::2], y[::2]), 1e-6)
    loss.backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()
