"""The compiled variants of the Triton kernels: which the heuristics can choose, and what the compiler makes of them.

No GPU is needed. Problems of every kind are launched on tensors without memory. The launches are recorded instead of
made, and the recorded kernels are compiled ahead of time: `python benchmarks variants --arch 80 90 100`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import triton
from otalign.triton_kernels import batch as batches
from otalign.triton_kernels import launch, runtime
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

META = torch.device("meta")
INF = float("inf")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid")


class Variant(NamedTuple):
    """What Triton compiles once: a kernel, the types of its arguments, its constants and its options.

    For AMD's chips all tensors are taken to be within 2 GiB, which is part of the variant there.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # pointers to 16 bytes, and multiples of 16

    def label(self) -> str:
        """The type of the costs and the constants that the heuristics chose, in short."""
        costs = dict(self.signature).get("C", "*none").removeprefix("*")
        return " ".join([costs, *(f"{name}={value}" for name, value in self.constants if name.isupper())])


class Report(NamedTuple):
    """The compiler's figures of a variant on a chip. `spills` are bytes of registers that are kept in memory."""

    arch: int | str
    kernel: str
    label: str
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    seconds: float


# Which there are -------------------------------------------------------------------------------------------------------


@contextmanager
def recording(generation: int = 90, processors: int = 132, lanes: int = 32) -> Iterator[dict[Variant, Any]]:
    """Record launches in the dictionary: what Triton would compile, and the key under which the launcher keeps it."""
    found: dict[Variant, Any] = {}

    def record(self: runtime.Kernel, grid: Any, values: dict[str, Any], constants: dict[str, Any], device: Any) -> None:
        key = (self, self.key(values), tuple(constants.values()))
        found.setdefault(variant(self.function, self.named(values), constants), key)

    old, runtime.Kernel.launch = runtime.Kernel.launch, record  # type: ignore[method-assign]
    chip = runtime.processors, runtime.generation, runtime.lanes
    runtime.processors, runtime.generation = lambda device: processors, lambda device: generation  # type: ignore[assignment]
    runtime.lanes = lambda device: lanes  # type: ignore[assignment]
    try:
        yield found
    finally:
        runtime.Kernel.launch = old  # type: ignore[method-assign]
        runtime.processors, runtime.generation, runtime.lanes = chip


def variant(function: Any, values: dict[str, Any], constants: dict[str, Any]) -> Variant:
    """The variant that Triton compiles for a call."""
    signature, fixed, aligned = [], [], []
    for parameter in function.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature.append((name, "constexpr"))
            fixed.append((name, constants[name]))
        elif parameter.annotation_type:
            signature.append((name, parameter.annotation_type))
        elif isinstance(values[name], torch.Tensor):
            signature.append((name, "*" + TYPES[values[name].dtype]))
            if not parameter.do_not_specialize_on_alignment and values[name].storage_offset() == 0:
                aligned.append(name)
        elif values[name] == 1 and not parameter.do_not_specialize:
            signature.append((name, "constexpr"))
            fixed.append((name, 1))
        else:
            signature.append((name, "i32" if abs(values[name]) < 2**31 else "i64"))
            if values[name] % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
    options = tuple((name, constants[name]) for name in OPTIONS if name in constants)
    return Variant(function.fn.__name__, tuple(signature), tuple(fixed), options, tuple(aligned))


