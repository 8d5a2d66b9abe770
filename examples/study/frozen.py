"""What the study trains first and then freezes: the language model on text, the encoder on seven voices."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import char_error_rate
from tqdm import trange
from transformers import LlamaForCausalLM

from .models import CHARACTERS, Encoder, language_model
from .world import BOS, EOS, INDEX, PAD, TASKS, answer, encode, stutter

IGNORED = -100  # label of positions that are not predicted


def train_language_model(texts: Sequence[str], steps: int, batch: int = 64, seed: int = 0) -> LlamaForCausalLM:
    """A language model that does all tasks with text. Half of the text is stuttered, as words in speech last long."""
    torch.manual_seed(seed)
    model, generator = language_model(), torch.Generator().manual_seed(seed)
    for _ in _training(model, steps, 2e-3, "language model"):
        ids, labels = [], []
        for number in torch.randint(len(texts), (batch,)).tolist():
            task = TASKS[number % len(TASKS)]
            words = encode(texts[number])
            if torch.rand((), generator=generator) < 0.5:
                words = stutter(words, generator)
            prompt = [BOS, *words, INDEX[f"<{task}>"]]
            reply = [*encode(answer(texts[number], task)), EOS]
            ids.append(torch.tensor(prompt + reply))
            labels.append(torch.tensor([IGNORED] * len(prompt) + reply))
        model(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=PAD),
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        ).loss.backward()
    return model.requires_grad_(False)


def train_encoder(recordings: Sequence[tuple[Tensor, str]], steps: int, batch: int = 24, seed: int = 0) -> Encoder:
    """A recogniser of characters, from frames and what was said."""
    torch.manual_seed(seed)
    model = Encoder()
    for _ in _training(model, steps, 2e-3, "encoder"):
        chosen = [recordings[k] for k in torch.randint(len(recordings), (batch,)).tolist()]
        targets = [_characters(text) for _, text in chosen]
        states, lengths = model(*padded([mel for mel, _ in chosen]))
        F.ctc_loss(
            model.head(states).log_softmax(2).transpose(0, 1),
            torch.cat(targets),
            lengths,
            torch.tensor([len(t) for t in targets]),
            zero_infinity=True,
        ).backward()
    return model.requires_grad_(False)


def _training(model: nn.Module, steps: int, learning_rate: float, name: str):
    """Yield the steps, and apply the gradients after each."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in trange(steps, desc=name, mininterval=5):
        yield step
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def _characters(text: str) -> Tensor:
    return torch.tensor([CHARACTERS.index(c) for c in text.replace(" ", "")])


@torch.no_grad()
def encoder_states(model: Encoder, mels: Sequence[Tensor], batch: int = 50) -> list[Tensor]:
    """The frozen encoder's states of recordings, `(T, WIDTH)` each."""
    found = []
    for first in range(0, len(mels), batch):
        states, lengths = model(*padded(mels[first : first + batch]))
        found += [row[:length].clone() for row, length in zip(states, lengths.tolist(), strict=True)]
    return found


def character_error(model: Encoder, states: Sequence[Tensor], texts: Sequence[str]) -> float:
    """Of the encoder's own transcripts, without spaces."""
    said = []
    for row in states:
        best = model.head(row).argmax(1).unique_consecutive().tolist()
        said.append("".join(CHARACTERS[c] for c in best if c))
    return float(char_error_rate(said, [text.replace(" ", "") for text in texts]))


def padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One tensor, zero behind the sequences, and their lengths."""
    return pad_sequence(list(sequences), batch_first=True), torch.tensor([len(s) for s in sequences])
