"""`otalign.attach` on models that are wrapped, recomputed, compiled, copied, or raise an error."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

import otalign
from otalign.speech import InnerAlignmentLoss, OTRegLoss

from ..helpers.attached import gradients, same_gradients, spelled_out, step
from ..helpers.problems import close, identical
from ..helpers.speech_models import CASES


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
    """Each run adds the loss to its own output, and the gradients are those of one run."""
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


@pytest.mark.slow
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
    """Prefix tuning gives the model a cache in training."""
    import peft

    case = CASES["voxtral"]()
    options = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        num_layers=3,
        token_dim=32,
        num_attention_heads=2,
    )
    expected = sum(spelled_out(case)) / 2  # embeddings: a prefix does not change them
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


def test_after_an_error_in_the_model_and_in_a_copy():
    case = CASES["qwen2_audio"]()
    otalign.attach(case.model, InnerAlignmentLoss([0, 1]))
    expected = case.model(**case.batch).loss
    with pytest.raises(Exception):  # noqa: B017 (the type of the error depends on the model)
        case.model(**case.batch | {"attention_mask": torch.ones(1, 1)})
    identical(case.model(**case.batch).loss, expected)
    twin = copy.deepcopy(case.model)
    identical(twin(**case.batch).loss, expected)
    more = otalign.attach(twin, OTRegLoss())  # in addition to the one of the copy
    assert twin(**case.batch).loss > expected
    assert more.metrics()["otalign/loss"] > 0
    identical(case.model(**case.batch).loss, expected)


def test_a_checkpoint_around_the_model_is_one_step():
    """The second run uses the weight of the first, and does not count as a step."""
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


def test_losses_on_a_wrapper_and_on_its_inner_model():
    import peft

    case = CASES["qwen2_audio"]()
    adapted = peft.get_peft_model(case.model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    inner = otalign.attach(case.model, OTRegLoss(), on_missing="raise", name="inner")
    outer = otalign.attach(adapted, InnerAlignmentLoss([0, 2], detach_text=False), name="outer")
    adapted(**case.batch).loss.backward()
    assert inner.metrics()["inner/loss"] > 0
    assert outer.metrics()["outer/loss"] > 0


def test_output_hidden_states_in_the_configuration():
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
