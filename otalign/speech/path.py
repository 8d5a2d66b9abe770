"""The alignment path of speech and text in a language model, its score, and interventions on it (arXiv 2510.12116)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Lengths
from ..options import one_of
from ._states import States, at_least_one, inside, lengths_of, means, paired, products, sides, unit, wide

METRICS = ("cosine", "euclidean")
INTERVENTIONS = ("angle", "length")


class AlignmentPath(NamedTuple):
    """Result of `alignment_path`, for L layers, B items and M tokens. Monotonicity and consistency of empty items are NaN."""

    path: Tensor  # (L, B, M) int64, the speech frame nearest to each token; -1 on the padding
    similarity: Tensor  # (L, B, M) cosine, or distance, along the path; 0 on the padding
    monotonicity: Tensor  # (L, B)
    consistency: Tensor  # (L, B)


class AlignmentPathScore(NamedTuple):
    """Result of `alignment_path_score`, for L layers, B items and M tokens. Scores of empty items are NaN."""

    score: Tensor  # (B,) mean over the layers
    per_layer: Tensor  # (L, B)
    path: Tensor  # (L, B, M) int64, -1 on the padding
    monotonicity: Tensor  # (L, B)
    consistency: Tensor  # (L, B)


@torch.no_grad()
def alignment_path(
    speech_states: States,
    text_states: States,
    speech_lengths: Lengths | None = None,
    text_lengths: Lengths | None = None,
    *,
    metric: str = "cosine",
) -> AlignmentPath:
    r"""The speech frame with the nearest hidden state, for each token and layer (arXiv 2510.12116, "alignment path").

    With :math:`A_l[i, j] = f(h^s_i, h^t_j)`, the path is :math:`i^*_j = \arg\max_i A_l[i, j]` (argmin for the distance). Each
    token is treated by itself, without warping or transport. Layers are treated one by one, so that the similarities `(B, N, M)`
    of one layer are in memory at a time. The equations are rebuilt from the paper's prose.

    Args:
        speech_states: of each layer `(B, N, D)`: a list, a dict by layer number, or one tensor.
        text_states: likewise `(B, M, D)`, of the same layers.
        speech_lengths: `(B,)` int32 or int64; None = full. The padding is never read.
        text_lengths: likewise.
        metric: `"cosine"` (similarity) or `"euclidean"` (distance).

    Returns:
        `path`; `similarity` along it; `monotonicity`, Spearman's rank correlation of j and i*_j (1 for one token); and
        `consistency`, the share of tokens whose cosine and Euclidean paths agree. Ties go to the first frame.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.
    """
    one_of("metric", metric, METRICS)
    found = [
        _layer(
            x, y, lengths_of("speech_lengths", x, speech_lengths), lengths_of("text_lengths", y, text_lengths), metric
        )
        for _, x, y in paired(speech_states, text_states)
    ]
    return AlignmentPath(*map(torch.stack, zip(*found, strict=True)))


def alignment_path_score(
    speech_states: States,
    text_states: States,
    speech_lengths: Lengths | None = None,
    text_lengths: Lengths | None = None,
    *,
    metric: str = "cosine",
) -> AlignmentPathScore:
    r"""The alignment path score, a measure of the gap between speech and text in a language model (arXiv 2510.12116).

    :math:`\mathrm{APS} = \frac{1}{L} \sum_l \frac{1}{T_t} \sum_j A_l[i^*_j, j]`: the mean similarity (for "euclidean" the mean
    distance) along the alignment path. In the paper it correlates with the gap in task scores, with R^2 = 0.81 for the cosine.
    There cosine and distance both rise with depth, so the cosine is the safe choice. Arguments and errors as in `alignment_path`.

    Example:
        >>> speech = [torch.randn(2, 30, 16) for _ in range(4)]
        >>> text = [torch.randn(2, 8, 16) for _ in range(4)]
        >>> aps = otalign.speech.alignment_path_score(speech, text, torch.tensor([30, 20]), torch.tensor([8, 5]))
        >>> aps.score.shape, aps.per_layer.shape, aps.path.shape
        (torch.Size([2]), torch.Size([4, 2]), torch.Size([4, 2, 8]))
    """
    found = alignment_path(speech_states, text_states, speech_lengths, text_lengths, metric=metric)
    tokens = (found.path >= 0).sum(2)
    per_layer = torch.where(tokens > 0, found.similarity.sum(2) / tokens.clamp(min=1), torch.nan)
    return AlignmentPathScore(per_layer.mean(0), per_layer, found.path, found.monotonicity, found.consistency)


@torch.no_grad()
def sequence_similarity(
    speech_states: States,
    text_states: States,
    speech_lengths: Lengths | None = None,
    text_lengths: Lengths | None = None,
    *,
    metric: str = "cosine",
) -> Tensor:
    """Cosine, or distance, of the means over time: `(L, B)`; NaN for empty items (arXiv 2510.12116, sequence level).

    Arguments and errors as in `alignment_path`.
    """
    one_of("metric", metric, METRICS)
    found = []
    for _, x, y in paired(speech_states, text_states):
        mask_x = inside(x, lengths_of("speech_lengths", x, speech_lengths))
        mask_y = inside(y, lengths_of("text_lengths", y, text_lengths))
        mean_x, mean_y = means(x, mask_x), means(y, mask_y)
        cosine = (unit(mean_x) * unit(mean_y)).sum(1)
        similarity = cosine if metric == "cosine" else (mean_x - mean_y).norm(dim=1)
        found.append(torch.where(mask_x.any(1) & mask_y.any(1), similarity, torch.nan))
    return torch.stack(found)


def _layer(x: Tensor, y: Tensor, n: Tensor, m: Tensor, metric: str) -> tuple[Tensor, ...]:
    """Path `(B, M)`, similarity `(B, M)`, monotonicity `(B,)` and consistency `(B,)` of one layer."""
    if x.shape[1] == 0:  # argmax needs a frame; this one lies behind the lengths of all items
        x = x.new_zeros(x.shape[0], 1, x.shape[2])
    mask_x, mask_y = inside(x, n), inside(y, m) & (n > 0)[:, None]
    matrix, norms_x, norms_y = _products_and_norms(x, y, n, m)
    norms_x, norms_y, outside = torch.where(mask_x, norms_x, 0), torch.where(mask_y, norms_y, 0), ~mask_x[:, :, None]
    # Padding has rows and columns of its own, so it reaches no entry of an item. Both paths share one matrix, to save memory.
    cosines = matrix.mul_(_inverse(norms_x)[:, :, None]).masked_fill_(outside, -torch.inf)
    best, alike = cosines.max(1)
    # The frame at the smallest distance has the largest <x, y> - |x|^2 / 2.
    scores = matrix.masked_fill_(outside, 0).mul_(norms_x[:, :, None]).sub_(norms_x[:, :, None].square() / 2)
    nearest = scores.masked_fill_(outside, -torch.inf).argmax(1)
    del matrix, cosines, scores
    if metric == "cosine":
        path, other, similarity = alike, nearest, best * _inverse(norms_y)
    else:
        path, other = nearest, alike
        items = zip(x, y, path, strict=True)
        similarity = torch.stack([(frames[at].to(best.dtype) - tokens).norm(dim=1) for frames, tokens, at in items])
    similarity, tokens = torch.where(mask_y, similarity, 0), mask_y.sum(1)
    agreement = ((path == other) & mask_y).sum(1).float() / tokens.clamp(min=1)
    known = (tokens > 0) & similarity.isfinite().all(1)
    return (
        torch.where(mask_y, path, -1),
        similarity,
        torch.where(known, _spearman(path, mask_y), torch.nan),
        torch.where(known, agreement, torch.nan),
    )


def _inverse(norms: Tensor) -> Tensor:
    """1 / norms, 0 where a norm is 0."""
    return torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1), 0)


def _products_and_norms(x: Tensor, y: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """<x_i, y_j> `(B, N, M)`, |x_i| `(B, N)` and |y_j| `(B, M)`, in float32 at least; arbitrary values on the padding."""
    dtype = wide(x, y)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # Item by item: no work on the padding, each item stays in the cache, and one item at a time is widened to float32.
        matrix = x.new_empty(len(x), x.shape[1], y.shape[1], dtype=dtype)
        norms_x, norms_y = (t.new_zeros(t.shape[:2], dtype=dtype) for t in (x, y))
        for b, (count_x, count_y) in enumerate(zip(n.tolist(), m.tolist(), strict=True)):
            frames, tokens = x[b, :count_x].to(dtype), y[b, :count_y].to(dtype)
            torch.mm(frames, tokens.mT, out=matrix[b, :count_x, :count_y])
            torch.linalg.vector_norm(frames, dim=1, out=norms_x[b, :count_x])
            torch.linalg.vector_norm(tokens, dim=1, out=norms_y[b, :count_y])
            del frames, tokens  # frees their memory before the next item's is allocated
        return matrix, norms_x, norms_y
    norms_x, norms_y = (torch.linalg.vector_norm(t, dim=2, dtype=dtype) for t in (x, y))
    if x.dtype == y.dtype and x.dtype.itemsize == 2 and x.device.type == "cuda":
        return torch.bmm(x, y.mT, out_dtype=torch.float32), norms_x, norms_y
    return products(x.to(dtype), y.to(dtype)), norms_x, norms_y


def _spearman(path: Tensor, mask: Tensor) -> Tensor:
    """Spearman's rank correlation between the tokens' numbers and their frames `(B, M)`: `(B,)`.

    Equal frames get the mean of their ranks. 1 for a single token; 0 where all tokens have the same frame, and so no order.
    """
    count = mask.sum(1)
    frames = torch.where(mask, path, torch.iinfo(path.dtype).max).contiguous()
    ordered = frames.sort(1).values
    below, upto = (torch.searchsorted(ordered, frames, right=right) for right in (False, True))
    of_frames = torch.where(mask, (below + upto - 1).float() / 2, 0)
    of_tokens = torch.where(mask, torch.arange(path.shape[1], device=path.device).to(of_frames.dtype), 0)
    middle = ((count - 1).float() / 2)[:, None]
    p, q = (torch.where(mask, ranks - middle, 0) for ranks in (of_frames, of_tokens))
    norm = (p.square().sum(1) * q.square().sum(1)).sqrt()
    correlation = torch.where(norm > 0, (p * q).sum(1) / torch.where(norm > 0, norm, 1), 0)
    return torch.where(count == 1, 1, correlation)


# Interventions ---------------------------------------------------------------------------------------------------------


def angle_project(speech: Tensor, text: Tensor) -> Tensor:
    """|h^s| h^t / |h^t|: the text's direction with the speech's length, `(..., D)` (arXiv 2510.12116, "angle projection").

    Where the text is zero, the speech stays. Computed in float32 at least; the result has the dtype of `speech`.
    """
    direction = unit(text)
    moved = _length(speech) * direction
    return torch.where((direction != 0).any(-1, keepdim=True), moved.to(speech.dtype), speech)


def _length(vectors: Tensor) -> Tensor:
    """Norms `(..., 1)` of vectors `(..., D)`, in float32 at least."""
    return vectors.to(wide(vectors)).norm(dim=-1, keepdim=True)


def length_normalize(speech: Tensor, text: Tensor) -> Tensor:
    """|h^t| h^s / |h^s|: the speech's direction with the text's length, `(..., D)` (arXiv 2510.12116, "length normalisation").

    In the paper it helps in one of eight settings; angle projection helps in most. Zero speech stays zero. Computed in float32
    at least; the result has the dtype of `speech`.
    """
    return (_length(text) * unit(speech)).to(speech.dtype)


def intervene(
    speech: Tensor,
    text: Tensor,
    speech_lengths: Lengths | None = None,
    text_lengths: Lengths | None = None,
    *,
    kind: str = "angle",
    worst: int | None = 3,
) -> Tensor:
    """Move the speech states on the alignment path towards the text's states (arXiv 2510.12116).

    Use it in a forward hook of a decoder layer, with the layer's output for the speech and the same layer's output for the text.

    Args:
        speech: `(B, N, D)` states of one layer.
        text: `(B, M, D)` states of the same layer.
        speech_lengths: `(B,)` int32 or int64; None = full.
        text_lengths: likewise.
        kind: `"angle"` = `angle_project`, or `"length"` = `length_normalize`.
        worst: number of tokens per item, those with the lowest cosine; None = the whole path.

    Returns:
        `(B, N, D)`, a new tensor of the dtype of `speech`. A frame on the path of several tokens follows the least similar one.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.
    """
    one_of("kind", kind, INTERVENTIONS)
    worst = None if worst is None else at_least_one("worst", worst)
    sides(speech, text, speech_lengths, text_lengths)  # raises errors that name these arguments
    found = alignment_path(speech, text, speech_lengths, text_lengths)
    path, similarity = found.path[0], found.similarity[0]
    # Most similar token first, so that the least similar one is written last.
    order = similarity.masked_fill(path < 0, torch.inf).argsort(dim=1, descending=True, stable=True)
    if worst is not None:
        order = order[:, -worst:] if order.shape[1] > worst else order
    frames, spare = path.gather(1, order), speech.shape[1]
    frames = torch.where(
        frames < 0, spare, frames
    )  # a spare frame behind all others takes the writes of tokens that move nothing
    # The last of the tokens that share a frame moves it; the others move the spare frame.
    places = torch.arange(frames.shape[1], device=frames.device).expand_as(frames)
    last = places.new_full((len(speech), spare + 1), -1).scatter_reduce(1, frames, places, "amax")
    frames = torch.where(places == last.gather(1, frames), frames, spare)[:, :, None].expand(-1, -1, speech.shape[2])
    padded = F.pad(speech, (0, 0, 0, 1))
    paired_text = text.gather(1, order[:, :, None].expand(-1, -1, text.shape[2]))
    paired_text = torch.where(frames < spare, paired_text, 0)
    function = angle_project if kind == "angle" else length_normalize
    return padded.scatter(1, frames, function(padded.gather(1, frames), paired_text))[:, :-1]
