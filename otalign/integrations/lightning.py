"""A callback for Lightning: it passes the global step to the schedule and the metrics to the module's logs."""

from __future__ import annotations

from typing import Any

try:
    import lightning.pytorch as pl
except ImportError:  # Lightning's older package
    import pytorch_lightning as pl  # type: ignore[no-redef]

from .attach import Attachment, expect_names


class OTAlignCallback(pl.Callback):
    """Sets the step of attached losses to Lightning's global step, and logs their metrics.

    A Lightning callback cannot change the loss. `otalign.attach` does: attach to the model whose `outputs.loss` `training_step`
    returns. The metrics are those of `Attachment.metrics`, such as `otalign/loss`. They are logged whenever Lightning logs.

    Args:
        handles: one or more handles of `otalign.attach`, with different names.

    Raises:
        ValueError: for no handle, or handles of the same name.

    Example::

        handle = otalign.attach(module.model, otalign.speech.OTRegLoss(), weight=0.1)
        trainer = lightning.Trainer(callbacks=[OTAlignCallback(handle)])
    """

    def __init__(self, *handles: Attachment) -> None:
        expect_names(handles)
        self.handles = handles
        self.logged = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for handle in self.handles:
            handle.set_step(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and trainer.global_step != self.logged:
            self.logged = trainer.global_step  # accumulated batches share a step
            for handle in self.handles:
                pl_module.log_dict(handle.metrics(synchronise=True), batch_size=1)
