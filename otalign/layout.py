"""Batch layouts: `Segments` describes padded, packed and jagged batches in the same way; helpers pack and pad.

A batch is a tensor of values with its `Segments`. Item b has `lengths[b]` rows. In a packed batch (total, D) they start at row
`starts[b]`, in a padded batch (B, N, D) at row 0 of item b. Vectors with one number per point have the same layout: (total,) or
(B, N).
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy
import torch
from torch import Tensor

from .checks import whole_number

INTEGERS = (torch.int32, torch.int64)
Lengths: TypeAlias = Tensor | Sequence[int] | numpy.ndarray  # or offsets

_debug = contextvars.ContextVar("otalign_debug", default=False)


@contextlib.contextmanager
def debug() -> Iterator[None]:
    """A context in which values on a GPU are checked as on a CPU. Each check synchronises with the device.

    A fault of a CUDA kernel then raises a RuntimeError at the launch of that kernel. Its message begins with CUDA's error name.

    Example:
        >>> with otalign.debug():
        ...     loss = otalign.sinkhorn_loss(torch.rand(2, 5, 8), torch.rand(2, 3, 8))
    """
    token = _debug.set(True)
    try:
        yield
    finally:
        _debug.reset(token)


def debugging() -> bool:
    """Whether values on a GPU are checked, within `debug()`."""
    return _debug.get()


@dataclass(frozen=True)
class Segments:
    """The rows of every item on one side of the problem."""

    items: int
    size: int  # longest length that the layout allows
    rows: int  # rows of the values: total, or B * N
    packed: bool
    layout: Tensor | None  # int64, lengths (B,) or, packed, offsets (B + 1,); None where all are full. With the values
    counts: list[int] | None  # the lengths, where Python may know: not under torch.compile, nor if they are on a GPU
    device: torch.device  # of the values

    @property
    def lengths(self) -> Tensor:
        """(B,) int64."""
        if self.layout is None:
            return torch.full((self.items,), self.size, dtype=torch.int64, device=self.device)
        return self.layout.diff() if self.packed else self.layout

    @property
    def starts(self) -> Tensor | None:
        """(B,) int64 in a packed batch, None in a padded one."""
        return self.layout[:-1] if self.packed and self.layout is not None else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a vector with one number per point."""
        return (self.rows,) if self.packed else (self.items, self.size)

    def spans(self) -> list[slice | tuple[int, slice]]:
        """What to index a tensor in this layout with to get the rows of each item."""
        lengths = self.lengths.tolist() if self.counts is None else self.counts
        if self.starts is None:
            return [(item, slice(0, length)) for item, length in enumerate(lengths)]
        return [slice(start, start + length) for start, length in zip(self.starts.tolist(), lengths, strict=True)]

    def item_of_row(self) -> Tensor:
        """Packed only: the item of every row, B for rows after the last one: (total,)."""
        assert self.layout is not None
        rows = torch.arange(self.rows, device=self.layout.device)
        return torch.searchsorted(self.layout[1:], rows, right=True)

    def mask(self) -> Tensor:
        """True on the points, False on the padding, in the shape of a vector."""
        if self.packed:
            return self.item_of_row() < self.items
        lengths = self.lengths
        return torch.arange(self.size, device=lengths.device) < lengths[:, None]

    def item_sums(self, vector: Tensor) -> Tensor:
        """Sum of a vector (zero on the padding) over each item, spread to the item's points again: vector's shape."""
        if not self.packed:
            return vector.sum(-1, keepdim=True).expand_as(vector)
        index = self.item_of_row()
        if vector.device.type == "cpu":
            return vector.new_zeros(self.items + 1).index_add(0, index, vector)[index]
        sums = self.to_padded(vector).sum(1)  # in a fixed order, which index_add on a GPU has not
        return torch.nn.functional.pad(sums, (0, 1))[index]

    def item_maxima(self, vector: Tensor) -> Tensor:
        """The largest of every item, of numbers >= 0: `(B, 1)`, or for every row of a packed batch."""
        if not self.packed:
            return vector.amax(-1, keepdim=True) if self.size else vector.new_zeros(self.items, 1)
        index = self.item_of_row()
        return vector.new_zeros(self.items + 1).scatter_reduce(0, index, vector, "amax")[index]

    def to_padded(self, values: Tensor) -> Tensor:
        """Values in this layout as (B, size, ...), zero on the padding."""
        if self.starts is None:
            mask = self.mask().to(values.device)
            return torch.where(mask.reshape(mask.shape + (1,) * (values.dim() - 2)), values, 0)
        lengths = self.lengths
        rows = torch.arange(self.size, device=lengths.device)
        index = (self.starts[:, None] + rows).clamp(max=max(self.rows - 1, 0)).to(values.device)
        inside = (rows < lengths[:, None]).to(values.device)
        if self.rows == 0:
            return values.new_zeros(self.items, self.size, *values.shape[1:]) + values.sum()
        return torch.where(inside.reshape(inside.shape + (1,) * (values.dim() - 1)), values[index], 0)

    def from_padded(self, values: Tensor, fill: float = 0) -> Tensor:
        """(B, size, ...) in this layout, with `fill` on the padding."""
        if not self.packed:
            mask = self.mask().to(values.device)
            return torch.where(mask.reshape(mask.shape + (1,) * (values.dim() - 2)), values, fill)
        if self.size == 0:
            return values.new_full((self.rows, *values.shape[2:]), fill) + values.sum()
        assert self.starts is not None
        item = self.item_of_row()
        inside = item < self.items
        item = torch.where(inside, item, 0)
        row = torch.where(inside, torch.arange(self.rows, device=item.device) - self.starts[item], 0)
        inside, item, row = (t.to(values.device) for t in (inside, item, row))
        return torch.where(inside.reshape(inside.shape + (1,) * (values.dim() - 2)), values[item, row], fill)


