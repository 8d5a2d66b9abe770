"""The methods of the papers, against plain loops over items and layers that spell out the published formulas."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st

import otalign
from otalign.speech import (
    InnerAlignmentLoss,
    OTRegLoss,
    RetrievalCorpus,
    alignment_path,
    alignment_path_score,
    angle_project,
    intervene,
    length_normalize,
    recipes,
    retrieval_scores,
    select_layers,
    sequence_similarity,
    unique_tokens,
)

from .problems import close, draw, identical


def states(layers: int = 3, x_lengths=(9, 1, 6, 0, 4), y_lengths=(4, 3, 6, 2, 1), D: int = 8, dtype=torch.float32):
    """Speech and text of some layers, poisoned behind their lengths."""
    batches = [draw(x_lengths, y_lengths, D=D, dtype=torch.float64, seed=seed) for seed in range(layers)]
    lengths = batches[0].x_lengths, batches[0].y_lengths
    return [b.x.to(dtype) for b in batches], [b.y.to(dtype) for b in batches], *lengths


# Tokens ------------------------------------------------------------------------------------------------------------------


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


# OTReg -------------------------------------------------------------------------------------------------------------------


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
def test_otreg_is_its_formula(form, token_weights, detach_plan):
    batch = draw([9, 4, 0, 6], [5, 3, 2, 4], D=6)
    ids = torch.tensor([[3, 1, 3, 2, 1, 9, 9], [4, 4, 4, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0], [5, 6, 7, 5, 0, 0, 0]])
    # Counted over the item's own tokens only.
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
    """Frames that begin somewhere around the embedding of their token, under twice its length of noise, end at it."""
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
    """A batch of empty items gives a zero that is attached to the graph, whatever is in the padding."""
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
    """Parts of a batch, weighted and divided by what the whole has, add up to the whole: OTReg and the inner layers."""
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


def test_weight_zero_keeps_an_item_out():
    x, y = torch.randn(3, 5, 4), torch.randn(3, 4, 4)
    x[1, 2] = math.nan
    x.requires_grad_()
    loss = OTRegLoss()(x, y, sample_weight=torch.tensor([1.0, 0.0, 1.0]))
    close(loss, OTRegLoss()(x[::2], y[::2]), 1e-6)
    loss.backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


# Alignment path ------------------------------------------------------------------------------------------------------------


def plain_path(x, y, metric):
    """Similarities and path of one item and layer."""
    A = F.cosine_similarity(x[:, None], y[None], dim=2) if metric == "cosine" else torch.cdist(x, y)
    best = A.max(0) if metric == "cosine" else A.min(0)
    return best.values, best.indices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_path_score_is_a_plain_loop(metric, dtype):
    xs, ys, n, m = states(dtype=dtype)
    found = alignment_path_score(xs, ys, n, m, metric=metric)
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    for layer, (x, y) in enumerate(zip(xs, ys, strict=True)):
        for item, (i, j) in enumerate(zip(n.tolist(), m.tolist(), strict=True)):
            path = found.path[layer, item]
            assert (path[j:] == -1).all()
            if not i or not j:
                assert found.per_layer[layer, item].isnan()
                assert (path == -1).all()
                continue
            values, indices = plain_path(x[item, :i].double(), y[item, :j].double(), metric)
            other = plain_path(x[item, :i].double(), y[item, :j].double(), ({"cosine", "euclidean"} - {metric}).pop())[
                1
            ]
            identical(path[:j], indices)
            close(found.per_layer[layer, item], values.mean(), tol)
            close(found.consistency[layer, item], (indices == other).double().mean(), 1e-6)
            if j > 1 and len(set(indices.tolist())) > 1:
                rho = scipy.stats.spearmanr(range(j), indices.tolist()).statistic
                close(found.monotonicity[layer, item], torch.tensor(float(rho)), 1e-6)
            else:
                assert found.monotonicity[layer, item] == float(j == 1)
    close(found.score, found.per_layer.mean(0), 1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_path_of_a_whole_batch_at_once(metric):
    """As on a GPU, and where torch.compile traces it; on a CPU items are taken one by one."""
    torch.compiler.reset()
    xs, ys, n, m = states(2, dtype=torch.float64)
    compiled = torch.compile(alignment_path_score, backend="eager", fullgraph=True)
    for actual, right in zip(
        compiled(xs, ys, n, m, metric=metric), alignment_path_score(xs, ys, n, m, metric=metric), strict=True
    ):
        close(actual.double(), right.double(), 1e-12)


def test_path_by_hand():
    speech = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    text = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    found = alignment_path_score(speech, text)
    assert found.path.tolist() == [[[1, 0]]]
    assert found.score.item() == pytest.approx(1.0)
    assert found.monotonicity.item() == pytest.approx(-1.0)
    assert found.consistency.item() == 1.0
    distance = alignment_path(speech, text, metric="euclidean")
    assert distance.similarity.tolist() == [[[1.0, 1.0]]]


def test_layers_as_a_dict_and_as_a_tensor():
    xs, ys, n, m = states()
    expected = alignment_path_score(xs, ys, n, m)
    by_number = alignment_path_score({4: xs[0], 7: xs[1], 9: xs[2]}, {4: ys[0], 7: ys[1], 9: ys[2]}, n, m)
    for actual, right in zip(by_number, expected, strict=True):
        close(actual.double(), right.double(), 0)
    one = alignment_path_score(xs[1], ys[1], n, m)
    identical(one.path[0], expected.path[1])
    with pytest.raises(ValueError, match="expected the layers of speech_states"):
        alignment_path_score({1: xs[0]}, {2: ys[0]}, n, m)


def test_zero_states_and_no_frames():
    """A zero state has no direction: similarity 0, and finite scores."""
    speech, text = torch.zeros(1, 3, 4), torch.randn(1, 2, 4)
    assert alignment_path_score(speech, text).score.item() == 0
    assert alignment_path_score(torch.zeros(1, 0, 4), text).score.isnan().all()


def test_sizes_of_states_do_not_matter_to_cosines():
    """Beyond the range whose squares float32 can hold; and in float16, whose range is small."""
    xs, ys, n, m = states(1)
    expected = sequence_similarity(xs, ys, n, m)
    soft = OTRegLoss(form="soft_target", tol=0)
    for size in (1e-30, 1e25):
        small = [xs[0] * size], [ys[0] * size], n, m
        close(sequence_similarity(*small), expected, 1e-5)
        close(soft(small[0][0], ys[0], n, m), soft(xs[0], ys[0], n, m), 1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_an_item_that_is_not_finite_is_alone_so(metric):
    xs, ys, n, m = states(2)
    expected = alignment_path_score(xs, ys, n, m, metric=metric)
    for value in (math.nan, math.inf):
        broken = xs[0].clone()
        broken[2, 1, 0] = value
        found = alignment_path_score([broken, xs[1]], ys, n, m, metric=metric)
        assert found.score[2].isnan() or found.score[2].isinf()
        mates = [0, 1, 3, 4]
        for actual, right in ((found.score, expected.score), *zip(found[1:], expected[1:], strict=True)):
            identical(actual[..., mates, :] if actual.dim() == 3 else actual[..., mates],
                      right[..., mates, :] if right.dim() == 3 else right[..., mates])  # fmt: skip
        if math.isnan(value):
            assert found.monotonicity[0, 2].isnan()
            assert found.consistency[0, 2].isnan()


def test_sequence_similarity():
    xs, ys, n, m = states()
    for metric in ("cosine", "euclidean"):
        found = sequence_similarity(xs, ys, n, m, metric=metric)
        for layer, (x, y) in enumerate(zip(xs, ys, strict=True)):
            for item, (i, j) in enumerate(zip(n.tolist(), m.tolist(), strict=True)):
                if not i or not j:
                    assert found[layer, item].isnan()
                    continue
                p, q = x[item, :i].mean(0), y[item, :j].mean(0)
                close(found[layer, item], F.cosine_similarity(p, q, 0) if metric == "cosine" else (p - q).norm(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_memory_of_a_path(metric, dtype):
    """One layer's similarities at a time, and no copy of the states."""
    B, N, M, D, L = 16, 300, 100, 1024, 3
    xs, ys = ([torch.randn(B, size, D, dtype=dtype) for _ in range(L)] for size in (N, M))
    with torch.profiler.profile(profile_memory=True) as profile:
        alignment_path_score(xs, ys, metric=metric)
    peak = held = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 4 * B * N * M <= peak < 2 * 4 * B * N * M