class Problem(NamedTuple):
    """A batch to launch; `layout` is "full", "lengths" or "packed"."""

    B: int = 4
    N: int = 100
    M: int = 50
    D: int = 1024
    x: torch.dtype = torch.bfloat16
    y: torch.dtype = torch.bfloat16
    cost: str = "cosine"  # or "given", of type x
    prior: str = "none"
    relaxed: bool = False
    layout: str = "full"
    weights: bool = False
    accelerate: bool = False

    def launch(self, *, gradients: bool = True) -> None:
        """Launch the forward pass and, with `gradients`, every backward pass."""
        dtype = torch.float64 if torch.float64 in (self.x, self.y) else torch.float32
        packed, ragged = self.layout == "packed", self.layout != "full"

        def side(size: int, kind: torch.dtype) -> batches.Side:
            rows = self.B * size
            shape = (rows, self.D) if packed else (self.B, size, self.D)
            layout = torch.empty(self.B + packed, dtype=torch.int64, device=META) if ragged else None
            points = None if self.cost == "given" else torch.empty(shape, dtype=kind, device=META)
            weights = torch.empty(shape[:-1], dtype=dtype, device=META) if self.weights else None
            return batches.Side(points, layout, weights, packed, size, rows)

        x, y = side(self.N, self.x), side(self.M, self.y)
        batch = batches.Batch(
            x,
            y,
            items=self.B,
            reg=0.05,
            reg_items=None,
            cost=self.cost,
            prior=self.prior,
            prior_parameters=(1.0, 1.0),
            rho=(1.0, 1.0) if self.relaxed else (INF, INF),
            dtype=dtype,
            device=META,
        )
        given = torch.empty(self.B, self.N, self.M, dtype=self.x, device=META) if self.cost == "given" else None
        saved = launch.solve(batch, given, None, {"max_iter": 200, "tol": 1e-3, "accelerate": self.accelerate}).saved
        if not gradients:
            return
        wanted = {"C": given} if given is not None else {"x": x.points, "y": y.points}
        wanted |= {"a": x.weights, "b": y.weights} if self.weights else {}
        value = torch.empty(self.B, dtype=dtype, device=META)
        plan = launch.plan(batch, saved)
        for incoming in ((value, None, None), (None, value, None), (None, None, plan)):
            launch.gradients(batch, saved, *incoming, wanted)
        launch.assign(batch, saved)
        if given is None:
            for by_y in (False, True):
                image, mass = launch.barycentric(batch, saved, by_y=by_y)
                launch.barycentric_gradients(batch, saved, image, mass, image, wanted, by_y=by_y)


# Sizes at every boundary of the heuristics, and one beyond it.
SIZES_X = (1, 64, 65, 128, 129, 192, 193, 256, 257, 768, 769, 3072, 3073, 20000)
SIZES_Y = (1, 32, 33, 64, 65, 128, 129, 256, 257, 512, 1024, 2048, 4096, 8192, 16384, 32768)
ITEMS = (1, 8, 9, 16, 17, 33, 34, 66, 67, 500)
FACTORS = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
)
PRIORS = ("none", "quadratic", "absolute", "order_preserving", "band")


def solvers() -> Iterator[Problem]:
    """All problems that the heuristics of the iterations distinguish."""
    for B, N, M in itertools.product(ITEMS, SIZES_X, SIZES_Y):
        for kind, *ways in itertools.product((torch.float32, torch.float64), (False, True), (False, True)):
            relaxed, accelerate = ways
            yield Problem(B, N, M, 64, kind, kind, relaxed=relaxed, accelerate=accelerate)


def products() -> Iterator[Problem]:
    """All problems that the heuristics of costs and gradients distinguish."""
    for (x, y), cost, prior in itertools.product(FACTORS, ("cosine", "sqeuclidean", "euclidean", "dot"), PRIORS):
        for N, M, D in ((100, 32, 64), (100, 64, 128), (300, 128, 1024), (128, 300, 1024)):
            yield Problem(4, N, M, D, x, y, cost, prior, weights=True)
    for x, prior in itertools.product((torch.bfloat16, torch.float16, torch.float32, torch.float64), PRIORS):
        for M in (32, 64, 128):
            yield Problem(4, 100, M, 64, x, x, "given", prior, weights=True)


def all_variants(arch: int | str = 90) -> list[Variant]:
    """Every variant that the heuristics can choose on a chip, for aligned points with contiguous dimensions."""
    with recording(0, 1, 64) if isinstance(arch, str) else recording(arch) as found:
        for problem in solvers():
            problem.launch(gradients=problem.N in (1, 3073))
        for problem in products():
            problem.launch()
    return list(found)


