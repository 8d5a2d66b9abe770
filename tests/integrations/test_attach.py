"""`otalign.attach` on real speech language models with few random weights, compared with the same sums written out."""

from __future__ import annotations

import pytest
import torch

import otalign
from otalign.speech import InnerAlignmentLoss, OTRegLoss

from ..helpers.attached import gradients, same_gradients, single_rows, spelled_out, step
from ..helpers.problems import close, identical
from ..helpers.speech_models import CASES, END, Case, left_padded

NAMES = sorted(CASES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [(0,), (0, 2)])
def test_added_loss_and_gradients(name, layers):
    """Loss and gradients are those of the model plus the weighted alignment loss, averaged by label tokens."""
    case = CASES[name]()
    own, own_gradients = step(case)
    case.model.zero_grad()
    losses = spelled_out(case, layers)
    tokens = (case.batch["labels"][:, 1:] != -100).sum(1)
    expected = 0.3 * sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / tokens.sum()
    expected.backward()
    added = gradients(case.model)

    criterion = OTRegLoss() if layers == (0,) else InnerAlignmentLoss(layers)
    handle = otalign.attach(case.model, criterion, weight=0.3)
    loss, found = step(case)
    close(loss, own + expected.detach(), 1e-5)
    same_gradients(found, {key: gradient + added.get(key, 0) for key, gradient in own_gradients.items()})
    reached = sum(added[key].abs().sum() for key in added if key in adapter_names(case))
    assert reached > 0

    found = handle.metrics()
    assert found["otalign/skipped"] == 0
    assert found["otalign/loss"] == pytest.approx(float(sum(losses).detach() / 2), rel=1e-4)
    assert found["otalign/weight"] == pytest.approx(0.3)
    assert 0 < found["otalign/marginal_error"] <= 1e-3
    assert found["otalign/n_iter"] >= 1
    assert handle.metrics() == {}


def adapter_names(case: Case) -> set[str]:
    inside = {id(p) for p in case.adapter.parameters()}
    return {name for name, p in case.model.named_parameters() if id(p) in inside}