# Interventions ---------------------------------------------------------------------------------------------------------------


def test_projections():
    speech, text = torch.randn(5, 7), torch.randn(5, 7)
    turned = angle_project(speech, text)
    close(turned.norm(dim=1), speech.norm(dim=1), 1e-6)
    close(F.cosine_similarity(turned, text), torch.ones(5), 1e-6)
    scaled = length_normalize(speech, text)
    close(scaled.norm(dim=1), text.norm(dim=1), 1e-6)
    close(F.cosine_similarity(scaled, speech), torch.ones(5), 1e-6)
    identical(angle_project(speech, torch.zeros(5, 7)), speech)
    assert not length_normalize(torch.zeros(5, 7), text).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_projections_of_wide_states(dtype):
    """Norms whose squares are beyond float16."""
    speech, text = (4 * torch.randn(5, 4096)).to(dtype), (6 * torch.randn(5, 4096)).to(dtype)
    for function in (angle_project, length_normalize):
        found = function(speech, text)
        assert found.dtype == dtype
        close(found.double(), function(speech.double(), text.double()), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("worst", [1, 3, None])
@pytest.mark.parametrize("kind", ["angle", "length"])
def test_interventions(kind, worst, dtype):
    xs, ys, n, m = states(1, dtype=dtype)
    moved = intervene(xs[0], ys[0], n, m, kind=kind, worst=worst)
    found = alignment_path(xs[0], ys[0], n, m)
    function = angle_project if kind == "angle" else length_normalize
    for item, (i, j) in enumerate(zip(n.tolist(), m.tolist(), strict=True)):
        expected = xs[0][item].clone()
        if i and j:
            order = found.similarity[0, item, :j].argsort(descending=True, stable=True)
            for token in order if worst is None else order[-worst:]:
                frame = found.path[0, item, token]
                expected[frame] = function(xs[0][item, frame], ys[0][item, token])
        close(moved[item], expected, 1e-12 if dtype == torch.float64 else 1e-5)


def test_interventions_without_frames_and_their_gradient():
    assert intervene(torch.randn(1, 0, 4), torch.randn(1, 3, 4)).shape == (1, 0, 4)
    identical(intervene(speech := torch.randn(1, 3, 4), torch.randn(1, 0, 4)), speech)
    xs, ys, n, m = states(1, dtype=torch.float64)
    x, y = xs[0].requires_grad_(), ys[0].requires_grad_()
    moved = intervene(x, y, n, m, worst=None)
    torch.where(torch.arange(x.shape[1])[:, None] < n[:, None, None], moved, 0).square().sum().backward()
    for item, frames in enumerate(n.tolist()):  # all norms stay, so that the moved have the gradient of the others
        close(x.grad[item, :frames], 2 * x.detach()[item, :frames], 1e-10)
    assert y.grad.isfinite().all()


def tiny_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
        )
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["angle", "length"])
def test_intervention_in_a_hook_of_a_language_model(kind):
    """The paper's: a decoder layer's output for the speech is moved towards what it was for the text."""
    model = tiny_llama()
    n, m = torch.tensor([9, 6]), torch.tensor([4, 3])
    speech, ids = torch.randn(2, 9, 16), torch.randint(40, (2, 4))
    text = model(input_ids=ids, output_hidden_states=True).hidden_states

    def hook(module, arguments, output):
        states = output[0] if isinstance(output, tuple) else output
        states = intervene(states, text[2], n, m, kind=kind, worst=2)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    seen = []  # what enters the third layer
    watch = model.model.layers[2].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    plain = model(inputs_embeds=speech).logits
    handle = model.model.layers[1].register_forward_hook(hook)
    changed = model(inputs_embeds=speech).logits
    handle.remove()
    again = model(inputs_embeds=speech).logits
    watch.remove()

    before, after = seen[:2]
    moved = (after != before).any(2)
    assert ((moved.sum(1) >= 1) & (moved.sum(1) <= 2)).all()
    assert not moved[1, 6:].any()
    assert not changed.equal(plain)
    assert again.equal(plain)
    path = alignment_path(before, text[2], n, m)
    for item in range(2):
        worst = path.similarity[0, item, : m[item]].argmin()
        state, target = after[item, path.path[0, item, worst]], text[2][item, worst]
        if kind == "angle":
            close(F.cosine_similarity(state, target, dim=0), torch.ones(()), 1e-5)
        else:
            close(state.norm(), target.norm(), 1e-5)


