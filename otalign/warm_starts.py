"""Warm starts in training: the potentials of each utterance from its last visit, as the start of the next solve."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import whole_number
from .layout import INTEGERS, expect_dense
from .problem import Problem, Solution, is_start

Key: TypeAlias = Any  # str, bytes, int, or a tuple of these; None = an item that is not kept
Ids: TypeAlias = "Sequence[Key] | Tensor | numpy.ndarray"

UNUSABLE = -1  # the length of an entry that no item has


class WarmStarts:
    """Potentials by utterance, from which a loss starts the next time that it sees the utterance.

    A loss takes the store as `warm_starts=`, and with each call the `ids` of its items. The solver starts from g alone, so an
    entry is the g of the text side. It is used if the text of the item has as many points as at the last visit;
    the speech may have another length, as after a change of speed. Otherwise, and for an item that is new, the solver starts
    from zero. An item whose potentials are not all finite leaves an entry that is not used; one that has not converged leaves
    its potentials, from which the next visit goes on.

    The start changes how many iterations a solve takes, and its result within `tol`; or, where `max_iter` ends it, towards
    the optimum. It is not part of the autograd graph. The results of an item then depend on its last visit, and no longer on
    the item alone. Give each loss its own store.

    Args:
        max_entries: largest number of entries. Beyond it, the entry whose last use is longest ago is dropped.
        device: where the potentials are; None = where the batches are. A store on the CPU makes batches on a GPU wait for it
            at each call.

    The memory is at most 4 bytes (8 in float64) times `max_entries` times the length of the longest text so far.

    Raises:
        TypeError, ValueError: for a `max_entries` that is not an integer of at least 1.

    Example:
        >>> criterion = otalign.SinkhornLoss(reg=0.05, warm_starts=otalign.WarmStarts())
        >>> x, y = torch.randn(2, 30, 16), torch.randn(2, 8, 16)
        >>> first = criterion(x, y, ids=["a", "b"]), criterion.last.n_iter
        >>> second = criterion(x, y, ids=["a", "b"]), criterion.last.n_iter
        >>> bool((second[1] < first[1]).all()), len(criterion.warm_starts)
        (True, 2)
    """

    def __init__(self, max_entries: int = 100_000, *, device: torch.device | str | None = None) -> None:
        self.max_entries = whole_number("max_entries", max_entries)
        if self.max_entries < 1:
            raise ValueError(f"max_entries: expected at least 1, got {max_entries}")
        self.device = None if device is None else torch.device(device)
        self.clear()

    def clear(self) -> None:
        """Drop all entries."""
        self._rows: OrderedDict[Key, int] = OrderedDict()  # row of each entry; the entry used last comes last
        # (rows, longest text), zero behind each text; float64 from the first problem in float64 on
        self._potentials = torch.zeros(0, 0, dtype=torch.float32, device="cpu")
        self._lengths = torch.zeros(0, dtype=torch.int64, device="cpu")  # (rows,)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __repr__(self) -> str:
        return f"WarmStarts({len(self)} of max_entries={self.max_entries}, device={self.device})"

    def state_dict(self) -> dict[str, Any]:
        """The entries on the CPU, for `torch.save`; `load_state_dict` takes them back."""
        rows = torch.tensor(list(self._rows.values()), dtype=torch.int64, device="cpu")
        potentials, lengths = (t.cpu()[rows] for t in (self._potentials, self._lengths))
        return {"ids": list(self._rows), "potentials": potentials, "lengths": lengths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace all entries by those of a `state_dict`; of more than `max_entries`, the ones used last.

        Raises:
            ValueError: if the parts of the state do not fit each other.
        """
        ids, potentials, lengths = state["ids"], state["potentials"], state["lengths"]
        if potentials.dim() != 2 or not len(ids) == len(potentials) == len(lengths):
            shapes = f"{len(ids)} ids, potentials {tuple(potentials.shape)}, lengths {tuple(lengths.shape)}"
            raise ValueError(
                f"state: expected as many ids as rows of potentials (entries, M) and lengths, got {shapes}"
            )
        kept = slice(max(len(ids) - self.max_entries, 0), None)
        self.clear()
        self._rows.update((key, row) for row, key in enumerate(keys_of(ids[kept], None)))
        self._potentials, self._lengths = potentials[kept].clone(), lengths[kept].clone()

    def _start(self, keys: list[Key], problem: Problem) -> Tensor | None:
        """The potential g to start from, in the layout of y and in the problem's dtype; None if no item is known."""
        found = [self._rows.get(key, -1) for key in keys]
        if max(found, default=-1) < 0:
            return None
        for key in keys:
            if key in self._rows:
                self._rows.move_to_end(key)
        self._move(problem.device)
        segments, here = problem.y.segments, self._potentials.device
        rows = _on(here, found)
        known, rows = rows >= 0, rows.clamp(min=0)
        potentials, lengths = self._potentials[rows], torch.where(known, self._lengths[rows], UNUSABLE)
        if here != problem.device:
            on_gpu = problem.device.type != "cpu"  # a non-blocking copy to the CPU could be read before it ends
            potentials, lengths = (t.to(problem.device, non_blocking=on_gpu) for t in (potentials, lengths))
        g = F.pad(potentials, (0, segments.size - potentials.shape[1]))  # negative padding cuts
        g = torch.where((lengths == segments.lengths)[:, None], g, 0)
        g = segments.from_padded(g).to(problem.dtype)  # of float64, infinity in float32 if too large
        # Where reg is far smaller than at the last visit, a potential may be too large for the solver.
        return torch.where(is_start(g, problem.options.reg, segments), g, 0)

    def _keep(self, keys: list[Key], problem: Problem, potential: Tensor) -> None:
        """Store the potential g of the items, `(B, M)` or `(total_y,)`."""
        items: dict[int, int] = {}  # the last item for each row: no row is written twice, in whatever order
        for item, key in enumerate(keys):
            if key is not None:
                items[self._row(key)] = item
        if not items:
            return
        self._move(problem.device)
        segments = problem.y.segments
        g = segments.to_padded(potential)
        usable = g.isfinite().all(1)
        g = torch.where(usable[:, None], g, 0)
        lengths = torch.where(usable, segments.lengths, UNUSABLE)
        if list(items.values()) != list(range(len(keys))):
            chosen = _on(g.device, list(items.values()))
            g, lengths = g[chosen], lengths[chosen]
        self._potentials = self._potentials.to(torch.promote_types(self._potentials.dtype, g.dtype))
        self._grow(segments.size)
        rows, here = _on(self._potentials.device, list(items)), self._potentials.device
        g = F.pad(g, (0, self._potentials.shape[1] - segments.size))
        self._potentials.index_copy_(0, rows, g.to(here, self._potentials.dtype))
        self._lengths.index_copy_(0, rows, lengths.to(here))

    def _row(self, key: Key) -> int:
        """The row for an entry: its own, a new one, or that of the entry whose last use is longest ago."""
        row = self._rows.pop(key, None)
        if row is None:
            row = len(self._rows) if len(self._rows) < self.max_entries else self._rows.popitem(last=False)[1]
        self._rows[key] = row
        return row

    def _grow(self, size: int) -> None:
        """Make room for all rows, and for a text of this size."""
        (rows, width), needed = self._potentials.shape, len(self._rows)
        more = 0 if needed <= rows else min(self.max_entries, max(needed, 2 * rows)) - rows
        if more or size > width:
            self._potentials = F.pad(self._potentials, (0, max(size - width, 0), 0, more))
            self._lengths = F.pad(self._lengths, (0, more), value=UNUSABLE)

    def _move(self, device: torch.device) -> None:
        """Bring the entries to where they belong, if the batches are on this device."""
        device = self.device or device
        self._potentials, self._lengths = (t.to(device) for t in (self._potentials, self._lengths))


