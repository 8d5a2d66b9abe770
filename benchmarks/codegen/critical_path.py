"""How long an iteration of the CUDA kernels takes by a model of its machine code: results/critical_path.csv, and a table.

`python benchmarks critical-path --before COMMIT` compiles the kernels of a commit and of the working tree for sm_90a and
writes both. It needs nvcc, and nvdisasm, which comes with Triton; it needs no GPU.

The model follows the warp that has the most to do through one iteration of a full block in a cluster. It issues in order,
with the stalls and the scoreboards that the compiler has written into the instructions, and with the latencies below,
which are others' measurements, rounded. Warps of one scheduler share its pipes up to the first barrier. The model knows
no bank conflicts, caches of instructions or skew between blocks, so it is good to perhaps 20 %.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

from common.tables import replace_block

ROOT = Path(__file__).resolve().parents[2]
SHAPE, WARPS, HELD, CLUSTER = 5, 8, 256, 4  # what the heuristics choose for 32 items of 750 x 128 on an H100
SCHEDULERS = 4
KERNEL = r"sinkhorn_kernel\w*(ELb0E|KindE0E)EEv"  # the symbol of the kernel for strict marginals, of old and of new

# Cycles until a result is there, of instructions that take a variable time and report to a scoreboard.
LATENCY = {"LDS": 29, "SHFL": 24, "MUFU": 22, "S2R": 25, "S2UR": 25, "LDC": 30, "SYNCS": 20, "B2R": 20, "LDG": 500}
READ, BARRIER, MESSAGE, TAKEN = 10, 30, 325, 8  # operands read; a barrier; a message; a branch that is taken
# Cycles for which an instruction of a warp takes a pipe of its scheduler; of "memory", four schedulers share one.
PIPES = {"float": 1, "integer": 2, "special": 8, "memory": 4}


class Instruction(NamedTuple):
    at: int
    text: str
    stall: int
    sets: tuple[int, ...]  # scoreboards: released when the result is there,
    reads: tuple[int, ...]  # when the operands are read,
    waits: tuple[int, ...]  # and awaited before the instruction

    @property
    def word(self) -> str:
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split()[0].rstrip(";")

    @property
    def kind(self) -> str:
        return self.word.split(".")[0]

    @property
    def targets(self) -> list[str]:
        return re.findall(r"\.L_x_\d+", self.text) if self.kind in ("BRA", "BRX") and ".DIV" not in self.word else []


class Code(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]  # index of the instruction that follows


def parse(listing: str, kernel: str) -> Code:
    """The kernel whose symbol matches `kernel`, from the output of `nvdisasm -hex`."""
    sections = re.split(r"\.section\s+\.text\.", listing)[1:]
    (section,) = (section for section in sections if re.search(kernel, section.split(",")[0]))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: tuple[int, str] | None = None
    for line in section.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif first := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*/\* 0x[0-9a-f]{16} \*/", line):
            pending = int(first[1], 16), first[2]
        elif pending and (second := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            instructions.append(decode(*pending, int(second[1], 16)))
            pending = None
    return Code(instructions, labels)


def decode(at: int, text: str, high: int) -> Instruction:
    """The high 64 bits of an instruction hold its stall, its two scoreboards and the mask of those that it awaits."""
    control = high >> 41
    sets, reads, waits = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    return Instruction(
        at, text, control & 15,
        (sets,) if sets != 7 else (), (reads,) if reads != 7 else (), tuple(k for k in range(6) if waits >> k & 1),
    )  # fmt: skip


def iteration(code: Code) -> tuple[int, int]:
    """First and last instruction of the loop of the iterations: the smallest with a pass, messages and a vote."""
    found = []
    for end, instruction in enumerate(code.instructions):
        for start in (code.labels[target] for target in instruction.targets if target in code.labels):
            if start < end:
                words = [each.word for each in code.instructions[start : end + 1]]
                passes = words.count("FFMA") >= 200 and words.count("MUFU.EX2") <= 16
                if passes and any(word.startswith("BAR.RED") for word in words):
                    found.append((end - start, start, end))
    _, start, end = min(found)
    return start, end


class Progress(NamedTuple):
    """What a way through an iteration has done so far."""

    barriers: int = 0
    sent: int = 0  # messages
    waited: bool = False
    combined: int = 0  # additions after the wait
    scaled: bool = False  # whether it has made a scaling after the wait

    def after(self, instruction: Instruction) -> Progress:
        return Progress(
            self.barriers + (instruction.kind == "BAR"),
            self.sent + (instruction.kind == "STAS"),
            self.waited or "PHASECHK" in instruction.word,
            self.combined + (self.waited and self.barriers == 1 and instruction.kind == "FADD"),
            self.scaled or (self.waited and instruction.kind == "MUFU"),
        )

    def is_possible(self, cluster: int) -> bool:
        if self.barriers == 2 and not (self.sent == cluster and self.scaled):
            return False
        if self.barriers == 2 and self.combined not in (cluster - 1, 4 * (cluster - 1)):
            return False
        return self.sent <= cluster and self.combined <= 4 * (cluster - 1)


def skips_memory(instructions: list[Instruction], k: int) -> bool:
    """Whether k is the branch around the rows in memory, taken unless the block has more rows than its registers hold."""
    if not (branch := re.match(r"@!(P\d) BRA", instructions[k].text)):
        return False
    sets = re.compile(rf"\w*SETP\S* {branch[1]}\b")
    before = next((each.text for each in instructions[k - 1 :: -1] if sets.match(each.text)), "")
    return re.search(rf"GE\.AND {branch[1]}, PT, R\d+, {HELD + 1:#x}, PT", before) is not None


def path(code: Code, cluster: int) -> list[Instruction]:
    """The way through an iteration of a thread that has rows and columns, in a block without rows in memory.

    Up to the first barrier it is the longest way. Then it is the shortest on which the thread sends a message to each block
    of the cluster and combines what all have sent: one column, or four. Loops over rows in memory are left out.
    """
    start, end = iteration(code)
    excluded = set()
    for k in range(start, end + 1):
        instruction = code.instructions[k]
        if instruction.kind in ("LDG", "STG") or ("PHASECHK" in instruction.word and "+0x10]" in instruction.text):
            excluded.add(k)
        for target in instruction.targets:
            inner = range(code.labels[target], k + 1)
            if start < inner.start and k < end and any(code.instructions[each].kind == "FFMA" for each in inner):
                excluded.update(inner)

    # known[k]: for what was done up to instruction k, the length of the best way and the instruction that it came from.
    known: list[dict[Progress, tuple[int, int, Progress]]] = [{} for _ in range(start, end + 1)]
    known[0][Progress()] = (0, -1, Progress())
    for k in range(start, end):
        if k in excluded:
            continue
        instruction = code.instructions[k]
        followers = [code.labels[target] for target in instruction.targets if k < code.labels[target] <= end]
        if skips_memory(code.instructions, k):
            pass
        elif (not instruction.targets or instruction.text.startswith("@")) and instruction.kind not in ("BRX", "EXIT"):
            followers.append(k + 1)
        for before, (length, _, _) in known[k - start].items():
            after = before.after(instruction)
            if after.is_possible(cluster):
                longer = length + (1 if after.barriers == 0 else -1)
                for follower in followers:
                    there = known[follower - start]
                    if after not in there or longer > there[after][0]:
                        there[after] = (longer, k, before)
    done = max(known[-1], key=lambda each: known[-1][each][0])
    k, way = end, [code.instructions[end]]
    while k > start:
        _, k, done = known[k - start][done]
        way.append(code.instructions[k])
    return way[::-1]


def pipe(instruction: Instruction) -> str:
    if instruction.kind in ("FFMA", "FADD", "FMUL"):
        return "float"
    if instruction.kind == "MUFU":
        return "special"
    return "memory" if instruction.kind in ("LDS", "STS", "SHFL", "STAS", "LDC", "SYNCS") else "integer"


class Warp:
    def __init__(self) -> None:
        self.now = 0  # the earliest cycle for the next instruction
        self.released = [0] * 6
        self.sent = 0  # when the last message was sent

    def ready(self, instruction: Instruction) -> int:
        return max([self.now, *(self.released[k] for k in instruction.waits)])

    def issue(self, instruction: Instruction, cycle: int, taken: bool) -> None:
        self.now = cycle + max(1, instruction.stall) + (TAKEN if taken else 0)
        done = cycle + LATENCY.get(instruction.kind, READ)
        if instruction.kind == "STAS":
            self.sent = cycle
        if "PHASECHK" in instruction.word:
            done = max(done, self.sent + MESSAGE)
        for k in instruction.sets:
            self.released[k] = max(self.released[k], done)
        for k in instruction.reads:
            self.released[k] = max(self.released[k], cycle + READ)


class Time(NamedTuple):
    """Cycles from the start of an iteration."""

    first_barrier: int  # when all warps have put their sums
    sent: int  # when the last message is on its way
    arrived: int
    end: int


def simulate(way: list[Instruction], warps: int) -> Time:
    """`warps` warps of one scheduler up to the first barrier, then one."""
    first = next(k for k, instruction in enumerate(way) if instruction.kind == "BAR")
    jumps = [a.kind in ("BRA", "BRX") and b.at != a.at + 16 for a, b in itertools.pairwise(way)] + [True]
    running = [Warp() for _ in range(warps)]
    places = [0] * warps
    free = dict.fromkeys(PIPES, 0)
    slot = 0  # the scheduler's next free cycle
    while min(places) < first:
        waiting = [w for w in range(warps) if places[w] < first]
        times = {w: max(running[w].ready(way[places[w]]), slot, free[pipe(way[places[w]])]) for w in waiting}
        w = min(waiting, key=lambda each: (times[each], each))
        instruction, cycle = way[places[w]], times[w]
        running[w].issue(instruction, cycle, jumps[places[w]])
        slot, free[pipe(instruction)] = cycle + 1, cycle + PIPES[pipe(instruction)]
        places[w] += 1
    warp = running[0]
    warp.now = first_barrier = max(each.now for each in running) + BARRIER
    arrived = 0
    for k in range(first + 1, len(way)):
        cycle = warp.ready(way[k])
        warp.issue(way[k], cycle, jumps[k])
        if way[k].kind == "BAR":
            warp.now = max(warp.now, cycle + BARRIER)
        if "PHASECHK" in way[k].word:
            arrived = max(warp.released[s] for s in way[k].sets)
    return Time(first_barrier, warp.sent, arrived, warp.now)


def listing(source: Path, folder: Path) -> str:
    cubin = folder / "kernel.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-arch=sm_90a", f"-I{source}", f"-DOTALIGN_TILE_SHAPE={SHAPE}"]
    subprocess.run([*command, "-o", str(cubin), str(source / "cuda/tile_shape.cu")], check=True)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return subprocess.run([str(tool), "-hex", str(cubin)], stdout=subprocess.PIPE, check=True, text=True).stdout


COLUMNS = ("source", "instructions", "barriers", "messages", "to_first_barrier", "to_message", "message",
           "after_message", "cycles")  # fmt: skip


def rows(source: str, text: str) -> Iterator[dict[str, object]]:
    way = path(parse(text, KERNEL), CLUSTER)
    time = simulate(way, WARPS // SCHEDULERS)
    kinds = [instruction.kind for instruction in way]
    yield {
        "source": source,
        "instructions": len(way),
        "barriers": kinds.count("BAR"),
        "messages": kinds.count("STAS"),
        "to_first_barrier": time.first_barrier,
        "to_message": time.sent - time.first_barrier,
        "message": time.arrived - time.sent,
        "after_message": time.end - time.arrived,
        "cycles": time.end,
    }


def table(found: list[dict[str, object]]) -> Iterator[str]:
    yield "| source | instructions | barriers | messages | to the first barrier | sums and sending | message | then | cycles |"
    yield "|---" * len(COLUMNS) + "|"
    for row in found:
        yield "| " + " | ".join(str(row[column]) for column in COLUMNS) + " |"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks critical-path", description=__doc__)
    parser.add_argument("--before", required=True, metavar="COMMIT", help="with which the working tree is compared")
    commit = parser.parse_args(arguments).before
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = subprocess.run(["git", "archive", commit, "csrc"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        found += rows(commit, listing(folder / "csrc", folder))
        found += rows("working tree", listing(ROOT / "csrc", folder))
    with (ROOT / "benchmarks/results/critical_path.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    replace_block(ROOT / "docs/performance.md", "critical-path", "\n".join(table(found)))
    return 0
