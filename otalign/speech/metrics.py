"""The scores of `otalign.speech` over a data set, as torchmetrics: streaming, and the same on any number of processes.

Only this module needs torchmetrics (`pip install otalign[metrics]`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from ..layout import Lengths
from ..options import one_of
from ._states import States, at_least_one, device_of_buffers
from .path import METRICS, alignment_path_score, sequence_similarity
from .retrieval import RetrievalScores, pooled, scores_of


class PathScores(NamedTuple):
    """Means over the items of a data set that are not empty; NaN if all are empty, or if one is not finite.

    For a single layer all shapes are (), because torchmetrics turns tensors with one element into scalars.
    """

    score: Tensor  # scalar, the alignment path score
    per_layer: Tensor  # (L,)
    monotonicity: Tensor  # (L,)
    consistency: Tensor  # (L,)
    sequence_similarity: Tensor  # (L,)


class AlignmentPathMetric(Metric):
    """The alignment path score over a data set (see `alignment_path_score`): `compute()` gives `PathScores`.

    Args:
        layers: number of layers of the states, at least 1.
        metric: `"cosine"` or `"euclidean"`.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError, TypeError: for bad arguments; in `update` also for another number of layers.

    Example:
        >>> aps = otalign.speech.metrics.AlignmentPathMetric(layers=2)
        >>> for _ in range(3):
        ...     aps.update([torch.randn(4, 9, 8)] * 2, [torch.randn(4, 5, 8)] * 2)
        >>> aps.compute().per_layer.shape
        torch.Size([2])
    """

    is_differentiable = False
    higher_is_better = None  # cosines: higher is better; distances: lower
    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, layers: int, *, metric: str = "cosine", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        one_of("metric", metric, METRICS)
        self.layers, self.metric = at_least_one("layers", layers), metric
        place = device_of_buffers()
        self.add_state("sums", torch.zeros(4, self.layers, dtype=torch.float64, device=place), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64, device=place), dist_reduce_fx="sum")

    def update(
        self,
        speech_states: States,
        text_states: States,
        speech_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
    ) -> None:
        """Add a batch. Arguments as in `alignment_path_score`."""
        arguments = speech_states, text_states, speech_lengths, text_lengths
        path = alignment_path_score(*arguments, metric=self.metric)
        sequence = sequence_similarity(*arguments, metric=self.metric)
        if len(path.per_layer) != self.layers:
            raise ValueError(f"speech_states: expected {self.layers} layers, got {len(path.per_layer)}")
        filled = (path.path >= 0).any(2).all(0)
        found = torch.stack([path.per_layer, path.monotonicity, path.consistency, sequence]).double()
        self.sums += torch.where(filled, found, 0).sum(2)
        self.count += filled.sum()

    def compute(self) -> PathScores:
        """The means over all items so far."""
        means = torch.where(self.count > 0, self.sums / self.count.clamp(min=1), torch.nan)
        return PathScores(means[0].mean(), *means)


class RetrievalMetric(Metric):
    """Cross-modal retrieval by layer over a data set (see `retrieval_scores`): `compute()` gives `RetrievalScores`.

    All items of all processes are compared with each other. The metric keeps their means over time: 2 L D numbers for each item.
    Layers are numbered from 0 in their order in the states.

    Args:
        chunk: number of items that are compared with all others at a time, at least 1.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError, TypeError: for bad arguments; in `update` also for another L or D than before.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    speech: list[Tensor]
    text: list[Tensor]
    sizes: Tensor

    def __init__(self, *, chunk: int = 1024, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chunk = at_least_one("chunk", chunk)
        # Flat vectors, because a process without a batch has none, and does not know the numbers of layers and dimensions.
        self.add_state("speech", [], dist_reduce_fx="cat")
        self.add_state("text", [], dist_reduce_fx="cat")
        self.add_state("sizes", torch.zeros(2, dtype=torch.int64, device=device_of_buffers()), dist_reduce_fx="max")

    def update(
        self,
        speech_states: States,
        text_states: States,
        speech_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
    ) -> None:
        """Add a batch. Arguments as in `retrieval_scores`. All layers must have the same D."""
        layers = list(pooled(speech_states, text_states, speech_lengths, text_lengths).values())
        speech, text = (torch.stack(side, 1) for side in zip(*layers, strict=True))  # (items, L, D)
        sizes = self.sizes.new_tensor(speech.shape[1:])
        if self.speech and not torch.equal(sizes, self.sizes):
            raise ValueError(f"speech_states: expected (L, D) {self.sizes.tolist()} as before, got {sizes.tolist()}")
        self.sizes = sizes
        self.speech.append(speech.to(self.dtype).flatten())
        self.text.append(text.to(self.dtype).flatten())

    def compute(self) -> RetrievalScores:
        """The scores of all items so far; of no layers before the first batch."""
        layers, dim = self.sizes.tolist()
        if not layers:
            return RetrievalScores.of({})
        flat = (torch.cat(list(kept)) if isinstance(kept, list) else kept for kept in (self.speech, self.text))
        speech, text = (vectors.view(-1, layers, dim).unbind(1) for vectors in flat)
        return RetrievalScores.of({n: scores_of(speech[n], text[n], self.chunk) for n in range(layers)})
