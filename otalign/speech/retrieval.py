"""Cross-modal retrieval by layer, which tells where a language model has speech and text in one place (arXiv 2503.10211)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import flag, whole_number
from ..distributed import gathered, processes
from ..layout import Lengths
from ._states import States, at_least_one, inside, lengths_of, means, paired, products, unit


class _Scores(NamedTuple):
    mrr: Tensor  # (L,) mean reciprocal rank
    recall_at_1: Tensor  # (L,)
    recall_at_5: Tensor  # (L,)
    recall_at_10: Tensor  # (L,)


class RetrievalScores(_Scores):
    """Of L layers, means over both directions: speech finds its text, and text its speech: four tensors `(L,)`.

    NaN for a layer without a pair, or in which an item is not finite.

    Attributes:
        layers: their numbers, which `select_layers` gives; empty = from 0 on.
    """

    layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, found: Mapping[int, tuple[Tensor, ...]]) -> RetrievalScores:
        """From the four scores of each layer."""
        columns = (
            zip(*found.values(), strict=True) if found else [[torch.empty(0, dtype=torch.float32, device="cpu")]] * 4
        )
        scores = cls(*(torch.stack(list(column)).view(len(found)) for column in columns))
        scores.layers = tuple(found)
        return scores


def retrieval_scores(
    speech_states: States,
    text_states: States,
    speech_lengths: Lengths | None = None,
    text_lengths: Lengths | None = None,
) -> RetrievalScores:
    """How well each item finds its partner among all items, in each layer, by the cosine of means over time.

    AI-STA (arXiv 2503.10211) selects the layers to align by cross-modal retrieval. How it pools is not published: means over
    time, and the mean of both directions, are our choice. A partner that ties with others has the middle of their ranks. For
    a corpus in several batches, or on several processes, `RetrievalCorpus`.

    Args:
        speech_states: of every layer `(B, N, D)`: a list, a dict by layer number, or one tensor.
        text_states: likewise `(B, M, D)`.
        speech_lengths: `(B,)`; None = full. Empty items take no part.
        text_lengths: likewise.

    Example:
        >>> states = [torch.randn(8, 5, 16) for _ in range(3)]
        >>> otalign.speech.retrieval_scores(states, states).recall_at_1
        tensor([1., 1., 1.])
    """
    corpus = RetrievalCorpus(distributed=False)
    corpus.update(speech_states, text_states, speech_lengths, text_lengths)
    return corpus.compute()


class RetrievalCorpus:
    """`retrieval_scores` over a corpus that comes in batches, and from several processes.

    Only pooled vectors are kept: two of D numbers for an item and layer. `compute` compares them `chunk` queries at a time; if
    torch.distributed is initialised and `distributed` is True, over the items of all processes, each with its own number.

    Example:
        >>> corpus = otalign.speech.RetrievalCorpus()
        >>> for _ in range(3):
        ...     states = torch.randn(4, 6, 8)
        ...     corpus.update(states, states)
        >>> corpus.compute().mrr
        tensor([1.])
    """

    def __init__(self, *, chunk: int = 1024, distributed: bool = True) -> None:
        self.chunk, self.distributed = at_least_one("chunk", chunk), flag("distributed", distributed)
        self.pooled: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def update(
        self,
        speech_states: States,
        text_states: States,
        speech_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
    ) -> None:
        """Add a batch; arguments as in `retrieval_scores`."""
        for number, vectors in pooled(speech_states, text_states, speech_lengths, text_lengths).items():
            self.pooled.setdefault(number, []).append(vectors)

    @torch.no_grad()
    def compute(self) -> RetrievalScores:
        """The scores of all items so far, layers in the order in which they came first; of no layers if nothing came."""
        return RetrievalScores.of({number: scores_of(x, y, self.chunk) for number, x, y in self._layers()})

    def _layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        own = {number: [torch.cat(side) for side in zip(*kept, strict=True)] for number, kept in self.pooled.items()}
        if not (self.distributed and processes() > 1):
            for number, (speech, text) in own.items():
                yield number, speech, text
            return
        # A process that has had no batch does not know the layers; it has to take part.
        kinds = {number: (x.shape[1], x.dtype, x.device.type) for number, (x, _) in own.items()}
        every: list[Any] = [None] * processes()
        torch.distributed.all_gather_object(every, kinds)
        for number, (width, dtype, device) in {n: kind for known in every for n, kind in known.items()}.items():
            speech, text = own.get(number) or [torch.empty(0, width, dtype=dtype, device=device)] * 2
            yield number, gathered(speech), gathered(text)


@torch.no_grad()
def pooled(
    speech_states: States, text_states: States, speech_lengths: Lengths | None, text_lengths: Lengths | None
) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer the means over time of the items that are not empty, of length one: two tensors `(items, D)`."""
    found = {}
    for number, x, y in paired(speech_states, text_states):
        mask_x = inside(x, lengths_of("speech_lengths", x, speech_lengths))
        mask_y = inside(y, lengths_of("text_lengths", y, text_lengths))
        filled = mask_x.any(1) & mask_y.any(1)
        found[number] = unit(means(x, mask_x)[filled]), unit(means(y, mask_y)[filled])
    return found


