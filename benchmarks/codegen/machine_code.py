"""The machine code of the CUDA kernels in the installed extension: results/machine_code.csv, and a table of it.

`python benchmarks machine-code` writes both. It reads the extension with cuobjdump, which comes with Triton.
"""

from __future__ import annotations

import argparse
import collections
import csv
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

from common.tables import replace_block
from otalign import backends

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
KINDS = ("strict", "relaxed", "accelerated", "adjoint")  # Kind in csrc/cuda/tiling.h


class Kernel(NamedTuple):
    architecture: str
    kind: str  # of KINDS
    form: int


class Usage(NamedTuple):
    """Registers of a thread, and its bytes of local memory, which hold spills."""

    registers: int
    local: int


class Loop(NamedTuple):
    """The loop of the iterations: the number of its instructions of each kind."""

    words: collections.Counter[str]

    def count(self, start: str, part: str = "") -> int:
        return sum(n for word, n in self.words.items() if word.startswith(start) and part in word)


def cuobjdump(*options: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), *options, str(backends.extension.module().__file__)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout


def kernel(symbol: str, architecture: str) -> Kernel | None:
    """The kernel of a symbol, whose template arguments are the form and, of the iterations, the kind."""
    found = re.search(r"TilingILi(\d+)E+(?:L\w*4KindE(\d)E)?", symbol)
    if not found:
        return None
    return Kernel(architecture, KINDS[int(found[2])] if found[2] else "adjoint", int(found[1]))


def usages() -> dict[Kernel, Usage]:
    found = {}
    for part in re.split(r"arch = ", cuobjdump("-res-usage"))[1:]:
        for symbol, text in re.findall(r"Function (\S+):\s+(REG.*)", part):
            of = kernel(symbol, part.split()[0])
            numbers = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text)}
            if of:
                found[of] = Usage(numbers["REG"], numbers["STACK"] + numbers["LOCAL"])
    return found


def code(architecture: str) -> dict[Kernel, list[tuple[int, str]]]:
    """The instructions of all kernels for an architecture, with their addresses."""
    instructions: list[tuple[int, str]] = []
    found: dict[Kernel, list[tuple[int, str]]] = {}
    for line in cuobjdump("-sass", "-arch", architecture).splitlines():
        if function := re.search(r"Function : (\S+)", line):
            instructions = []
            if of := kernel(function[1], architecture):
                found[of] = instructions
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?(.*?)\s*;", line):
            instructions.append((int(match[1], 16), match[2]))
    return found


def loops(architecture: str) -> dict[Kernel, Loop]:
    """The iterations of all plain kernels for an architecture; in the accelerated ones a pass is in several loops."""
    plain = {of: lines for of, lines in code(architecture).items() if of.kind != "accelerated"}
    return {of: min(candidates(lines), key=lambda loop: sum(loop.words.values())) for of, lines in plain.items()}


def candidates(instructions: list[tuple[int, str]]) -> Iterator[Loop]:
    """Loops with barriers and with the multiply-adds of a pass over the matrix; the smallest is the iteration."""
    for end, instruction in instructions:
        jump = re.match(r"BRA(?:\.\S+)? .*?0x([0-9a-f]+)", instruction)
        if jump and (start := int(jump[1], 16)) < end:
            loop = Loop(collections.Counter(text.split()[0] for at, text in instructions if start <= at <= end))
            multiplies = (
                loop.count("FFMA") >= 200 and loop.count("MUFU.EX2") <= 16
            )  # not an exact pass, full of exponentials
            if multiplies and loop.count("BAR.") >= 2:
                yield loop


def forms() -> list[tuple[int, int, int, int]]:
    """Width, lanes across, rows of a thread, and warps of every form, as csrc/cuda/tiling.h lists them."""
    text = (ROOT / "csrc/cuda/tiling.h").read_text()
    listed = re.search(r"kTileShapes\[\] = \{(.*?)\};", text, re.DOTALL)
    assert listed
    numbers = [int(number) for number in re.findall(r"\d+", listed[1])]
    return [(numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]) for i in range(0, len(numbers), 4)]


COLUMNS = (
    "architecture", "kernel", "columns", "rows_in_registers", "warps", "registers", "local_bytes", "loop_instructions",
    "loop_multiply_adds", "loop_shuffles", "loop_loads_of_four", "loop_local",
)  # fmt: skip


def rows() -> Iterator[dict[str, object]]:
    used, shapes = usages(), forms()
    for architecture in ARCHITECTURES:
        for of, loop in sorted(loops(architecture).items(), key=lambda item: (item[0].form, KINDS.index(item[0].kind))):
            width, lanes, held, warps = shapes[of.form]
            numbers = (held * warps * 32 // lanes, warps, *used[of], sum(loop.words.values()), loop.count("FFMA"))
            numbers += (loop.count("SHFL"), loop.count("LD", ".128"), loop.count("LDL") + loop.count("STL"))
            yield dict(zip(COLUMNS, (architecture, of.kind, width, *numbers), strict=True))


def table(found: list[dict[str, object]]) -> Iterator[str]:
    """Registers of the iterations on every architecture, and the instructions of their loop on sm_90a."""
    yield (
        "| columns | rows in registers | warps | marginals | " + " | ".join(ARCHITECTURES) + " | loop | multiply-adds |"
    )
    yield "|---" * (6 + len(ARCHITECTURES)) + "|"
    by_kernel: dict[tuple[object, ...], dict[object, dict[str, object]]] = {}
    for row in found:
        if row["kernel"] != "adjoint":
            key = (row["columns"], row["rows_in_registers"], row["warps"], row["kernel"])
            by_kernel.setdefault(key, {})[row["architecture"]] = row
    for key, of in by_kernel.items():
        registers = [
            f"{of[architecture]['registers']} / {of[architecture]['local_bytes']}" for architecture in ARCHITECTURES
        ]
        hopper = of["sm_90a"]
        cells = [*key, *registers, hopper["loop_instructions"], hopper["loop_multiply_adds"]]
        yield "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser("python benchmarks machine-code", description=__doc__).parse_args(arguments)
    found = list(rows())
    with (ROOT / "benchmarks/results/machine_code.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "compiler"])
        writer.writeheader()
        writer.writerows({**row, "compiler": backends.extension.module().compiler} for row in found)
    replace_block(ROOT / "docs/performance.md", "machine-code", "\n".join(table(found)))
    return 0
