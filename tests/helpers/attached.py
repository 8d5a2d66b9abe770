"""What the tests of `otalign.attach` compare: training steps, gradients, and the same losses written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import otalign

from .speech_models import BOS, END, Case


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tol: float = 1e-4) -> None:
    """Compare each gradient relative to its own norm. Differences below a millionth of the largest norm are rounding."""
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    for key, gradient in found.items():
        error = float((gradient - expected[key]).norm())
        assert error <= tol * float(expected[key].norm()) + 1e-6 * largest, key


def step(case: Case, **more) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch."""
    case.model.zero_grad()
    loss = case.model(**case.batch, **more).loss
    loss.backward()
    return loss.detach(), gradients(case.model)


def transcript(case: Case, row: int) -> Tensor:
    """Positions of the transcript's tokens, without the end token."""
    labels = case.batch["labels"][row]
    return ((labels != -100) & (labels != END)).nonzero()[:, 0]


def spelled_out(case: Case, layers=(0,), reg=0.05) -> list[Tensor]:
    """The alignment loss of every row, computed from the hidden states of the model."""
    ids = case.batch["input_ids"]
    hidden = case.model(
        **{k: v for k, v in case.batch.items() if k != "labels"}, output_hidden_states=True
    ).hidden_states
    losses = []
    for row in range(len(ids)):
        places = transcript(case, row)
        words = ids[row, places]
        total = 0
        for layer in layers:
            speech = hidden[layer][row][ids[row] == case.audio_token_id]
            if layers == (0,):
                first = [words.tolist().index(word) for word in dict.fromkeys(words.tolist())]
                text = hidden[0][row, places[first]].detach()
            else:
                with torch.no_grad():
                    alone = torch.cat([torch.tensor([BOS]), words])[None]
                    states = case.model(input_ids=alone, output_hidden_states=True).hidden_states
                text = states[layer][0, 1:]
            result = otalign.solve(speech[None], text[None], reg=reg)
            if layers == (0,):
                cosine = torch.cosine_similarity(speech[:, None], text[None], dim=2)
                total = total + (result.plan()[0].detach() * (1 - cosine)).sum()
            else:
                total = total + result.value[0] / len(layers)
        losses.append(total)
    return losses


def single_rows(case: Case) -> list[dict[str, Tensor]]:
    rows = []
    for k in range(2):
        row = {key: value[k : k + 1] for key, value in case.batch.items()}
        if len(case.batch["input_features"]) == 3:  # Voxtral's chunks: two of the first row, one of the second
            row["input_features"] = case.batch["input_features"][:2] if k == 0 else case.batch["input_features"][2:]
        rows.append(row)
    return rows
