"""Does training with the loss move speech towards its text?"""

import pytest
import torch

import otalign
from otalign import Prior

TEXTS, STATES, WORDS = 6, 16, 12


@pytest.fixture
def corpus():
    """Sentences of word vectors, and "speech": each word for some frames, in another basis, with noise."""
    generator = torch.Generator().manual_seed(11)
    words = torch.nn.functional.normalize(torch.randn(WORDS, STATES, generator=generator), dim=-1)
    basis = torch.linalg.qr(torch.randn(STATES, STATES, generator=generator)).Q
    lengths = torch.randint(4, 8, (TEXTS,), generator=generator)
    texts, speeches, owners = [], [], []
    for length in lengths.tolist():
        ids = torch.randperm(WORDS, generator=generator)[:length]
        repeats = torch.randint(2, 6, (length,), generator=generator)
        owner = torch.arange(length).repeat_interleave(repeats)
        frames = words[ids][owner] @ basis
        texts.append(words[ids])
        speeches.append(frames + 0.1 * torch.randn(frames.shape, generator=generator))
        owners.append(owner)
    pad = torch.nn.utils.rnn.pad_sequence
    speech_lengths = torch.tensor([len(owner) for owner in owners])
    return pad(speeches, True), pad(texts, True), speech_lengths, lengths, owners


def accuracy(speech, text, speech_lengths, text_lengths, owners, **options) -> float:
    """The share of frames whose most likely token is the right one."""
    plan = otalign.solve(speech.detach(), text, speech_lengths, text_lengths, **options).plan()
    right = [
        float((plan[index, : len(owner)].argmax(-1) == owner).float().mean()) for index, owner in enumerate(owners)
    ]
    return sum(right) / len(right)


def train(model, loss, steps=120):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("objective", ["value", "plan_cost", "transport", "divergence"])
def test_alignment_emerges(corpus, objective):
    """From an untrained adapter, with a temporal prior as the only information on time."""
    speech, text, speech_lengths, text_lengths, owners = corpus
    model = torch.nn.Linear(STATES, STATES)
    options = {"reg": 0.1, "prior": Prior.quadratic(2.0), "backend": "cpu"}
    criterion = otalign.SinkhornLoss(objective=objective, **options)
    lengths = (speech_lengths, text_lengths)
    alone = {"reg": 0.1, "backend": "cpu"}  # measured without the prior
    before = accuracy(model(speech), text, *lengths, owners, **alone)
    losses = train(model, lambda: criterion(model(speech), text, *lengths))
    after = accuracy(model(speech), text, *lengths, owners, **alone)
    assert losses[-1] < 0.7 * losses[0]
    assert before < 0.5
    assert after > 0.8


def test_backends_train_alike(corpus):
    """The same steps on the reference and on the engine give the same model."""
    speech, text, speech_lengths, text_lengths, _ = corpus
    speech, text = speech.double(), text.double()
    curves = []
    for backend in ("reference", "cpu"):
        torch.manual_seed(0)
        model = torch.nn.Linear(STATES, STATES).double()
        criterion = otalign.SinkhornLoss(reg=0.1, accelerate=False, backend=backend)
        curves.append(train(model, lambda c=criterion, m=model: c(m(speech), text, speech_lengths, text_lengths), 15))
    for reference, engine in zip(*curves, strict=True):
        assert abs(reference - engine) < 1e-7


def test_instead_of_ctc(corpus):
    """`nn.CTCLoss` takes (log_probs, targets, input_lengths, target_lengths); the swap is one line."""
    speech, text, speech_lengths, text_lengths, _ = corpus
    model = torch.nn.Linear(STATES, STATES)
    loss = otalign.SinkhornLoss()(model(speech), text, speech_lengths, text_lengths)
    assert loss.shape == ()
    loss.backward()
    assert model.weight.grad.abs().sum() > 0
