"""Hidden states of several layers, their validation and their means: shared by the methods of this folder."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import checks
from ..backends.reference import normalize
from ..layout import Lengths, expect_dense, padded_segments
from ..options import checks_values

# (B, N, D) of one layer; or several layers, in order (None = left out) or by number.
States: TypeAlias = Tensor | Sequence[Tensor | None] | Mapping[int, Tensor]


def by_layer(name: str, states: States) -> dict[int, Tensor]:
    """The layers of the argument `name` by number, validated, `(B, N, D)` each."""
    if isinstance(states, Tensor):
        states = [states]
    numbered = states.items() if isinstance(states, Mapping) else enumerate(states)
    layers = {number: layer for number, layer in numbered if layer is not None}
    if not layers:
        raise ValueError(f"{name}: expected at least one layer")
    for number, layer in layers.items():
        if not isinstance(layer, Tensor):
            raise TypeError(f"{name}[{number}]: expected a torch.Tensor, got {type(layer).__name__}")
        expect_padded(f"{name}[{number}]", layer)
        if layer.dim() != 3:
            raise ValueError(f"{name}[{number}]: expected shape (B, N, D), got {tuple(layer.shape)}")
        if not layer.is_floating_point():
            raise TypeError(f"{name}[{number}]: expected floating point, got {layer.dtype}")
    return layers


def paired(speech_states: States, text_states: States) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, speech `(B, N, D)` and text `(B, M, D)` of each layer. Both sides must have the same layers."""
    speech, text = by_layer("speech_states", speech_states), by_layer("text_states", text_states)
    if speech.keys() != text.keys():
        raise ValueError(f"text_states: expected the layers of speech_states, {list(speech)}, got {list(text)}")
    for number, x in speech.items():
        expect_pair(f"text_states[{number}]", x, text[number])
        yield number, x, text[number]


def expect_pair(name: str, x: Tensor, y: Tensor) -> None:
    """Raise a ValueError unless `y` has the items and the dimension of `x`."""
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"{name}: expected {x.shape[0]} items of dimension {x.shape[2]}, got {tuple(y.shape)}")


def sides(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None,
    y_lengths: Lengths | None,
    names: tuple[str, str] = ("speech", "text"),
) -> tuple[Tensor, Tensor]:
    """Validate two sides `(B, N, D)` and `(B, M, D)`, and return their lengths, `(B,)` int64 each. `names` is for messages."""
    for name, points in zip(names, (x, y), strict=True):
        if isinstance(points, Tensor):
            expect_padded(name, points)
        if not isinstance(points, Tensor) or points.dim() != 3:
            shape = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
            raise ValueError(f"{name}: expected a tensor of shape (B, N, D), got {shape}")
    expect_pair(names[1], x, y)
    return lengths_of(f"{names[0]}_lengths", x, x_lengths), lengths_of(f"{names[1]}_lengths", y, y_lengths)


def expect_padded(name: str, points: Tensor) -> None:
    """Raise an error for nested tensors, sparse tensors, and tensors on the meta device."""
    if points.is_nested:
        raise ValueError(
            f"{name}: expected shape (B, N, D), got a nested tensor; otalign.layout.to_padded(t.values(), t.offsets()) pads"
        )
    expect_dense(name, points)
    if points.device.type == "meta":
        raise ValueError(f"{name}: expected numbers, got a tensor on the meta device, which has none")


def layer_numbers(layers: Sequence[int]) -> list[int]:
    """Validate numbers of layers; there must be at least one."""
    if isinstance(layers, (int, str)) or not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers: expected a sequence of at least one number, got {layers!r}")
    return [checks.whole_number("layers", layer) for layer in layers]


def finite(name: str, value: float) -> float:
    """Validate a finite number, and return it as a float."""
    value = checks.number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def positive(name: str, value: float) -> float:
    """Validate a finite number > 0, and return it as a float."""
    value = checks.number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return value


