"""`python -m otalign score`: the alignment path score of saved hidden states, layer by layer."""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor

import otalign

from ..speech import alignment_path_score, sequence_similarity
from ..speech.path import METRICS
from . import files
from .errors import InputError, as_input_error
from .table import fixed, table, to_json

HELP = "the alignment path score of saved hidden states, layer by layer"
DESCRIPTION = """\
Scores the agreement of speech and text in the hidden states of each layer of a model (arXiv 2510.12116): the mean similarity
(or distance) of each token with its nearest frame, the monotonicity of these frames, the share of tokens for which cosine and
distance agree on the frame, and the similarity of the means over time. All are means over the items that are not empty.

Each file holds one array (L, N, D) of one item or (L, B, N, D) of several. As .npz or .pt it may hold an array (N, D) or
(B, N, D) for each layer, named by number: 0, 1, ... or layer_0, layer_1, ..."""
EXAMPLES = """\
examples:
  python -m otalign score speech_states.npy text_states.npy
  python -m otalign score speech.npz text.npz --speech-lengths n.npy --text-lengths m.npy --plot layers.png
  python -m otalign score speech.pt text.pt --metric euclidean --json > scores.json"""
LAST = {"cosine": "sequence similarity", "euclidean": "sequence distance"}
COLUMNS = ("score", "monotonicity", "consistency", "sequence_similarity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `score`."""
    add = parser.add_argument
    add("speech_states", help="hidden states of the speech")
    add("text_states", help="hidden states of the text, with the same layers and items")
    add("--metric", choices=METRICS, default="cosine", help="similarity, or distance (default: %(default)s)")
    add("--speech-lengths", metavar="FILE", help="integers (B,); the padding is never read (default: full)")
    add("--text-lengths", metavar="FILE", help="likewise for the text")
    add("--plot", metavar="FILE", help="draw the columns by layer, as .png, .pdf or .svg; needs matplotlib")
    add("--json", action="store_true", help="print JSON, with the score of each item, instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Score and print."""
    files.expect_plot(arguments.plot)
    numbers, score, columns = scores(arguments)
    rows = [
        {"layer": number, **dict(zip(COLUMNS, means, strict=True))}
        for number, *means in zip(numbers, *(column.nanmean(1).tolist() for column in columns.values()), strict=True)
    ]
    facts = {"metric": arguments.metric, "items": len(score), "score": float(score.nanmean())}
    if arguments.json:
        print(to_json({**facts, "item_scores": score.tolist(), "layers": rows}))
    else:
        print(
            show(rows, arguments.metric),
            "",
            f"score {fixed(facts['score'], 4)} ({_unit(arguments.metric)}, {_of(facts)})",
            sep="\n",
        )
    if arguments.plot is not None:
        files.save_figure(draw(numbers, columns, arguments.metric), arguments.plot)
    return 0


def scores(arguments: argparse.Namespace) -> tuple[list[int], Tensor, dict[str, Tensor]]:
    """Numbers of the layers, the score `(B,)`, and the columns of the table, `(L, B)` each; NaN for empty items."""
    speech, text = files.layers(arguments.speech_states), files.layers(arguments.text_states)
    n, m = (
        None if path is None else files.lengths(path) for path in (arguments.speech_lengths, arguments.text_lengths)
    )
    if speech.keys() != text.keys():
        numbers = f"{list(speech)} as in {arguments.speech_states}, got {list(text)}"
        raise InputError(f"{arguments.text_states}: expected layers {numbers}")
    with as_input_error(ValueError, TypeError, RuntimeError):
        found = alignment_path_score(speech, text, n, m, metric=arguments.metric)
        similarity = sequence_similarity(speech, text, n, m, metric=arguments.metric)
    expect_finite(arguments.speech_states, speech, n)
    expect_finite(arguments.text_states, text, m)
    columns = (found.per_layer, found.monotonicity, found.consistency, similarity)
    return list(speech), found.score, dict(zip(COLUMNS, columns, strict=True))


def expect_finite(path: str, states: dict[int, Tensor], lengths: Tensor | None) -> None:
    """Raise an InputError if states `(B, N, D)` of a layer have NaN or infinity within the lengths `(B,)`."""
    for number, layer in states.items():
        counts = [layer.shape[1]] * len(layer) if lengths is None else lengths.tolist()
        for item, (values, count) in enumerate(zip(layer, counts, strict=True)):
            if not values[:count].isfinite().all():
                raise InputError(f"{path}: NaN or infinity in layer {number}, item {item} (from 0)")


def show(rows: list[dict[str, Any]], metric: str) -> str:
    """The table as printed text."""
    cells = [[str(row["layer"]), *(fixed(row[name], 4) for name in COLUMNS)] for row in rows]
    return table(["layer", *COLUMNS[:-1], LAST[metric]], cells)


def draw(numbers: list[int], columns: dict[str, Tensor], metric: str) -> Any:
    """Draw all columns by layer, distances on a second axis."""
    path = "alignment path score" if metric == "cosine" else "path distance"
    labels = {"score": path, "sequence_similarity": LAST[metric]}
    curves = {labels.get(name, name): values for name, values in columns.items()}
    return otalign.plot.layers(curves, numbers=numbers, right=list(labels.values()) if metric == "euclidean" else [])


def _unit(metric: str) -> str:
    return "mean cosine along the path" if metric == "cosine" else "mean distance along the path"


def _of(facts: dict[str, Any]) -> str:
    return "one item" if facts["items"] == 1 else f"mean of {facts['items']} items"
