"""Hooks on a model: they request hidden states from its forward pass and add alignment losses to the loss that it returns."""

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

IGNORED = -100  # the label of a position that is not predicted, in every trainer
WITHOUT_LABELS = "labels (label smoothing and custom losses take them out before the model sees them)"
Batch = Mapping[str, Any]  # the arguments of the model's forward, by name


class Missing(Exception):
    """A batch lacks something that an alignment loss needs."""


@dataclass
class Call:
    """One forward pass of the model in training."""

    batch: Batch
    requested_states: Any  # the caller's own output_hidden_states
    as_tuple: bool  # whether the caller passed return_dict=False
    states: Sequence[Tensor] | None = None  # by layer, (B, S, D) each; None = the output has none


class AttachedLoss(Protocol):
    """An alignment loss, as `HookSet` uses it."""

    loss: nn.Module
    layers: list[int]

    @property
    def own_inputs(self) -> frozenset[str]:
        """Entries of the batch that the model must not get."""

    def loss_for(self, model: nn.Module, call: Call) -> Tensor | None:
        """The weighted alignment loss of this batch, a scalar; None if the batch lacks something."""

    def skip(self, model: nn.Module, call: Call, lacking: str) -> None:
        """Handle a batch without an alignment loss, because it is `lacking` something."""


class hooks_disabled:
    """A context in which the hooks of every `HookSet` do nothing, on any model."""

    depth = 0

    def __enter__(self) -> None:
        hooks_disabled.depth += 1

    def __exit__(self, *error: object) -> None:
        hooks_disabled.depth -= 1