@pytest.mark.parametrize("name", NAMES)
def test_weight_zero_and_removal_leave_the_model_alone(name):
    case = CASES[name]()
    keys, hooks = list(case.model.state_dict()), len(case.model._forward_hooks)
    own, own_gradients = step(case)
    handle = otalign.attach(case.model, OTRegLoss(), weight=0.0)
    assert list(case.model.state_dict()) == keys
    loss, found = step(case)
    identical(loss, own)
    for key, gradient in found.items():
        identical(gradient, own_gradients[key])
    output = case.model(**case.batch)
    assert output.get("hidden_states") is None
    assert len(case.model(**case.batch, output_hidden_states=True).hidden_states) == 4
    assert case.model(**case.batch, output_hidden_states=1).hidden_states[1] is not None
    as_tuple = case.model(**case.batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(case.model.eval()(**case.batch, return_dict=False))
    identical(as_tuple[0], own)
    case.model.train()

    handle.remove()
    handle.remove()
    assert len(case.model._forward_hooks) == hooks == len(case.model._forward_pre_hooks)
    again = otalign.attach(case.model, OTRegLoss(), weight=1.0)
    assert case.model(**case.batch).loss > own
    again.remove()


def test_off_in_evaluation_and_generation():
    case = CASES["qwen2_audio"]()
    own = case.model.eval()(**case.batch).loss
    handle = otalign.attach(case.model, OTRegLoss(), weight=5.0, on_missing="raise")
    identical(case.model(**case.batch, transcript_ids=torch.ones(2, 3).long()).loss, own)
    prompt = {k: v for k, v in case.batch.items() if k != "labels"}
    case.model.generate(**prompt, max_new_tokens=2, do_sample=False)
    for use_cache in (True, False):
        case.model.train().generate(**prompt, max_new_tokens=2, do_sample=False, use_cache=use_cache)
    assert handle.metrics() == {}
    assert handle.step == 0


@pytest.mark.parametrize("name", ["audio_flamingo3", "qwen2_5_omni", "voxtral"])
def test_accumulation_over_rows_is_exact(name):
    """Single rows, divided by the number of labels in all rows, give the gradients of the batch."""
    case = CASES[name]()
    otalign.attach(case.model, OTRegLoss(), weight=2.0)
    total = int((case.batch["labels"][:, 1:] != -100).sum())
    _, whole = step(case, num_items_in_batch=torch.tensor(total))
    case.model.zero_grad()
    for row in single_rows(case):
        case.model(**row, num_items_in_batch=torch.tensor(total)).loss.backward()
    same_gradients(gradients(case.model), whole)


@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech"])
def test_left_padding(name):
    case = CASES[name]()
    otalign.attach(case.model, OTRegLoss(), weight=1.0)
    right = case.model(**case.batch).loss
    close(case.model(**left_padded(case.batch)).loss, right, 1e-5)


@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech"])
@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_transcripts_outside_the_sequence(name, layers):
    """Transcripts from the batch or from a function give the same result as equal labels."""
    case = CASES[name]()
    criterion = (lambda: OTRegLoss(cost="sqeuclidean")) if layers == [0] else lambda: InnerAlignmentLoss(layers)
    ids = torch.cat([torch.full((2, 2), -100), case.batch["labels"]], 1)
    handle = otalign.attach(case.model, criterion())
    expected = case.model(**case.batch).loss
    handle.remove()
    handle = otalign.attach(case.model, criterion(), transcript="transcript_ids")
    close(case.model(**case.batch, transcript_ids=ids).loss, expected, 1e-5)
    with pytest.warns(UserWarning, match="lacks transcript_ids"):
        case.model(**case.batch)
    handle.remove()
    otalign.attach(case.model, criterion(), transcript=lambda batch: batch["labels"])
    close(case.model(**case.batch).loss, expected, 1e-5)


def test_ignored_tokens():
    case = CASES["voxtral"]()
    own = case.model(**case.batch).loss
    handle = otalign.attach(case.model, OTRegLoss(), ignore_token_ids=[41, 51])
    some = case.model(**case.batch).loss - own
    handle.remove()
    for word in (41, 51):
        case.batch["transcript_ids"] = case.batch.get("transcript_ids", case.batch["labels"]).masked_fill(
            case.batch["labels"] == word, -100
        )
    otalign.attach(case.model, OTRegLoss(), transcript="transcript_ids")
    close(case.model(**case.batch).loss - own, some, 1e-4)


def test_items_without_speech_or_text_are_skipped():
    case = CASES["qwen2_audio"]()
    case.batch["labels"][1, :] = -100
    handle = otalign.attach(case.model, OTRegLoss(), accumulate="mean")
    own = case.model.eval()(**case.batch).loss
    loss = case.model.train()(**case.batch).loss
    assert handle.metrics()["otalign/skipped"] == 1
    case.batch["labels"][:, :] = -100
    case.batch["labels"][:, -1] = END  # only the end token to predict
    loss, found = step(case)
    close(loss, case.model.eval()(**case.batch).loss, 1e-6)
    assert handle.metrics()["otalign/skipped"] == 2
    assert own.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_two_losses():
    case = CASES["qwen2_audio"]()
    own = case.model(**case.batch).loss
    parts = []
    for criterion in (OTRegLoss(), InnerAlignmentLoss([1, 2])):
        handle = otalign.attach(case.model, criterion)
        parts.append(case.model(**case.batch).loss - own)
        handle.remove()
    first = otalign.attach(case.model, OTRegLoss(), name="embeddings")
    second = otalign.attach(case.model, InnerAlignmentLoss([1, 2]), name="inner")
    output = case.model(**case.batch)
    close(output.loss - own, sum(parts), 1e-4)
    assert output.get("hidden_states") is None
    assert set(first.metrics()) & set(second.metrics()) == set()
    first.remove()
    close(case.model(**case.batch).loss - own, parts[1], 1e-4)


def test_schedules():
    case = CASES["qwen2_audio"]()
    handle = otalign.attach(case.model, OTRegLoss(weight=2.0, warmup_steps=4), weight=lambda step: 0.5 * (step >= 1))
    weights = []
    for _ in range(3):
        weights.append(float(handle.current_weight()))
        case.model(**case.batch)
    assert weights == [0, 0.5, 0.75]
    handle.set_step(100)
    case.model(**case.batch)
    assert float(handle.current_weight()) == 1.0
    assert handle.step == 100


@pytest.mark.parametrize("name", NAMES)
def test_no_words_and_no_bos_token(name):
    """Released configurations have no bos_token_id. Without words the pass over the text then has no input."""
    case = CASES[name]()
    for config in (case.model.config, case.model.config.text_config):
        config.bos_token_id = None
    handle = otalign.attach(case.model, InnerAlignmentLoss([0, 2]))
    case.model(**case.batch).loss.backward()
    assert handle.metrics()["otalign/skipped"] == 0
    case.batch["labels"][:] = -100
    case.batch["labels"][:, -1] = END
    _, found = step(case)
    assert handle.metrics()["otalign/skipped"] == 2
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_labels_that_cover_the_speech():
    case = CASES["voxtral"]()
    handle = otalign.attach(case.model, OTRegLoss(), accumulate="mean")
    case.model(**case.batch)
    expected = handle.metrics()["otalign/loss"]
    speech = case.batch["input_ids"] == case.audio_token_id
    case.batch["labels"] = torch.where(speech, case.batch["input_ids"], case.batch["labels"])
    case.model(**case.batch)
    assert handle.metrics()["otalign/loss"] == pytest.approx(expected)


def test_metrics_show_the_weight_of_the_step():
    case = CASES["qwen2_audio"]()
    own, _ = step(case)
    handle = otalign.attach(case.model, OTRegLoss(warmup_steps=4), weight=lambda step: step + 1.0, accumulate="mean")
    for weight in (0.25, 1.0, 2.25):
        loss, _ = step(case)
        found = handle.metrics()
        assert found["otalign/weight"] == pytest.approx(weight)
        assert float(loss - own) == pytest.approx(weight * found["otalign/loss"], rel=1e-4)


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_items_packed_in_one_row(layers):
    """position_ids separate packed items. At the embeddings the result equals that of separate rows."""
    case = CASES["qwen2_audio"]()
    criterion = OTRegLoss() if layers == [0] else InnerAlignmentLoss(layers)
    handle = otalign.attach(case.model, criterion)
    rows = case.batch["attention_mask"].bool()
    packed = {key: value[rows][None] for key, value in case.batch.items() if value.shape == rows.shape}
    packed["position_ids"] = (torch.arange(rows.shape[1]).expand_as(rows))[rows][None]
    packed |= {key: value for key, value in case.batch.items() if key not in packed}
    losses = []
    for batch in (case.batch, packed):
        together = case.model.train()(**batch).loss
        losses.append(together - case.model.eval()(**batch).loss)
    found = handle.metrics()
    assert found["otalign/skipped"] == 0
    if layers == [0]:
        close(losses[1], losses[0], 1e-5)
    assert losses[1] > 0
    handle.remove()
    otalign.attach(case.model.train(), criterion, transcript="transcript_ids")
    with pytest.raises(ValueError, match="packed in a row"):
        case.model(**packed, transcript_ids=torch.ones(1, 3).long())
    # position_ids without packing change nothing.
    expected = case.model(**case.batch, transcript_ids=torch.ones(2, 3).long()).loss
    plain = case.batch | {"position_ids": torch.arange(rows.shape[1]).expand_as(rows)}
    close(case.model(**plain, transcript_ids=torch.ones(2, 3).long()).loss, expected, 1e-6)


def test_otreg_on_an_inner_layer(monkeypatch):
    """The ids of the text are as long as its states, also if no padding was cut off before, as on a GPU."""
    case = CASES["voxtral"]()
    losses = []
    for cut in (True, False):
        if not cut:
            order = lambda mask: ((~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(1))  # noqa: E731
            monkeypatch.setattr(otalign.integrations.spans, "_marked_positions", order)
        handle = otalign.attach(case.model, OTRegLoss(), layers=[1])
        case.model(**case.batch)
        losses.append(handle.metrics()["otalign/loss"])
        handle.remove()
    assert losses[0] == pytest.approx(losses[1])


def test_masked_audio_is_not_speech():
    """Some collators add fake audio with a mask of zeros to rows without audio."""
    case = CASES["qwen2_audio"]()
    handle = otalign.attach(case.model, OTRegLoss(), accumulate="mean")
    case.batch["attention_mask"][0, case.batch["input_ids"][0] == case.audio_token_id] = 0
    case.model(**case.batch)
    assert handle.metrics()["otalign/skipped"] == 1


def test_metrics_show_nan():
    """The log of Trainer shows a NaN loss as 0."""
    case = CASES["qwen2_audio"]()
    handle = otalign.attach(case.model, OTRegLoss())
    case.batch["input_features"][0, 0, 0] = torch.nan
    assert case.model(**case.batch).loss.isnan()
    assert torch.tensor(handle.metrics()["otalign/loss"]).isnan()


@pytest.mark.parametrize("criterion", [OTRegLoss, otalign.SinkhornLoss])
def test_warm_starts(criterion):
    """The ids come from an entry of the batch, which the model does not see, or from a function; loss and gradients stay."""
    case = CASES["qwen2_audio"]()
    options = {"tol": 1e-5, "max_iter": 2000, "accelerate": False}
    handle = otalign.attach(case.model, criterion(**options), weight=0.3)
    loss, expected = step(case)
    cold = handle.metrics()["otalign/n_iter"]
    handle.remove()

    store = otalign.WarmStarts()
    handle = otalign.attach(case.model, criterion(**options, warm_starts=store), weight=0.3, ids="utterance")
    assert len(otalign.attach(case.model, OTRegLoss(), 0.0, name="other")._hooks.attached) == 2
    for passes in (cold, 1):
        found, gradients = step(case, utterance=["a", 2])
        close(found, loss, 1e-5)
        same_gradients(gradients, expected, 1e-3)
        assert handle.metrics()["otalign/n_iter"] == pytest.approx(passes)
    assert store.state_dict()["ids"] == ["a", 2]
    with pytest.raises(ValueError, match=r"ids: expected 'utterance' in the batch, got .*remove_unused_columns=False"):
        step(case)
    with pytest.raises(ValueError, match="ids: expected 2, one for each item, got 1"):
        step(case, utterance=["a"])
    case.model.eval()
    case.model(**case.batch, utterance=["b", "c"])
    assert len(store) == 2
    handle.remove()

    by_function = lambda batch: batch["input_ids"][:, -1].tolist()  # noqa: E731
    handle = otalign.attach(case.model.train(), criterion(**options, warm_starts=store), ids=by_function)
    step(case)
    assert store.state_dict()["ids"][-1] == int(case.batch["input_ids"][1, -1])


def test_wrong_ids():
    case = CASES["qwen2_audio"]()
    with pytest.raises(ValueError, match="ids: they are for a loss with warm_starts=, got OTRegLoss without"):
        otalign.attach(case.model, OTRegLoss(), ids="id")
    with pytest.raises(
        TypeError, match="ids: expected the name of an entry of the batch, or a function of it, got list"
    ):
        otalign.attach(case.model, OTRegLoss(warm_starts=otalign.WarmStarts()), ids=[1, 2])
