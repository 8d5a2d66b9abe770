"""For Lightning: the global step goes into the schedule, and the metrics into the module's logs."""

from __future__ import annotations

from typing import Any

try:
    import lightning.pytorch as pl
except ImportError:  # the older package of the same project
    import pytorch_lightning as pl  # type: ignore[no-redef]

from .attach import Attachment, expect_names


class OTAlignCallback(pl.Callback):
    """What `otalign.attach` gives, told of Lightning's steps and written to its logs.

    A Lightning callback cannot change a loss: `otalign.attach` does, on the model whose output's loss `training_step` returns.
    Logs get `otalign/loss` and the others of `Attachment.metrics`, whenever Lightning logs.

    Args:
        handle: of `otalign.attach`; several, with different names, are given one after the other.

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
            self.logged = trainer.global_step  # batches that are accumulated share a step
            for handle in self.handles:
                pl_module.log_dict(handle.metrics(synchronise=True), batch_size=1)
