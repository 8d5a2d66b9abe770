"""Does `make test` find faults? Plants one fault at a time in a copy of the tree, and runs its tests until one fails.

    python tests/plant_faults.py            # all, as many at a time as there are cores; part of `make test-all`
    python tests/plant_faults.py triton     # those whose name contains this

The tests that should find the fault run first, then all others of `make test`. A fault counts as caught if a test fails that
passes in a copy without the fault. The exit status is 1 if a fault was missed, or cannot be planted because the code differs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SELECTION = ["-m", "not slow and not gpu"]  # of `make test`
COPIED = ("benchmarks", "conftest.py", "csrc", "docs", "examples", "otalign", "tests", "triton_kernels")
COPIED += ("CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md")
COPIED += ("mkdocs.yml", "pyproject.toml", "setup.py")
AGREEMENT = (
    "tests/backends/test_agreement.py",
    "tests/backends/test_agreement_gradients.py",
    "tests/solver/test_layouts.py",
)


class Fault(NamedTuple):
    """In `file`, `old` (which occurs once) becomes `new`; `first` are the tests that should find it."""

    name: str
    file: str
    old: str
    new: str
    first: tuple[str, ...]


def reference(name: str, old: str, new: str, *first: str) -> Fault:
    return Fault(f"reference: {name}", "otalign/backends/reference.py", old, new, first)


def engine(name: str, file: str, old: str, new: str, *first: str) -> Fault:
    return Fault(f"engine: {name}", f"csrc/cpu/{file}", old, new, (*first, *AGREEMENT, "-k", "cpu"))


def process(name: str, file: str, old: str, new: str, first: str) -> Fault:
    return Fault(f"process: {name}", f"csrc/cpu/{file}", old, new, (first,))


def triton(name: str, file: str, old: str, new: str, *first: str) -> Fault:
    return Fault(f"triton: {name}", f"triton_kernels/{file}.py", old, new, (*first, *AGREEMENT, "-k", "triton"))


def cuda(name: str, file: str, old: str, new: str) -> Fault:
    return Fault(f"cuda: {name}", f"csrc/cuda/{file}.cuh", old, new, ("tests/backends/test_cuda.py",))


def helper(name: str, file: str, old: str, new: str, *first: str) -> Fault:
    return Fault(f"helper: {name}", f"otalign/{file}.py", old, new, first)


FAULTS = (
    reference(
        "a wrong sign in the implicit gradient",
        "grad_C = damping_x * p[:, None] * pi + damping_y",
        "grad_C = damping_x * p[:, None] * pi - damping_y",
        "tests/solver/test_gradients.py",
    ),
    reference(
        "a wrong sign in the value of a relaxed side",
        "-rho * torch.expm1(-f / rho)",
        "-rho * torch.expm1(f / rho)",
        "tests/solver/test_closed_forms.py",
        "tests/solver/test_properties.py",
    ),
    reference(
        "the weights of the other side",
        "1 / max(m, 1)) if p.y.weights is None else p.y.weights[ys]",
        "1 / max(n, 1)) if p.y.weights is None else p.y.weights[ys]",
        "tests/solver/test_closed_forms.py",
        "tests/solver/test_properties.py",
    ),
    process(
        "a child waits for OpenMP's threads",
        "fork.h",
        "return is_child.load(std::memory_order_relaxed);",
        "return false;",
        "tests/faults/test_forks.py",
    ),
    process(
        "Newton's method without memory goes another way",
        "solver.h",
        "it.starved = it.starved || !newton.ok() || !exponents.ok();",
        "",
        "tests/faults/test_allocations.py",
    ),
    process(
        "the threads that were set meanwhile are lost",
        "blas.cpp",
        "if (library.threads() == 1) library.set_threads(before_all);",
        "library.set_threads(before_all);",
        "tests/backends/test_blas.py",
    ),
    engine(
        "a missing look for NaN",
        "isa.cpp",
        "return Simd<T>::sum(zeros) == 0;",
        "return true;",
        "tests/solver/test_odd_input.py",
    ),
    engine(
        "potentials of massless points that are stale",
        "finish.h",
        "if (massless_y) exact_columns(",
        "if (false) exact_columns(",
        "tests/solver/test_oracle.py",
    ),
    engine(
        "rows of a relaxed side whose absorbed potential is forgotten",
        "solver.h",
        "if (a[i] > 0) phi[i] += next_log[i];",
        "",
        "tests/solver/test_oracle.py",
    ),
    Fault(
        "engine: findings of the first chunk only",
        "csrc/cpu/solver.h",
        "k < chunks.count; ++k) {\n      found |=",
        "k < 1; ++k) {\n      found |=",
        ("tests/backends/test_long_items.py",),
    ),
    Fault(
        "engine: column sums of all chunks at one place",
        "csrc/cpu/solver.h",
        "return &part == parts ? all : ",
        "return true ? all : ",
        ("tests/backends/test_long_items.py",),
    ),
    Fault(
        "engine: products of points where they lie",
        "csrc/cpu/batch.h",
        "return !converts(side) && aligned(points) && row_stride == product_stride(side, 0);",
        "return !converts(side) && row_stride == product_stride(side, 0);",
        ("tests/backends/test_bits.py",),
    ),
    helper(
        "lengths that stay the caller's",
        "layout",
        "return integers.to(torch.int64, copy=True).contiguous()",
        "return integers.to(torch.int64).contiguous()",
        "tests/backends/test_memory.py",
    ),
    engine(
        "an index of the prior that is one too low",
        "prior.h",
        "const double e = position - (j + 1) * step;",
        "const double e = position - j * step;",
    ),
    engine(
        "bfloat16 read as float16",
        "isa.cpp",
        "to[k] = from_bf16(static_cast<const uint16_t*>(from)[k]);",
        "to[k] = from_f16(static_cast<const uint16_t*>(from)[k]);",
    ),
    engine(
        "a wrong sign in the implicit gradient",
        "adjoint.h",
        "slope -= S::load(back.adjoint_y + j) + back.adjoint_x[i];",
        "slope -= S::load(back.adjoint_y + j) - back.adjoint_x[i];",
    ),
    engine(
        "offsets of plans that are transposed",
        "pack.cpp",
        "(b * p.x.size + i) * p.y.size",
        "(b * p.y.size + i) * p.y.size",
    ),
    triton(
        "a missing mask of dimensions",
        "cost",
        "mask=inside[:, None] & (k < dim)[None, :], other=0)",
        "mask=inside[:, None], other=0)",
    ),
    triton(
        "a dropped damping",
        "sinkhorn",
        "tl.where(sums == 0, INFINITY, -damping * (top + logarithm(sums)))",
        "tl.where(sums == 0, INFINITY, -(top + logarithm(sums)))",
    ),
    triton(
        "a wrong sign in the implicit gradient",
        "gradients",
        "(S - own_adjoint - other_adjoint) * inv_reg",
        "(S - own_adjoint + other_adjoint) * inv_reg",
    ),
    triton(
        "the sides of the prior swapped",
        "gradients",
        "prior_tile(j, i, other_n, own_n,",
        "prior_tile(i, j, other_n, own_n,",
    ),
    triton(
        "packed rows of the other side at the offset of the own one",
        "gradients",
        "first_point(other_points, other_addressing, other_start, item,",
        "first_point(other_points, other_addressing, own_start, item,",
    ),
    triton(
        "an index of the prior that is one too low",
        "math",
        "e = (i + 1).to(T) / x - (j + 1).to(T) / y",
        "e = i.to(T) / x - (j + 1).to(T) / y",
    ),
    triton(
        "NaN that is not looked for",
        "sinkhorn",
        "bad = filled & (broken | (total != total))",
        "bad = filled & broken & (total > 1)",
        "tests/solver/test_odd_input.py",
    ),
    cuda(
        "a stale scaling of rows",
        "sinkhorn",
        "numbers(kU + 1 - turn) = next;",
        "numbers(kU + 1 - turn) = before;",
    ),
    cuda(
        "the last column without its adjoint",
        "adjoint",
        "if (j < block.m) t[j] = block.columns(kSolution)[j];",
        "if (j < block.m - 1) t[j] = block.columns(kSolution)[j];",
    ),
    cuda(
        "the relaxation of the other side",
        "sinkhorn",
        "scaling(total, part(gamma, k), block.current().damping_y)",
        "scaling(total, part(gamma, k), block.current().damping_x)",
    ),
    cuda(
        "a dropped damping",
        "sinkhorn",
        "b > 0 ? -block.current().damping_y * log_sum : 0",
        "b > 0 ? -log_sum : 0",
    ),
    helper(
        "a mask of padding read as one of points",
        "layout",
        '~_expect_mask("padding_mask", h, padding_mask)',
        '_expect_mask("padding_mask", h, padding_mask)',
        "tests/solver/test_layout_helpers.py",
    ),
    helper(
        "relative lengths that are rounded down",
        "layout",
        "(rel * h.shape[1]).round().long()",
        "(rel * h.shape[1]).long()",
        "tests/solver/test_layout_helpers.py",
    ),
    helper(
        "a prior whose index of y is one too low",
        "prior",
        "e2 = ((i + 1) / n - (j + 1) / m).square()",
        "e2 = ((i + 1) / n - j / m).square()",
        "tests/solver/test_prior.py",
    ),
    helper(
        "empty items in the mean of scores",
        "speech/metrics",
        "torch.where(filled, found, 0).sum(2)",
        "found.sum(2)",
        "tests/speech/test_speech_metrics.py",
    ),
    helper(
        "ranks that are not shared",
        "speech/path",
        "torch.where(mask, (below + upto - 1).float() / 2, 0)",
        "torch.where(mask, below.float(), 0)",
        "tests/speech/test_path.py",
    ),
)


def copied(folder: Path) -> Path:
    """A copy of the tree with its built engine. `import otalign` imports the copy, and its Triton kernels too."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "otalign/triton_kernels").symlink_to("../triton_kernels")
    return folder


