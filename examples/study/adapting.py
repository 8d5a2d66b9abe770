"""One run of the study: an adapter is trained on one voice and one task, and measured on other voices and tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import word_error_rate
from transformers import LlamaForCausalLM

from otalign import speech

from .frozen import IGNORED, padded
from .models import LAYERS, Adapter
from .world import BOS, EOS, INDEX, PAD, SPECIAL, TASKS, answer, decode, encode

TRAINED_TASK = "repeat"  # the language model knows the other tasks from text alone
LONGEST_ANSWER = 9
WARMUP = 100  # steps over which the regulariser's weight rises


@dataclass(frozen=True)
class Arm:
    """The regulariser of a run: nothing, OTReg on the embeddings, or AI-STA's loss on hidden states."""

    method: str = "none"  # "otreg" or "aista"
    weight: float = 0.0
    layers: tuple[int, ...] = ()  # of AI-STA; 0 are the embeddings

    def __str__(self) -> str:
        layers = " ".join(map(str, self.layers))
        names = {"none": "none", "otreg": f"OTReg {self.weight:g}", "aista": f"AI-STA {self.weight:g}, layers {layers}"}
        return names[self.method]


@dataclass(frozen=True)
class Recordings:
    """What one voice said: the frozen encoder's states `(T, WIDTH)` of every sentence."""

    voice: str
    states: list[Tensor]
    texts: list[str]


@dataclass(frozen=True)
class Run:
    """The rows of a run, for two tables."""

    errors: list[dict[str, Any]]  # by checkpoint and voice
    layers: list[dict[str, Any]]  # by voice and layer, at the end


class Text:
    """The language model's view of transcripts: embeddings and hidden states of their words."""

    def __init__(self, model: LlamaForCausalLM, texts: Sequence[str]) -> None:
        self.ids, self.lengths = padded([torch.tensor(encode(text)) for text in texts])
        self.embeddings = model.get_input_embeddings()(self.ids)
        start = torch.full((len(texts), 1), BOS)
        with torch.no_grad():
            states = model.model(input_ids=torch.cat([start, self.ids], 1), output_hidden_states=True).hidden_states
        self.states = [layer[:, 1:] for layer in states]


