"""Speech aligned to its transcript by optimal transport, learnt from scratch on one CPU core in about half a minute.

One small convolutional encoder reads log-mel frames, another reads the characters of the transcript. The only criterion
is `otalign.SinkhornLoss`, the cost of transporting the frames to the characters. Training uses no time labels. The word
times of the synthesiser measure the result on held-out sentences. The run ends with a table and a picture of the
transport plan.

Attraction alone does not align: the transport is cheapest if all frames and characters are one point. The alignment
needs three things, and examples/README.md has the figures without each of them:

1. Contrast. The loss is a cross-entropy: the transport value selects the transcript of a recording among the other
   transcripts of the batch, and among copies of the right transcript with its words in another order.
2. A temporal prior. Transport ignores order: without `otalign.Prior`, it cannot distinguish the copies of a letter.
3. A relaxed text side. Strict uniform marginals give every character the same share of the frames, so that little more
   than the diagonal is possible. With `unbalanced=(inf, rho)` every frame is transported, and the shares may differ.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from aligner import FRAME, Aligner, Settings, alignment_loss, make_criterion, plans
from picture import draw
from speech import Utterance, load
from torch import Tensor, nn
from tqdm import tqdm

TOLERANCE = 0.1  # seconds


def split(utterances: list[Utterance]) -> tuple[list[Utterance], list[Utterance]]:
    """Training and held-out recordings: every fifth sentence is held out, in both voices."""
    held_out = [u for u in utterances if u.number % 5 == 1]
    return [u for u in utterances if u.number % 5 != 1], held_out


def train(model: Aligner, utterances: list[Utterance], settings: Settings) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    sentences: dict[int, list[Utterance]] = {}
    for u in utterances:
        sentences.setdefault(u.number, []).append(u)
    voices = list(sentences.values())
    criterion = make_criterion(settings)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    model.train()
    with tqdm(range(settings.steps), desc="training", unit="step", mininterval=1) as bar:
        for _ in bar:
            # One voice of each sentence: two recordings of one transcript would be false negatives of each other.
            chosen = torch.randperm(len(voices), generator=generator)[: settings.batch].tolist()
            batch = [voices[k][int(torch.randint(len(voices[k]), (), generator=generator))] for k in chosen]
            loss = alignment_loss(model, criterion, batch, settings, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def word_errors(plan: Tensor, utterance: Utterance) -> list[float]:
    """The distance, for every word, from its middle to the mean time of the frames that the plan gives to it."""
    times = FRAME * torch.arange(len(plan))
    errors = []
    for first, last, start, end in utterance.words:
        mass = plan[:, first:last].sum(1)
        errors.append(abs(float(mass @ times / mass.sum()) - (start + end) / 2))
    return errors


def diagonal_errors(utterance: Utterance) -> list[float]:
    """The same for characters that are spread evenly over the recording, without a model."""
    pace = utterance.duration / len(utterance.text)
    return [abs((first + last) / 2 * pace - (start + end) / 2) for first, last, start, end in utterance.words]


def figures(errors: list[list[float]]) -> tuple[float, float]:
    """Mean error in milliseconds and the share of words within TOLERANCE."""
    flat = torch.tensor([error for row in errors for error in row])
    return 1000 * flat.mean().item(), (flat <= TOLERANCE).float().mean().item()


def plan_figures(plans: list[Tensor], utterances: list[Utterance]) -> tuple[float, float]:
    return figures([word_errors(p, u) for p, u in zip(plans, utterances, strict=True)])


def run(settings: Settings, utterances: list[Utterance]) -> tuple[list[Tensor], list[Tensor]]:
    """Train a fresh model; return the held-out plans before and after."""
    torch.manual_seed(settings.seed)
    training, held_out = split(utterances)
    model = Aligner()
    before = plans(model, held_out, settings)
    train(model, training, settings)
    return before, plans(model, held_out, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small: more threads gain little, and cost much on a busy machine
    settings = replace(Settings(), steps=args.steps, seed=args.seed)

    utterances = load()
    training, held_out = split(utterances)
    words = sum(len(u.words) for u in held_out)
    size = sum(p.numel() for p in Aligner().parameters())
    print(f"{len(training)} recordings to train on, {len(held_out)} held out ({words} words), {size:,} parameters")
    began = time.perf_counter()
    before, after = run(settings, utterances)
    seconds = time.perf_counter() - began

    prior_alone = plans(Aligner(), held_out, settings, constant_cost=True)
    rows = {
        "characters spread evenly": figures([diagonal_errors(u) for u in held_out]),
        "temporal prior alone": plan_figures(prior_alone, held_out),
        "before training": plan_figures(before, held_out),
        f"after {settings.steps} steps, {seconds:.0f} s": plan_figures(after, held_out),
    }
    print(f"\n{'words of held-out sentences':32}{'mean error':>12}{f'within {1000 * TOLERANCE:.0f} ms':>16}")
    for name, (error, share) in rows.items():
        print(f"{name:32}{error:>9.0f} ms{share:>16.0%}")

    k = next(k for k, u in enumerate(held_out) if u.number == 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(
        args.out,
        held_out[k],
        {
            "before training": (before[k], plan_figures(before, held_out)),
            "after training": (after[k], plan_figures(after, held_out)),
        },
        frame=FRAME,
    )
    print(f"\npicture: {args.out}")


if __name__ == "__main__":
    main()
