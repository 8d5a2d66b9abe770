"""Hidden states of several layers, and the cosine: what the methods of this folder share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..layout import padded_segments

States: TypeAlias = Tensor | Sequence[Tensor] | Mapping[int, Tensor]  # one layer; or several, in order or by number


def by_layer(name: str, states: States) -> dict[int, Tensor]:
    """The layers of an argument by their numbers, each `(B, N, D)`."""
    if isinstance(states, Tensor):
        states = [states]
    layers = dict(states) if isinstance(states, Mapping) else dict(enumerate(states))
    if not layers:
        raise ValueError(f"{name}: expected at least one layer")
    for number, layer in layers.items():
        if not isinstance(layer, Tensor):
            raise TypeError(f"{name}[{number}]: expected a torch.Tensor, got {type(layer).__name__}")
        if layer.dim() != 3:
            raise ValueError(f"{name}[{number}]: expected shape (B, N, D), got {tuple(layer.shape)}")
    return layers


def paired(speech_states: States, text_states: States) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, speech and text of every layer, which both have to have."""
    speech, text = by_layer("speech_states", speech_states), by_layer("text_states", text_states)
    if speech.keys() != text.keys():
        raise ValueError(f"text_states: expected the layers of speech_states, {list(speech)}, got {list(text)}")
    for number, x in speech.items():
        y = text[number]
        if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
            raise ValueError(
                f"text_states[{number}]: expected {x.shape[0]} items of dimension {x.shape[2]}, got {tuple(y.shape)}"
            )
        yield number, x, y


def stacked(name: str, states: States, layers: Sequence[int]) -> Tensor:
    """Some layers as one batch, one behind the other: `(L B, N, D)`."""
    found = by_layer(name, states)
    if missing := [layer for layer in layers if layer not in found]:
        raise ValueError(f"{name}: expected layers {list(layers)}, got {list(found)}, without {missing}")
    return torch.cat([found[layer] for layer in layers])


def repeated(lengths: Tensor | None, count: int) -> Tensor | None:
    """The lengths that belong to so many stacked layers."""
    return None if lengths is None else lengths.repeat(count)


def lengths_of(name: str, values: Tensor, lengths: Tensor | None) -> Tensor:
    """Validated lengths `(B,)` int64 on the device of the values."""
    return padded_segments(name, values, values.shape[1], lengths).lengths


def inside(values: Tensor, lengths: Tensor) -> Tensor:
    """True on the points: `(B, N)`."""
    return torch.arange(values.shape[1], device=values.device) < lengths[:, None]


def clean(values: Tensor, mask: Tensor) -> Tensor:
    """As float32 at least, and zero where nothing may be read."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.where(mask[..., None], values, 0).to(dtype)


def unit(vectors: Tensor) -> Tensor:
    """Vectors over their norms; zero, with gradient zero, for those of length zero."""
    squares = vectors.square().sum(-1, keepdim=True)
    positive = squares > 0
    return vectors * torch.where(positive, torch.where(positive, squares, 1).rsqrt(), 0)


def products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_j>, `(..., N, M)`, in the type of the arguments, which autocast would round."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ y.mT


def means(values: Tensor, mask: Tensor) -> Tensor:
    """Means over the points of every item, `(B, D)`; zero for empty ones."""
    return clean(values, mask).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def filled(x: Tensor, y: Tensor, speech_lengths: Tensor | None, text_lengths: Tensor | None) -> Tensor:
    """True for the items that have both speech and text: `(B,)`."""
    n, m = lengths_of("speech_lengths", x, speech_lengths), lengths_of("text_lengths", y, text_lengths)
    return (n > 0) & (m > 0)


def weighted_mean(
    losses: Tensor, filled: Tensor, sample_weight: Tensor | None, normalizer: Tensor | float | None
) -> Tensor:
    """Mean of `(B,)` losses over the items that are not empty: scalar, 0 if all are.

    Args:
        losses: `(B,)`, 0 for empty items.
        filled: `(B,)`, True where an item is not empty.
        sample_weight: `(B,)`, of each item, 0 to leave it out; None = 1.
        normalizer: what the weighted sum is divided by; None = the sum of the weights of the items that are not empty.
    """
    weights = torch.ones_like(losses)
    if sample_weight is not None:
        if not isinstance(sample_weight, Tensor) or sample_weight.shape != losses.shape:
            shape = tuple(sample_weight.shape) if isinstance(sample_weight, Tensor) else type(sample_weight).__name__
            raise ValueError(f"sample_weight: expected a tensor of shape {tuple(losses.shape)}, got {shape}")
        weights = sample_weight.to(losses)
    if normalizer is None:
        total = torch.where(filled, weights, 0).sum()
        normalizer = torch.where(total == 0, 1, total)
    counted = filled & (weights != 0)  # a weight of zero keeps an item out of the value, even one with NaN
    return torch.where(counted, weights * losses, 0).sum() / normalizer
