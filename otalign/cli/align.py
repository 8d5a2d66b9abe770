"""`python -m otalign align`: the time of each token, by the transport plan of two saved arrays."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import otalign

from .. import backends
from ..options import COSTS
from . import files
from .arguments import PRIOR_FORMS, count, device_of, positive, prior, relaxation
from .errors import InputError, as_input_error
from .table import fixed, table, to_json

HELP = "align one utterance with its text: a table of tokens and frames, a picture, a file"
DESCRIPTION = """\
Solves the optimal transport between speech (N, D) and text (M, D), saved as .npy, .npz or .pt with one array each. Prints
for each token: the frame that gives it most mass; mean and standard deviation of the frames under the plan; its share
of the mass. Frames and tokens count from 0. The time of frame i is (i + 0.5) * SECONDS."""
EXAMPLES = """\
examples:
  python -m otalign align speech.npy text.npy
  python -m otalign align speech.npy text.npy --tokens tokens.txt --seconds-per-frame 0.02 --plot plan.png
  python -m otalign align speech.pt text.pt --prior quadratic:1.0 --unbalanced inf,0.5 --out alignment.json"""
OUTPUTS = (".npz", ".json", ".csv")


class Tokens(NamedTuple):
    """Frames and mass of each of M tokens under a plan."""

    frame: Tensor  # (M,) int64, the frame that gives it most mass; -1 for a token without mass
    mean: Tensor  # (M,) float64, in frames; NaN for a token without mass
    spread: Tensor  # (M,) float64, standard deviation, in frames
    share: Tensor  # (M,) float64, of all mass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align`."""
    add = parser.add_argument
    add("speech", help="array (N, D) of speech frames")
    add("text", help="array (M, D) of text embeddings")
    add("--tokens", help='labels: a file with one in each line, or "a,b,c"')
    add("--seconds-per-frame", type=positive, metavar="SECONDS", help="print and draw times as well")
    add("--cost", choices=COSTS, default="cosine", help="ground cost (default: %(default)s)")
    add(
        "--reg",
        type=positive,
        default=0.05,
        help="entropic regularisation, in the unit of the cost (default: %(default)s)",
    )
    add("--prior", type=prior, help=f"temporal term of the cost: {PRIOR_FORMS}")
    add("--unbalanced", type=relaxation, metavar="RHO", help="marginal relaxation: RHO, or RHO_X,RHO_Y (inf = strict)")
    add(
        "--max-iter",
        type=count,
        default=200,
        metavar="COUNT",
        help="maximum number of iterations (default: %(default)s)",
    )
    add("--tol", type=float, default=1e-3, help="stop at this L1 marginal error (default: %(default)s)")
    add("--backend", choices=backends.NAMES, default="auto", help="(default: %(default)s)")
    add("--plot", metavar="FILE", help="draw the plan, as .png, .pdf or .svg; needs matplotlib")
    add(
        "--out", metavar="FILE", help="save table and summary as .json, the table as .csv, or all with the plan as .npz"
    )


def run(arguments: argparse.Namespace) -> int:
    """Solve and print. Without convergence: a warning on stderr, and still exit status 0."""
    files.expect_plot(arguments.plot)
    files.expect_writable(arguments.out, OUTPUTS)
    speech, text = files.points(arguments.speech), files.points(arguments.text)
    if speech.shape[1] != text.shape[1]:
        raise InputError(
            f"{arguments.text}: expected D = {speech.shape[1]} as in {arguments.speech}, got {text.shape[1]}"
        )
    labels = None if arguments.tokens is None else read_labels(arguments.tokens, len(text))
    result, plan = solve(speech, text, arguments)
    rows, facts = records(describe(plan), labels, arguments.seconds_per_frame), summary(result, plan)
    facts["backend"] = backends.resolve(arguments.backend, result.value.device)
    print(show(rows), "", show_summary(facts), sep="\n")
    if not facts["converged"]:
        banded = arguments.prior is not None and arguments.prior.kind == "band"
        band = ", widen the band, or relax one side (--unbalanced inf,1)" if banded else ""
        print(
            f"warning: not converged: marginal error {facts['marginal_error']:.2g} after {facts['iterations']} iterations, "
            f"above {arguments.tol:g}; raise --max-iter or --reg{band}",
            file=sys.stderr,
        )
    if arguments.plot is not None:
        ax = otalign.plot.plan(plan, tokens=labels, seconds_per_frame=arguments.seconds_per_frame)
        files.save_figure(ax, arguments.plot)
    if arguments.out is not None:
        with as_input_error(OSError, about=arguments.out):
            save(arguments.out, rows, facts, plan)
    return 0


