"""An alignment loss for a speech language model under any trainer, by hooks on the model and nothing else."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import joined_mean_normalizer, processes
from ..functional import ItemLosses, item_losses
from ..modules import SinkhornLoss
from ..problem import one_of
from ..speech import InnerAlignmentLoss, OTRegLoss
from ..speech._states import weighted_mean
from .configuration import Placeholder, audio_token, embedding_scale, expect_unwrapped, first_token, special_tokens
from .hooks import IGNORED, WITHOUT_LABELS, Batch, Call, Missing, Site, site_of, unobserved

ACCUMULATIONS = ("tokens", "mean")
MISSING = ("warn", "raise", "ignore")


def attach(
    model: nn.Module,
    loss: nn.Module,
    weight: float | Callable[[int], float] = 1.0,
    *,
    audio_token_id: int | str = "auto",
    transcript: str | Callable[[Batch], Tensor] = "labels",
    ignore_token_ids: Sequence[int] = (),
    layers: Sequence[int] | None = None,
    speech_mask_fn: Callable[[Batch], Tensor] | None = None,
    states_from: nn.Module | None = None,
    accumulate: str = "tokens",
    on_missing: str = "warn",
    name: str = "otalign",
) -> Attachment:
    """Add a weighted alignment loss to the loss that `model` returns in training.

    Hooks on the model ask for the hidden states that are needed, cut out the speech and the transcript, and add to
    `outputs.loss`. Nothing is patched, the state dict stays as it is, and nothing happens in `eval()` or `generate()`.
    Attach to the model itself, before `torch.compile`, DDP or FSDP wrap it.

    Args:
        model: a speech language model whose forward takes `labels` and returns an output with `loss` and `hidden_states`:
            the Hugging Face contract, in which frames of audio stand where the placeholder token is.
        loss: `otalign.speech.OTRegLoss`, `otalign.speech.InnerAlignmentLoss` or `otalign.SinkhornLoss`, of which the text is a
            constant to the gradient; the others have `detach_text`.
        weight: of the loss; or a function of the global step, which `OTAlignCallback` or `set_step` tell. (The schedule of
            OTRegLoss comes on top.)
        audio_token_id: the placeholder of audio in `input_ids`; `"auto"` = as the model's configuration says.
        transcript: where the text is. `"labels"`: in the sequence, where labels are not -100 (recognition).
            `"transcript_ids"`: the batch has `transcript_ids` `(B, M)`, padded with -100 (translation, chat); under Hugging
            Face's Trainer this takes `remove_unused_columns=False`. Or a function of the batch that returns such ids.
        ignore_token_ids: tokens of the transcript to leave out, besides the end, begin and padding tokens of the configuration.
        layers: hidden states to align, 0 being the embeddings; None = those of the loss, or 0. Text of deeper layers comes from
            a pass of the model over the transcript alone; without gradients, unless the loss has `detach_text=False`.
        speech_mask_fn: for models without a placeholder: the batch to a `(B, S)` bool mask, True on the speech.
        states_from: the submodule whose hidden states are meant, if the model itself returns none; None = the model.
        accumulate: how items are weighed. `"tokens"`: by their number of labels, over `num_items_in_batch` if the trainer gives
            it, so that accumulation over batches of any size is exact. `"mean"`: alike. Either way sums are over the items
            of all processes that train together.
        on_missing: what to do if a batch in training has no labels, loss or transcript: `"warn"` once, `"raise"`, `"ignore"`.
        name: what the keys of `metrics()` begin with.

    Returns:
        An `Attachment`, with `metrics()`, `set_step(step)` and `remove()`.

    Raises:
        ValueError, TypeError: for a wrapped model, an unknown loss, or a model without a span of speech.

    Example::

        handle = otalign.attach(model, otalign.speech.OTRegLoss(), weight=0.1)
    """
    one_of("accumulate", accumulate, ACCUMULATIONS)
    one_of("on_missing", on_missing, MISSING)
    expect_unwrapped(model)
    _expect_loss(loss)
    _expect_weight(weight)
    if not callable(transcript):
        one_of("transcript", transcript, ("labels", "transcript_ids"))
    for argument, given in (("layers", layers), ("ignore_token_ids", ignore_token_ids)):
        if given is not None and not isinstance(given, Iterable):
            raise TypeError(f"{argument}: expected a sequence of integers, got {given!r}")
    if states_from is not None and not isinstance(states_from, nn.Module):
        raise TypeError(f"states_from: expected a torch.nn.Module, got {type(states_from).__name__}")
    if speech_mask_fn is None and audio_token_id == "auto":
        audio_token_id = audio_token(model)
    if speech_mask_fn is None and (isinstance(audio_token_id, bool) or not isinstance(audio_token_id, int)):
        raise TypeError(f"audio_token_id: expected an integer or 'auto', got {audio_token_id!r}")
    left_out = frozenset(ignore_token_ids) | special_tokens(model)
    if isinstance(audio_token_id, int):
        left_out |= {audio_token_id}
        speech_mask_fn = speech_mask_fn or Placeholder(audio_token_id)
    assert speech_mask_fn is not None
    attachment = Attachment(
        loss=loss,
        weight=weight,
        layers=_layers(loss, layers),
        name=name,
        _site=site_of(model),
        _speech_mask=speech_mask_fn,
        _transcript=transcript,
        _left_out=left_out,
        _accumulate=accumulate,
        _on_missing=on_missing,
    )
    attachment._site.add(attachment, None if states_from is model else states_from)
    return attachment


def _expect_loss(loss: nn.Module) -> None:
    kinds = OTRegLoss, InnerAlignmentLoss, SinkhornLoss
    if not isinstance(loss, kinds):
        raise TypeError(f"loss: expected OTRegLoss, InnerAlignmentLoss or SinkhornLoss, got {type(loss).__name__}")
    if type(loss).forward not in [kind.forward for kind in kinds]:
        raise TypeError(
            f"loss: attach takes the losses of single items, and not what {type(loss).__name__}.forward makes"
        )
    if isinstance(loss, SinkhornLoss) and loss.options["reduction"] != "mean":
        raise ValueError(
            f"loss: attach weighs the items itself; expected reduction='mean', got {loss.options['reduction']!r}"
        )


def _expect_weight(weight: Any) -> None:
    if callable(weight) or (isinstance(weight, Tensor) and weight.dim() == 0):
        return
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        raise TypeError(f"weight: expected a number or a function of the step, got {weight!r}")
    if not (float(weight) >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight: expected a finite number >= 0, got {weight}")


def _layers(loss: nn.Module, layers: Sequence[int] | None) -> list[int]:
    """Those that are asked for, which the loss has to be able to take."""
    wanted = list(layers) if layers is not None else list(getattr(loss, "layers", [0]))
    if not wanted or min(wanted) < 0:
        raise ValueError(f"layers: expected numbers >= 0, got {wanted}")
    if isinstance(loss, InnerAlignmentLoss):
        if wanted != loss.layers:
            raise ValueError(f"layers: the loss has {loss.layers}, got {wanted}")
    elif len(wanted) > 1:
        raise ValueError(f"layers: {type(loss).__name__} takes one; InnerAlignmentLoss takes several, got {wanted}")
    return wanted


class Spans(NamedTuple):
    """Speech and text of a batch, cut out of its sequences and put in front."""

    speech: dict[int, Tensor]  # by layer, (B, S, D)
    speech_lengths: Tensor  # (B,)
    text: dict[int, Tensor]  # by layer, (B, T, D)
    text_lengths: Tensor  # (B,)
    text_ids: Tensor  # (B, T)
    label_counts: Tensor  # (B,)


@dataclass(eq=False)
class Attachment:
    """A loss that is attached to a model: its metrics, its step, and the way to take it off again.

    Attributes:
        loss: the module that was given.
        weight: a number, or a function of the step.
        layers: of the hidden states that are aligned.
        name: what the keys of `metrics()` begin with.
        step: the global step; counts calls in training until `set_step` is used.
    """

    loss: nn.Module
    weight: float | Callable[[int], float]
    layers: list[int]
    name: str
    _site: Site = field(repr=False)
    _speech_mask: Callable[[Batch], Tensor] = field(repr=False)
    _transcript: str | Callable[[Batch], Tensor] = field(repr=False)
    _left_out: frozenset[int] = field(repr=False)
    _accumulate: str = field(repr=False)
    _on_missing: str = field(repr=False)
    step: int = 0
    _told: bool = field(default=False, repr=False)  # whether somebody sets the step
    _warned: bool = field(default=False, repr=False)
    _told_of_none: bool = field(default=False, repr=False)
    _counted_calls: bool | None = field(default=None, repr=False)  # what the loss did before somebody set the step
    _sums: Tensor | None = field(default=None, repr=False)  # of items, their loss, error and iterations; items left out
    _last: tuple[Tensor, Tensor | int] | None = field(default=None, repr=False)  # weight and normaliser of the last run

    def set_step(self, step: int) -> None:
        """Tell the trainer's global step, which schedules follow from then on."""
        self.step, self._told = step, True
        if isinstance(self.loss, OTRegLoss):
            if self._counted_calls is None:
                self._counted_calls = self.loss.count_calls
            self.loss.count_calls = False
            self.loss.set_step(step)

    def current_weight(self) -> Tensor:
        """What the loss is multiplied with at the present step: a scalar tensor."""
        given: Any = self.weight(self.step) if callable(self.weight) else self.weight
        place = given.device if isinstance(given, Tensor) else "cpu"
        weight = torch.as_tensor(given, dtype=torch.float64, device=place)
        return self.loss.current_weight() * weight if isinstance(self.loss, OTRegLoss) else weight

    def metrics(self, *, synchronise: bool = False) -> dict[str, float]:
        """Means over the items since the last call, nothing if there were none; waits for the device.

        Args:
            synchronise: whether to sum over all processes, which then all have to call.

        Returns:
            `<name>/loss` without its weight, `<name>/weight`, `<name>/marginal_error`, `<name>/n_iter`, and
            `<name>/skipped`, the number of items that had no speech or no text. The weight is that of the last step.
        """
        sums, self._sums = self._sums, None
        if synchronise and processes() > 1:
            sums = torch.zeros(5, dtype=torch.float64, device=self._site.device) if sums is None else sums
            dist.all_reduce(sums)
        if sums is None:
            return {}
        items, loss, error, n_iter, skipped = sums.tolist()
        totals = {"loss": loss, "marginal_error": error, "n_iter": n_iter}
        values = {key: total / items if items else 0.0 for key, total in totals.items()}
        weight = self.current_weight() if self._last is None else self._last[0]
        values |= {"weight": float(weight), "skipped": skipped}
        if not items and not self._told_of_none and self._on_missing != "ignore":
            self._told_of_none = True
            warnings.warn(
                "no item had both speech and text: is that the placeholder of audio, or the mask?", stacklevel=2
            )
        return {f"{self.name}/{key}": value for key, value in values.items()}

    def remove(self) -> None:
        """Take the loss off the model."""
        self._site.remove(self)
        if isinstance(self.loss, OTRegLoss) and self._counted_calls is not None:
            self.loss.count_calls = self._counted_calls

    def added(self, model: nn.Module, call: Call) -> Tensor | None:
        """What is added to the model's loss for this batch; None if the batch lacks something, of which the user hears."""
        try:
            spans = self._spans(model, call)
        except Missing as what:
            self.absent(model, call, str(what))
            return None
        losses = self._items(spans)
        filled = (spans.speech_lengths > 0) & (spans.text_lengths > 0)
        shares = spans.label_counts if self._accumulate == "tokens" else torch.ones_like(spans.label_counts)
        shares = torch.where(filled, shares, 0).to(losses.loss.dtype)
        if self._last is not None and _recomputes():
            weight, normalizer = self._last
        else:
            weight, normalizer = self.current_weight(), self._normalizer(shares, call)
            self._last = weight, normalizer
            self._record(losses, filled)
            if not self._told:
                self.step += 1
                if isinstance(self.loss, OTRegLoss) and self.loss.count_calls:
                    self.loss.step += 1
        loss = weighted_mean(losses.loss, filled, shares, normalizer)
        return weight.to(loss.device, loss.dtype) * loss

    def absent(self, model: nn.Module, call: Call, what: str) -> None:
        """Say, as the user wished it, that a batch lacks something; and do what the other processes wait for."""
        message = f"no alignment loss for this batch, which lacks {what}"
        if self._on_missing == "raise":
            raise ValueError(message)
        if self._on_missing == "warn" and not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)
        if processes() > 1 and not _recomputes():
            if self.layers != [0]:  # parameters that are sharded are gathered by all at once
                nothing = torch.zeros(1, dtype=torch.int64, device=self._site.device)
                self._text(model, nothing[None], nothing)
            self._normalizer(torch.zeros(1, dtype=torch.float32, device=self._site.device), call)

    def _spans(self, model: nn.Module, call: Call) -> Spans:
        batch, states = call.batch, call.states
        if states is None:
            raise Missing("hidden states: the output has none; states_from= names the submodule that makes them")
        if (labels := batch.get("labels")) is None:
            raise Missing(WITHOUT_LABELS)
        if max(self.layers) >= len(states):
            raise ValueError(f"layers: the model has {len(states)} hidden states, from 0 on; got {self.layers}")
        mask, (items, width) = self._speech_mask(batch), states[self.layers[0]].shape[:2]
        if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.shape[:1] != (items,) or mask.dim() != 2:
            kind = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"speech_mask_fn: expected a bool mask {(items, width)}, True on the speech, got {kind}")
        if mask.shape[1] != width:
            raise ValueError(
                f"the model made {width} positions of the batch's {mask.shape[1]}: it expands placeholders by itself, "
                "or a prompt that is learned comes first, which attach does not know. Give it batches whose placeholders are "
                "expanded, as its processor makes them"
            )
        mask = mask.bool()
        ids = self._transcript_ids(batch)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2 or len(ids) != items:
            kind = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"transcript: expected integer ids ({items}, M), got {kind}")
        rows = Rows.of(batch, labels)
        if rows.segments is not None and self._transcript != "labels":
            raise ValueError(
                "position_ids: several items are packed in a row, whose transcripts only labels can tell apart"
            )
        positions, n = _front(rows.apart(mask))
        kept = ids != IGNORED
        if self._transcript == "labels":
            kept = kept & ~mask
        for token in self._left_out:
            kept = kept & (ids != token)
        places, m = _front(rows.apart(kept))
        ids = rows.take(ids, places)
        if self._transcript == "labels" and self.layers == [0]:
            text = {0: rows.take(states[0], places)}
        else:
            text = self._text(model, ids, m)
            ids = ids[:, : text[self.layers[0]].shape[1]]
        speech = {layer: rows.take(states[layer], positions) for layer in self.layers}
        return Spans(speech, n, text, m, ids, rows.apart(labels != IGNORED)[:, 1:].sum(1))

    def _transcript_ids(self, batch: Batch) -> Tensor:
        if callable(self._transcript):
            return self._transcript(batch)
        if batch.get(self._transcript) is None:
            hint = "" if self._transcript == "labels" else " (Trainer drops it unless remove_unused_columns=False)"
            raise Missing(self._transcript + hint)
        return batch[self._transcript]

    def _text(self, model: nn.Module, ids: Tensor, lengths: Tensor) -> dict[int, Tensor]:
        """States of the transcript alone, behind the token that begins a text if the language model has one."""
        width = ids.shape[1]
        if not width:
            ids = ids.new_zeros(len(ids), 1)  # models refuse sequences without a position
        inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        ids = torch.where(inside, ids, 0)
        constant = getattr(self.loss, "detach_text", True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            if self.layers == [0]:
                embed: Any = model.get_input_embeddings
                return {0: embed()(ids)[:, :width] * embedding_scale(model)}
            if not torch.compiler.is_compiling():
                # A wait for the device, for a pass that is as long as the longest text and not as the whole sequence.
                width = max(lengths.tolist(), default=0)
                ids, inside = ids[:, : max(width, 1)], inside[:, : max(width, 1)]
            begin = first_token(model)
            if begin is not None:
                ids = torch.cat([ids.new_full((len(ids), 1), begin), ids], 1)
                inside = torch.cat([inside.new_ones(len(inside), 1), inside], 1)
            with unobserved():
                output = model(
                    input_ids=ids, attention_mask=inside.long(), output_hidden_states=self.layers, use_cache=False
                )
        first = int(begin is not None)
        return {layer: output.hidden_states[layer][:, first : first + width] for layer in self.layers}

    def _items(self, spans: Spans) -> ItemLosses:
        lengths = spans.speech_lengths, spans.text_lengths
        if isinstance(self.loss, InnerAlignmentLoss):
            return self.loss.items(spans.speech, spans.text, *lengths)
        x, y = spans.speech[self.layers[0]], spans.text[self.layers[0]]
        if isinstance(self.loss, OTRegLoss):
            return self.loss.items(x, y, *lengths, spans.text_ids)
        assert isinstance(self.loss, SinkhornLoss)
        options = {key: value for key, value in self.loss.options.items() if key != "reduction"}
        return item_losses(x, y.detach(), *lengths, **options)

    def _normalizer(self, shares: Tensor, call: Call) -> Tensor | int:
        """What the weighted sum is divided by, so that the mean of the processes' gradients is that of the joined batch."""
        total = call.batch.get("num_items_in_batch") if self._accumulate == "tokens" else None
        if total is not None:
            return total.to(shares.device).clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
        return joined_mean_normalizer(shares)

    @torch.no_grad()
    def _record(self, losses: ItemLosses, filled: Tensor) -> None:
        values = (filled, losses.loss, losses.error, losses.n_iter)
        kept = [torch.where(filled, value.detach().double(), 0).sum() for value in values]
        sums = torch.stack([*kept, (~filled).sum().double()])
        self._sums = sums if self._sums is None else self._sums + sums


def expect_names(handles: Sequence[Attachment]) -> None:
    """Refuse handles whose metrics could not be told apart, or none."""
    if not handles:
        raise ValueError("handles: expected at least one, as otalign.attach returns it")
    names = [handle.name for handle in handles]
    if len(set(names)) < len(names):
        raise ValueError(f"handles: expected different names, which attach(name=) gives, got {names}")


def _recomputes() -> bool:
    """Whether this is a second run of the same step, for a checkpoint around the model: then a backward pass is under way."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _front(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions `(B, S)` of what is marked, in order and before the rest, and how many there are `(B,)`."""
    order, lengths = (~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(1)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU it would have to be waited for
        order = order[:, : max(lengths.tolist(), default=0)]
    return order, lengths


class Rows(NamedTuple):
    """The rows of a batch, which are its items unless several are packed in one."""

    segments: Tensor | None  # (B, S) number of each position's item in its row; None = one item a row
    most: int = 1  # items in a row

    @classmethod
    def of(cls, batch: Batch, labels: Tensor) -> Rows:
        """Read off `position_ids`, which begin at 0 with every item; that is waited for, if they are given."""
        ids, attention = batch.get("position_ids"), batch.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.shape != labels.shape:
            return cls(None)
        starts = ids == 0
        if isinstance(attention, Tensor) and attention.shape == ids.shape:
            starts = starts & attention.bool()
        segments = (starts.cumsum(1) - 1).clamp(min=0)
        most = int(segments.max()) + 1 if segments.numel() else 1
        return cls(segments, most) if most > 1 else cls(None)

    def apart(self, mask: Tensor) -> Tensor:
        """A mask `(B, S)` as one of items, `(items, S)`."""
        if self.segments is None:
            return mask
        own = self.segments[:, None] == torch.arange(self.most, device=mask.device)[:, None]
        return (mask[:, None] & own).flatten(0, 1)

    def take(self, values: Tensor, positions: Tensor) -> Tensor:
        """Of values `(B, S)` or `(B, S, D)` those at the positions `(items, T)`."""
        if self.segments is not None:
            row = torch.arange(len(values), device=values.device).repeat_interleave(self.most)
            return values[row[:, None], positions]
        if values.dim() == 2:
            return values.gather(1, positions)
        return values.gather(1, positions[..., None].expand(-1, -1, values.shape[2]))
