"""Hooks on a model: what it is called with, the hidden states that are wanted of it, and the loss that it returns."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Mapping[str, Any]  # what the model's forward is called with


class Missing(Exception):
    """A batch lacks something that a loss needs."""


@dataclass
class Call:
    """One forward of the model in training."""

    batch: Batch
    asked: Any  # the caller's own output_hidden_states
    as_tuple: bool  # the caller's return_dict=False
    states: Sequence[Tensor] | None = None


class Addition(Protocol):
    """What a site wants to know of an attached loss."""

    layers: list[int]

    def added(self, model: nn.Module, call: Call) -> Tensor | None: ...

    def missing(self, what: str) -> None: ...


class Site:
    """The hooks on one model, shared by the losses that are attached to it. It does not hold the model."""

    def __init__(self) -> None:
        self.additions: list[Addition] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.source: nn.Module | None = None  # the submodule whose states are taken; None = the model
        self.call: Call | None = None
        self.closed = False
        self.device = torch.device("cpu")

    def open(self, model: nn.Module) -> None:
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True),
        ]

    def add(self, addition: Addition, source: nn.Module | None) -> None:
        if self.additions and source is not self.source:
            raise ValueError("states_from: a loss that is attached to this model takes its states from elsewhere")
        if source is not None and not self.additions:
            self.source = source
            self.handles += [
                source.register_forward_pre_hook(self.before_source, with_kwargs=True),
                source.register_forward_hook(self.after_source),
            ]
        self.additions.append(addition)

    def remove(self, addition: Addition) -> None:
        if addition in self.additions:
            self.additions.remove(addition)
        if not self.additions:
            for handle in self.handles:
                handle.remove()
            self.handles, self.source = [], None

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """The model may be called without this site taking notice."""
        self.closed = True
        try:
            yield
        finally:
            self.closed = False

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.closed:
            return None
        batch = _by_name(model, args, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "transcript_ids"}
        trains = (
            model.training and batch.get("past_key_values") is None
        )  # generate() may be called in training mode too
        if not trains:
            self.call = None
            return args, kwargs
        self.call = Call(batch, kwargs.get("output_hidden_states"), kwargs.get("return_dict") is False)
        if self.call.as_tuple:
            kwargs["return_dict"] = True
        if self.source is None:
            kwargs["output_hidden_states"] = self._wanted(self.call.asked)
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.closed or self.call is None:
            return None
        call, self.call = self.call, None
        self.device = next((value.device for value in call.batch.values() if isinstance(value, Tensor)), self.device)
        # Some models return (output, accuracy), (loss, statistics, ...) or a dict.
        carrier = output[0] if isinstance(output, tuple) and output else output
        if self.source is None:
            call.states = _get(carrier, "hidden_states")
        loss = carrier if isinstance(carrier, Tensor) and carrier.dim() == 0 else _get(carrier, "loss")
        if loss is None:
            for addition in self.additions:
                addition.missing("a loss: the model returned none, as it does without labels")
            if isinstance(carrier, Tensor):
                return None
        else:
            warn_of_means(model, call.batch, carrier, loss)
            for addition in self.additions:
                added = addition.added(model, call)
                loss = loss if added is None else loss + added.to(loss.dtype)
        dropped = {"hidden_states": None} if self.source is None and not call.asked else {}
        changed: Any = loss if isinstance(carrier, Tensor) else _replaced(carrier, loss=loss, **dropped)
        if call.as_tuple and hasattr(changed, "to_tuple"):
            return changed.to_tuple()
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def before_source(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self.closed or self.call is None or self.call.states is not None:
            return None
        return args, {**kwargs, "output_hidden_states": self._wanted(kwargs.get("output_hidden_states"))}

    def after_source(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.closed and self.call is not None and self.call.states is None:
            self.call.states = _get(output, "hidden_states")

    def _wanted(self, asked: Any) -> Any:
        """All layers if the caller wants them all, else those that somebody wants."""
        if asked is True:
            return True
        if isinstance(asked, int) and asked is not False:
            asked = [asked]
        own = {layer for addition in self.additions for layer in addition.layers}
        return sorted(own | set(asked or ()))


_sites: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()


def site_of(model: nn.Module) -> Site:
    """The model's hooks, put on if they are not there."""
    site = _sites.get(model)
    if site is None:
        site = _sites[model] = Site()
    if not site.handles:
        site.open(model)
    return site


def _by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Batch:
    """The arguments of a call by their names."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def _get(output: Any, key: str) -> Any:
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)


def _replaced(output: Any, **values: Any) -> Any:
    """A copy of an output with other values, those that are None left out."""
    if isinstance(output, Mapping):
        return type(output)(**{key: value for key, value in {**output, **values}.items() if value is not None})
    changed = copy.copy(output)
    for key, value in values.items():
        setattr(changed, key, value)
    return changed


_told_of_means: set[type] = set()


@torch.no_grad()
def warn_of_means(model: nn.Module, batch: Batch, output: Any, loss: Tensor) -> None:
    """Say once for a class if its own loss ignores `num_items_in_batch`, and so is too large under accumulation."""
    total, labels, logits = batch.get("num_items_in_batch"), batch.get("labels"), _get(output, "logits")
    if type(model) in _told_of_means or torch.compiler.is_compiling():
        return
    if total is None or labels is None or logits is None or logits.shape[:2] != labels.shape:
        return
    counted = labels[:, 1:] != -100
    here, everywhere = int(counted.sum()), float(total)
    if here == 0 or abs(here - everywhere) < 0.05 * everywhere:
        return  # the two cannot be told apart
    _told_of_means.add(type(model))
    mean = F.cross_entropy(logits[:, :-1][counted].float(), labels[:, 1:][counted])
    if abs(float(loss) - float(mean)) < 0.01 * float(mean):
        warnings.warn(
            f"{type(model).__name__} ignores num_items_in_batch: its own loss is the mean of each batch, and under gradient "
            "accumulation the sum of such means is too large. The alignment loss is weighed exactly",
            stacklevel=2,
        )
