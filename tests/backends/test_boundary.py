"""Is a Problem that lies about its memory refused, or harmless? The corpus of tests/backends/engine/fuzz_problem.cpp, run again.

The inputs are what libFuzzer kept for the code that they reach, and those that once failed, by name.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "tests/backends/engine"
COMPILER = os.environ.get("CXX", "g++")

pytestmark = [pytest.mark.unpoisoned, pytest.mark.slow]


def replay(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [str(root / "tests/backends/engine/replay.sh"), COMPILER, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_lies_are_refused_or_harmless(sanitizers):
    done = replay(sanitizers)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{len(list((ENGINE / 'corpus').iterdir()))} inputs: each refused or harmless"


FAULTS = {
    "the memory of the other order": ("csrc/cpu/isa.cpp", "std::max(Solver<T>::scratch(n, m), other)", "Solver<T>::scratch(n, m)"),
    "lengths of a symmetric problem": ("csrc/cpu/batch.h", "!p.symmetric || n(b) == m(b)", "true"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_check_that_is_missing_is_found(name, tmp_path):
    for folder in ("csrc", "tests/backends/engine"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    file, right, wrong = FAULTS[name]
    source = tmp_path / file
    text = source.read_text()
    assert right in text
    source.write_text(text.replace(right, wrong))
    done = replay("address,undefined", root=tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr or "runtime error" in done.stderr or "FAILED" in done.stderr
