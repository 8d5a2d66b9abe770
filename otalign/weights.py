"""Weights of points as the backends take them: normalised over every item, in the layout of the points."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import valid_or_nan
from .layout import Segments, expect_dense
from .options import checks_values, one_of


def normalized_weights(
    name: str,
    weights: Tensor | str | None,
    values: Tensor | None,
    segments: Segments,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Weights as the backends take them: zero on the padding, summing to one over every item.

    They are divided by the largest weight of the item before the sum, so that no sum overflows or vanishes. Weights in
    float64 are rounded to `dtype` only at the end.
    """
    if weights is None:
        return None
    if isinstance(weights, str):
        one_of(name, weights, ("norm",))
        if values is None:
            raise ValueError(f'{name}: "norm" needs the embeddings; solve_cost knows only the cost')
        weights = _norms(values.detach())
    if not isinstance(weights, Tensor):
        raise TypeError(f'{name}: expected a tensor, "norm" or None, got {type(weights).__name__}')
    weights = _laid_out(name, weights, segments)
    if weights.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {weights.device}")
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"{name}: expected a float or integer tensor, got {weights.dtype}")
    mask = segments.mask()
    weights = torch.where(mask, weights.to(torch.promote_types(weights.dtype, dtype)), 0)
    looked_at = checks_values(weights)
    if looked_at and bool((weights < 0).any()):
        raise ValueError(f"{name}: expected non-negative weights, got {float(weights.detach().min())}")
    if not looked_at:
        weights = valid_or_nan(weights, ~(weights < 0), f"{name}: expected non-negative weights")
    largest = segments.item_maxima(weights.detach())
    only_zeros = f"{name}: expected some positive weight in every item, got an item of only zeros"
    no_mass = largest == 0  # of empty items as well, and on the padding of packed ones
    if not looked_at:
        largest = valid_or_nan(torch.where(no_mass, 1, largest), ~(mask & no_mass), only_zeros)
    elif bool(no_mass.any()):
        if bool((mask & no_mass).any()):
            raise ValueError(only_zeros)
        largest = torch.where(no_mass, 1, largest)
    weights = weights / largest
    return (weights / torch.where(mask, segments.item_sums(weights), 1)).to(dtype)


def _norms(values: Tensor) -> Tensor:
    """Euclidean norms of `values` (..., D), whose squares never overflow: (...,) float64."""
    if values.dtype != torch.float64 or values.shape[-1] == 0:
        return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
    largest = values.abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return torch.linalg.vector_norm(values / scale, dim=-1) * scale.squeeze(-1)


def _laid_out(name: str, weights: Tensor, segments: Segments) -> Tensor:
    """Weights in the layout of their points: the values of jagged weights; one row for all items is expanded."""
    if weights.is_nested:
        weights = _jagged_weights(name, weights, segments)
    expect_dense(name, weights)
    shape = tuple(weights.shape)
    if not segments.packed and shape in ((1, segments.size), (segments.size,)):
        return weights.expand(segments.shape)
    if shape != segments.shape:
        for_all = "" if segments.packed else f", or (1, {segments.size}) for all items"
        raise ValueError(f"{name}: expected shape {segments.shape}{for_all}, got {shape}")
    return weights


def _jagged_weights(name: str, weights: Tensor, segments: Segments) -> Tensor:
    if weights.layout != torch.jagged:
        raise ValueError(f"{name}: nested tensors must have layout=torch.jagged, got {weights.layout}")
    if not segments.packed:
        raise ValueError(f"{name}: expected shape {segments.shape} for padded points, got a nested tensor")
    if weights.dim() != 2 or weights.lengths() is not None:  # type: ignore[attr-defined]
        raise ValueError(f"{name}: expected a nested tensor of one weight for every point, without holes")
    offsets, values = weights.offsets(), weights.values()  # type: ignore[attr-defined]
    if offsets.shape[0] - 1 != segments.items:
        raise ValueError(f"{name}: expected {segments.items} items as the points have, got {offsets.shape[0] - 1}")
    if offsets is not segments.layout and checks_values(offsets):
        lengths, expected = offsets.diff().tolist(), segments.lengths.tolist()
        if lengths != expected:
            raise ValueError(f"{name}: expected the lengths of the points, {expected}, got {lengths}")
    return values
