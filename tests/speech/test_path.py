"""The alignment path, its score and interventions, compared with plain loops over items and layers."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import transformers

from otalign.speech import (
    InnerAlignmentLoss,
    OTRegLoss,
    alignment_path,
    alignment_path_score,
    angle_project,
    intervene,
    length_normalize,
    retrieval_scores,
    sequence_similarity,
)

from ..helpers.problems import close, identical, states


def plain_path(x, y, metric):
    """Similarities and path of one item and layer."""
    A = F.cosine_similarity(x[:, None], y[None], dim=2) if metric == "cosine" else torch.cdist(x, y)
    best = A.max(0) if metric == "cosine" else A.min(0)
    return best.values, best.indices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_path_score_equals_a_plain_loop(metric, dtype):
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
    """The batched code, which GPUs and torch.compile use. On a CPU, items are computed one by one."""
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


def test_cosines_ignore_the_norms_of_states():
    """Also for norms whose squares leave the range of float32, and in float16, whose range is small."""
    xs, ys, n, m = states(1)
    expected = sequence_similarity(xs, ys, n, m)
    soft = OTRegLoss(form="soft_target", tol=0)
    for size in (1e-30, 1e25):
        small = [xs[0] * size], [ys[0] * size], n, m
        close(sequence_similarity(*small), expected, 1e-5)
        close(soft(small[0][0], ys[0], n, m), soft(xs[0], ys[0], n, m), 1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_non_finite_item_leaves_the_others_unchanged(metric):
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
    """Only the similarities of one layer are stored at a time, and the states are not copied."""
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
    for item, frames in enumerate(n.tolist()):  # all norms stay, so moved frames have the same gradient as the others
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
    """As in the paper: the output of a decoder layer for the speech is moved towards its output for the text."""
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
    """Scores, retrieval and both losses take the hidden states of a Llama, and gradients reach the layer of the embeddings."""
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
