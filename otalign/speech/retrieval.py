"""Cross-modal retrieval by layer, which tells where a language model has speech and text in one place (arXiv 2503.10211)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .states import States, inside, lengths_of, means, paired, products, unit


class RetrievalScores(NamedTuple):
    """Of L layers, means over both directions: speech finds its text, and text its speech. NaN without a pair."""

    mrr: Tensor  # (L,) mean reciprocal rank
    recall_at_1: Tensor  # (L,)
    recall_at_5: Tensor  # (L,)
    recall_at_10: Tensor  # (L,)


def retrieval_scores(
    speech_states: States,
    text_states: States,
    speech_lengths: Tensor | None = None,
    text_lengths: Tensor | None = None,
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
        self.chunk, self.distributed = chunk, distributed
        self.pooled: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def update(
        self,
        speech_states: States,
        text_states: States,
        speech_lengths: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> None:
        """Add a batch; arguments as in `retrieval_scores`."""
        for number, vectors in pooled(speech_states, text_states, speech_lengths, text_lengths).items():
            self.pooled.setdefault(number, []).append(vectors)

    @torch.no_grad()
    def compute(self) -> RetrievalScores:
        """The scores of all items so far, layers in the order in which they came first."""
        found = [scores_of(*layer, self.chunk) for layer in self._layers()]
        return RetrievalScores(*map(torch.stack, zip(*found, strict=True)))

    def _layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batches in self.pooled.values():
            speech, text = (torch.cat(vectors) for vectors in zip(*batches, strict=True))
            yield _gather(speech) if self.distributed else speech, _gather(text) if self.distributed else text


@torch.no_grad()
def pooled(
    speech_states: States, text_states: States, speech_lengths: Tensor | None, text_lengths: Tensor | None
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
    return (1 / ranks).mean(), *((ranks <= k).to(ranks.dtype).mean() for k in (1, 5, 10))


def _ranks(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    found = [queries.new_empty(0)]
    for first in range(0, len(queries), chunk):
        similarities = products(queries[first : first + chunk], keys)
        own = similarities.diagonal(first)[:, None]
        found.append((similarities > own).sum(1) + ((similarities == own).sum(1) + 1) / 2)
    return torch.cat(found)


def _gather(vectors: Tensor) -> Tensor:
    """The vectors of all processes, which may have different numbers of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return vectors
    world = torch.distributed.get_world_size()
    counts = [torch.zeros((), dtype=torch.int64, device=vectors.device) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor(len(vectors), device=vectors.device))
    longest = int(max(counts))
    padded = torch.nn.functional.pad(vectors, (0, 0, 0, longest - len(vectors)))
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def select_layers(
    scores: RetrievalScores | Tensor | Sequence[float] | Mapping[int, float], k: int, always: Sequence[int] = ()
) -> list[int]:
    """The `k` layers with the highest scores, best first, after those that are taken `always`.

    AI-STA (arXiv 2503.10211) aligns few, shallow layers; in a digest of it the loss does not converge without layer 0, hence
    `always=(0,)` is worth a try.

    Args:
        scores: of every layer: `RetrievalScores`, of which the mean reciprocal rank counts; numbers; or a dict by layer.
        k: how many in all, those of `always` included. Ties go to the shallower layer.

    Example:
        >>> otalign.speech.select_layers([0.2, 0.9, 0.5, 0.7], 3, always=(0,))
        [0, 1, 3]
    """
    values = scores.mrr if isinstance(scores, RetrievalScores) else scores
    if isinstance(values, Tensor):
        values = values.tolist()
    named = dict(values) if isinstance(values, Mapping) else dict(enumerate(values))
    missing = [layer for layer in always if layer not in named]
    if missing:
        raise ValueError(f"always: expected layers among {list(named)}, got {missing}")
    if not len(set(always)) <= k <= len(named):
        raise ValueError(f"k: expected a number from {len(set(always))} to {len(named)}, got {k}")
    rest = sorted((layer for layer in named if layer not in always), key=lambda layer: (-named[layer], layer))
    return [*dict.fromkeys(always), *rest][:k]
