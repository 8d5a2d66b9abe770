"""Batches, arguments and models that `otalign.attach` refuses or warns about."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import otalign
from otalign.integrations.transformers import OTAlignCallback
from otalign.speech import InnerAlignmentLoss, OTRegLoss

from ..helpers.attached import step
from ..helpers.problems import identical
from ..helpers.speech_models import CASES, PAD


def test_a_model_that_ignores_the_number_of_labels_is_named():
    case = CASES["qwen2_audio"]()
    otalign.integrations.hooks._settled_classes.clear()
    otalign.integrations.hooks._candidate_calls.clear()
    otalign.attach(case.model, OTRegLoss())
    own = int((case.batch["labels"][:, 1:] != -100).sum())
    for _ in range(5):
        step(case, num_items_in_batch=torch.tensor(own))  # the number of this batch: ignoring it makes no difference
    with pytest.warns(UserWarning, match="Qwen2AudioForConditionalGeneration ignores num_items_in_batch"):
        for _ in range(3):  # not every step checks this
            step(case, num_items_in_batch=torch.tensor(100))
    other = CASES["voxtral"]()
    otalign.attach(other.model, OTRegLoss())
    step(other, num_items_in_batch=torch.tensor(100))  # (a warning would be an error)


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


def test_a_placeholder_that_never_occurs():
    case = CASES["qwen2_audio"]()
    own, _ = step(case)
    handle = otalign.attach(case.model, OTRegLoss(), audio_token_id=98)
    for _ in range(2):
        identical(step(case)[0], own)
    with pytest.warns(UserWarning, match="no item had both speech and text"):
        assert handle.metrics()["otalign/skipped"] == 4
    case.model(**case.batch)
    assert handle.metrics()["otalign/skipped"] == 2  # said once


class Overridden(OTRegLoss):
    def forward(self, *arguments, **options):
        return 2 * super().forward(*arguments, **options)


def test_what_functions_of_the_batch_may_return():
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
    assert not case.model._forward_hooks  # a failed call leaves no hooks
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
    """The legacy inputs of Qwen2-Audio have one placeholder for a whole recording."""
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


@pytest.mark.parametrize("kind", ["CsmConfig", "MoshiConfig", "KyutaiSpeechToTextConfig"])
def test_codec_models_are_refused(kind):
    model = nn.Linear(1, 1)
    model.config = getattr(transformers, kind)()
    with pytest.raises(ValueError, match="codec"):
        otalign.attach(model, OTRegLoss())