@dataclass(frozen=True)
class Visit:
    """One call of a loss with the ids of its items."""

    store: WarmStarts
    keys: list[Key]

    @torch.inference_mode(False)
    @torch.no_grad()
    def started(self, problem: Problem) -> Problem:
        """The problem with its warm start."""
        return replace(problem, init=self.store._start(self.keys, problem))

    @torch.inference_mode(False)
    @torch.no_grad()
    def end(self, problem: Problem, solution: Solution) -> None:
        """Keep the potentials of the solution."""
        self.store._keep(self.keys, problem, solution.g.detach())


def visit_of(store: WarmStarts | None, ids: Ids | None, items: int) -> Visit | None:
    """The visit of a call with `ids`; None without ids."""
    if ids is None:
        return None
    if store is None:
        raise ValueError("ids: this loss keeps nothing by id; give its constructor warm_starts=otalign.WarmStarts()")
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "ids: warm starts work in eager mode; leave ids out under torch.compile and torch.func"
        )
    return Visit(store, keys_of(ids, items))


def checked_store(store: object) -> WarmStarts | None:
    """The argument `warm_starts` of a loss."""
    if store is not None and not isinstance(store, WarmStarts):
        raise TypeError(f"warm_starts: expected an otalign.WarmStarts or None, got {type(store).__name__}")
    return store


def keys_of(ids: Ids, items: int | None) -> list[Key]:
    """Ids as keys of a dictionary, one for each of the `items`; None = of any number. Ids on a GPU make Python wait for it."""
    if isinstance(ids, Tensor):
        expect_dense("ids", ids)
        if ids.dim() != 1 or ids.dtype not in INTEGERS:
            raise ValueError(f"ids: expected int32 or int64 of shape (B,), got {ids.dtype} of {tuple(ids.shape)}")
        ids = ids.tolist()
    elif isinstance(ids, numpy.ndarray):
        ids = ids.tolist()
    if not isinstance(ids, (list, tuple)):
        raise TypeError(f"ids: expected a list with the id of each item, or integers (B,), got {type(ids).__name__}")
    if items is not None and len(ids) != items:
        raise ValueError(f"ids: expected {items}, one for each item, got {len(ids)}")
    return [_key(each) for each in ids]


def _key(key: object) -> Key:
    if key is None or isinstance(key, (str, bytes)):
        return key
    if isinstance(key, tuple):
        return tuple(map(_key, key))
    if isinstance(key, (int, numpy.integer)) and type(key) is not bool:
        return int(key)
    raise TypeError(f"ids: expected strings, integers, tuples of these, or None, got {type(key).__name__}")


def _on(device: torch.device, integers: list[int]) -> Tensor:
    """Integers on a device, without waiting for it."""
    return torch.tensor(integers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
