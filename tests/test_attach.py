"""`otalign.attach` on real speech language models with few random weights, against the same sums written out."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import transformers
from torch import Tensor, nn

import otalign
from otalign.integrations.transformers import OTAlignCallback
from otalign.speech import InnerAlignmentLoss, OTRegLoss

from .problems import close, identical
from .speech_models import BOS, CASES, END, PAD, Case, left_padded

NAMES = sorted(CASES)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tol: float = 1e-4) -> None:
    """Of each parameter, relative to its own size; what is a millionth of the largest is rounding."""
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    for key, gradient in found.items():
        error = float((gradient - expected[key]).norm())
        assert error <= tol * float(expected[key].norm()) + 1e-6 * largest, key


def step(case: Case, **more) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch."""
    case.model.zero_grad()
    loss = case.model(**case.batch, **more).loss
    loss.backward()
    return loss.detach(), gradients(case.model)


def transcript(case: Case, row: int) -> Tensor:
    """Positions of the words that are to be said, without the end."""
    labels = case.batch["labels"][row]
    return ((labels != -100) & (labels != END)).nonzero()[:, 0]


def spelled_out(case: Case, layers=(0,), reg=0.05) -> list[Tensor]:
    """The alignment loss of every row, from the model's own hidden states."""
    ids = case.batch["input_ids"]
    hidden = case.model(
        **{k: v for k, v in case.batch.items() if k != "labels"}, output_hidden_states=True
    ).hidden_states
    losses = []
    for row in range(len(ids)):
        places = transcript(case, row)
        words = ids[row, places]
        total = 0
        for layer in layers:
            speech = hidden[layer][row][ids[row] == case.audio_token_id]
            if layers == (0,):
                first = [words.tolist().index(word) for word in dict.fromkeys(words.tolist())]
                text = hidden[0][row, places[first]].detach()
            else:
                with torch.no_grad():
                    alone = torch.cat([torch.tensor([BOS]), words])[None]
                    states = case.model(input_ids=alone, output_hidden_states=True).hidden_states
                text = states[layer][0, 1:]
            result = otalign.solve(speech[None], text[None], reg=reg)
            if layers == (0,):
                cosine = torch.cosine_similarity(speech[:, None], text[None], dim=2)
                total = total + (result.plan()[0].detach() * (1 - cosine)).sum()
            else:
                total = total + result.value[0] / len(layers)
        losses.append(total)
    return losses


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [(0,), (0, 2)])
def test_what_is_added(name, layers):
    """The loss and every gradient are the model's own plus the weighted mean by label tokens."""
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
    """Rows one by one, with the number of labels in all of them, give the gradients of the batch."""
    case = CASES[name]()
    otalign.attach(case.model, OTRegLoss(), weight=2.0)
    total = int((case.batch["labels"][:, 1:] != -100).sum())
    _, whole = step(case, num_items_in_batch=torch.tensor(total))
    case.model.zero_grad()
    for row in single_rows(case):
        case.model(**row, num_items_in_batch=torch.tensor(total)).loss.backward()
    same_gradients(gradients(case.model), whole)


def single_rows(case: Case) -> list[dict[str, Tensor]]:
    rows = []
    for k in range(2):
        row = {key: value[k : k + 1] for key, value in case.batch.items()}
        if len(case.batch["input_features"]) == 3:  # Voxtral's chunks: two of the first row, one of the second
            row["input_features"] = case.batch["input_features"][:2] if k == 0 else case.batch["input_features"][2:]
        rows.append(row)
    return rows


def test_a_model_that_ignores_the_number_of_labels_is_named():
    case = CASES["qwen2_audio"]()
    otalign.integrations.hooks._told_of_means.clear()
    otalign.integrations.hooks._looked.clear()
    otalign.attach(case.model, OTRegLoss())
    own = int((case.batch["labels"][:, 1:] != -100).sum())
    for _ in range(5):
        step(case, num_items_in_batch=torch.tensor(own))  # in which it cannot be told
    with pytest.warns(UserWarning, match="Qwen2AudioForConditionalGeneration ignores num_items_in_batch"):
        for _ in range(3):  # it is not looked at in each
            step(case, num_items_in_batch=torch.tensor(100))
    other = CASES["voxtral"]()
    otalign.attach(other.model, OTRegLoss())
    step(other, num_items_in_batch=torch.tensor(100))  # (a warning would be an error)