def points(
    side: str, values: Tensor, lengths: Lengths | None, cu_seqlens: Lengths | None, max_seqlen: int | None
) -> tuple[Tensor, Segments]:
    """Validate the points of one side and read its layout.

    Args:
        side: "x" or "y", for messages.
        values: `(B, N, D)` padded, `(total, D)` packed, or a jagged nested tensor.
        lengths: `(B,)`, of padded points; None = full.
        cu_seqlens: `(B + 1,)` offsets, of packed points.
        max_seqlen: longest item of packed points; None = read from the offsets.

    Returns:
        `(B, N, D)` or `(total, D)` values, and their segments.
    """
    _expect_tensor(side, values)
    if values.is_nested:
        if values.layout != torch.jagged:
            raise ValueError(f"{side}: nested tensors must have layout=torch.jagged, got {values.layout}")
        if lengths is not None or cu_seqlens is not None:
            raise ValueError(f"{side}: a nested tensor brings its own lengths; leave {side}_lengths and cu_seqlens out")
        if values._ragged_idx != 1:  # type: ignore[attr-defined]
            raise ValueError(
                f"{side}: expected a nested tensor of shape (B, lengths, D), got one whose dimension "
                f"{values._ragged_idx} has the lengths; transpose it back"  # type: ignore[attr-defined]
            )
        if values.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(f"{side}: nested tensors with holes (from narrow) are not read; call .contiguous() first")
        values, cu_seqlens = values.values(), values.offsets()  # type: ignore[attr-defined]
    expect_dense(side, values)
    if not values.is_floating_point() or values.dtype.itemsize < 2:
        raise TypeError(f"{side}: expected a float16, bfloat16, float32 or float64 tensor, got {values.dtype}")
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError(f"give either {side}_lengths (padded) or cu_seqlens_{side} (packed), not both")
        if values.dim() != 2:
            raise ValueError(f"{side}: packed points must be (total, D), got shape {tuple(values.shape)}")
        return values, packed_segments(side, values, cu_seqlens, max_seqlen)
    if max_seqlen is not None:
        raise ValueError(f"max_seqlen_{side} belongs to packed input; cu_seqlens_{side} is missing")
    if values.dim() != 3:
        raise ValueError(
            f"{side}: padded points must be (B, N, D), got shape {tuple(values.shape)}; "
            f"for packed points (total, D) give cu_seqlens_{side}"
        )
    return values, padded_segments(f"{side}_lengths", values, values.shape[1], lengths)


