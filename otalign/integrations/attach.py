"""`attach` and its handle: an alignment loss on a speech language model under any trainer, by forward hooks."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import joined_mean_normalizer, processes
from ..functional import ItemLosses, item_losses
from ..modules import SinkhornLoss
from ..options import one_of
from ..speech import InnerAlignmentLoss, OTRegLoss
from ..speech._states import weighted_mean
from ..warm_starts import Ids
from .configuration import Placeholder, audio_token, expect_unwrapped, special_tokens
from .hooks import Batch, Call, HookSet, Missing, hooks_on
from .spans import SpanRules, Spans, cut_spans, text_states

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
    ids: str | Callable[[Batch], Ids] | None = None,
) -> Attachment:
    """Add a weighted alignment loss to the loss that `model` returns in training.

    Hooks on the model request the hidden states, cut out the speech and the transcript, and add the alignment loss to
    `outputs.loss`. No method is patched, the state dict stays the same, and the hooks do nothing in `eval()` and `generate()`.
    Attach to the model itself, before `torch.compile`, DDP or FSDP wrap it.

    Args:
        model: a speech language model. Its forward takes `labels` `(B, S)` and returns an output with `loss`, a scalar, and
            `hidden_states`, `(B, S, D)` each. In `input_ids` `(B, S)` a placeholder token stands for each frame of audio. This
            is the contract of Hugging Face.
        loss: `otalign.speech.OTRegLoss`, `otalign.speech.InnerAlignmentLoss` or `otalign.SinkhornLoss`. With SinkhornLoss the
            text is always detached; the other two take `detach_text`.
        weight: factor of the loss; or a function that maps the global step to it. `OTAlignCallback` or `set_step` set the step.
            The schedule of OTRegLoss is a further factor.
        audio_token_id: the placeholder of audio in `input_ids`; `"auto"` = as the model's configuration says.
        transcript: where the text is. `"labels"`: in the sequence, where labels are not -100 (recognition).
            `"transcript_ids"`: the batch has `transcript_ids` `(B, M)`, padded with -100 (translation, chat); Hugging Face's
            Trainer keeps them with `remove_unused_columns=False`. Or a function of the batch that returns such ids.
        ignore_token_ids: tokens of the transcript to leave out, besides the end, begin and padding tokens of the configuration.
        layers: numbers of the hidden states to align, 0 being the embeddings; None = the layers of the loss, or 0. Text states
            of deeper layers come from a pass of the model over the transcript alone; without gradients, unless the loss has
            `detach_text=False`.
        speech_mask_fn: for models without a placeholder: maps the batch to a `(B, S)` bool mask, True on the speech.
        states_from: the submodule that returns the hidden states, if the model itself returns none; None = the model.
        accumulate: how items are weighted. `"tokens"`: by their number of labels, divided by `num_items_in_batch` if the
            trainer gives it, so that accumulation over batches of any size is exact. `"mean"`: equally. Sums run over the items
            of all processes that train together.
        on_missing: how to handle a batch in training without labels, loss or transcript: `"warn"` once, `"raise"`, `"ignore"`.
        name: prefix of the keys of `metrics()`.
        ids: which utterance each item is, for a loss with `warm_starts`: the name of an entry of the batch, which is taken out
            before the model is called, or a function of the batch. One id for each item, see `WarmStarts`.

    Returns:
        An `Attachment`, with `metrics()`, `set_step(step)` and `remove()`.

    Raises:
        ValueError, TypeError: for a wrapped model, an unknown loss, a bad option, or a model without a placeholder of audio.

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
    _expect_ids(loss, ids)
    rules = _span_rules(model, audio_token_id, transcript, ignore_token_ids, speech_mask_fn)
    attachment = Attachment(
        loss=loss,
        weight=weight,
        layers=_layers(loss, layers),
        name=name,
        _hooks=hooks_on(model),
        _rules=rules,
        _accumulate=accumulate,
        _on_missing=on_missing,
        _ids=ids,
    )
    attachment._hooks.add(attachment, None if states_from is model else states_from)
    return attachment


