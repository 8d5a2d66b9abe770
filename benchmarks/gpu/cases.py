"""What the GPU benchmark measures: shapes, batches, the order of cases, and the targets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from common.shapes import NOISE, SHAPES, Batch, Shape, make_batch
from gpu.providers import OURS
from gpu.rows import Row

REG = 0.05
TOL = 1e-3
FIXED, FIXED_DRY = 100, 5  # iterations
MODES = ("forward", "backward", "full")
OUT_OF_TIME = "missing: out of time"  # the column `match` of what was not started
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

LARGE = {
    "A": Shape("A", 32, 750, 128, 1024),
    "B": Shape("B", 8, 3000, 512, 4096),
    **{name: shape._replace(D=2048 if shape.D == 1024 else 4096) for name, shape in SHAPES.items()},
}
# Microseconds on an H200 at exactly 100 iterations with bf16 points of full length, or, "A, early exit", to TOL.
TARGETS = {
    ("A", "forward"): (85, 60),
    ("A", "full"): (130, 105),
    ("B", "forward"): (440, 260),
    ("B", "full"): (720, 560),
    ("A, early exit", "forward"): (45, 45),
}
TRITON_FACTOR = 3  # Triton alone may take this multiple of a target


class Case(NamedTuple):
    shape: Shape
    ragged: bool
    dtype: str
    tol: float  # 0 for exactly FIXED iterations

    @property
    def name(self) -> str:
        kinds = (", ragged" if self.ragged else "", ", early exit" if self.tol else "")
        return self.shape.name + "".join(kinds)


def cases(shapes: list[Shape]) -> Iterator[Case]:
    """The most important first, since time is limited. Early exit is measured for bf16 points only, as in training."""
    for ragged in (False, True):
        for dtype in TYPES:
            for shape in shapes:
                for tol in (0.0, TOL) if dtype == "bf16" else (0.0,):
                    yield Case(shape, ragged, dtype, tol)


def failed(error: Exception) -> str:
    """The column `match` of what raised an error."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def first_cases(todo: list[Case]) -> list[Case]:
    """The cases that count most: bf16 points of full length."""
    return [case for case in todo if not case.ragged and case.dtype == "bf16"]


def plan(todo: list[Case], providers: list[str]) -> Iterator[tuple[Case, list[str]]]:
    """Cases and their providers, in order: otalign on the first cases, peers on shapes with targets, then the rest."""
    ours, peers = ([name for name in providers if (name in OURS) is own] for own in (True, False))
    first = first_cases(todo)
    aimed = [case for case in first if case.name in {shape for shape, _ in TARGETS} or case.shape.name == "B"]
    groups = [(first, ours), (aimed, peers), ([c for c in todo if c not in first], ours)]
    groups.append(([c for c in todo if c not in aimed], peers))
    for group, names in groups:
        yield from ((case, names) for case in group if names)


@lru_cache(16)
def points(shape: Shape, ragged: bool, device: torch.device) -> Batch:
    """A batch in float32 on the device; without `ragged`, all items at full length."""
    if ragged:
        batch = make_batch(shape)
    else:
        one = [make_batch(shape._replace(B=1), seed=seed, noise=NOISE) for seed in range(shape.B)]
        batch = Batch(*(torch.cat(fields) for fields in zip(*one, strict=True)))
    return Batch(*(field.to(device) for field in batch))


def make(case: Case, device: torch.device) -> Batch:
    """The batch of a case, its points in the type that is measured."""
    batch = points(case.shape, case.ragged, device)
    return batch._replace(x=batch.x.to(TYPES[case.dtype]), y=batch.y.to(TYPES[case.dtype]))


def targets(rows: list[Row]) -> Iterator[str]:
    """A line for each target: the best backend of otalign against it, and Triton alone against three times it."""
    for (shape, mode), (target, stretch) in TARGETS.items():
        ours = [
            (float(str(row["median_us"])), str(row["provider"]))
            for row in rows
            if row.get("shape") == shape and row.get("mode") == mode and row.get("dtype") == "bf16"
            and str(row.get("provider")).startswith(("triton", "cuda")) and row.get("median_us")
        ]  # fmt: skip
        if not ours:
            yield f"{shape} {mode}: not measured (target {target} us, stretch {stretch} us)"
            continue
        best, provider = min(ours)
        verdict = "stretch met" if best <= stretch else "met" if best <= target else "missed"
        alone = min((median for median, name in ours if name.startswith("triton")), default=float("nan"))
        bound = "within" if alone <= TRITON_FACTOR * target else "not within"
        yield (
            f"{shape} {mode}: {best:.1f} us by {provider}, target {target} us {verdict} (stretch {stretch} us); "
            f"Triton alone {alone:.1f} us, {bound} {TRITON_FACTOR}x"
        )