def padded_segments(name: str, values: Tensor, size: int, lengths: Lengths | None) -> Segments:
    """Segments of padded `values` (B, size, ...). `lengths` (B,) are integers in [0, size], None = full; `name` is for messages."""
    items, compiling = values.shape[0], torch.compiler.is_compiling()
    if lengths is None:
        return Segments(items, size, items * size, False, None, None if compiling else [size] * items, values.device)
    lengths = _own(_integers(name, lengths, (items,)))
    counts = _contents(lengths, values)
    if counts and not 0 <= min(counts) <= max(counts) <= size:
        raise ValueError(f"{name}: expected values in [0, {size}], got {counts}")
    return Segments(items, size, items * size, False, _beside(lengths, values), counts, values.device)


def packed_segments(side: str, values: Tensor, cu_seqlens: Lengths, max_seqlen: int | None) -> Segments:
    """Segments of packed `values` (total, D) from offsets `cu_seqlens` (B + 1,)."""
    name, rows = f"cu_seqlens_{side}", values.shape[0]
    cu_seqlens = _integers(name, cu_seqlens, None)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if max_seqlen is not None and not _is_symbolic(max_seqlen):
        max_seqlen = whole_number(f"max_seqlen_{side}", max_seqlen)
        if max_seqlen < 0:
            raise ValueError(f"max_seqlen_{side}: expected at least 0, got {max_seqlen}")
    cu_seqlens = _own(cu_seqlens)
    items, offsets = cu_seqlens.shape[0] - 1, _beside(cu_seqlens, values)
    if torch.compiler.is_compiling():
        return Segments(items, rows if max_seqlen is None else max_seqlen, rows, True, offsets, None, values.device)
    marks = _contents(cu_seqlens, values)
    if marks is None and max_seqlen is not None:
        return Segments(items, max_seqlen, rows, True, offsets, None, values.device)
    if marks is None:
        marks = cu_seqlens.tolist()  # synchronises; max_seqlen avoids this
    counts = [end - start for start, end in itertools.pairwise(marks)]
    longest = max(counts, default=0)
    if marks[0] != 0 or marks[-1] > rows or min(counts, default=0) < 0:
        raise ValueError(f"{name}: expected offsets that rise from 0 to at most {rows}, got {marks}")
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"max_seqlen_{side}: the longest item has {longest} points, got {max_seqlen}")
    return Segments(items, longest if max_seqlen is None else max_seqlen, rows, True, offsets, counts, values.device)


def _is_symbolic(value: object) -> bool:
    return isinstance(value, torch.SymInt)


def _contents(integers: Tensor, values: Tensor) -> list[int] | None:
    """The integers as a list, if reading them costs no synchronisation, or values are on the CPU, or in otalign.debug()."""
    if torch.compiler.is_compiling():
        return None
    return integers.tolist() if "cpu" in (integers.device.type, values.device.type) or debugging() else None


def _own(integers: Tensor) -> Tensor:
    """A contiguous int64 copy, which stays valid if the caller changes the original later."""
    return integers.to(torch.int64, copy=True).contiguous()


def _beside(integers: Tensor, values: Tensor) -> Tensor:
    """The integers on the device of the values, without waiting for a GPU."""
    on_gpu = values.device.type != "cpu"  # a non-blocking copy to the CPU could be read before it ends
    return integers.to(values.device, non_blocking=on_gpu)


def _expect_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def expect_dense(name: str, value: object) -> None:
    """Raise an error for anything but a dense tensor: other types, nested and sparse tensors."""
    _expect_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.is_nested:
        raise ValueError(f"{name}: expected a dense tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}")


