"""How wide the Triton kernels of the benchmark's shapes read memory: results/accesses.csv, and a table of two commits.

`python benchmarks accesses` compiles the kernels that a loss with both gradients and both images launches, and replaces
the rows of this commit. `python benchmarks accesses --table` makes the table in docs/performance.md.
"""

from __future__ import annotations

import argparse
import collections
import csv
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from codegen import variants
from common import environment
from common.tables import replace_block

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/accesses.csv"
KERNELS = "cost_kernel .*COST=cosine|sinkhorn|points_gradient_kernel .*COST=cosine|barycentric"
PROBLEMS = {
    ("A", "bf16"): variants.Problem(32, 750, 128, 1024),
    ("A", "fp32"): variants.Problem(32, 750, 128, 1024, torch.float32, torch.float32),
    ("B", "bf16"): variants.Problem(8, 3000, 512, 4096),
}
# Instructions of PTX, by column. A copy is asynchronous: it goes from global to shared memory without registers.
ACCESSES = {
    "loads_2": r"ld\.global[\w.:]*\.[bu]16\b",
    "loads_4": r"ld\.global(?![\w.:]*\.v[24])[\w.:]*\.[bfu]32\b",
    "copies_4": r"cp\.async\.ca\.shared\.global[\w.:]* [^;]*?, (?:0x)?4\b",
    "loads_16": r"ld\.global[\w.:]*\.v4\.[bfu]32\b",
    "copies_16": r"cp\.async\.c[ag]\.shared\.global[\w.:]* [^;]*?, (?:16|0x10)\b",
}
# Loads of an exchange that follow each other without a barrier, at most: so many are under way at once.
AT_ONCE = "exchanged_at_once"
LOOP = ("loop_instructions", "loop_barriers", "loop_shuffles")
COLUMNS = (
    "commit",
    "triton",
    "arch",
    "shape",
    "dtype",
    "kernel",
    "side",
    "registers",
    "spills",
    "shared",
    *ACCESSES,
    AT_ONCE,
    *LOOP,
)


def rows(arch: int) -> Iterator[dict[str, object]]:
    about = {"commit": environment.commit(), "triton": triton.__version__, "arch": arch}
    for (shape, dtype), problem in PROBLEMS.items():
        with variants.recording(arch) as found:
            problem.launch()
        for variant in found:
            if re.search(KERNELS, f"{variant.kernel} {variant.label()}"):
                yield about | {"shape": shape, "dtype": dtype} | figures(variant, arch)


def figures(variant: variants.Variant, arch: int) -> dict[str, object]:
    """The compiler's figures of a kernel, and how many instructions of each kind read global memory."""
    compiled = variants.compiled(variant, arch)
    registers, _, spills = variants.nvidia_usage(compiled, arch)
    constants = dict(variant.constants)
    by_y = constants.get("BY_Y")
    found = {"kernel": variant.kernel, "side": "" if by_y is None else "y" if by_y else "x"}
    found |= {"registers": registers, "spills": spills, "shared": compiled.metadata.shared}
    found |= {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in ACCESSES.items()}
    found[AT_ONCE] = max(part.count("ld.global.cg") for part in compiled.asm["ptx"].split("bar.sync"))
    return found | (iteration(compiled) if constants.get("GROUPS") else {})


def iteration(compiled: Any) -> dict[str, int]:
    """Instructions of the loop of the iterations on a kernel matrix in registers."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass(compiled))]
    jumps = [(end, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for end, text in instructions]
    loops = []
    for end, jump in jumps:
        if jump and int(jump[1], 16) <= end:
            words = [text for at, text in instructions if int(jump[1], 16) <= at <= end]
            count = collections.Counter(re.sub(r"^@\S+ ", "", text).split()[0].split(".")[0] for text in words)
            if count["FFMA"] >= 80 and count["MUFU"] <= 16:  # not an exact pass, which has many exponentials
                loops.append(count)
    loop = min(loops, key=lambda count: count.total())
    return dict(zip(LOOP, (loop.total(), loop["BAR"], loop["SHFL"]), strict=True))


def sass(compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", binary.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(found: list[dict[str, str]]) -> Iterator[str]:
    """The last commit in the file beside the first one, for the newest Triton that both have."""
    commits = list(dict.fromkeys(row["commit"] for row in found))
    version = max(row["triton"] for row in found)
    key = ("shape", "dtype", "kernel", "side")
    by_key: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in found:
        if row["triton"] == version:
            by_key.setdefault(tuple(row[name] for name in key), {})[row["commit"]] = row
    shown = ("registers", "spills", *ACCESSES, AT_ONCE, *LOOP[:2])
    yield f"Triton {version}, sm_{found[0]['arch']}; commit {commits[0]} -> commit {commits[-1]}."
    yield ""
    yield "| shape | kernel | " + " | ".join(name.replace("_", " ") for name in shown) + " |"
    yield "|---" * (2 + len(shown)) + "|"
    for (shape, dtype, kernel, side), of in by_key.items():
        first, last = of[commits[0]], of[commits[-1]]
        cells = [first[n] if first[n] == last[n] else f"{first[n]} -> {last[n]}" for n in shown]
        name = kernel.removesuffix("_kernel") + (f", {side}" if side else "")
        yield f"| {shape}, {dtype} | {name} | " + " | ".join(cell or "-" for cell in cells) + " |"


def read() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks accesses", description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="the compute capability, 90 for 9.0")
    parser.add_argument("--table", action="store_true", help="make the table; compile nothing")
    args = parser.parse_args(arguments)
    if args.table:
        replace_block(ROOT / "docs/performance.md", "accesses", "\n".join(table(read())))
        return 0
    new = list(rows(args.arch))
    same = tuple(str(new[0][name]) for name in COLUMNS[:3])
    kept = [row for row in read() if tuple(row[name] for name in COLUMNS[:3]) != same]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows([*kept, *new])
    return 0