def _span_rules(
    model: nn.Module,
    audio_token_id: int | str,
    transcript: str | Callable[[Batch], Tensor],
    ignore_token_ids: Sequence[int],
    speech_mask_fn: Callable[[Batch], Tensor] | None,
) -> SpanRules:
    """The rules for speech and transcript, with the placeholder and the special tokens of the model's configuration."""
    if speech_mask_fn is None and audio_token_id == "auto":
        audio_token_id = audio_token(model)
    if speech_mask_fn is None and (isinstance(audio_token_id, bool) or not isinstance(audio_token_id, int)):
        raise TypeError(f"audio_token_id: expected an integer or 'auto', got {audio_token_id!r}")
    ignored = frozenset(ignore_token_ids) | special_tokens(model)
    if isinstance(audio_token_id, int):
        ignored |= {audio_token_id}
        speech_mask_fn = speech_mask_fn or Placeholder(audio_token_id)
    assert speech_mask_fn is not None
    return SpanRules(speech_mask_fn, transcript, ignored)


def _expect_loss(loss: nn.Module) -> None:
    """Raise an error for a loss that does not give the losses of single items, or gives them reduced."""
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
    """Raise an error for a weight that is neither a finite number >= 0 nor a function of the step."""
    if callable(weight) or (isinstance(weight, Tensor) and weight.dim() == 0):
        return
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        raise TypeError(f"weight: expected a number or a function of the step, got {weight!r}")
    if not (float(weight) >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight: expected a finite number >= 0, got {weight}")


def _expect_ids(loss: nn.Module, ids: Any) -> None:
    """Raise an error for ids without a store, or of another kind than `attach` says."""
    if ids is None:
        return
    if not isinstance(ids, str) and not callable(ids):
        raise TypeError(
            f"ids: expected the name of an entry of the batch, or a function of it, got {type(ids).__name__}"
        )
    if getattr(loss, "warm_starts", None) is None:
        raise ValueError(f"ids: they are for a loss with warm_starts=, got {type(loss).__name__} without")


def _layers(loss: nn.Module, layers: Sequence[int] | None) -> list[int]:
    """Numbers of the layers to align: those given, else those of the loss, which must be able to take them."""
    wanted = list(layers) if layers is not None else list(getattr(loss, "layers", [0]))
    if not wanted or min(wanted) < 0:
        raise ValueError(f"layers: expected numbers >= 0, got {wanted}")
    if isinstance(loss, InnerAlignmentLoss):
        if wanted != loss.layers:
            raise ValueError(f"layers: the loss has {loss.layers}, got {wanted}")
    elif len(wanted) > 1:
        raise ValueError(f"layers: {type(loss).__name__} takes one; InnerAlignmentLoss takes several, got {wanted}")
    return wanted


@dataclass(eq=False)
class Attachment:
    """A loss that is attached to a model: its metrics, its step, and its removal.

    Attributes:
        loss: the loss module.
        weight: a number, or a function of the step.
        layers: numbers of the hidden states that are aligned.
        name: prefix of the keys of `metrics()`.
        step: the global step. It counts the model's calls in training until the first `set_step`.
    """

    loss: nn.Module
    weight: float | Callable[[int], float]
    layers: list[int]
    name: str
    _hooks: HookSet = field(repr=False)
    _rules: SpanRules = field(repr=False)
    _accumulate: str = field(repr=False)
    _on_missing: str = field(repr=False)
    _ids: str | Callable[[Batch], Ids] | None = field(default=None, repr=False)
    step: int = 0
    _step_is_set: bool = field(default=False, repr=False)  # by set_step; else calls are counted
    _warned_of_missing: bool = field(default=False, repr=False)
    _warned_of_no_items: bool = field(default=False, repr=False)
    _loss_count_calls: bool | None = field(default=None, repr=False)  # loss.count_calls before set_step changed it
    # float64 sums since the last metrics(): items, their loss, marginal error and iterations; skipped items
    _sums: Tensor | None = field(default=None, repr=False)
    # weight and normaliser of the last call
    _last: tuple[Tensor, Tensor | int] | None = field(default=None, repr=False)

    def set_step(self, step: int) -> None:
        """Set the global step, which the schedules use from then on."""
        self.step, self._step_is_set = step, True
        if isinstance(self.loss, OTRegLoss):
            if self._loss_count_calls is None:
                self._loss_count_calls = self.loss.count_calls
            self.loss.count_calls = False
            self.loss.set_step(step)

    def current_weight(self) -> Tensor:
        """The factor of the loss at the present step: a float64 scalar tensor."""
        given: Any = self.weight(self.step) if callable(self.weight) else self.weight
        device = given.device if isinstance(given, Tensor) else "cpu"
        weight = torch.as_tensor(given, dtype=torch.float64, device=device)
        return self.loss.current_weight() * weight if isinstance(self.loss, OTRegLoss) else weight

    def metrics(self, *, synchronise: bool = False) -> dict[str, float]:
        """Means over the items since the last call; empty if there were none. Waits for the device.

        Args:
            synchronise: whether to sum over all processes. Then all processes have to call.

        Returns:
            `<name>/loss` without its weight, `<name>/weight`, `<name>/marginal_error`, `<name>/n_iter`, and
            `<name>/skipped`, the number of items without speech or without text. The weight is that of the last step.
        """
        sums, self._sums = self._sums, None
        if synchronise and processes() > 1:
            sums = torch.zeros(5, dtype=torch.float64, device=self._hooks.device) if sums is None else sums
            dist.all_reduce(sums)
        if sums is None:
            return {}
        items, loss, error, n_iter, skipped = sums.tolist()
        totals = {"loss": loss, "marginal_error": error, "n_iter": n_iter}
        values = {key: total / items if items else 0.0 for key, total in totals.items()}
        weight = self.current_weight() if self._last is None else self._last[0]
        values |= {"weight": float(weight), "skipped": skipped}
        if not items and not self._warned_of_no_items and self._on_missing != "ignore":
            self._warned_of_no_items = True
            warnings.warn(
                "no item had both speech and text: is that the placeholder of audio, or the mask?", stacklevel=2
            )
        return {f"{self.name}/{key}": value for key, value in values.items()}

    def remove(self) -> None:
        """Remove the loss from the model."""
        self._hooks.remove(self)
        if isinstance(self.loss, OTRegLoss) and self._loss_count_calls is not None:
            self.loss.count_calls = self._loss_count_calls

    def loss_for(self, model: nn.Module, call: Call) -> Tensor | None:
        """The weighted alignment loss of this batch, a scalar; None, with a warning or error, if the batch lacks something."""
        try:
            spans = cut_spans(model, call, self._rules, self.layers, detach_text=self._detach_text)
        except Missing as lacking:
            self.skip(model, call, str(lacking))
            return None
        losses = self._item_losses(spans, self._ids_of(call.batch))
        filled = (spans.speech_lengths > 0) & (spans.text_lengths > 0)
        shares = spans.label_counts if self._accumulate == "tokens" else torch.ones_like(spans.label_counts)
        shares = torch.where(filled, shares, 0).to(losses.loss.dtype)
        if self._last is not None and _recomputes():
            weight, normalizer = self._last
        else:
            weight, normalizer = self.current_weight(), self._normalizer(shares, call)
            self._last = weight, normalizer
            self._record(losses, filled)
            if not self._step_is_set:
                self.step += 1
                if isinstance(self.loss, OTRegLoss) and self.loss.count_calls:
                    self.loss.step += 1
        loss = weighted_mean(losses.loss, filled, shares, normalizer)
        return weight.to(loss.device, loss.dtype) * loss

    def skip(self, model: nn.Module, call: Call, lacking: str) -> None:
        """Handle a batch without an alignment loss as `on_missing` says, and take part in the other processes' collectives."""
        message = f"no alignment loss for this batch, which lacks {lacking}"
        if self._on_missing == "raise":
            raise ValueError(message)
        if self._on_missing == "warn" and not self._warned_of_missing:
            self._warned_of_missing = True
            warnings.warn(message, stacklevel=2)
        if processes() > 1 and not _recomputes():
            if self.layers != [0]:  # all processes have to take part in gathering sharded parameters
                empty = torch.zeros(1, dtype=torch.int64, device=self._hooks.device)
                text_states(model, empty[None], empty, self.layers, detach=self._detach_text)
            self._normalizer(torch.zeros(1, dtype=torch.float32, device=self._hooks.device), call)

    @property
    def _detach_text(self) -> bool:
        return getattr(self.loss, "detach_text", True)

    @property
    def own_inputs(self) -> frozenset[str]:
        """Entries of the batch that the model must not get."""
        return frozenset({"transcript_ids"} | ({self._ids} if isinstance(self._ids, str) else set()))

    def _ids_of(self, batch: Batch) -> Ids | None:
        if not isinstance(self._ids, str):
            return self._ids(batch) if self._ids is not None else None
        if batch.get(self._ids) is None:
            hint = "Trainer drops it unless remove_unused_columns=False"
            raise ValueError(f"ids: expected {self._ids!r} in the batch, got {sorted(batch)} ({hint})")
        return batch[self._ids]

    def _item_losses(self, spans: Spans, ids: Ids | None) -> ItemLosses:
        """Loss, iterations and marginal error of each item, `(B,)`."""
        lengths = spans.speech_lengths, spans.text_lengths
        if isinstance(self.loss, InnerAlignmentLoss):
            return self.loss.items(spans.speech, spans.text, *lengths)
        x, y = spans.speech[self.layers[0]], spans.text[self.layers[0]]
        if isinstance(self.loss, OTRegLoss):
            return self.loss.items(x, y, *lengths, spans.text_ids, ids)
        assert isinstance(self.loss, SinkhornLoss)
        options = {key: value for key, value in self.loss.options.items() if key != "reduction"}
        return item_losses(x, y.detach(), *lengths, warm_starts=self.loss.warm_starts, ids=ids, **options)

    def _normalizer(self, shares: Tensor, call: Call) -> Tensor | int:
        """Divisor of the weighted sum, a scalar. With it, gradients averaged over processes are those of the joined batch."""
        total = call.batch.get("num_items_in_batch") if self._accumulate == "tokens" else None
        if total is not None:
            return total.to(shares.device).clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
        return joined_mean_normalizer(shares)

    @torch.no_grad()
    def _record(self, losses: ItemLosses, filled: Tensor) -> None:
        """Add the items of a batch to the sums for `metrics`; `filled` `(B,)` is True for items with speech and text."""
        values = (filled, losses.loss, losses.error, losses.n_iter)
        kept = [torch.where(filled, value.detach().double(), 0).sum() for value in values]
        sums = torch.stack([*kept, (~filled).sum().double()])
        self._sums = sums if self._sums is None else self._sums + sums


def expect_names(handles: Sequence[Attachment]) -> None:
    """Raise a ValueError if there are no handles, or if two have the same name, and so the same keys of metrics."""
    if not handles:
        raise ValueError("handles: expected at least one, as otalign.attach returns it")
    names = [handle.name for handle in handles]
    if len(set(names)) < len(names):
        raise ValueError(f"handles: expected different names, which attach(name=) gives, got {names}")


def _recomputes() -> bool:
    """True while a checkpoint around the model runs its forward again: then a backward pass is under way."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
