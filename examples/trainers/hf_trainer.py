"""OTReg under Hugging Face's Trainer: `python examples/trainers/hf_trainer.py`."""

import argparse

import transformers
from tiny_slm import Recordings, collate, tiny_model

import otalign
from otalign.integrations.transformers import OTAlignCallback


def main(steps: int, folder: str) -> list[dict[str, float]]:
    model = tiny_model()
    handle = otalign.attach(model, otalign.speech.OTRegLoss(warmup_steps=5), weight=1.0)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=2e-3,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Recordings(),
        data_collator=collate,
        callbacks=[OTAlignCallback(handle)],  # the global step for the schedule, the metrics for the logs
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", default="out/hf_trainer")
    args = parser.parse_args()
    main(args.steps, args.folder)