def test_methods_on_a_language_model():
    """Scores, retrieval and both losses take a Llama's hidden states as they come, and reach what made the embeddings."""
    model = tiny_llama().requires_grad_(False)
    adapter = torch.nn.Linear(5, 16)
    n, m = torch.tensor([9, 6, 8]), torch.tensor([4, 3, 2])
    ids = torch.randint(40, (3, 4))
    embedded = adapter(torch.randn(3, 9, 5))
    speech = model(inputs_embeds=embedded, output_hidden_states=True).hidden_states
    text = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert alignment_path_score(speech, text, n, m).per_layer.shape == (4, 3)
    assert retrieval_scores(speech, text, n, m).mrr.shape == (4,)
    loss = InnerAlignmentLoss([0, 2])(speech, text, n, m) + OTRegLoss()(embedded, text[0], n, m, ids)
    loss.backward()
    assert adapter.weight.grad.abs().max() > 0


# Retrieval -------------------------------------------------------------------------------------------------------------------


def plain_retrieval(x, y):
    """Mean reciprocal rank and recalls of means (B, D), both directions."""
    A = F.cosine_similarity(x[:, None], y[None], dim=2)
    ranks = torch.tensor(
        [1 + int((S[i] > S[i, i]).sum()) for S in (A, A.T) for i in range(len(A))], dtype=torch.float64
    )
    return [(1 / ranks).mean(), *((ranks <= k).double().mean() for k in (1, 5, 10))]


