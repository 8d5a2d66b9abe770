"""Unmodified trainers with an attached loss: what they optimise, log, save and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from torch import Tensor

import otalign
from otalign.integrations.lightning import OTAlignCallback as LightningCallback
from otalign.integrations.transformers import OTAlignCallback
from otalign.speech import InnerAlignmentLoss, OTRegLoss

from ..helpers.attached import single_rows
from ..helpers.problems import close, identical
from ..helpers.speech_models import CASES, Case

STEPS = 6


class Rows(torch.utils.data.Dataset):
    """The rows of a case's batch, repeated, with different numbers of tokens."""

    def __init__(self, case: Case, more: dict[str, Tensor] | None = None, count: int = 24):
        self.batch, self.count = {**case.batch, **(more or {})}, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index % 2] for key, value in self.batch.items()}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def hf_trainer(case: Case, folder: Path, callbacks: list[Any], **options: Any) -> transformers.Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    more = options.pop("more", None)
    return transformers.Trainer(
        case.model,
        transformers.TrainingArguments(**arguments | options),
        train_dataset=Rows(case, more),
        eval_dataset=Rows(case, more, count=2),
        data_collator=collate,
        callbacks=callbacks,
    )


KEYS = {f"otalign/{key}" for key in ("loss", "weight", "marginal_error", "n_iter", "skipped")}


def test_hugging_face_logs_and_schedule(tmp_path):
    case = CASES["qwen2_audio"]()
    before = {name: p.detach().clone() for name, p in case.adapter.named_parameters()}
    handle = otalign.attach(case.model, OTRegLoss(weight=0.5, warmup_steps=4))
    trainer = hf_trainer(case, tmp_path, [OTAlignCallback(handle)], eval_strategy="steps", eval_steps=3)
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer.callback_handler.callbacks.insert(0, Reporter())
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == STEPS
    assert all(entry.keys() >= KEYS for entry in history)
    assert [entry["otalign/weight"] for entry in history] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert any((p.detach() != before[name]).any() for name, p in case.adapter.named_parameters())
    assert not any(KEYS & entry.keys() for entry in seen)

    seen.clear()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, OTAlignCallback))
    callback.report_first(trainer)
    trainer.train()
    assert all(entry.keys() >= KEYS for entry in seen if "loss" in entry)
    assert not any(KEYS & entry.keys() for entry in seen if "eval_loss" in entry)


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def resumable(folder: Path, stop: int = STEPS, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], list[float]]:
    """The weights of the model at the end, and the logged weights of the loss.

    Trainer saves weights under the names of the Hub, but loads them by the names of the model. For these classes no name matches,
    and Trainer continues with the current weights (transformers 5.23). So this function loads them.
    """
    case = CASES["qwen2_audio"]()
    if checkpoint is not None:
        case.model.load_state_dict(type(case.model).from_pretrained(checkpoint).state_dict())
    handle = otalign.attach(case.model, OTRegLoss(weight=0.5, start_step=1, warmup_steps=4))
    trainer = hf_trainer(
        case,
        folder,
        [OTAlignCallback(handle), StopAt(stop)],
        bf16=True,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps",
        save_steps=3,
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    weights = [entry["otalign/weight"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach().clone() for name, p in case.model.named_parameters()}, weights


@pytest.mark.filterwarnings("ignore:.*ignores num_items_in_batch")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_resumed_training_equals_uninterrupted_training(tmp_path):
    """Qwen2-Audio under Trainer with checkpointing, accumulation and bfloat16, stopped at half of its steps."""
    whole, weights = resumable(tmp_path / "whole")
    assert weights == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5])
    resumable(tmp_path / "parts", stop=3)
    resumed, again = resumable(tmp_path / "parts", checkpoint=tmp_path / "parts" / "checkpoint-3")
    assert again == pytest.approx(weights)
    for name, value in resumed.items():
        identical(value, whole[name])


def test_label_smoothing_removes_the_labels(tmp_path):
    """Trainer then computes the loss itself. There is none to add to, and one warning says so."""
    case = CASES["audio_flamingo3"]()
    otalign.attach(case.model, OTRegLoss())
    with pytest.warns(UserWarning, match="no alignment loss for this batch"):
        hf_trainer(case, tmp_path, [], label_smoothing_factor=0.1, max_steps=2).train()


