"""A callback for Hugging Face's Trainer: it passes the global step to the schedule and the metrics to the logs."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .attach import Attachment, expect_names


class OTAlignCallback(TrainerCallback):
    """Sets the step of attached losses to the trainer's global step, and logs their metrics.

    The step is set at the beginning of each training step, also of the first after a resumption, so schedules continue. The logs
    and `trainer.state.log_history` get `otalign/loss`, `otalign/weight`, `otalign/marginal_error`, `otalign/n_iter` and
    `otalign/skipped` over all processes since the last log, as `Attachment.metrics` describes them. Trainer calls its reporters
    before the callbacks of its argument `callbacks`; `report_first` puts this callback before the reporters.

    Args:
        handles: one or more handles of `otalign.attach`, with different names.

    Raises:
        ValueError: for no handle, or handles of the same name.

    Example::

        handle = otalign.attach(model, otalign.speech.OTRegLoss(), weight=0.1)
        trainer = Trainer(model, ..., callbacks=[OTAlignCallback(handle)])
    """

    def __init__(self, *handles: Attachment) -> None:
        expect_names(handles)
        self.handles = handles

    def report_first(self, trainer: Any) -> None:
        """Move this callback to the front, so that TensorBoard, Weights & Biases and others see the metrics."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for handle in self.handles:
            handle.set_step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        for handle in self.handles:
            metrics = handle.metrics(synchronise=True)
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)
