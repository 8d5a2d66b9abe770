"""What would warm starts save in training? `python benchmarks warm-starts` writes results/warm_starts.csv and its tables.

Two trainings of this repository run as they are: the demo (`make demo`), and one run of the study (`make study`) with OTReg. Beside
each step, the problems of the step are solved twice for every setting: from zero, and from the potentials of the same pair of
speech and text at its last visit. The training itself does not change. The study needs espeak-ng and flite, and trains what it
freezes first, for ten minutes.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad
from torch.nn.utils.rnn import pad_sequence

import otalign
from common import environment
from common.tables import number, replace_block

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "warm_starts.csv"
PAGE = ROOT / "docs" / "performance.md"
PARTS = 5  # of a training, of equal numbers of steps
TOL, MAX_ITER = 1e-3, 200  # the defaults
SETTINGS = [(reg, accelerate) for reg in (0.05, 0.01) for accelerate in (True, False)]
OTREG_WEIGHT = 10.0  # which the study has chosen
COLUMNS = [
    "training",
    "reg",
    "tol",
    "max_iter",
    "accelerate",
    "part",
    "items",
    "revisited",
    "steps_since",
    "cost_moved",
    *(f"{start}_{what}" for what in ("passes", "longest", "converged", "ms") for start in ("cold", "warm")),
    "saved_of_revisited",
    "saved_of_all",
    "value_difference",
]


@dataclass(frozen=True)
class Visit:
    """One item of one step."""

    step: int
    since: int | None  # steps since the last visit; None = the first visit
    moved: float  # of the cost since then: the largest change of an entry, relative to the range of the cost
    cold: int  # passes from zero
    warm: int  # passes from the last visit; from zero, at the first
    cold_converged: bool
    warm_converged: bool
    difference: float  # of the values, relative to the one from zero


@dataclass
class Setting:
    """A setting of the solver, with what it has measured so far."""

    options: dict[str, Any]  # of `otalign.solve`
    potentials: dict[Hashable, Tensor] = field(default_factory=dict)  # g of each pair, as the last warm solve left it
    visits: list[Visit] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)  # of each step, from zero and warm

    def cold(self, pairs: Sequence[Hashable], batch: Sequence[Tensor]) -> otalign.OTResult:
        return otalign.solve(*batch, **self.options)

    def warm(self, pairs: Sequence[Hashable], batch: Sequence[Tensor]) -> otalign.OTResult:
        """Starts where it can from the last visit, and keeps the potentials."""
        x, y, _, m = batch
        known = [self.potentials.get(pair) for pair in pairs]
        init = None
        if any(g is not None for g in known):
            empty = y.new_zeros(0)
            g = pad_sequence([empty if g is None else g for g in known], batch_first=True)
            # The solver starts from g alone.
            init = x.new_zeros(x.shape[:2]), pad(g, (0, y.shape[1] - g.shape[1]))
        result = otalign.solve(*batch, init=init, **self.options)
        for pair, g, length in zip(pairs, result.potentials[1], m.tolist(), strict=True):
            if pair is not None:
                self.potentials[pair] = g[:length].clone()
        return result


class Meter:
    """Solves the problems of each step of a training twice for each setting, and counts the passes."""

    def __init__(self, **options: Any) -> None:
        same = {"tol": TOL, "max_iter": MAX_ITER, **options}
        self.settings = [Setting({"reg": reg, "accelerate": accelerate, **same}) for reg, accelerate in SETTINGS]
        self.costs: dict[Hashable, tuple[int, Tensor]] = {}  # of each pair at its last visit, with the step
        self.step = 0
        self.random = random.Random(0)

    @torch.no_grad()
    def visit(self, pairs: Sequence[Hashable], x: Tensor, y: Tensor, n: Tensor, m: Tensor) -> None:
        """One step: `(B, N, D)` and `(B, M, D)` with their lengths; an item whose pair is None is never seen again."""
        self.step += 1
        directions = [normalize(side.detach(), dim=2) for side in (x, y)]
        costs = [1 - u[:i] @ v[:j].T for u, v, i, j in zip(*directions, n.tolist(), m.tolist(), strict=True)]
        since = [self._since(pair, cost) for pair, cost in zip(pairs, costs, strict=True)]
        # In random order, so that other work on the machine affects all alike.
        for setting in self.random.sample(self.settings, len(self.settings)):
            results, seconds = {}, {}
            for solve in self.random.sample([setting.cold, setting.warm], 2):
                began = time.perf_counter()
                results[solve.__name__] = solve(pairs, (x, y, n, m))
                seconds[solve.__name__] = time.perf_counter() - began
            setting.seconds.append((seconds["cold"], seconds["warm"]))
            cold, warm = results["cold"], results["warm"]
            difference = ((warm.value - cold.value) / cold.value).abs()
            found = (cold.n_iter, warm.n_iter, cold.converged, warm.converged, difference)
            rows = zip(since, *(values.tolist() for values in found), strict=True)
            setting.visits += [Visit(self.step, *before, *rest) for before, *rest in rows]
        self.costs |= {pair: (self.step, cost) for pair, cost in zip(pairs, costs, strict=True) if pair is not None}

    def _since(self, pair: Hashable, cost: Tensor) -> tuple[int | None, float]:
        if pair not in self.costs:
            return None, float("nan")
        step, before = self.costs[pair]
        return self.step - step, float((cost - before).abs().max() / (before.max() - before.min()))

    def rows(self, training: str) -> Iterable[list[Any]]:
        for setting in self.settings:
            for part in range(PARTS):
                here = [v for v in setting.visits if (v.step - 1) * PARTS // self.step == part]
                again = [v for v in here if v.since is not None]
                times = setting.seconds[part * self.step // PARTS : (part + 1) * self.step // PARTS]
                options = [setting.options[name] for name in ("reg", "tol", "max_iter", "accelerate")]
                yield [
                    training,
                    *options,
                    part + 1,
                    len(here),
                    len(again),
                    *(f"{median(values):.4g}" for values in ([v.since for v in again], [v.moved for v in again])),
                    *(f"{median([getattr(v, name) for v in again]):.4g}" for name in ("cold", "warm")),
                    *(f"{longest(here, name):.4g}" for name in ("cold", "warm")),
                    *(
                        f"{statistics.fmean(getattr(v, name + '_converged') for v in here):.4f}"
                        for name in ("cold", "warm")
                    ),
                    *(f"{1000 * median(column):.3f}" for column in zip(*times, strict=True)),
                    *(f"{saved(visits):.4f}" for visits in (again, here)),
                    f"{max(v.difference for v in here):.2g}",
                ]


def median(values: Sequence[Any]) -> float:
    return statistics.median(values) if values else float("nan")


def longest(visits: list[Visit], name: str) -> float:
    """The median over the steps of the most passes of an item: a GPU, which solves a batch at once, waits for these."""
    most: dict[int, int] = {}
    for visit in visits:
        most[visit.step] = max(most.get(visit.step, 0), getattr(visit, name))
    return median(list(most.values()))


def saved(visits: list[Visit]) -> float:
    """The share of all passes that warm starts save; below 0, they cost passes."""
    cold = sum(v.cold for v in visits)
    return 1 - sum(v.warm for v in visits) / cold if cold else float("nan")


def demo(steps: int) -> Meter:
    """The demo's training. A recording meets the transcripts of its batch, and shuffled ones, which are new each time."""
    sys.path.append(str(ROOT / "examples" / "demo"))
    import demo as example
    from aligner import Aligner, Settings, alignment_loss
    from speech import load

    settings = replace(Settings(), steps=steps)
    meter = Meter(prior=otalign.Prior.quadratic(settings.prior), unbalanced=settings.unbalanced)

    def measured(model, criterion, batch, settings, generator):
        def counted(x, y, n, m):
            pairs: list[Hashable] = []
            for u in batch:
                pairs += [(u.number, u.voice, other.number) for other in batch] + [None] * settings.shuffles
            meter.visit(pairs, x, y, n, m)
            return criterion(x, y, n, m)

        return alignment_loss(model, counted, batch, settings, generator)

    example.alignment_loss = measured
    torch.manual_seed(settings.seed)
    example.train(Aligner(), example.split(load())[0], settings)
    return meter


