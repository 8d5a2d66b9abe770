"""The steps of `make gpu`, in the order of their worth: what comes first is worth most if the time is over."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpu.backends import ON_GPU, WITHOUT
from gpu.exits import WRONG
from gpu.session.build import cores
from gpu.session.jobs import Step

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = [sys.executable, str(ROOT / "benchmarks")]
SELECTABLE = ("doctor", "first", "tests", "times", "forms", "peers", "stages", "memcheck", "racecheck", "long-tests")
QUICK = ("doctor", "first", "tests", "times")
SECONDS, QUICK_SECONDS = 590.0, 175.0  # at most for all steps together
DRY_FACTOR = 2  # a rehearsal may share two cores with other work
WORKERS = 16  # at most, processes that run tests
WORKER_GIB = 2.0  # of GPU memory that a worker needs: a context, and the largest batch of a test
NO_TEST = 5  # pytest's exit status
FOUND = 9  # the sanitizer's exit status
PEERS = ("torch absorbed, compiled, graph", "POT")  # the few that are measured with the targets
OURS = ("triton", "triton, graph", "cuda", "cuda, graph")


class Plan(NamedTuple):
    """What a session is to do."""

    out: Path
    site: Path
    wheels: Path | None = None
    dry: bool = False
    quick: bool = False

    @property
    def backends(self) -> tuple[str, ...]:
        return ("triton",) if self.dry else ON_GPU  # the CUDA kernels need a GPU


def steps(plan: Plan) -> Iterator[Step]:
    """All steps. Those that are not in SELECTABLE prepare the others, and always run."""
    kinds = [preparation, first_looks, tests, measurements, *(() if plan.quick else (sanitizers, long_tests))]
    for step in itertools.chain.from_iterable(kind(plan) for kind in kinds):
        yield step._replace(seconds=step.seconds * DRY_FACTOR) if plan.dry else step


def preparation(plan: Plan) -> Iterator[Step]:
    python, site = sys.executable, str(plan.site)
    if plan.wheels is not None:
        files = [str(wheel) for wheel in sorted(plan.wheels.glob("*.whl"))]
        options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--upgrade", "--target", site]
        yield Step("wheels", [python, "-m", "pip", "install", *options, *files], 10 if plan.quick else 15)
    yield Step("files", [*BENCHMARKS, "build", site, "--only", "files"], 5 if plan.quick else 10)
    without_nvcc = {"OTALIGN_BUILD_CUDA": "0"} if plan.dry else {}
    command = [*BENCHMARKS, "build", site, "--only", "extension"]
    yield Step("build", command, 110, without_nvcc, background=True, lines=30)


def first_looks(plan: Plan) -> Iterator[Step]:
    report = [sys.executable, "-m", "otalign", "doctor", "--report-only"]
    yield Step("doctor", report, 15 if plan.quick else 30, lines=30)  # torch is read from a cold disk
    look = [*BENCHMARKS, "first-look", "--out", str(plan.out), *(["--dry"] if plan.dry else [])]
    seconds = {"triton": 40, "cuda": 25} if plan.quick else {"triton": 60, "cuda": 40, "cpu": 20}
    for backend in [name for name in (*plan.backends, "cpu") if name in seconds]:
        yield Step(
            "first",
            [*look, backend],
            seconds[backend],
            part=backend,
            backends=(backend,),
            first_look=True,
            waits=backend != "triton",
            spare=0.3 * seconds[backend],
            outcomes={WRONG: "some results are wrong"},
            writes=("first.csv",),
        )


def tests(plan: Plan) -> Iterator[Step]:
    """One step for each backend: an error of one that makes the GPU unusable for a process cannot fail the other's tests."""
    seconds = {"triton": 30, "cuda": 20} if plan.quick else {"triton": 110, "cuda": 80}
    for backend in plan.backends:
        command = pytest(plan, "gpu and not slow", backend)
        yield Step(
            "tests",
            [*command, *(["--one-variant"] if plan.quick else [])],
            seconds[backend],
            test_variables(plan, backend),
            part=backend,
            backends=(backend,),
            waits=backend == "cuda",
            outcomes={NO_TEST: "no test is selected"},
            writes=("tests.csv",),
        )