def scores_of(speech: Tensor, text: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Mean reciprocal rank and recalls of one layer, from vectors of length one `(items, D)`."""
    ranks = torch.cat([_ranks(speech, text, chunk), _ranks(text, speech, chunk)])
    known = torch.ones_like(ranks).masked_fill(ranks.isnan(), torch.nan)
    return (1 / ranks).mean(), *((known * (ranks <= k)).mean() for k in (1, 5, 10))


def _ranks(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    found = [queries.new_empty(0)]
    for first in range(0, len(queries), chunk):
        similarities = products(queries[first : first + chunk], keys)
        own = similarities.diagonal(first)[:, None]
        ranks = (similarities > own).sum(1) + ((similarities == own).sum(1) + 1).float() / 2
        found.append(torch.where(own[:, 0].isnan(), torch.nan, ranks))
    return torch.cat(found)


def select_layers(
    scores: RetrievalScores | Tensor | Sequence[float] | Mapping[int, float], k: int, always: Sequence[int] = ()
) -> list[int]:
    """The `k` layers with the highest scores, best first, after those that are taken `always`.

    AI-STA (arXiv 2503.10211) aligns few, shallow layers; in a digest of it the loss does not converge without layer 0, hence
    `always=(0,)` is worth a try.

    Args:
        scores: of every layer: `RetrievalScores`, of which the mean reciprocal rank counts; numbers; or a dict by layer.
        k: how many in all, those of `always` included. Ties go to the shallower layer; NaN comes last.
        always: numbers of layers.

    Example:
        >>> otalign.speech.select_layers([0.2, 0.9, 0.5, 0.7], 3, always=(0,))
        [0, 1, 3]
    """
    values, numbers = (scores.mrr, scores.layers) if isinstance(scores, RetrievalScores) else (scores, ())
    if isinstance(values, Tensor):
        values = values.flatten().tolist()
    named = (
        dict(values) if isinstance(values, Mapping) else dict(zip(numbers or range(len(values)), values, strict=True))
    )
    missing = [layer for layer in always if layer not in named]
    if missing:
        raise ValueError(f"always: expected layers among {list(named)}, got {missing}")
    k = whole_number("k", k)
    if not len(set(always)) <= k <= len(named):
        raise ValueError(f"k: expected a number from {len(set(always))} to {len(named)}, got {k}")

    def order(layer: int) -> tuple[bool, float, int]:
        score = float(named[layer])
        return (True, 0.0, layer) if math.isnan(score) else (False, -score, layer)

    rest = sorted((layer for layer in named if layer not in always), key=order)
    return [*dict.fromkeys(always), *rest][:k]
