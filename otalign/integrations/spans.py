"""Spans of a batch: hidden states of the speech and of the transcript, cut out of a model's sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .configuration import embedding_scale, first_token
from .hooks import IGNORED, WITHOUT_LABELS, Batch, Call, Missing, hooks_disabled


class Spans(NamedTuple):
    """Speech and transcript of B items. Each starts at position 0; positions from its length on hold arbitrary states."""

    speech: dict[int, Tensor]  # by layer, (B, N, D)
    speech_lengths: Tensor  # (B,)
    text: dict[int, Tensor]  # by layer, (B, M, D)
    text_lengths: Tensor  # (B,)
    text_ids: Tensor  # (B, M)
    label_counts: Tensor  # (B,) labels that the model predicts


@dataclass(frozen=True)
class SpanRules:
    """Which positions of a batch are speech, and which tokens are transcript. See the arguments of `otalign.attach`."""

    speech_mask: Callable[[Batch], Tensor]  # gives a (B, S) mask, True on the speech
    transcript: str | Callable[[Batch], Tensor]  # "labels", "transcript_ids", or gives (B, M) ids, padded with -100
    ignored_tokens: frozenset[int]  # ids of tokens that are left out of the transcript


def cut_spans(model: nn.Module, call: Call, rules: SpanRules, layers: Sequence[int], *, detach_text: bool) -> Spans:
    """Speech and transcript of one batch.

    Raises:
        Missing: if the batch or the output lacks something.
        ValueError, TypeError: for layers that the model has not, and for masks or ids that do not fit the batch.
    """
    states, labels = _states_and_labels(call, layers)
    items, width = states[layers[0]].shape[:2]
    mask = _speech_mask(call.batch, rules, items, width)
    ids = _transcript_ids(call.batch, rules, items)
    rows, in_sequence = Rows.of(call.batch, labels), rules.transcript == "labels"
    if rows.segments is not None and not in_sequence:
        raise ValueError(
            "position_ids: several items are packed in a row, whose transcripts only labels can tell apart"
        )
    frames, speech_lengths = _marked_positions(rows.split(mask))
    kept = _transcript_mask(ids, rules)
    tokens, text_lengths = _marked_positions(rows.split(kept & ~mask if in_sequence else kept))
    ids = rows.take(ids, tokens)
    if in_sequence and list(layers) == [0]:
        text = {0: rows.take(states[0], tokens)}
    else:
        text = text_states(model, ids, text_lengths, layers, detach=detach_text)
        ids = ids[:, : text[layers[0]].shape[1]]
    speech = {layer: rows.take(states[layer], frames) for layer in layers}
    label_counts = rows.split(labels != IGNORED)[:, 1:].sum(1)  # the first position has no predecessor to predict it
    return Spans(speech, speech_lengths, text, text_lengths, ids, label_counts)


def text_states(
    model: nn.Module, ids: Tensor, lengths: Tensor, layers: Sequence[int], *, detach: bool
) -> dict[int, Tensor]:
    """Hidden states of transcripts alone, by layer: `(B, M, D)`. A beginning-of-text token comes first if the model has one.

    Args:
        model: the language model, or the speech language model around it.
        ids: `(B, M)` token ids.
        lengths: `(B,)` tokens of each transcript.
        layers: numbers of the layers, 0 being the embeddings. Deeper ones take a pass of the model, in which all processes
            take part if its parameters are sharded. That pass cuts M to the longest transcript, except under `torch.compile`.
        detach: whether to compute without gradients.
    """
    width = ids.shape[1]
    if not width:
        ids = ids.new_zeros(len(ids), 1)  # models refuse sequences without a position
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    ids = torch.where(inside, ids, 0)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        if list(layers) == [0]:
            embed: Any = model.get_input_embeddings
            return {0: embed()(ids)[:, :width] * embedding_scale(model)}
        if not torch.compiler.is_compiling():
            # This waits for the device, and saves a pass over as many positions as the whole sequence has.
            width = max(lengths.tolist(), default=0)
            ids, inside = ids[:, : max(width, 1)], inside[:, : max(width, 1)]
        begin = first_token(model)
        if begin is not None:
            ids = torch.cat([ids.new_full((len(ids), 1), begin), ids], 1)
            inside = torch.cat([inside.new_ones(len(inside), 1), inside], 1)
        with hooks_disabled():
            output = model(input_ids=ids, attention_mask=inside.long(), output_hidden_states=layers, use_cache=False)
    first = int(begin is not None)
    return {layer: output.hidden_states[layer][:, first : first + width] for layer in layers}


def _states_and_labels(call: Call, layers: Sequence[int]) -> tuple[Sequence[Tensor], Tensor]:
    """The hidden states by layer, `(B, S, D)` each, and the labels `(B, S)`."""
    if call.states is None:
        raise Missing("hidden states: the output has none; states_from= names the submodule that makes them")
    if (labels := call.batch.get("labels")) is None:
        raise Missing(WITHOUT_LABELS)
    if max(layers) >= len(call.states):
        raise ValueError(f"layers: the model has {len(call.states)} hidden states, from 0 on; got {layers}")
    return call.states, labels


def _speech_mask(batch: Batch, rules: SpanRules, items: int, width: int) -> Tensor:
    """True on the speech: `(items, width)`."""
    mask = rules.speech_mask(batch)
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.shape[:1] != (items,) or mask.dim() != 2:
        kind = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"speech_mask_fn: expected a bool mask {(items, width)}, True on the speech, got {kind}")
    if mask.shape[1] != width:
        raise ValueError(
            f"the model made {width} positions of the batch's {mask.shape[1]}: it expands placeholders by itself, "
            "or a prompt that is learned comes first, which attach does not know. Give it batches whose placeholders are "
            "expanded, as its processor makes them"
        )
    return mask.bool()


def _transcript_ids(batch: Batch, rules: SpanRules, items: int) -> Tensor:
    """Token ids of the transcript, -100 where there is none: `(items, M)`."""
    ids: Any
    if callable(rules.transcript):
        ids = rules.transcript(batch)
    else:
        ids = batch.get(rules.transcript)
        if ids is None:
            hint = "" if rules.transcript == "labels" else " (Trainer drops it unless remove_unused_columns=False)"
            raise Missing(rules.transcript + hint)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2 or len(ids) != items:
        kind = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"transcript: expected integer ids ({items}, M), got {kind}")
    return ids


def _transcript_mask(ids: Tensor, rules: SpanRules) -> Tensor:
    """True on the tokens to align: `(B, M)`."""
    ignored = torch.tensor([IGNORED, *sorted(rules.ignored_tokens)], dtype=torch.int64, device="cpu")
    return ~torch.isin(ids, ignored.to(ids.device, non_blocking=True))  # a blocking copy would wait for the device


def _marked_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that a mask `(B, S)` marks, in order and before all others, `(B, S)` or shorter; and their number `(B,)`."""
    order, lengths = (~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(1)
    if (
        mask.device.type == "cpu" and not torch.compiler.is_compiling()
    ):  # on a GPU, reading the lengths would wait for it
        order = order[:, : max(lengths.tolist(), default=0)]
    return order, lengths


class Rows(NamedTuple):
    """The rows of a batch. A row is one item, unless several items are packed in it."""

    segments: Tensor | None  # (B, S) number of each position's item within its row; None = one item per row
    items_per_row: int = 1  # at most; rows with fewer get empty items

    @classmethod
    def of(cls, batch: Batch, labels: Tensor) -> Rows:
        """From `position_ids` `(B, S)`, which start at 0 in every item. If the batch has them, this waits for the device."""
        ids, attention = batch.get("position_ids"), batch.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.shape != labels.shape:
            return cls(None)
        starts = ids == 0
        if isinstance(attention, Tensor) and attention.shape == ids.shape:
            starts = starts & attention.bool()
        segments = (starts.cumsum(1) - 1).clamp(min=0)
        most = int(segments.max()) + 1 if segments.numel() else 1
        return cls(segments, most) if most > 1 else cls(None)

    def split(self, mask: Tensor) -> Tensor:
        """A mask of rows `(B, S)` as a mask of items, `(items, S)`."""
        if self.segments is None:
            return mask
        own = self.segments[:, None] == torch.arange(self.items_per_row, device=mask.device)[:, None]
        return (mask[:, None] & own).flatten(0, 1)

    def take(self, values: Tensor, positions: Tensor) -> Tensor:
        """Values `(B, S)` or `(B, S, D)` at the positions `(items, T)` of each item: `(items, T)` or `(items, T, D)`."""
        if self.segments is not None:
            row = torch.arange(len(values), device=values.device).repeat_interleave(self.items_per_row)
            return values[row[:, None], positions]
        if values.dim() == 2:
            return values.gather(1, positions)
        return values.gather(1, positions[..., None].expand(-1, -1, values.shape[2]))