@pytest.mark.parametrize("name", ["qwen2_audio", "voxtral", "audio_flamingo3", "qwen2_5_omni"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    case = CASES[name]()
    otalign.attach(case.model, InnerAlignmentLoss([0, 2]), weight=1.0)
    loss, expected = step(case)
    case.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again, found = step(case)
    close(again, loss, 1e-6)
    same_gradients(found, expected)


def test_a_checkpoint_around_the_model_runs_the_hooks_twice():
    """Then each run adds the loss to its own output, and the gradients are those of one."""
    case = CASES["qwen2_audio"]()
    otalign.attach(case.model, OTRegLoss(), weight=1.0)
    loss, expected = step(case)
    case.model.zero_grad()
    anchor = torch.zeros((), requires_grad=True)
    again = torch.utils.checkpoint.checkpoint(
        lambda anchor: case.model(**case.batch).loss + 0 * anchor, anchor, use_reentrant=True
    )
    again.backward()
    close(again.detach(), loss, 1e-6)
    same_gradients(gradients(case.model), expected)


def test_under_compile():
    case = CASES["qwen2_audio"]()
    otalign.attach(case.model, OTRegLoss(), weight=1.0)
    loss, expected = step(case)
    compiled = torch.compile(case.model, backend="aot_eager")
    case.model.zero_grad()
    again = compiled(**case.batch).loss
    again.backward()
    close(again.detach(), loss, 1e-5)
    same_gradients(gradients(case.model), expected)
    with pytest.raises(ValueError, match="attach first, then torch"):
        otalign.attach(compiled, OTRegLoss())


@pytest.mark.parametrize("first", [True, False])
def test_under_prefix_tuning(first):
    """Which gives the model a cache in training."""
    import peft

    case = CASES["voxtral"]()
    options = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        num_layers=3,
        token_dim=32,
        num_attention_heads=2,
    )
    expected = sum(spelled_out(case)) / 2  # of embeddings, which a prefix leaves as they are
    if first:
        handle = otalign.attach(case.model, OTRegLoss(), accumulate="mean")
        adapted = peft.get_peft_model(case.model, options).train()
    else:
        adapted = peft.get_peft_model(case.model, options).train()
        handle = otalign.attach(adapted, OTRegLoss(), accumulate="mean")
    with_loss = adapted(**case.batch).loss
    handle.remove()
    close(with_loss - adapted(**case.batch).loss, expected, 1e-4)


@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech"])
def test_under_peft(name):
    import peft

    case = CASES[name]()
    adapted = peft.get_peft_model(case.model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    own = adapted(**case.batch).loss.detach()
    expected = otalign.attach(adapted, OTRegLoss(), weight=0.5)
    loss = adapted(**case.batch).loss
    assert loss > own
    expected.remove()
    inner = otalign.attach(case.model, OTRegLoss(), weight=0.5)
    close(adapted(**case.batch).loss, loss, 1e-6)
    inner.remove()
    close(adapted(**case.batch).loss.detach(), own, 1e-6)


def test_under_bfloat16_autocast():
    case = CASES["voxtral"]()
    own = case.model(**case.batch).loss
    otalign.attach(case.model, OTRegLoss(), weight=1.0)
    exact = case.model(**case.batch).loss - own
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = case.model(**case.batch)
        plain = case.model.eval()(**case.batch).loss
    output.loss.backward()
    close(output.loss - plain, exact, 0.02)
    assert all(p.grad is None or p.grad.isfinite().all() for p in case.model.parameters())


@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech"])
def test_left_padding(name):
    case = CASES[name]()
    otalign.attach(case.model, OTRegLoss(), weight=1.0)
    right = case.model(**case.batch).loss
    close(case.model(**left_padded(case.batch)).loss, right, 1e-5)


@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech"])
@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_transcripts_that_are_not_in_the_sequence(name, layers):
    """Given by the batch or by a function, they mean what the labels mean where they say the same."""
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
    case.batch["labels"][:, -1] = END  # nothing but an end to predict
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


def test_after_an_error_in_the_model_and_in_a_copy():
    case = CASES["qwen2_audio"]()
    otalign.attach(case.model, InnerAlignmentLoss([0, 1]))
    expected = case.model(**case.batch).loss
    with pytest.raises(Exception):  # noqa: B017 (whatever the model makes of it)
        case.model(**case.batch | {"attention_mask": torch.ones(1, 1)})
    identical(case.model(**case.batch).loss, expected)
    twin = copy.deepcopy(case.model)
    identical(twin(**case.batch).loss, expected)
    more = otalign.attach(twin, OTRegLoss())  # beside the one that came with the copy
    assert twin(**case.batch).loss > expected
    assert more.metrics()["otalign/loss"] > 0
    identical(case.model(**case.batch).loss, expected)


def test_a_checkpoint_around_the_model_is_one_step():
    """The second run has the first one's weight, and does not count."""
    found = []
    for around in (False, True):
        case = CASES["qwen2_audio"]()
        handle = otalign.attach(case.model, OTRegLoss(weight=100.0, warmup_steps=4))
        anchor = torch.zeros((), requires_grad=True)

        def forward(anchor, case=case):
            return case.model(**case.batch).loss + 0 * anchor

        run = torch.utils.checkpoint.checkpoint
        (run(forward, anchor, use_reentrant=True) if around else forward(anchor)).backward()
        assert handle.step == 1
        found.append((gradients(case.model), handle.metrics()))
    same_gradients(found[1][0], found[0][0])
    assert found[0][1] == pytest.approx(found[1][1])


@pytest.mark.parametrize("name", NAMES)
def test_no_words_and_no_token_to_begin_with(name):
    """Released configurations have no bos_token_id; then the pass over the text has nothing at all."""
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


def test_losses_on_a_wrapper_and_on_what_is_inside():
    import peft

    case = CASES["qwen2_audio"]()
    adapted = peft.get_peft_model(case.model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    inner = otalign.attach(case.model, OTRegLoss(), on_missing="raise", name="inner")
    outer = otalign.attach(adapted, InnerAlignmentLoss([0, 2], detach_text=False), name="outer")
    adapted(**case.batch).loss.backward()
    assert inner.metrics()["inner/loss"] > 0
    assert outer.metrics()["outer/loss"] > 0


def test_labels_that_are_not_masked_on_the_speech():
    case = CASES["voxtral"]()
    handle = otalign.attach(case.model, OTRegLoss(), accumulate="mean")
    case.model(**case.batch)
    expected = handle.metrics()["otalign/loss"]
    speech = case.batch["input_ids"] == case.audio_token_id
    case.batch["labels"] = torch.where(speech, case.batch["input_ids"], case.batch["labels"])
    case.model(**case.batch)
    assert handle.metrics()["otalign/loss"] == pytest.approx(expected)


def test_hidden_states_that_the_configuration_asks_for():
    case = CASES["qwen2_audio"]()
    case.model.config.output_hidden_states = case.model.config.text_config.output_hidden_states = True
    otalign.attach(case.model, OTRegLoss())
    assert len(case.model(**case.batch).hidden_states) == 4


def test_nothing_is_kept_after_the_step():
    case = CASES["qwen2_audio"]()
    otalign.attach(case.model, InnerAlignmentLoss([0, 1]))
    seen = []
    case.adapter.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    output = case.model(**case.batch)
    output.loss.backward()
    del output
    gc.collect()
    assert [reference() for reference in seen] == [None]
    model = weakref.ref(case.model)
    del case
    gc.collect()
    assert model() is None


def test_nothing_is_kept_of_a_forward_that_fails():
    case = CASES["qwen2_audio"]()
    handle = otalign.attach(case.model, InnerAlignmentLoss([0, 1]))

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = case.model.get_output_embeddings().register_forward_hook(fail)
    batch = {key: value.clone() for key, value in case.batch.items()}
    ids = weakref.ref(batch["input_ids"])
    with pytest.raises(RuntimeError, match="out of memory"):
        case.model(**batch)
    del batch
    gc.collect()
    assert ids() is None
    hook.remove()
    case.model(**case.batch)
    assert handle.metrics()["otalign/loss"] > 0


def test_missing_parts():
    case = CASES["qwen2_audio"]()
    handle = otalign.attach(case.model, OTRegLoss())
    without = {k: v for k, v in case.batch.items() if k != "labels"}
    with pytest.warns(UserWarning, match=r"lacks labels \(label smoothing"):
        case.model(**without)
    case.model(**without)  # said once
    handle.remove()
    otalign.attach(case.model, OTRegLoss(), on_missing="raise")
    with pytest.raises(ValueError, match="lacks labels"):
        case.model(**without)


def test_a_placeholder_that_is_nowhere():
    case = CASES["qwen2_audio"]()
    own, _ = step(case)
    handle = otalign.attach(case.model, OTRegLoss(), audio_token_id=98)
    for _ in range(2):
        identical(step(case)[0], own)
    with pytest.warns(UserWarning, match="no item had both speech and text"):
        assert handle.metrics()["otalign/skipped"] == 4
    case.model(**case.batch)
    assert handle.metrics()["otalign/skipped"] == 2  # said once


def test_weight_in_the_metrics_is_that_of_the_step():
    case = CASES["qwen2_audio"]()
    own, _ = step(case)
    handle = otalign.attach(case.model, OTRegLoss(warmup_steps=4), weight=lambda step: step + 1.0, accumulate="mean")
    for weight in (0.25, 1.0, 2.25):
        loss, _ = step(case)
        found = handle.metrics()
        assert found["otalign/weight"] == pytest.approx(weight)
        assert float(loss - own) == pytest.approx(weight * found["otalign/loss"], rel=1e-4)


class Overridden(OTRegLoss):
    def forward(self, *arguments, **options):
        return 2 * super().forward(*arguments, **options)


def test_what_functions_of_the_batch_may_give():
    case = CASES["qwen2_audio"]()
    ids = case.batch["input_ids"]
    for options, message in (
        (
            {"speech_mask_fn": lambda batch: (ids == 99).float()},
            r"speech_mask_fn: expected a bool mask .* got torch.float32",
        ),
        ({"speech_mask_fn": lambda batch: None}, "speech_mask_fn: .* got NoneType"),
        ({"speech_mask_fn": lambda batch: ids[:1] == 99}, "speech_mask_fn"),
        (
            {"transcript": lambda batch: torch.rand(2, 3)},
            r"transcript: expected integer ids \(2, M\), got torch.float32",
        ),
        ({"transcript": lambda batch: ids[:1]}, r"transcript: expected integer ids \(2, M\)"),
    ):
        handle = otalign.attach(case.model, OTRegLoss(), **options)
        with pytest.raises(TypeError, match=message):
            case.model(**case.batch)
        handle.remove()
    expected = step(case)[0]
    handle = otalign.attach(case.model, OTRegLoss())
    bool_mask = step(case)[0]
    handle.remove()
    otalign.attach(case.model, OTRegLoss(), speech_mask_fn=lambda batch: (ids == 99).long())
    identical(step(case)[0], bool_mask)
    assert bool_mask > expected


def test_one_module_is_attached_once():
    case = CASES["qwen2_audio"]()
    loss = OTRegLoss()
    first = otalign.attach(case.model, loss)
    with pytest.raises(ValueError, match="loss: this module is attached"):
        otalign.attach(case.model, loss, layers=[1])
    second = otalign.attach(case.model, OTRegLoss())
    with pytest.raises(ValueError, match="handles: expected different names"):
        OTAlignCallback(first, second)
    second.remove()
    OTAlignCallback(first, otalign.attach(case.model, OTRegLoss(), name="second"))


def test_bad_arguments():
    case = CASES["qwen2_audio"]()
    for options, message in (
        ({"loss": nn.MSELoss()}, "loss: expected OTRegLoss"),
        ({"accumulate": "sum"}, "accumulate"),
        ({"on_missing": "log"}, "on_missing"),
        ({"transcript": "text"}, "transcript"),
        ({"layers": [-1]}, "layers"),
        ({"audio_token_id": "<|AUDIO|>"}, "audio_token_id"),
        ({"layers": [0, 1]}, "InnerAlignmentLoss takes several"),
        ({"layers": 0}, "layers: expected a sequence"),
        ({"ignore_token_ids": 5}, "ignore_token_ids: expected a sequence"),
        ({"weight": "0.1"}, "weight: expected a number"),
        ({"weight": None}, "weight: expected a number"),
        ({"weight": torch.tensor([0.1, 0.2])}, "weight: expected a number"),
        ({"weight": float("nan")}, "weight: expected a finite number >= 0"),
        ({"weight": -1}, "weight: expected a finite number >= 0"),
        ({"transcript": None}, "transcript"),
        ({"states_from": "model"}, "states_from: expected a torch.nn.Module, got str"),
        ({"loss": otalign.SinkhornLoss(reduction="sum")}, "expected reduction='mean', got 'sum'"),
        ({"loss": Overridden()}, "Overridden.forward"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            otalign.attach(case.model, **({"loss": OTRegLoss()} | options))
    assert not case.model._forward_hooks  # nothing is left of what failed
    handle = otalign.attach(case.model, InnerAlignmentLoss([0, 9]))
    with pytest.raises(ValueError, match="the model has 4 hidden states"):
        case.model(**case.batch)
    handle.remove()
    with pytest.raises(ValueError, match="DataParallel runs copies"):
        otalign.attach(nn.DataParallel(case.model), OTRegLoss())
    case.batch = {k: v for k, v in case.batch.items() if k in ("input_ids", "attention_mask", "labels")}
    case.model.config.num_codebooks = 8
    with pytest.raises(ValueError, match="codec"):
        otalign.attach(case.model, OTRegLoss())
    with pytest.raises(ValueError, match="no placeholder of audio"):
        otalign.attach(nn.Linear(2, 2), OTRegLoss())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        otalign.attach(case, OTRegLoss())


def test_placeholders_that_the_model_expands():
    """Legacy inputs of Qwen2-Audio: one placeholder for a whole recording."""
    case = CASES["qwen2_audio"]()
    case.model.config.ignore_index = -100
    rows, labels = [], []
    for ids, own in zip(case.batch["input_ids"], case.batch["labels"], strict=True):
        kept = (ids != PAD) & ~((ids == case.audio_token_id) & (ids.roll(1) == case.audio_token_id))
        rows.append(ids[kept])
        labels.append(own[kept])
    pad = nn.utils.rnn.pad_sequence
    batch = case.batch | {
        "input_ids": pad(rows, batch_first=True, padding_value=PAD),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(r) for r in rows], batch_first=True),
    }
    otalign.attach(case.model, OTRegLoss())
    with pytest.raises(ValueError, match="expands placeholders by itself"):
        case.model(**batch)


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_items_that_are_packed_in_a_row(layers):
    """Told apart by position_ids; at the embeddings they are what they are in rows of their own."""
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
    # Positions that are given without packing change nothing.
    expected = case.model(**case.batch, transcript_ids=torch.ones(2, 3).long()).loss
    plain = case.batch | {"position_ids": torch.arange(rows.shape[1]).expand_as(rows)}
    close(case.model(**plain, transcript_ids=torch.ones(2, 3).long()).loss, expected, 1e-6)


def test_otreg_on_an_inner_layer(monkeypatch):
    """The text's ids are as long as its states, also where nothing was cut off before, as on a GPU."""
    case = CASES["voxtral"]()
    losses = []
    for cut in (True, False):
        if not cut:
            order = lambda mask: ((~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(1))  # noqa: E731
            monkeypatch.setattr(otalign.integrations.capture, "_front", order)
        handle = otalign.attach(case.model, OTRegLoss(), layers=[1])
        case.model(**case.batch)
        losses.append(handle.metrics()["otalign/loss"])
        handle.remove()
    assert losses[0] == pytest.approx(losses[1])


def test_audio_that_is_not_attended_to_is_no_speech():
    """Some collators add fake audio, under a mask of zeros, to rows without any."""
    case = CASES["qwen2_audio"]()
    handle = otalign.attach(case.model, OTRegLoss(), accumulate="mean")
    case.batch["attention_mask"][0, case.batch["input_ids"][0] == case.audio_token_id] = 0
    case.model(**case.batch)
    assert handle.metrics()["otalign/skipped"] == 1


def test_nan_is_seen_in_the_metrics():
    """Trainer's log shows a loss of NaN as 0."""
    case = CASES["qwen2_audio"]()
    handle = otalign.attach(case.model, OTRegLoss())
    case.batch["input_features"][0, 0, 0] = torch.nan
    assert case.model(**case.batch).loss.isnan()
    assert torch.tensor(handle.metrics()["otalign/loss"]).isnan()


@pytest.mark.parametrize("kind", ["CsmConfig", "MoshiConfig", "KyutaiSpeechToTextConfig"])
def test_codec_models_are_refused(kind):
    model = nn.Linear(1, 1)
    model.config = getattr(transformers, kind)()
    with pytest.raises(ValueError, match="codec"):
        otalign.attach(model, OTRegLoss())