def measurements(plan: Plan) -> Iterator[Step]:
    dry = ["--dry"] if plan.dry else []
    measure = [*BENCHMARKS, "gpu", "--append", "--out", str(plan.out), *dry]
    both = {"backends": plan.backends, "waits": True, "writes": ("benchmark.csv", "targets.txt")}
    shapes = ["--shapes", "A"] if plan.quick else ["--shapes", "A", "B"]
    few = [*measure, *shapes, "--first", "--providers", *OURS, *(() if plan.quick else PEERS)]
    if plan.quick:
        yield Step("times", few, 35, spare=12, **both)
        return
    yield Step("times", few, 90, spare=25, **both)
    # A rehearsal first compiles the CUDA kernels for the CPU.
    forms = [*BENCHMARKS, "forms", "--out", str(plan.out), *dry]
    kernels = () if plan.dry else ("cuda",)
    yield Step("forms", forms, 60 if plan.dry else 30, backends=kernels, waits=True, writes=("forms.csv",))
    seconds, spare = (40, 70) if plan.dry else (120, 30)
    yield Step("peers", measure, seconds, spare=spare, **both)
    both["writes"] = ("stages.csv",)
    yield Step("stages", [*BENCHMARKS, "stages", "--out", str(plan.out), *dry], 30, **both)


def sanitizers(plan: Plan) -> Iterator[Step]:
    cases = [*BENCHMARKS, "sanitize"]
    both = {"backends": plan.backends, "waits": True, "spare": 20}
    if plan.dry:  # some of the cases, without a sanitizer
        yield Step("memcheck", cases, 40, **both | {"spare": 60})
        return
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    check = [program or "compute-sanitizer", "--error-exitcode", str(FOUND)]
    # Each tensor is a block of its own: memcheck finds no access out of bounds within torch's large blocks.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # How many blocks fit on a processor is asked of the driver, which may say no: that is no error of a kernel.
    memcheck = [*check, "--tool", "memcheck", "--report-api-errors", "no", *cases]
    both |= {"outcomes": {FOUND: "errors found"}, "refusals": r"Device not supported.*"}
    yield Step("memcheck", memcheck, 50, alone, **both)
    yield Step("racecheck", [*check, "--tool", "racecheck", *cases], 50, **both)


def long_tests(plan: Plan) -> Iterator[Step]:
    for backend in plan.backends:
        yield Step(
            "long-tests",
            pytest(plan, "gpu and slow", backend),
            60,
            test_variables(plan, backend),
            part=backend,
            backends=(backend,),
            waits=True,
            outcomes={NO_TEST: "passed: there is no such test"},
            writes=("tests.csv",),
        )


def pytest(plan: Plan, marks: str, backend: str) -> list[str]:
    """Command of the tests that are marked `gpu`. Their files have names in test_gpu*.py; others need more packages."""
    folder, pattern = ("project", "test_gpu_benchmark.py") if plan.dry else ("backends", "test_gpu*.py")
    files = sorted((ROOT / "tests" / folder).glob(pattern))
    if not files:  # without a path pytest would run all tests
        raise FileNotFoundError(f"expected {pattern} in {ROOT / 'tests' / folder}, found none")
    # pytest takes the folder of results for one of tests, and would look for its settings above both.
    settings = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *settings, "--durations=10"]
    command += ["-m", marks.replace("gpu", "not gpu") if plan.dry else marks, "--continue-on-collection-errors"]
    command += ["-p", "gpu.session.live", "--live", str(plan.out / "tests.csv"), "--live-label", backend]
    if not plan.dry and installed(plan, "pytest_xdist", "xdist"):
        command += ["-n", str(workers()), "--dist", "worksteal"]
    if not plan.dry and installed(
        plan, "pytest_timeout", "pytest_timeout"
    ):  # against programs that wait for each other
        command += ["--timeout", "90", "--timeout-method", "thread"]
    return [*command, *map(str, files)]


def installed(plan: Plan, package: str, module: str) -> bool:
    """Whether a package is here, or is among the wheels that the session installs first."""
    wheels = plan.wheels.glob(f"{package}-*.whl") if plan.wheels else ()
    return importlib.util.find_spec(module) is not None or any(wheels)


def test_variables(plan: Plan, backend: str) -> dict[str, str]:
    """The tests of one backend leave out the others. The workers share the cores, so each has few threads."""
    others = {WITHOUT: ",".join(name for name in ON_GPU if name != backend)}
    return {"PYTHONPATH": python_path(plan, ROOT / "benchmarks"), "OMP_NUM_THREADS": "1"} | others


def python_path(plan: Plan, *more: Path) -> str:
    return os.pathsep.join(filter(None, [str(plan.site), *map(str, more), os.environ.get("PYTHONPATH")]))


@functools.cache
def workers() -> int:
    """As many processes as there are cores, and as fit into the GPU's memory."""
    command = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        fitting = int(float(said.split()[0]) / 1024 / WORKER_GIB)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        fitting = WORKERS // 2
    return max(1, min(WORKERS, cores(), fitting))