def at_least_one(name: str, value: int) -> int:
    """Validate a whole number >= 1, and return it as an int."""
    value = checks.whole_number(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def share(name: str, value: float) -> float:
    """Validate a number in [0, 1], and return it as a float."""
    value = checks.number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return value


def device_of_buffers() -> str | None:
    """The device for a module's buffers: None = torch's default, but the CPU instead of meta, which would lose their values."""
    return "cpu" if torch.get_default_device().type == "meta" else None


class Stack(NamedTuple):
    """L layers of B items as one batch of L B items: all items of the first layer, then of the next."""

    x: Tensor  # (L B, N, D)
    y: Tensor  # (L B, M, D)
    x_lengths: Tensor  # (L B,)
    y_lengths: Tensor  # (L B,)

    @property
    def filled(self) -> Tensor:
        """True for the items that have both speech and text: `(L B,)`."""
        return (self.x_lengths > 0) & (self.y_lengths > 0)


def stacked(
    speech_states: States,
    text_states: States,
    speech_lengths: Lengths | None,
    text_lengths: Lengths | None,
    layers: Sequence[int],
) -> Stack:
    """The layers with these numbers. In lists, numbers below zero count from the end."""
    speech, text = chosen("speech_states", speech_states, layers), chosen("text_states", text_states, layers)
    for number, x, y in zip(layers, speech, text, strict=True):
        expect_pair(f"text_states[{number}]", x, y)
    n, m = sides(speech[0], text[0], speech_lengths, text_lengths)
    return Stack(torch.cat(speech), torch.cat(text), n.repeat(len(layers)), m.repeat(len(layers)))


def chosen(name: str, states: States, layers: Sequence[int]) -> list[Tensor]:
    """The layers with these numbers, `(B, N, D)` each, in this order. In lists, numbers below zero count from the end."""
    found, count = by_layer(name, states), 0 if isinstance(states, Mapping | Tensor) else len(states)
    numbers = [layer if layer >= 0 else layer + count for layer in layers]
    if missing := [layer for layer, number in zip(layers, numbers, strict=True) if number not in found]:
        raise ValueError(f"{name}: expected layers {list(layers)}, got {list(found)}, without {missing}")
    return [found[number] for number in numbers]


def lengths_of(name: str, values: Tensor, lengths: Lengths | None) -> Tensor:
    """Validate lengths of values `(B, N, ...)`: `(B,)` int64, on the device of the values; None = full."""
    return padded_segments(name, values, values.shape[1], lengths).lengths


def inside(values: Tensor, lengths: Tensor) -> Tensor:
    """True on the points, False on the padding: `(B, N)`, for values `(B, N, ...)` and lengths `(B,)`."""
    return torch.arange(values.shape[1], device=values.device) < lengths[:, None]


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the promoted one of all tensors, and float32 at least."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def clean(values: Tensor, mask: Tensor) -> Tensor:
    """Values `(B, N, D)` in float32 at least, zero where the mask `(B, N)` is False. Not even NaN is read there."""
    return torch.where(mask[..., None], values, 0).to(wide(values))


def unit(vectors: Tensor) -> Tensor:
    """Vectors `(..., D)` divided by their norms, in float32 at least. A zero vector stays zero, with gradient zero."""
    return normalize(vectors.to(wide(vectors)))


def products(x: Tensor, y: Tensor) -> Tensor:
    """The products <x_i, y_j>, `(..., N, M)`, in the dtype of the arguments. Autocast would round them, so it is switched off."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ y.mT


def means(values: Tensor, mask: Tensor) -> Tensor:
    """Means of values `(B, N, D)` over the points of each item, `(B, D)`; zero for empty items."""
    return clean(values, mask).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def weighted_mean(
    losses: Tensor, filled: Tensor, sample_weight: Tensor | None, normalizer: Tensor | float | None
) -> Tensor:
    """Mean of `(B,)` losses over the items that are not empty: scalar, 0 if all are.

    Args:
        losses: `(B,)`, 0 for empty items.
        filled: `(B,)`, True where an item is not empty.
        sample_weight: `(B,)`, weight of each item, >= 0; 0 leaves the item out; None = 1 each.
        normalizer: divisor of the weighted sum, > 0; None = the sum of the weights of the items that are not empty.

    Raises:
        ValueError, TypeError: for weights or a normalizer of another kind or sign.
    """
    weights = torch.ones_like(losses)
    if sample_weight is not None:
        if not isinstance(sample_weight, Tensor) or sample_weight.shape != losses.shape:
            shape = tuple(sample_weight.shape) if isinstance(sample_weight, Tensor) else type(sample_weight).__name__
            raise ValueError(f"sample_weight: expected a tensor of shape {tuple(losses.shape)}, got {shape}")
        expect_dense("sample_weight", sample_weight)
        if checks_values(sample_weight) and not bool((sample_weight >= 0).all()):
            raise ValueError(f"sample_weight: expected numbers >= 0, got {sample_weight.tolist()}")
        weights = sample_weight.to(losses)
    if normalizer is None:
        total = torch.where(filled, weights, 0).sum()
        normalizer = torch.where(total == 0, 1, total)
    else:
        normalizer = _checked_normalizer(normalizer)
    counted = filled & (weights != 0)  # a weight of zero leaves out even an item with NaN
    return torch.where(counted, weights * losses, 0).sum() / normalizer


def _checked_normalizer(normalizer: Tensor | float) -> Tensor | float:
    if not isinstance(normalizer, Tensor):
        return positive("normalizer", normalizer)
    if normalizer.numel() != 1 or normalizer.dtype == torch.bool or normalizer.is_complex():
        raise ValueError(f"normalizer: expected a number, got {normalizer.dtype} of shape {tuple(normalizer.shape)}")
    if checks_values(normalizer):
        positive("normalizer", float(normalizer.detach()))
    return normalizer.reshape(())