def study(steps: int, work: Path) -> Meter:
    """A run of the study with OTReg. What is frozen is trained as in the study; the voices of its tests are left out."""
    sys.path.append(str(ROOT))
    from examples.study import adapting, stages
    from examples.study.design import Design

    design = replace(Design(), known_voices=(), new_voices=(), speeds=(), development_texts=10, test_texts=10)
    design = replace(design, development_voices=design.development_voices[:1])
    bench = stages.load(stages.prepare(design, work, workers=1))
    meter, regulariser = Meter(), adapting.regulariser

    def measured(arm):
        otreg = regulariser(arm)

        def counted(embedded, hidden, lengths, text, step):
            # Each word once, as OTRegLoss does by default.
            index, m, _ = otalign.speech.unique_tokens(text.ids, text.lengths)
            words = text.embeddings.gather(1, index[..., None].expand_as(text.embeddings))
            pairs = [tuple(row[:k]) for row, k in zip(text.ids.tolist(), text.lengths.tolist(), strict=True)]
            meter.visit(pairs, embedded, words, lengths, m)
            return otreg(embedded, hidden, lengths, text, step)

        return counted

    adapting.regulariser = measured
    arm = adapting.Arm("otreg", OTREG_WEIGHT)
    adapting.train(bench.model, bench.training, {}, arm, seed=0, checkpoints=(steps,))
    return meter


