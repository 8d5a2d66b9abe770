"""`otalign.attach` on models from outside Hugging Face: with their own masks, inner language models, other outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import otalign
from otalign.speech import OTRegLoss

from ..helpers.problems import close, identical


class Decoder(nn.Module):
    """A language model by embeddings."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, inputs_embeds, labels, output_hidden_states=False):
        hidden = inputs_embeds, self.mix(inputs_embeds).tanh()
        logits = self.head(hidden[1])
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits, hidden_states=hidden if output_hidden_states else None)


class Returned(NamedTuple):
    loss: Tensor
    logits: Any


class Merged(nn.Module):
    """Speech in front of the text, as in SLAM-LLM and Ultravox. `gives` chooses the form of the output."""

    def __init__(self, gives: str):
        super().__init__()
        self.gives, self.project, self.llm = gives, nn.Linear(5, 8), Decoder()

    def forward(self, audio, audio_lengths, tokens, labels):
        embeds = torch.cat([self.project(audio), self.llm.embed(tokens)], 1)
        output = self.llm(inputs_embeds=embeds, labels=labels)
        return {
            "output": output,
            "output and accuracy": (output, 0.5),
            "loss and statistics": (output.loss, {"loss": 1.0}, torch.tensor(2.0)),
            "named tuple": Returned(output.loss, output.logits),
            "dict": {"loss": output.loss, "logits": output.logits},
            "loss": output.loss,
            "logits": output.logits,
        }[self.gives]


def loss_of(output) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output
    return output if isinstance(output, Tensor) else output["loss"] if isinstance(output, dict) else output.loss


@pytest.mark.parametrize(
    "gives", ["output", "output and accuracy", "loss and statistics", "named tuple", "dict", "loss"]
)
def test_models_with_their_own_masks(gives):
    torch.manual_seed(0)
    model = Merged(gives)
    audio, audio_lengths = torch.randn(2, 6, 5), torch.tensor([6, 4])
    tokens = torch.randint(3, 20, (2, 4))
    labels = torch.cat([torch.full((2, 6), -100), tokens], 1)
    arguments = audio, audio_lengths, tokens, labels

    def mask(batch):
        place = torch.arange(batch["labels"].shape[1])
        return place < batch["audio_lengths"][:, None]

    own = loss_of(model(*arguments))
    handle = otalign.attach(model, OTRegLoss(), 0.7, speech_mask_fn=mask, states_from=model.llm, accumulate="mean")
    output = model(*arguments)
    assert type(output) is type(model.eval()(*arguments))
    expected = OTRegLoss()(model.project(audio), model.llm.embed(tokens), audio_lengths, torch.tensor([4, 4]), tokens)
    close(loss_of(output) - own, 0.7 * expected, 1e-5)
    loss_of(output).backward()
    assert model.project.weight.grad.abs().max() > 0
    handle.remove()
    identical(loss_of(model.train()(*arguments)), own)
    assert not model.llm._forward_hooks


def test_a_model_without_a_loss_is_left_alone():
    model = Merged("logits")
    batch = torch.randn(2, 6, 5), None, torch.ones(2, 4).long(), torch.ones(2, 10).long()
    own = model(*batch)
    otalign.attach(model, OTRegLoss(), speech_mask_fn=lambda batch: batch["labels"] > 0, states_from=model.llm)
    with pytest.warns(UserWarning, match="lacks a loss"):
        identical(model(*batch), own)


def test_a_model_without_hidden_states_is_reported():
    model = Merged("dict")
    model.forward = lambda output_hidden_states=None, **batch: Merged.forward(model, **batch)
    mask = torch.ones(2, 10, dtype=torch.bool)
    otalign.attach(model, OTRegLoss(), speech_mask_fn=lambda batch: mask)
    batch = {"audio": torch.randn(2, 6, 5), "audio_lengths": None, "tokens": torch.ones(2, 4).long()}
    with pytest.warns(UserWarning, match="states_from"):
        model(**batch, labels=torch.ones(2, 10).long())