class HookSet:
    """The hooks on one model. All losses that are attached to the model share them. It holds no reference to the model."""

    def __init__(self) -> None:
        self.attached: list[AttachedLoss] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.source: nn.Module | None = None  # the submodule that returns the hidden states; None = the model
        self.call: Call | None = None  # the forward pass under way; None outside of training
        self.device = torch.device("cpu")  # of the last batch

    def register(self, model: nn.Module) -> None:
        """Register the hooks on the model."""
        self.handles = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True),
            model.register_forward_hook(self.release, always_call=True),
        ]

    def add(self, attached: AttachedLoss, source: nn.Module | None) -> None:
        """Add a loss that takes its hidden states from `source`; None = from the model."""
        if any(other.loss is attached.loss for other in self.attached):
            raise ValueError("loss: this module is attached to the model already, and would count each step twice")
        if self.attached and source is not self.source:
            raise ValueError("states_from: a loss that is attached to this model takes its states from elsewhere")
        if source is not None and not self.attached:
            self.source = source
            self.handles += [
                source.register_forward_pre_hook(self.before_source, with_kwargs=True),
                source.register_forward_hook(self.after_source),
            ]
        self.attached.append(attached)

    def remove(self, attached: AttachedLoss) -> None:
        """Remove a loss, and with the last one the hooks."""
        if attached in self.attached:
            self.attached.remove(attached)
        if not self.attached:
            for handle in self.handles:
                handle.remove()
            self.handles, self.source = [], None

    def before_forward(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Keep the batch, and request the hidden states that the losses need."""
        if hooks_disabled.depth:
            return None
        if getattr(model, "_is_replica", False):
            raise RuntimeError("DataParallel runs copies of a model that share its hooks; use DistributedDataParallel")
        batch = _by_name(model, args, kwargs)
        own = frozenset[str]().union(*(attached.own_inputs for attached in self.attached))
        kwargs = {key: value for key, value in kwargs.items() if key not in own}
        # generate() also runs in training mode; it passes a cache and no labels. Prefix tuning passes a cache with labels.
        generates = batch.get("past_key_values") is not None and batch.get("labels") is None
        trains = model.training and not generates and (torch.is_grad_enabled() or batch.get("labels") is not None)
        if not trains:
            self.call = None
            return args, kwargs
        requested = kwargs.get("output_hidden_states")
        if requested is None:
            requested = getattr(getattr(model, "config", None), "output_hidden_states", None)
        self.call = Call(batch, requested, kwargs.get("return_dict") is False)
        if self.call.as_tuple:
            kwargs["return_dict"] = True
        if self.source is None:
            kwargs["output_hidden_states"] = self._layers_to_return(requested)
        return args, kwargs

    def after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Add the alignment losses to the loss of the output."""
        if hooks_disabled.depth or self.call is None:
            return None
        call, self.call = self.call, None
        self.device = next((value.device for value in call.batch.values() if isinstance(value, Tensor)), self.device)
        if self.source is None:
            call.states = _field(_main_part(output), "hidden_states")
        loss = read_loss(output)
        if loss is None:
            lacking = "a loss: the model returned none" if call.batch.get("labels") is not None else WITHOUT_LABELS
            for attached in self.attached:
                attached.skip(model, call, lacking)
        else:
            warn_of_mean_loss(model, call.batch, _field(_main_part(output), "logits"), loss)
            for attached in self.attached:
                added = attached.loss_for(model, call)
                loss = loss if added is None else loss + added.to(loss.dtype)
        drop_states = self.source is None and not call.requested_states
        return with_loss(output, loss, drop_states=drop_states, as_tuple=call.as_tuple)

    def release(self, *_: object) -> None:
        """Keep no batch after a forward pass that failed."""
        if not hooks_disabled.depth:
            self.call = None

    def before_source(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Request the hidden states from the submodule, at its first call in this forward pass."""
        if hooks_disabled.depth or self.call is None or self.call.states is not None:
            return None
        return args, {**kwargs, "output_hidden_states": self._layers_to_return(kwargs.get("output_hidden_states"))}

    def after_source(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Keep the hidden states that the submodule returned."""
        if not hooks_disabled.depth and self.call is not None and self.call.states is None:
            self.call.states = _field(output, "hidden_states")

    def _layers_to_return(self, requested: Any) -> Any:
        """`output_hidden_states` for the model: all layers if the caller requests all, else the caller's and the losses' layers."""
        if requested is True:
            return True
        if isinstance(requested, int) and requested is not False:
            requested = [requested]
        own = {layer for attached in self.attached for layer in attached.layers}
        return sorted(own | set(requested or ()))


def hooks_on(model: nn.Module) -> HookSet:
    """The model's `HookSet`, registered now if there is none. A deep copy of a model has a copy of it."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hooks := getattr(hook, "__self__", None), HookSet):
            return hooks
    hooks = HookSet()
    hooks.register(model)
    return hooks


def _by_name(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Batch:
    """The arguments of a call by name."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


# Forms of a model's output ---------------------------------------------------------------------------------------------


def read_loss(output: Any) -> Tensor | None:
    """The loss of a model's output, a scalar; None if there is none.

    Known forms: an object or a dict with `loss`; the loss itself, a tensor without dimensions; or a tuple, named or not, whose
    first entry is one of these, such as (output, accuracy) or (loss, statistics, ...).
    """
    part = _main_part(output)
    return part if isinstance(part, Tensor) and part.dim() == 0 else _field(part, "loss")


def with_loss(output: Any, loss: Tensor | None, *, drop_states: bool, as_tuple: bool) -> Any:
    """An output of the same form with another loss; None, which leaves the output unchanged, for logits without a loss.

    Args:
        output: of a form that `read_loss` knows.
        loss: scalar; None = the output has no loss.
        drop_states: whether to leave out the hidden states, because only the alignment losses requested them.
        as_tuple: whether to turn an output of Hugging Face's into the tuple that return_dict=False gives.
    """
    part = _main_part(output)
    if isinstance(part, Tensor):
        if loss is None:
            return None
        changed: Any = loss
    else:
        changed = _replaced(part, loss=loss, **({"hidden_states": None} if drop_states else {}))
    if as_tuple and hasattr(changed, "to_tuple"):
        return changed.to_tuple()
    if not isinstance(output, tuple):
        return changed
    return type(output)._make((changed, *output[1:])) if hasattr(output, "_make") else (changed, *output[1:])


def _main_part(output: Any) -> Any:
    """The part of an output that holds the loss: the first entry of a tuple, else the output itself."""
    return output[0] if isinstance(output, tuple) and output else output


def _field(output: Any, key: str) -> Any:
    """An entry of a dict or an attribute of an object; None if there is none."""
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)


def _replaced(output: Any, **values: Any) -> Any:
    """A copy of an output with other values. A dict leaves out entries that are None."""
    if isinstance(output, Mapping):
        return type(output)(**{key: value for key, value in {**output, **values}.items() if value is not None})
    changed = copy.copy(output)
    for key, value in values.items():
        setattr(changed, key, value)
    return changed


# Models that ignore num_items_in_batch ---------------------------------------------------------------------------------

_settled_classes: set[type] = set()  # models whose kind of loss is known
_candidate_calls: dict[type, int] = {}  # calls that could have shown the kind of loss, by class of the model


@torch.no_grad()
def warn_of_mean_loss(model: nn.Module, batch: Batch, logits: Tensor | None, loss: Tensor) -> None:
    """Warn once for each class of models whose own loss ignores `num_items_in_batch`: under accumulation it is too large.

    Args:
        logits: `(B, S, V)`, of the model.
        loss: the model's own, a scalar.
    """
    total, labels = batch.get("num_items_in_batch"), batch.get("labels")
    if torch.compiler.is_compiling() or type(model) in _settled_classes:
        return
    if total is None or labels is None or logits is None or logits.shape[:2] != labels.shape:
        return
    _candidate_calls[type(model)] = count = _candidate_calls.get(type(model), 0) + 1
    if count & (count - 1):  # the check waits for the device, so it runs at calls 1, 2, 4, 8, ... only
        return
    counted = labels[:, 1:] != IGNORED
    here, everywhere = int(counted.sum()), float(total)
    if here == 0 or abs(here - everywhere) < 0.05 * everywhere:  # then both kinds of loss are about equal
        return
    _settled_classes.add(type(model))
    mean = F.cross_entropy(logits[:, :-1][counted].float(), labels[:, 1:][counted])
    if abs(float(loss) - float(mean)) < 0.01 * float(mean):
        warnings.warn(
            f"{type(model).__name__} ignores num_items_in_batch: its own loss is the mean of each batch, and under gradient "
            "accumulation the sum of such means is too large. The alignment loss is weighed exactly",
            stacklevel=2,
        )