def planted(folder: Path, fault: Fault) -> None:
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has this {text.count(fault.old)} times, not once: {fault.old}")
    path.write_text(text.replace(fault.old, fault.new))
    if fault.file.startswith("csrc/cpu/"):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", "build/engine", "."]
        said = run(folder, *command, OTALIGN_BUILD_CUDA="0", OTALIGN_REQUIRE_EXT="1")
        if said.returncode:
            raise ValueError(f"the engine with the fault cannot be built: {said.stdout[-500:]}")


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the copy, with the engine that was built there, if any."""
    built = folder / "build/engine/otalign"
    environment |= {"PYTHONPATH": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if built.exists():
        environment["OTALIGN_EXT_DIR"] = str(built)
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def failing(folder: Path, *tests: str, selection: list[str] = SELECTION) -> str | None:
    """The first of the tests that fails, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *selection, *tests]
    done = run(folder, *command)
    found = re.search(r"^(?:FAILED|ERROR) ((?:tests|otalign)/\S+?\.py(?:::.*?)?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if found is None and done.returncode not in (0, 5):
        raise ValueError(f"pytest ended with {done.returncode}: {done.stdout[-1000:]}")
    return found and found[1]


def caught(fault: Fault) -> str | None:
    """The test that fails with the fault and passes without it; None if there is none."""
    with tempfile.TemporaryDirectory() as with_fault, tempfile.TemporaryDirectory() as without:
        folder = copied(Path(with_fault))
        planted(folder, fault)
        test = failing(folder, *fault.first) or failing(folder, "--doctest-modules", "tests", "otalign")
        if test is not None and failing(copied(Path(without)), test, selection=[]) is not None:
            raise ValueError(f"{test} fails without the fault, too")
        return test


def outcome(fault: Fault) -> tuple[bool, str]:
    """Whether the fault was caught, and a row of the table."""
    try:
        test = caught(fault)
    except ValueError as error:
        return False, f"| {fault.name} | **not tried**: {error} |"
    return test is not None, f"| {fault.name} | {f'`{test}`' if test else '**missed**'} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", default="", help="part of the names of the faults to plant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if arguments.name in fault.name]
    print("| fault | caught by |\n|---|---|", flush=True)
    all_caught = bool(chosen)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for good, row in pool.map(outcome, chosen):
            print(row, flush=True)
            all_caught &= good
    return 0 if all_caught else 1


if __name__ == "__main__":
    sys.exit(main())
