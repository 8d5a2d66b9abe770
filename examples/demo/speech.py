"""The demo's recordings as tensors: log-mel frames, character ids and the synthesiser's word times."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor

DATA = Path(__file__).resolve().parents[1] / "data"
SAMPLE_RATE = 16_000
HOP = 160  # 10 ms
WINDOW = 400  # 25 ms
MELS = 80
ALPHABET = " ',abcdefghijklmnopqrstuvwxyz"  # id 0 is padding


@dataclass
class Utterance:
    """One recording. `words` holds (first character, end character, start second, end second) of every word."""

    number: int
    voice: str
    text: str
    mel: Tensor  # (frames, MELS)
    words: list[tuple[int, int, float, float]]
    duration: float


def mel_filters(mels: int = MELS, n_fft: int = 512, low: float = 20.0, high: float = SAMPLE_RATE / 2) -> Tensor:
    """Triangles that are evenly spaced on the mel scale: `(mels, n_fft // 2 + 1)`."""
    low_mel, high_mel = (2595 * math.log10(1 + f / 700) for f in (low, high))
    left, centre, right = (700 * (10 ** (torch.linspace(low_mel, high_mel, mels + 2) / 2595) - 1)).unfold(0, 3, 1).T
    frequency = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)
    rising = (frequency - left[:, None]) / (centre - left)[:, None]
    falling = (right[:, None] - frequency) / (right - centre)[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def log_mel(samples: Tensor) -> Tensor:
    """`(samples,)` to `(frames, MELS)`; frame k is centred on sample k * HOP. Every channel has mean 0, all together variance 1."""
    spectrum = torch.stft(samples, 512, HOP, WINDOW, torch.hann_window(WINDOW), return_complex=True).abs().square()
    frames = (mel_filters() @ spectrum).clamp(min=1e-6).log().T
    return (frames - frames.mean(0)) / frames.std()


def load() -> list[Utterance]:
    """All recordings."""
    utterances = []
    for entry in json.loads((DATA / "sentences.json").read_text(encoding="utf-8")):
        samples, rate = soundfile.read(DATA / entry["file"], dtype="float32")
        assert rate == SAMPLE_RATE
        text = entry["text"].lower().rstrip(".")
        utterances.append(
            Utterance(
                number=entry["sentence"],
                voice=entry["voice"],
                text=text,
                mel=log_mel(torch.from_numpy(samples)),
                words=[(*word["span"], word["start"], word["end"]) for word in entry["words"]],
                duration=entry["duration"],
            )
        )
    return utterances


def encode(text: str) -> Tensor:
    return torch.tensor([ALPHABET.index(character) + 1 for character in text])


def pad(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences to one padded tensor and their lengths."""
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), torch.tensor([len(s) for s in sequences])