def mapped(value: Tensor) -> bool:
    """Whether torch.vmap maps over this tensor, so that Python cannot read its numbers."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active() and _holds_mapped(value)


def _holds_mapped(value: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def _integers(name: str, lengths: Lengths, shape: tuple[int, ...] | None) -> Tensor:
    """Validate lengths or offsets, a tensor, list, tuple or numpy array of integers, and return them as a tensor."""
    if not isinstance(lengths, Tensor):
        lengths = _from_numbers(name, lengths)
    _expect_integers(name, lengths, shape)
    return lengths


def _from_numbers(name: str, numbers: object) -> Tensor:
    if not isinstance(numbers, (list, tuple, numpy.ndarray)):
        raise TypeError(f"{name}: expected a torch.Tensor or a list of integers, got {type(numbers).__name__}")
    try:
        array = numpy.array(numbers)
    except ValueError:
        raise ValueError(f"{name}: expected a list of integers, got {numbers!r}") from None
    if array.size == 0 and not isinstance(numbers, numpy.ndarray):
        array = array.astype(numpy.int64)
    if array.dtype.kind in "iu":
        if array.size and int(array.max()) > numpy.iinfo(numpy.int64).max:
            raise ValueError(f"{name}: expected numbers within int64, got {int(array.max())}")
        return torch.tensor(array.astype(numpy.int64), device="cpu")
    if array.dtype.kind == "f":
        return torch.tensor(
            array.astype(numpy.float64), device="cpu"
        )  # the caller refuses it, with a message for floats
    raise TypeError(f"{name}: expected integers, got {type(numbers).__name__} of {array.dtype}")


def _expect_integers(name: str, lengths: Tensor, shape: tuple[int, ...] | None) -> None:
    expect_dense(name, lengths)
    if lengths.is_floating_point():
        raise ValueError(
            f"{name}: expected int32 or int64, got {lengths.dtype}; "
            "for lengths relative to the longest item use otalign.layout.from_relative_lengths"
        )
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected int32 or int64, got {lengths.dtype}")
    if shape is not None and tuple(lengths.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(lengths.shape)}")
    if mapped(lengths):
        raise NotImplementedError(f"{name}: torch.vmap may map over points, costs and weights, and not over this")
    if lengths.device.type == "meta":
        raise ValueError(f"{name}: expected numbers, got a tensor on the meta device, which has none")


# Helpers for callers: from masks, lengths and spans to packed values and offsets -----------------------------------------


def from_mask(h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pack the rows where `mask` is True.

    Args:
        h: `(B, N, D)`.
        mask: `(B, N)`, boolean or integer; True (non-zero) keeps a row. The kept rows need not be adjacent. None = all rows.

    Returns:
        `(total, D)` values and `(B + 1,)` int64 offsets, as `cu_seqlens_x` takes them.

    Raises:
        TypeError: for a float mask, because its meaning is unclear: 1 to keep, or -inf to pad?
        ValueError: for a mask of another shape.

    Example:
        >>> values, cu_seqlens = otalign.layout.from_mask(torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]))
        >>> values.shape, cu_seqlens
        (torch.Size([3, 4]), tensor([0, 2, 3]))
    """
    return _pack(h, _expect_mask("mask", h, mask) if mask is not None else _all(h))


