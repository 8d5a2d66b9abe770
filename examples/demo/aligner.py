"""The demo's model, which embeds speech frames and characters in one space, and its loss."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from speech import ALPHABET, HOP, MELS, SAMPLE_RATE, Utterance, encode, pad
from torch import Tensor, nn

import otalign

STRIDE = 2
FRAME = STRIDE * HOP / SAMPLE_RATE  # seconds between two vectors of the speech encoder


@dataclass(frozen=True)
class Settings:
    """What the demo uses. `ablate.py` changes one field at a time."""

    steps: int = 300
    batch: int = 8
    learning_rate: float = 3e-3
    reg: float = 0.05
    objective: str = "value"
    prior: float = 5.0  # weight of the quadratic temporal prior in training
    read_prior: float = 10.0  # when an alignment is read from the plan: reading needs a sharper plan than training
    relax: float = 0.3  # of the text side: a small value lets the characters' shares of the frames differ more; inf means equal shares
    contrast: bool = True
    shuffles: int = 3  # further negatives: copies of the right transcript with its words in another order
    temperature: float = 0.05
    seed: int = 0

    @property
    def unbalanced(self) -> tuple[float, float] | None:
        return None if math.isinf(self.relax) else (math.inf, self.relax)


class MaskedConv(nn.Conv1d):
    """A convolution over `(B, T, C)` that reads zeros where the padding is, so that an item does not depend on its batch."""

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        valid = torch.arange(x.shape[1]) < lengths[:, None]
        x = super().forward((x * valid[..., None]).mT).mT
        return x, (lengths - 1) // self.stride[0] + 1


class Aligner(nn.Module):
    """Two encoders that see only a neighbourhood (0.25 s of speech, five characters), so that they know no positions."""

    def __init__(self, width: int = 128, dim: int = 64, dropout: float = 0.1):
        super().__init__()
        self.convs = nn.ModuleList(
            MaskedConv(channels, width, 5, stride, padding=2)
            for channels, stride in [(MELS, 1), (width, STRIDE), (width, 1), (width, 1)]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.convs)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(width, dim)
        self.embed = nn.Embedding(len(ALPHABET) + 1, dim, padding_idx=0)
        self.context = MaskedConv(dim, dim, 5, padding=2)

    def speech(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, T, MELS)` to `(B, ceil(T / STRIDE), dim)` and the new lengths."""
        x = mel
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y, lengths = conv(x, lengths)
            y = self.dropout(F.gelu(norm(y)))
            x = x + y if x.shape == y.shape else y
        return self.project(x), lengths

    def text(self, characters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, M)` to `(B, M, dim)` and the lengths."""
        y = self.embed(characters)
        return y + F.gelu(self.context(y, lengths)[0]), lengths


def make_criterion(settings: Settings) -> otalign.SinkhornLoss:
    return otalign.SinkhornLoss(
        prior=otalign.Prior.quadratic(settings.prior) if settings.prior else None,
        reg=settings.reg,
        unbalanced=settings.unbalanced,
        objective=settings.objective,
        max_iter=20,  # exactly 20 iterations, whatever the error: the plan of a training step need not be exact
        tol=0,
        reduction="none",
    )


def shuffled(text: str, generator: torch.Generator) -> str:
    """The words of `text` in another order."""
    words = text.split(" ")
    while True:
        order = torch.randperm(len(words), generator=generator).tolist()
        if order != sorted(order):
            return " ".join(words[i] for i in order)


def alignment_loss(
    model: Aligner,
    criterion: otalign.SinkhornLoss,
    batch: list[Utterance],
    settings: Settings,
    generator: torch.Generator,
) -> Tensor:
    """Cross-entropy of the transcript of a recording, and of the recording of a transcript, by transport values alone.

    Every recording is paired with the B transcripts of the batch and with `shuffles` shuffled copies of its own, all in
    one call of the criterion. Without `contrast`, the loss is the mean value of the B true pairs, which collapses.
    """
    size = len(batch)
    own = torch.arange(size)
    texts = [u.text for u in batch]
    if settings.contrast:
        texts += [shuffled(u.text, generator) for u in batch for _ in range(settings.shuffles)]
    x, x_lengths = model.speech(*pad([u.mel for u in batch]))
    y, y_lengths = model.text(*pad([encode(text) for text in texts]))
    if not settings.contrast:
        return criterion(x, y, x_lengths, y_lengths).mean()
    copies = size + torch.arange(size * settings.shuffles).view(size, -1)
    j = torch.cat([own.expand(size, size), copies], dim=1)
    i = own[:, None].expand_as(j)
    value = criterion(x[i.flatten()], y[j.flatten()], x_lengths[i.flatten()], y_lengths[j.flatten()])
    logits = -value.view_as(j) / settings.temperature
    return F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :size].T, own)


def plans(
    model: Aligner, utterances: list[Utterance], settings: Settings, *, constant_cost: bool = False
) -> list[Tensor]:
    """The transport plan `(frames, characters)` of every utterance; with `constant_cost`, the plan of the prior alone."""
    model.eval()
    with torch.no_grad():
        x, x_lengths = model.speech(*pad([u.mel for u in utterances]))
        y, y_lengths = model.text(*pad([encode(u.text) for u in utterances]))
        if constant_cost:
            x, y = torch.ones_like(x), torch.ones_like(y)
        result = otalign.solve(
            x,
            y,
            x_lengths,
            y_lengths,
            prior=otalign.Prior.quadratic(settings.read_prior) if settings.read_prior else None,
            reg=settings.reg,
            unbalanced=settings.unbalanced,
        )
        plan = result.plan()
    return [p[:n, :m] for p, n, m in zip(plan, x_lengths.tolist(), y_lengths.tolist(), strict=True)]