# What they become ------------------------------------------------------------------------------------------------------


def compiled(variant: Variant, arch: int | str) -> Any:
    """Triton's compiled kernel for a compute capability, 90 say, or for an AMD chip, "gfx942"."""
    function = getattr(launch, variant.kernel)
    names = function.arg_names
    attributes: dict[Any, Any] = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    if isinstance(arch, str):
        for name, kind in variant.signature:
            if kind.startswith("*"):
                attributes.setdefault((names.index(name),), []).append(["tt.pointer_range", 32])
    source = ASTSource(
        fn=function,
        signature=dict(variant.signature),
        constexprs={(names.index(name),): value for name, value in variant.constants},
        attrs=attributes,
    )
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=dict(variant.options) | {"enable_fp_fusion": True})


def compile_variant(variant: Variant, arch: int | str) -> Report:
    """Compile for a compute capability, or for an AMD chip, and report the compiler's figures."""
    start = time.perf_counter()
    kernel = compiled(variant, arch)
    seconds = time.perf_counter() - start
    usage = amd_usage(kernel.asm["amdgcn"]) if isinstance(arch, str) else nvidia_usage(kernel, arch)
    warps = dict(variant.options)["num_warps"]
    return Report(arch, variant.kernel, variant.label(), warps, *usage, kernel.metadata.shared, round(seconds, 2))


def nvidia_usage(kernel: Any, arch: int) -> tuple[int, int, int]:
    """Registers of a thread, bytes of its stack, and bytes of its spills."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        binary, text = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        binary.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", str(binary)], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
        if not stack:
            return registers, 0, 0
        text.write_text(kernel.asm["ptx"])
        chip = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"])[1]  # type: ignore[index]
        command = [get_ptxas(arch).path, "-v", f"-arch={chip}", "-o", os.devnull, str(text)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return registers, stack, int(re.search(r"(\d+) bytes spill stores", said)[1])  # type: ignore[index]


def amd_usage(assembly: str) -> tuple[int, int, int]:
    def number(word: str) -> int:
        return int(re.search(rf"\.{word}:\s*(\d+)", assembly)[1])  # type: ignore[index]

    return number("vgpr_count"), number("private_segment_fixed_size"), 4 * number("vgpr_spill_count")


def report(variants: Iterable[Variant], arch: int | str, processes: int) -> list[Report]:
    variants = list(variants)
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_variant, variants, [arch] * len(variants)))


def write(rows: list[list[str]], out: TextIO) -> None:
    """By chip: first the compute capabilities, then AMD's chips."""
    in_order = sorted(rows, key=lambda row: (not row[0].isdigit(), len(row[0]), row[0]))
    csv.writer(out).writerows([Report._fields, *in_order])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks variants", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["90"], help="compute capabilities (90), or AMD chips (gfx942)")
    parser.add_argument("--only", default="", help="kernels and constants to compile: a regular expression")
    parser.add_argument("--every", type=int, default=1, help="compile only every n-th variant")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="a CSV file; printed if not given")
    parser.add_argument("--update", action="store_true", help="keep the rows of --out that these options leave out")
    args = parser.parse_args(arguments)
    if args.update and not args.out:
        parser.error("--update: expected --out")
    rows: list[list[str]] = []
    if args.update:
        with args.out.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
    for arch in (int(name) if name.isdigit() else name for name in args.arch):
        variants = [v for v in all_variants(arch) if re.search(args.only, f"{v.kernel} {v.label()}")]
        reports = report(variants[:: args.every], arch, args.processes)
        others = [row for row in rows if row[0] != str(arch) or not re.search(args.only, f"{row[1]} {row[2]}")]
        rows = [[str(value) for value in found] for found in reports] + others
        if args.out:
            with args.out.open("w", newline="") as out:
                write(rows, out)
    if not args.out:
        write(rows, sys.stdout)
    return 0