def from_padding_mask(h: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pack the rows where `padding_mask` `(B, N)` is False (fairseq's and torch's `key_padding_mask` convention).

    As `from_mask`, with the opposite polarity: True (non-zero) drops a row. None = no padding.
    """
    return _pack(h, ~_expect_mask("padding_mask", h, padding_mask) if padding_mask is not None else _all(h))


def from_relative_lengths(h: Tensor, rel: Tensor) -> tuple[Tensor, Tensor]:
    """Pack the first `round(rel * N)` rows of each item (SpeechBrain's convention).

    Args:
        h: `(B, N, D)`.
        rel: `(B,)` float, the share of `N` that each item fills, in `[0, 1]`.

    Returns:
        `(total, D)` values and `(B + 1,)` int64 offsets.

    Raises:
        ValueError, TypeError: for shares of another type or shape, or outside of `[0, 1]`.
    """
    _expect_batch(h)
    expect_dense("rel", rel)
    if not rel.is_floating_point():
        raise TypeError(f"rel: expected a float tensor of shares in [0, 1], got {rel.dtype}")
    if tuple(rel.shape) != (h.shape[0],):
        raise ValueError(f"rel: expected shape ({h.shape[0]},), got {tuple(rel.shape)}")
    if not bool(((rel >= 0) & (rel <= 1)).all()):
        raise ValueError(f"rel: expected shares in [0, 1], got {rel.tolist()}")
    # SpeechBrain rounds float32 shares in float32. In float64 a product near one half could round the other way.
    rel = rel.to(torch.promote_types(rel.dtype, torch.float32))
    return _pack(h, _length_mask((rel * h.shape[1]).round().long(), h))


def from_time_major(h: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """Pack time-major states `(N, B, D)` with integer `lengths` `(B,)`: `(total, D)` values, `(B + 1,)` offsets."""
    _expect_batch(h)
    h = h.transpose(0, 1)
    segments = padded_segments("lengths", h, h.shape[1], lengths)
    return _pack(h, _length_mask(segments.lengths, h))


def from_spans(h: Tensor, spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """Pack spans of several clips or sentences in one row. Each span becomes an item.

    Args:
        h: `(B, N, D)`.
        spans: a list of `(start, end)` pairs, end exclusive, for each of the B rows; a list may be empty.

    Returns:
        `(total, D)` values and `(number of spans + 1,)` int64 offsets, in the order of the spans.

    Raises:
        ValueError, TypeError: for spans that are no pairs of integers, or not within `[0, N]`.
    """
    _expect_batch(h)
    if len(spans) != h.shape[0]:
        raise ValueError(f"spans: expected one list for each of {h.shape[0]} rows, got {len(spans)}")
    pieces, offsets = [h[:0].reshape(0, h.shape[-1])], [0]
    for row, pairs in zip(h, spans, strict=True):
        for pair in pairs:
            try:
                start, end = map(operator.index, pair)
            except (TypeError, ValueError):
                raise TypeError(f"spans: expected (start, end) pairs of integers for each row, got {pair!r}") from None
            if not 0 <= start <= end <= h.shape[1]:
                raise ValueError(f"spans: expected 0 <= start <= end <= {h.shape[1]}, got ({start}, {end})")
            pieces.append(row[start:end])
            offsets.append(offsets[-1] + end - start)
    return torch.cat(pieces), torch.tensor(offsets, device=h.device)


def to_padded(values: Tensor, cu_seqlens: Lengths) -> tuple[Tensor, Tensor]:
    """Pad packed values, the inverse of the helpers above. `otalign.speech` takes padded batches only.

    Args:
        values: `(total, D)`.
        cu_seqlens: `(B + 1,)` offsets, such as those of a jagged nested tensor.

    Returns:
        `(B, N, D)`, N being the longest length, with zeros on the padding; and `(B,)` int64 lengths.

    Raises:
        ValueError, TypeError: for bad values or offsets.

    Example:
        >>> states, attention_mask = torch.ones(2, 4, 3), torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])  # padded on the left
        >>> padded, lengths = otalign.layout.to_padded(*otalign.layout.from_mask(states, attention_mask))
        >>> padded.shape, lengths
        (torch.Size([2, 3, 3]), tensor([3, 1]))
    """
    expect_dense("values", values)
    if values.dim() != 2:
        raise ValueError(f"values: expected shape (total, D), got {tuple(values.shape)}")
    segments = packed_segments("values", values, cu_seqlens, None)
    return segments.to_padded(values), segments.lengths


def _pack(h: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return h[keep], torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))


def _length_mask(lengths: Tensor, h: Tensor) -> Tensor:
    return torch.arange(h.shape[1], device=h.device) < lengths.to(h.device)[:, None]


def _expect_batch(h: Tensor) -> None:
    expect_dense("h", h)
    if h.dim() != 3:
        raise ValueError(f"h: expected 3 dimensions, got shape {tuple(h.shape)}")


def _all(h: Tensor) -> Tensor:
    _expect_batch(h)
    return h.new_ones(h.shape[:2], dtype=torch.bool)


def _expect_mask(name: str, h: Tensor, mask: Tensor) -> Tensor:
    _expect_batch(h)
    expect_dense(name, mask)
    if mask.is_floating_point():
        raise TypeError(f"{name}: expected a boolean or integer mask, got {mask.dtype}")
    if mask.shape != h.shape[:2]:
        raise ValueError(f"{name}: expected shape {tuple(h.shape[:2])}, got {tuple(mask.shape)}")
    return mask.to(h.device).bool()
