"""A training step with an attached loss against the bare step: `python benchmarks capture` writes results/capture.csv.

The model is a medium-sized Qwen2-Audio with random weights. All weights are trained, on rows of 300 placeholders and 60
words.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

import otalign
from common import environment
from otalign.speech import InnerAlignmentLoss, OTRegLoss

B, PLACEHOLDERS, WORDS = 4, 300, 60
MELS, VOCABULARY, AUDIO = 80, 8000, 7999
OUT = Path(__file__).resolve().parents[1] / "results" / "capture.csv"


def model() -> transformers.Qwen2AudioForConditionalGeneration:
    torch.manual_seed(0)
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": MELS,
            "max_source_positions": 2 * PLACEHOLDERS,
            "d_model": 256,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 1024,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        audio_token_index=AUDIO,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config).train()


def batch() -> dict[str, Tensor]:
    words = torch.randint(3, VOCABULARY - 1, (B, WORDS))
    ids = torch.cat([torch.full((B, PLACEHOLDERS), AUDIO), words], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([torch.full((B, PLACEHOLDERS), -100), words], 1),
        "input_features": torch.randn(B, MELS, 4 * PLACEHOLDERS),
        "feature_attention_mask": torch.ones(B, 4 * PLACEHOLDERS, dtype=torch.int64),
    }


def step(attach: Callable[[torch.nn.Module], object], inputs: dict[str, Tensor]) -> Callable[[], float]:
    """A function that makes one training step of a new model, and returns its seconds."""
    own = model()
    attach(own)
    optimizer = torch.optim.SGD(own.parameters(), 1e-4)

    def run() -> float:
        began = time.perf_counter()
        own(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks capture", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="rounds, of which the first warms up (%(default)s)")
    args = parser.parse_args(arguments)
    inputs = batch()
    contestants = {
        "bare": lambda m: None,
        "OTReg": lambda m: otalign.attach(m, OTRegLoss()),
        "AI-STA, layers 0 and 1": lambda m: otalign.attach(m, InnerAlignmentLoss([0, 1])),
    }
    steps = {name: step(attach, inputs) for name, attach in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        # In random order, so that other work on the machine affects all contestants alike.
        for name in random.sample(list(steps), len(steps)):
            times[name].append(steps[name]())
    where = environment.describe(threads=torch.get_num_threads(), memory_kept=False)
    with OUT.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["contestant", "B", "placeholders", "words", "seconds", "ratio_to_bare", "low", "high", *where])
        for name, seconds in times.items():
            # Ratios within a round; the first round warms up.
            ratios = sorted(s / bare for s, bare in zip(seconds[1:], times["bare"][1:], strict=True))
            fifth = len(ratios) // 5
            row = [statistics.median(seconds[1:]), statistics.median(ratios), ratios[fifth], ratios[-1 - fifth]]
            writer.writerow([name, B, PLACEHOLDERS, WORDS, *(f"{value:.4f}" for value in row), *where.values()])
            print(f"{name:26}{row[0]:8.3f} s  {row[1]:.3f} [{row[2]:.3f}, {row[3]:.3f}] of the bare step")
    return 0
