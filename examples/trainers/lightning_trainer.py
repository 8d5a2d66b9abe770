"""AI-STA's loss in two layers under Lightning: `python examples/trainers/lightning_trainer.py`."""

import argparse

import lightning
import torch
from tiny_slm import Recordings, collate, tiny_model

import otalign
from otalign.integrations.lightning import OTAlignCallback


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 2e-3)


def main(steps: int, folder: str) -> lightning.Trainer:
    module = Module()
    handle = otalign.attach(module.model, otalign.speech.InnerAlignmentLoss(layers=[0, 1]), weight=1.0)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        log_every_n_steps=5,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        default_root_dir=folder,
        logger=lightning.pytorch.loggers.CSVLogger(folder, version=0),
        callbacks=[OTAlignCallback(handle)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(Recordings(), 8, shuffle=True, collate_fn=collate))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", default="out/lightning")
    args = parser.parse_args()
    main(args.steps, args.folder)