def test_retrieval_is_a_plain_loop():
    n, m = [3 + i % 4 for i in range(14)], [2 + i % 3 for i in range(14)]
    xs, ys, n, m = states(2, n, m)
    ys = [y + 0.5 * x[:, :1] for x, y in zip(xs, ys, strict=True)]  # so that partners are found now and then
    found = retrieval_scores(xs, ys, n, m)
    for layer, (x, y) in enumerate(zip(xs, ys, strict=True)):
        pooled = [
            torch.stack([t[i, :k].mean(0) for i, k in enumerate(lengths.tolist())]) for t, lengths in ((x, n), (y, m))
        ]
        for actual, right in zip((score[layer] for score in found), plain_retrieval(*pooled), strict=True):
            close(actual, right, 1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_retrieval_over_a_corpus(chunk):
    """Batch by batch the same as all at once; empty items take no part."""
    xs, ys, n, m = states(2, [5] * 12, [3] * 12)
    n[4], m[7] = 0, 0
    keep = [i for i in range(12) if i not in (4, 7)]
    expected = retrieval_scores([x[keep] for x in xs], [y[keep] for y in ys], n[keep], m[keep])
    corpus = RetrievalCorpus(chunk=chunk)
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        corpus.update([x[part] for x in xs], [y[part] for y in ys], n[part], m[part])
    for actual, right in zip(corpus.compute(), expected, strict=True):
        close(actual, right, 1e-6)


def test_retrieval_without_a_difference():
    """Where all are the same, nobody is found better than by chance."""
    x = torch.ones(9, 4, 3)
    found = retrieval_scores(x, x)
    assert found.mrr.item() == pytest.approx(1 / 5)
    assert found.recall_at_1.item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_retrieval_of_what_is_not_finite(value):
    """No layer looks good because it is broken."""
    xs, ys, n, m = states(3, [5] * 8, [3] * 8)
    xs[1][2, 1, 0] = value
    found = retrieval_scores(xs, ys, n, m)
    expected = retrieval_scores([xs[0], xs[2]], [ys[0], ys[2]], n, m)
    for actual, right in zip(found, expected, strict=True):
        assert actual[1].isnan()
        close(actual[[0, 2]], right, 0)
    assert 1 not in select_layers(found, 2)


def test_retrieval_of_nothing():
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


# Inner layers ----------------------------------------------------------------------------------------------------------------


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
    # Layers that were not computed, as transformers gives them; numbers from the end; weights by number.
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
    launcher = otalign.backends.launcher
    monkeypatch.setattr(otalign.backends, "launcher", lambda name: lambda p: calls.append(p.items) or launcher(name)(p))
    xs, ys, n, m = states(3)
    InnerAlignmentLoss([0, 1, 2])(dict(enumerate(xs)), dict(enumerate(ys)), n, m)
    assert calls == [15]


def test_inner_alignment_on_nothing():
    x = torch.full((2, 3, 4), math.nan, requires_grad=True)
    loss = InnerAlignmentLoss([0])(x, torch.randn(2, 2, 4), torch.tensor([0, 0]), torch.tensor([2, 0]))
    assert loss == 0
    loss.backward()
    assert not x.grad.any()
    with pytest.raises(ValueError, match="speech_states: expected layers"):
        InnerAlignmentLoss([3])(x, torch.randn(2, 2, 4))


# Autocast ------------------------------------------------------------------------------------------------------------------


def losses_and_scores(x, y, n, m):
    """What each method gives for states of two layers: what is differentiable, and what is not."""
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
    scores = [recipes.otalign(x, y, n, m), *retrieval_scores(x, y, n, m), intervene(x, y, n, m).detach()]
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