def solve(speech: Tensor, text: Tensor, arguments: argparse.Namespace) -> tuple[otalign.OTResult, Tensor]:
    """The result of a batch of one item, and its plan `(N, M)` on the CPU. `speech` is `(N, D)`, `text` `(M, D)`."""
    device = device_of(arguments.backend)
    names = ("cost", "reg", "prior", "unbalanced", "max_iter", "tol", "backend")
    options = {name: getattr(arguments, name) for name in names}
    with as_input_error(ValueError, TypeError, RuntimeError), torch.no_grad():
        result = otalign.solve(speech[None].to(device), text[None].to(device), **options)
        return result, result.plan()[0].cpu()


def read_labels(tokens: str, expected: int) -> list[str]:
    """Labels from the file `tokens`, one per line; if there is no such file, `tokens` is a list with commas."""
    if Path(tokens).is_file():
        with as_input_error(OSError, UnicodeDecodeError, about=tokens):
            labels = Path(tokens).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        source = tokens
    else:
        labels, source = [label.strip() for label in tokens.split(",")], f"--tokens (no file {tokens!r}, so a list)"
    if len(labels) != expected:
        raise InputError(f"{source}: expected {expected} labels, one for each row of the text, got {len(labels)}")
    return labels


def describe(plan: Tensor) -> Tokens:
    """Which frames the mass of each token comes from, for a plan `(N, M)`.

    Example:
        >>> otalign.cli.align.describe(torch.tensor([[0.2, 0.0], [0.2, 0.0], [0.0, 0.4]])).mean
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    plan = plan.double()
    mass, frames = plan.sum(0), torch.arange(len(plan), dtype=torch.float64)[:, None]
    weights = plan / mass  # NaN for tokens without mass
    mean = (weights * frames).sum(0)
    spread = (weights * (frames - mean).square()).sum(0).sqrt()
    return Tokens(torch.where(mass > 0, plan.argmax(0), -1), mean, spread, mass / mass.sum())


def records(tokens: Tokens, labels: Sequence[str] | None, seconds: float | None) -> list[dict[str, Any]]:
    """The rows of the table: a dictionary for each token. `seconds` is the duration of a frame."""
    found = []
    for index, (frame, mean, spread, share) in enumerate(zip(*(column.tolist() for column in tokens), strict=True)):
        record: dict[str, Any] = {"token": index}
        if labels is not None:
            record["label"] = labels[index]
        record |= {"frame": frame, "mean_frame": mean, "spread_frames": spread}
        if seconds is not None:
            record |= {"time": (mean + 0.5) * seconds, "spread_seconds": spread * seconds}
        found.append({**record, "share": share})
    return found


def summary(result: otalign.OTResult, plan: Tensor) -> dict[str, Any]:
    """Facts about the solution as a whole."""
    return {
        "value": float(result.value),
        "transport_cost": float(result.value_linear),
        "mass": float(plan.double().sum()),
        "iterations": int(result.n_iter),
        "marginal_error": float(result.error),
        "converged": bool(result.converged),
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The table as printed text."""
    forms: dict[str, tuple[str, Callable[[Any], str]]] = {
        "token": ("token", str),
        "label": ("label", _printable),
        "frame": ("frame", lambda frame: "-" if frame < 0 else str(frame)),
        "mean_frame": ("mean frame", lambda number: fixed(number, 2)),
        "spread_frames": ("spread", lambda number: fixed(number, 2)),
        "time": ("time, s", lambda number: fixed(number, 3)),
        "spread_seconds": ("spread, s", lambda number: fixed(number, 3)),
        "share": ("mass, %", lambda number: fixed(100 * number, 2)),
    }
    names = list(rows[0])
    cells = [[forms[name][1](row[name]) for name in names] for row in rows]
    return table([forms[name][0] for name in names], cells, left=[names.index("label")] if "label" in names else [])


def show_summary(facts: dict[str, Any]) -> str:
    """The summary as printed text, below the table."""
    forms: dict[str, Callable[[Any], str]] = {
        "converged": lambda yes: "yes" if yes else "no",
        "marginal_error": "{:.2e}".format,
        "value": "{:.6g}".format,
        "transport_cost": "{:.6g}".format,
        "mass": "{:.4f}".format,
    }
    return "\n".join(f"{name.replace('_', ' '):<15} {forms.get(name, str)(value)}" for name, value in facts.items())


def save(path: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any], plan: Tensor) -> None:
    """Save table and summary as .json, the table as .csv, or table, summary and plan as .npz."""
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        Path(path).write_text(to_json({**facts, "tokens": rows}) + "\n", encoding="utf-8")
    elif suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import numpy as np

        columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        scalars = {name: np.array(value) for name, value in facts.items()}
        with open(path, "wb") as archive:  # given a name, savez would append .npz to one that ends in .NPZ
            np.savez(archive, plan=plan.numpy(), **columns, **scalars)  # type: ignore[arg-type]


def _printable(label: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in label)