def train(
    model: LlamaForCausalLM,
    data: Recordings,
    tests: dict[str, Sequence[Recordings]],
    arm: Arm,
    seed: int,
    checkpoints: Sequence[int],
    batch: int = 16,
) -> Run:
    """Train an adapter up to the last of `checkpoints`, and measure it at each on `tests`, by split.

    Two arms with the same seed begin with the same adapter and see the same batches.
    """
    torch.manual_seed(seed)
    adapter, order = Adapter(), torch.Generator().manual_seed(seed)
    regularise = regulariser(arm)
    steps = checkpoints[-1]
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    run = Run([], [])
    label = {"arm": str(arm), "seed": seed}
    for step in range(1, steps + 1):
        chosen = torch.randint(len(data.texts), (batch,), generator=order).tolist()
        texts = [data.texts[k] for k in chosen]
        embedded, lengths = adapter(*padded([data.states[k] for k in chosen]))
        replies = [[*encode(answer(text, TRAINED_TASK)), EOS] for text in texts]
        inputs, labels = assemble(model, embedded, lengths, TRAINED_TASK, replies)
        outputs = model(inputs_embeds=inputs, labels=labels, output_hidden_states=bool(arm.layers))
        loss = outputs.loss
        if regularise is not None:
            hidden = [state[:, 1 : 1 + embedded.shape[1]] for state in outputs.hidden_states or ()]
            loss = loss + regularise(embedded, hidden, lengths, Text(model, texts), step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in checkpoints:
            for split, recordings in tests.items():
                for voice in recordings:
                    where = {**label, "step": step, "split": split, "voice": voice.voice}
                    errors, layers = measure(model, adapter, voice)
                    run.errors.append({**where, **errors})
                    if step == steps:
                        run.layers.extend({**where, **layer} for layer in layers)
    return run


def regulariser(arm: Arm):
    """The arm's loss, a function of `(embedded, hidden, lengths, text, step)`, or None."""
    if arm.method == "otreg":
        otreg = speech.OTRegLoss(weight=arm.weight, warmup_steps=WARMUP)
        return lambda embedded, hidden, lengths, text, step: otreg(
            embedded, text.embeddings, lengths, text.lengths, text.ids
        )
    if arm.method == "aista":
        inner = speech.InnerAlignmentLoss(arm.layers)
        return lambda embedded, hidden, lengths, text, step: (
            arm.weight * min(step / WARMUP, 1) * inner(hidden, text.states, lengths, text.lengths)
        )
    return None


def assemble(
    model: LlamaForCausalLM, embedded: Tensor, lengths: Tensor, task: str, replies: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """The sequences <bos> speech <task> reply, padded at the right, and the labels of the replies."""
    embed = model.get_input_embeddings()
    start, ask = embed(torch.tensor([[BOS], [INDEX[f"<{task}>"]]]))
    rows, labels = [], []
    for row, length, reply in zip(embedded, lengths.tolist(), replies, strict=True):
        rows.append(torch.cat([start, row[:length], ask, embed(torch.tensor(reply, dtype=torch.int64))]))
        labels.append(torch.tensor([IGNORED] * (length + 2) + list(reply)))
    return pad_sequence(rows, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, adapter: Adapter, recordings: Recordings
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Word errors of every task and measures of the gap between speech and text; and the latter by layer."""
    embedded, lengths = adapter(*padded(recordings.states))
    text = Text(model, recordings.texts)
    found = {f"{task}_error": word_error(model, embedded, lengths, task, recordings.texts) for task in TASKS}

    start = model.get_input_embeddings()(torch.full((len(embedded), 1), BOS))
    outputs = model.model(inputs_embeds=torch.cat([start, embedded], 1), output_hidden_states=True)
    pair = [state[:, 1:] for state in outputs.hidden_states], text.states, lengths, text.lengths
    cosine, distance = (speech.alignment_path_score(*pair, metric=metric) for metric in ("cosine", "euclidean"))
    sequence, retrieval = speech.sequence_similarity(*pair), speech.retrieval_scores(*pair)
    found |= {
        "aps_cosine": cosine.score.mean().item(),
        "aps_euclidean": distance.score.mean().item(),
        "sequence_cosine": sequence.mean().item(),
        "monotonicity": cosine.monotonicity.mean().item(),
        "consistency": cosine.consistency.mean().item(),
        "words_found": words_found(model, embedded, lengths, text),
    }
    layers = [
        {
            "layer": layer,
            "aps_cosine": cosine.per_layer[layer].mean().item(),
            "aps_euclidean": distance.per_layer[layer].mean().item(),
            "sequence_cosine": sequence[layer].mean().item(),
            "mrr": retrieval.mrr[layer].item(),
            "recall_at_1": retrieval.recall_at_1[layer].item(),
        }
        for layer in range(LAYERS + 1)
    ]
    return found, layers


def word_error(model: LlamaForCausalLM, embedded: Tensor, lengths: Tensor, task: str, texts: Sequence[str]) -> float:
    """Word error rate of greedy answers to `<bos> speech <task>`."""
    prompts, _ = assemble(model, embedded, lengths, task, [()] * len(texts))
    # Answers begin at the right end of every row.
    longest, sizes = prompts.shape[1], lengths + 2
    places = torch.arange(longest) - (longest - sizes)[:, None]
    prompts = prompts.gather(1, places.clamp(min=0)[..., None].expand_as(prompts))
    replies = model.generate(
        inputs_embeds=prompts,
        attention_mask=(places >= 0).long(),
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        pad_token_id=PAD,
    )
    return float(word_error_rate([decode(r) for r in replies.tolist()], [answer(text, task) for text in texts]))


def text_error(model: LlamaForCausalLM, task: str, texts: Sequence[str]) -> float:
    """The same for the transcripts in place of the speech."""
    text = Text(model, texts)
    return word_error(model, text.embeddings, text.lengths, task, texts)


def words_found(model: LlamaForCausalLM, embedded: Tensor, lengths: Tensor, text: Text) -> float:
    """Share of the spoken words that are the nearest word, by the cosine, of at least one frame."""
    words = model.get_input_embeddings().weight[len(SPECIAL) :]
    nearest = torch.cosine_similarity(embedded[:, :, None], words, dim=3).argmax(2) + len(SPECIAL)
    nearest = nearest.masked_fill(torch.arange(nearest.shape[1]) >= lengths[:, None], PAD)
    spoken = text.ids != PAD
    return float((nearest[:, :, None] == text.ids[:, None]).any(1)[spoken].float().mean())