def tables() -> str:
    """What moved between two visits, and what warm starts saved."""
    with OUT.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("training", "reg", "accelerate")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    parts = " | ".join(f"part {part}" for part in range(1, PARTS + 1))
    lines = [f"| since the last visit | {parts} |", "|---" * (PARTS + 1) + "|"]
    for (training, *_), found in {key[0]: (key, group) for key, group in groups.items()}.values():
        lines.append(f"| {training}: steps | {' | '.join(row['steps_since'] for row in found)} |")
        moved = " | ".join(number(100 * float(row["cost_moved"])) for row in found)
        lines.append(f"| {training}: largest change of the cost, % of its range | {moved} |")
    lines += [
        "",
        "| training | `reg` | solver | "
        + " | ".join(f"saved in part {part}, %" for part in range(1, PARTS + 1))
        + " | passes at the end | of the longest item | converged, % | solve, ms |",
        "|---" * (3 + PARTS + 4) + "|",
    ]
    for (training, reg, accelerate), found in groups.items():
        shares = " | ".join(str(round(100 * float(row["saved_of_all"]))) for row in found)
        end = found[-1]
        changes = [f"{end['cold_' + name]} -> {end['warm_' + name]}" for name in ("passes", "longest")]
        changes.append(" -> ".join(f"{100 * float(end[start + '_converged']):.0f}" for start in ("cold", "warm")))
        changes.append(" -> ".join(number(float(end[start + "_ms"])) for start in ("cold", "warm")))
        solver = "accelerated" if accelerate == "True" else "plain"
        lines.append(f"| {training} | {reg} | {solver} | {shares} | {' | '.join(changes)} |")
    lines += [
        "",
        f"tol {rows[0]['tol']}, max_iter {rows[0]['max_iter']}, one thread of {rows[0]['cpu']}; commit {rows[0]['commit']}.",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks warm-starts", description=__doc__)
    parser.add_argument("--demo-steps", type=int, default=300, help="as in the demo: %(default)s")
    parser.add_argument("--study-steps", type=int, default=500, help="as in the study: %(default)s; 0 leaves it out")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "warm_starts", help="for what the study freezes")
    parser.add_argument("--table", action="store_true", help="only make the tables of docs/performance.md")
    args = parser.parse_args(arguments)
    if not args.table:
        torch.set_num_threads(1)
        rows = list(demo(args.demo_steps).rows("demo"))
        if args.study_steps:
            rows += study(args.study_steps, args.work).rows("study")
        about = environment.describe(threads=1, memory_kept=False)
        with OUT.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*COLUMNS, *about])
            writer.writerows([*row, *about.values()] for row in rows)
    replace_block(PAGE, "warm-starts", tables())
    return 0
