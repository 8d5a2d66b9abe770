"""Hooks on a model: what it is called with, the hidden states that are wanted of it, and the loss that it returns."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label of what is not to be predicted, in every trainer
WITHOUT_LABELS = "labels (label smoothing and custom losses take them out before the model sees them)"
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

    loss: nn.Module
    layers: list[int]

    def added(self, model: nn.Module, call: Call) -> Tensor | None: ...

    def absent(self, model: nn.Module, call: Call, what: str) -> None: ...


class unobserved:
    """A context in which models may be called without any site taking notice."""

    depth = 0

    def __enter__(self) -> None:
        unobserved.depth += 1

    def __exit__(self, *error: object) -> None:
        unobserved.depth -= 1


class Site:
    """The hooks on one model, shared by the losses that are attached to it. It does not hold the model."""

    def __init__(self) -> None:
        self.additions: list[Addition] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.source: nn.Module | None = None  # the submodule whose states are taken; None = the model
        self.call: Call | None = None
        self.device = torch.device("cpu")

    def open(self, model: nn.Module) -> None:
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True),
            model.register_forward_hook(self.release, always_call=True),
        ]

    def add(self, addition: Addition, source: nn.Module | None) -> None:
        if any(other.loss is addition.loss for other in self.additions):
            raise ValueError("loss: this module is attached to the model already, and would count each step twice")
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

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if unobserved.depth:
            return None
        if getattr(model, "_is_replica", False):
            raise RuntimeError("DataParallel runs copies of a model that share its hooks; use DistributedDataParallel")
        batch = _by_name(model, args, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "transcript_ids"}
        # generate() may be called in training mode too. (With labels a cache is what prefix tuning puts before the batch.)
        generates = batch.get("past_key_values") is not None and batch.get("labels") is None
        trains = model.training and not generates and (torch.is_grad_enabled() or batch.get("labels") is not None)
        if not trains:
            self.call = None
            return args, kwargs
        asked = kwargs.get("output_hidden_states")
        if asked is None:
            asked = getattr(getattr(model, "config", None), "output_hidden_states", None)
        self.call = Call(batch, asked, kwargs.get("return_dict") is False)
        if self.call.as_tuple:
            kwargs["return_dict"] = True
        if self.source is None:
            kwargs["output_hidden_states"] = self._wanted(self.call.asked)
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if unobserved.depth or self.call is None:
            return None
        call, self.call = self.call, None
        self.device = next((value.device for value in call.batch.values() if isinstance(value, Tensor)), self.device)
        # Some models return (output, accuracy), (loss, statistics, ...) or a dict.
        carrier = output[0] if isinstance(output, tuple) and output else output
        if self.source is None:
            call.states = _get(carrier, "hidden_states")
        loss = carrier if isinstance(carrier, Tensor) and carrier.dim() == 0 else _get(carrier, "loss")
        if loss is None:
            lacks = "a loss: the model returned none" if call.batch.get("labels") is not None else WITHOUT_LABELS
            for addition in self.additions:
                addition.absent(model, call, lacks)
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
        if not isinstance(output, tuple):
            return changed
        return type(output)._make((changed, *output[1:])) if hasattr(output, "_make") else (changed, *output[1:])

    def release(self, *_: object) -> None:
        """Keep no batch when the forward has failed."""
        if not unobserved.depth:
            self.call = None

    def before_source(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if unobserved.depth or self.call is None or self.call.states is not None:
            return None
        return args, {**kwargs, "output_hidden_states": self._wanted(kwargs.get("output_hidden_states"))}

    def after_source(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not unobserved.depth and self.call is not None and self.call.states is None:
            self.call.states = _get(output, "hidden_states")

    def _wanted(self, asked: Any) -> Any:
        """All layers if the caller wants them all, else those that somebody wants."""
        if asked is True:
            return True
        if isinstance(asked, int) and asked is not False:
            asked = [asked]
        own = {layer for addition in self.additions for layer in addition.layers}
        return sorted(own | set(asked or ()))


def site_of(model: nn.Module) -> Site:
    """The model's hooks, which a copy of the model has as well; put on if they are not there."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(site := getattr(hook, "__self__", None), Site):
            return site
    site = Site()
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
_looked: dict[type, int] = {}  # calls in which it could have been told


@torch.no_grad()
def warn_of_means(model: nn.Module, batch: Batch, output: Any, loss: Tensor) -> None:
    """Say once for a class if its own loss ignores `num_items_in_batch`, and so is too large under accumulation."""
    total, labels, logits = batch.get("num_items_in_batch"), batch.get("labels"), _get(output, "logits")
    if torch.compiler.is_compiling() or type(model) in _told_of_means:
        return
    if total is None or labels is None or logits is None or logits.shape[:2] != labels.shape:
        return
    _looked[type(model)] = count = _looked.get(type(model), 0) + 1
    if count & (count - 1):  # looking costs a wait for the device: at calls 1, 2, 4, 8, ...
        return
    counted = labels[:, 1:] != IGNORED
    here, everywhere = int(counted.sum()), float(total)
    if here == 0 or abs(here - everywhere) < 0.05 * everywhere:
        return
    _told_of_means.add(type(model))
    mean = F.cross_entropy(logits[:, :-1][counted].float(), labels[:, 1:][counted])
    if abs(float(loss) - float(mean)) < 0.01 * float(mean):
        warnings.warn(
            f"{type(model).__name__} ignores num_items_in_batch: its own loss is the mean of each batch, and under gradient "
            "accumulation the sum of such means is too large. The alignment loss is weighed exactly",
            stacklevel=2,
        )
