"""For Hugging Face's Trainer: the global step goes into the schedule, and the metrics into the logs."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .attach import Attachment, expect_names


class OTAlignCallback(TrainerCallback):
    """What `otalign.attach` gives, told of the trainer's steps and written to its logs.

    The step is set at the beginning of each, also of the first after a resumption, so that schedules go on where they were.
    Logs get `otalign/loss`, `otalign/weight`, `otalign/marginal_error`, `otalign/n_iter` and `otalign/skipped`: means since the
    last log, over all processes; they are in `trainer.state.log_history` as well. Trainer calls its reporters before a callback
    that is given to it; `report_first` puts this one before them.

    Args:
        handle: of `otalign.attach`; several, with different names, are given one after the other.

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
        if logs is None or "loss" not in logs:  # of an evaluation, or the summary at the end
            return
        for handle in self.handles:
            metrics = handle.metrics(synchronise=True)
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)
