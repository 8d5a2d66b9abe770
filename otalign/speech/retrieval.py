"""Cross-modal retrieval by layer: in which layers is speech near its text? (arXiv 2503.10211)"""

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
    """Retrieval scores of L layers, four tensors `(L,)`: means over both directions, speech to text and text to speech.

    NaN for a layer without a pair, or with an item that is not finite.

    Attributes:
        layers: numbers of the layers, which `select_layers` returns; empty = 0 to L - 1.
    """

    layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, found: Mapping[int, tuple[Tensor, ...]]) -> RetrievalScores:
        """From four scalars for each layer: mean reciprocal rank and three recalls."""
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
    """Rank of each item's partner among all items, in each layer, by the cosine of means over time.

    AI-STA (arXiv 2503.10211) selects the layers to align by cross-modal retrieval. Its pooling is not published. Means over
    time, and the mean of both directions, are our choice. A partner that ties with others gets the mean of their ranks. Use
    `RetrievalCorpus` for a corpus in several batches or on several processes.

    Args:
        speech_states: of each layer `(B, N, D)`: a list, a dict by layer number, or one tensor.
        text_states: likewise `(B, M, D)`.
        speech_lengths: `(B,)` int32 or int64; None = full. Empty items are left out.
        text_lengths: likewise.

    Returns:
        `RetrievalScores`.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.

    Example:
        >>> states = [torch.randn(8, 5, 16) for _ in range(3)]
        >>> otalign.speech.retrieval_scores(states, states).recall_at_1
        tensor([1., 1., 1.])
    """
    corpus = RetrievalCorpus(distributed=False)
    corpus.update(speech_states, text_states, speech_lengths, text_lengths)
    return corpus.compute()


class RetrievalCorpus:
    """`retrieval_scores` over a corpus in several batches, on one or several processes.

    The corpus keeps pooled vectors only: 2 D numbers for each item and layer. `compute` compares `chunk` queries with all items
    at a time. If torch.distributed is initialised and `distributed` is True, it compares the items of all processes. Then all
    processes have to call it. Their numbers of items may differ.

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
        """Add a batch. Arguments as in `retrieval_scores`."""
        for number, vectors in pooled(speech_states, text_states, speech_lengths, text_lengths).items():
            self.pooled.setdefault(number, []).append(vectors)

    @torch.no_grad()
    def compute(self) -> RetrievalScores:
        """The scores of all items so far, layers in the order of their first batch; of no layers before the first batch."""
        return RetrievalScores.of({number: scores_of(x, y, self.chunk) for number, x, y in self._layers()})

    def _layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        own = {number: [torch.cat(side) for side in zip(*kept, strict=True)] for number, kept in self.pooled.items()}
        if not (self.distributed and processes() > 1):
            for number, (speech, text) in own.items():
                yield number, speech, text
            return
        # A process without a batch does not know the layers, and still has to take part in the collectives.
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
    """By layer, the means over time of the items that are not empty, scaled to length 1: speech and text, `(items, D)` each."""
    found = {}
    for number, x, y in paired(speech_states, text_states):
        mask_x = inside(x, lengths_of("speech_lengths", x, speech_lengths))
        mask_y = inside(y, lengths_of("text_lengths", y, text_lengths))
        filled = mask_x.any(1) & mask_y.any(1)
        found[number] = unit(means(x, mask_x)[filled]), unit(means(y, mask_y)[filled])
    return found


def scores_of(speech: Tensor, text: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Mean reciprocal rank and recalls of one layer, four scalars, from vectors `(items, D)` of length 1."""
    ranks = torch.cat([_ranks(speech, text, chunk), _ranks(text, speech, chunk)])
    known = torch.ones_like(ranks).masked_fill(ranks.isnan(), torch.nan)
    return (1 / ranks).mean(), *((known * (ranks <= k)).mean() for k in (1, 5, 10))


def _ranks(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Rank of key i for query i among all keys, from 1 on, NaN where a similarity is NaN: `(items,)`."""
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
    """`k` layers: first those of `always`, then the layers with the highest scores, best first.

    AI-STA (arXiv 2503.10211) aligns few, shallow layers. According to a digest of the paper, the loss does not converge without
    layer 0, so `always=(0,)` is worth a try.

    Args:
        scores: of each layer: `RetrievalScores`, whose mean reciprocal rank counts; numbers; or a dict by layer.
        k: number of layers, with those of `always`. Ties go to the shallower layer; NaN comes last.
        always: numbers of layers to take in any case.

    Returns:
        Numbers of the layers.

    Raises:
        ValueError, TypeError: for a `k` that does not fit, or for layers in `always` without a score.

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
