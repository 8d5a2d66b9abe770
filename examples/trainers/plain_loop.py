"""OTReg in a plain PyTorch loop: `python examples/trainers/plain_loop.py`."""

import argparse

import torch
from tiny_slm import Recordings, collate, tiny_model

import otalign


def main(steps: int) -> list[float]:
    model = tiny_model()
    handle = otalign.attach(model, otalign.speech.OTRegLoss(warmup_steps=5), weight=1.0)  # the only line that is added

    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    batches = torch.utils.data.DataLoader(Recordings(), 8, shuffle=True, collate_fn=collate)
    losses, step = [], 0
    while step < steps:
        for batch in batches:
            loss = model(**batch).loss  # includes the alignment loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 5 == 0:
                metrics = handle.metrics()
                losses.append(metrics["otalign/loss"])
                print(step, f"loss {loss.item():.3f}", {key: round(value, 4) for key, value in metrics.items()})
            if step == steps:
                break
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
