"""Is memory that cannot be had always a Python exception, and the next call right?

Each allocation of a call is made to fail in turn, by a library that replaces malloc and operator new. And large calls run
under RLIMIT_AS, from more than they need to nothing.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ..helpers.processes import program, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="preloads a library, and limits memory")

SOURCE = Path(__file__).with_name("failing_allocations.c")
REFUSED = ("MemoryError", "RuntimeError")
PROBLEMS = (
    "cosine, float32",
    "cosine, float64",
    "two threads' work",
    "strided bfloat16",
    "euclidean",
    "extreme points",
    "packed",
    "relaxed, by transport",
    "divergence",
    "given cost",
    "one long item",
    "Newton",
    "Newton by conjugate gradients",
    "dense plans",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("failing") / "libfailing_allocations.so"
    compiler = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-fexceptions", str(SOURCE), "-o", str(built)]
    subprocess.run([*compiler, "-ldl", "-lstdc++"], check=True)
    return str(built)


def fail_each(
    library: str, sparing: str, problem: str, threads: int, process: str = "parent"
) -> tuple[list[str], list[str], str]:
    """For each allocation that was made to fail "culprit after outcome"; how the process ended where it did; the last line."""
    outcomes: list[str] = []
    deaths: list[str] = []
    while True:
        first = len(outcomes) + len(deaths) + 1
        arguments = [program("failing_allocations"), library, sparing, problem, str(threads), str(first), process]
        done = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"LD_PRELOAD": library},
            capture_output=True,
            text=True,
            timeout=300,
        )
        lines = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.count(" ") >= 2]
        if done.returncode == 0:
            return outcomes + lines[:-1], deaths, lines[-1]
        outcomes += lines
        deaths.append(f"{done.returncode}: {done.stderr[-300:]}")


QUICK = [("two threads' work", 2), ("Newton", 1)]


@pytest.mark.parametrize(
    ("problem", "threads"),
    [
        pytest.param(problem, threads, marks=[] if (problem, threads) in QUICK else pytest.mark.slow)
        for problem in PROBLEMS
        for threads in (1, 2)
    ],
)
def test_each_allocation_fails(library, problem, threads):
    outcomes, deaths, last = fail_each(library, "torch", problem, threads)
    assert deaths == []
    assert last.startswith("all ") and last.endswith(" right"), "the end comes with a call that was left alone"
    kinds = Counter(tuple(line.split(" ", 2)) for line in outcomes)
    print(problem, threads, kinds, last)
    assert {after for _, after, _ in kinds} == {"right"}, "the next call is right"
    assert {outcome for *_, outcome in kinds} <= {"right", "MemoryError"}
    of_the_engine = sum(
        count for (culprit, _, outcome), count in kinds.items() if culprit == "_C" and outcome in REFUSED
    )
    assert of_the_engine >= 20, "the engine's allocations were among them"


@pytest.mark.slow
def test_each_allocation_fails_in_a_forked_child(library):
    """There the engine starts its threads itself."""
    outcomes, deaths, last = fail_each(library, "torch", "two threads' work", 2, "child")
    assert deaths == []
    assert last.endswith(" right")
    assert {tuple(line.split(" ")[1:]) for line in outcomes} == {("right", "right"), ("right", "MemoryError")}


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["cosine, float32", "two threads' work"])
def test_torch_may_end_the_process_but_nothing_is_wrong(library, problem):
    """Without memory, some functions of torch that may not throw do so. Whatever it survives has to be right."""
    outcomes, deaths, last = fail_each(library, "OpenMP", problem, 1)
    kinds = Counter(line.split(" ", 1)[1] for line in outcomes)
    print(problem, kinds, len(deaths), deaths[:1], last)
    assert {kind.split(" ", 1)[0] for kind in kinds} == {"right"}
    assert {kind.split(" ", 1)[1] for kind in kinds} <= {"right", *REFUSED}


LIMITED = (
    "long items",
    "long items, by transport",
    "extreme points",
    "euclidean, float64",
    "divergence",
    "given cost",
    "Newton",
    "dense plans",
)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", LIMITED)
def test_address_space_is_limited(call, threads):
    """Every limit gives the right bits or an exception, and the calls after it are right."""
    # Each large block then comes from the system, and goes back.
    fresh = {"MALLOC_MMAP_THRESHOLD_": "131072", "OTALIGN_POOL_MB": "0"}
    found = json.loads(run_program("memory_limits", call, str(threads), timeout=300, **fresh))
    print(found)
    outcomes = {outcome for _, outcome in found["outcomes"]}
    assert found["after"]
    assert outcomes <= {"right", *REFUSED}
    assert found["outcomes"][0][1] == "right"
    assert outcomes & set(REFUSED), "some limits were too low"