def test_transcript_ids_reach_the_loss(tmp_path):
    more = {"transcript_ids": torch.tensor([[7, 8, 9], [7, 9, -100]])}
    case = CASES["audio_flamingo3"]()
    handle = otalign.attach(case.model, OTRegLoss(), transcript="transcript_ids")
    options = {"more": more, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = hf_trainer(case, tmp_path, [OTAlignCallback(handle)], remove_unused_columns=False, **options)
    trainer.train()
    assert trainer.state.log_history[0]["otalign/loss"] > 0
    handle.remove()
    otalign.attach(case.model, OTRegLoss(), transcript="transcript_ids")
    with pytest.warns(UserWarning, match="remove_unused_columns=False"):
        hf_trainer(case, tmp_path, [], **options).train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accumulation_in_trainer_is_exact(tmp_path, accumulation):
    """Two batches of two rows change the weights like one batch of four: by the model's loss and by the attached one."""
    case = CASES["audio_flamingo3"]()
    otalign.attach(case.model, OTRegLoss(), weight=3.0)
    options = {"per_device_train_batch_size": 2 // accumulation, "gradient_accumulation_steps": accumulation}
    start = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    hf_trainer(case, tmp_path, [], max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **options).train()
    moved = {name: p.detach() - start[name] for name, p in case.model.named_parameters()}

    other = CASES["audio_flamingo3"]()
    otalign.attach(other.model, OTRegLoss(), weight=3.0)
    other.model(**other.batch).loss.backward()
    for name, p in other.model.named_parameters():
        if p.grad is not None:
            close(moved[name], -p.grad, 1e-5)
    assert other.adapter.linear_1.weight.grad.norm() > 1e-3


def test_lightning(tmp_path):
    case = CASES["qwen2_audio"]()
    before = case.adapter.linear.weight.detach().clone()
    handle = otalign.attach(case.model, InnerAlignmentLoss([0, 1]), weight=lambda step: 0.1 * step)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = case.model

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    logged = []

    class Logger(lightning.pytorch.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append(metrics)

    trainer = lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=Logger(),
        callbacks=[LightningCallback(handle)],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Rows(case), 2, collate_fn=collate))
    weights = [entry["otalign/weight"] for entry in logged if "otalign/weight" in entry]
    assert weights[0] == 0
    assert weights[-1] == pytest.approx(0.3)
    assert (case.adapter.linear.weight.detach() != before).any()
    assert all(entry.keys() >= KEYS for entry in logged if "otalign/loss" in entry)


def test_a_plain_loop():
    """Embeddings overfit one batch: both parts of the loss fall, the alignment loss because it is trained."""
    case = CASES["qwen2_5_omni"]()
    handle = otalign.attach(case.model, OTRegLoss(), weight=5.0)
    optimizer = torch.optim.AdamW(case.model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = case.model(**case.batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(handle.metrics()["otalign/loss"])
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["voxtral", "audio_flamingo3"])
def test_accelerate_accumulates_exactly(name):
    """Batches of different size in one step, as in docs/trainers.md, change the weights like one batch."""
    import accelerate

    case, whole = CASES[name](), CASES[name]()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    otalign.attach(case.model, OTRegLoss(), weight=2.0)
    model, optimizer = accelerator.prepare(case.model, torch.optim.SGD(case.model.parameters(), 1.0))
    group = single_rows(case)
    tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in group)
    for batch in group:
        with accelerator.accumulate(model):
            loss = model(**batch, num_items_in_batch=tokens).loss
            accelerator.backward(loss * accelerator.gradient_accumulation_steps)
            optimizer.step()
            optimizer.zero_grad()

    otalign.attach(whole.model, OTRegLoss(), weight=2.0)
    optimizer = torch.optim.SGD(whole.model.parameters(), 1.0)
    whole.model(**whole.batch).loss.backward()
    optimizer.step()
    for (key, found), expected in zip(case.model.named_parameters(), whole.model.parameters(), strict=True):
        close(found, expected, 1e-4, key)
