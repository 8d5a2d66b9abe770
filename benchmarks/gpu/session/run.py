"""The session of `make gpu`: build, test, sanitize and benchmark, each with a time limit, all results in one folder.

It needs no network and no virtual environment. torch, Triton and a compiler must be installed; other packages may come
as wheels in a folder. If a step fails or takes too long, the summary records it and the next step runs. The folder has
few files, so that it is easy to copy: summary.json, log.txt, tests.xml, benchmark.csv, stages.csv, targets.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = [sys.executable, str(ROOT / "benchmarks")]
WITHOUT_CUDA = "OTALIGN_WITHOUT_CUDA"
WORKERS = 6  # processes that run tests: they wait longer for the compiler than for the GPU


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: float  # at most
    variables: dict[str, str] = {}  # noqa: RUF012 - never written to
    needed_for: str = ""  # an environment variable that is set for the next steps if this one fails


def steps(out: Path, site: Path, wheels: Path | None, *, dry: bool) -> Iterator[Step]:
    python, tests = sys.executable, pytest(dry=dry)
    if wheels is not None:
        files = [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
        options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--upgrade", "--target", str(site)]
        yield Step("wheels", [python, "-m", "pip", "install", *options, *files], 15)
    if not dry:
        yield Step("build", [*BENCHMARKS, "build", str(site)], 70)
        # A CUDA kernel that never ends would block the tests and the benchmark. If this step fails, they leave it out.
        yield Step("first solve by cuda", [*BENCHMARKS, "first-solve"], 30, needed_for=WITHOUT_CUDA)
    few = {} if dry else {"OMP_NUM_THREADS": "2"}  # threads of the reference in each worker
    yield Step("tests", [*tests, f"--junitxml={out / 'tests.xml'}"], 145, few)
    small = [*BENCHMARKS, "sanitize"]
    if dry:
        yield Step("sanitizer cases", small, 120)
    else:
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        check = [sanitizer or "compute-sanitizer", "--error-exitcode", "9"]
        # Each tensor is a block of its own: memcheck finds no access out of bounds within torch's large blocks.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Step("memcheck", [*check, "--tool", "memcheck", *small, "--seconds", "30"], 50, alone)
        yield Step("racecheck", [*check, "--tool", "racecheck", *small, "--seconds", "30"], 50)
    benchmark = [*BENCHMARKS, "gpu", "--out", str(out)]
    yield Step("benchmark", [*benchmark, *(["--dry"] if dry else ["--seconds", "115"])], 150)
    stages = [*BENCHMARKS, "stages", "--out", str(out)]
    yield Step("stages", [*stages, *(["--dry"] if dry else [])], 30)


def pytest(*, dry: bool) -> list[str]:
    """Command of the tests that are marked `gpu`. Their files have names in test_gpu*.py; others need more packages."""
    pattern = "test_gpu_benchmark.py" if dry else "test_gpu*.py"
    files = sorted((ROOT / "tests").rglob(pattern))
    if not files:  # without a path pytest would run all tests
        raise FileNotFoundError(f"expected {pattern} in {ROOT / 'tests'} or below, found none")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--durations=10"]
    command += ["-m", "not gpu and not slow" if dry else "gpu", "--continue-on-collection-errors"]
    if not dry and importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS)]
    if not dry and importlib.util.find_spec("pytest_timeout"):  # against programs that wait for each other for ever
        command += ["--timeout", "100", "--timeout-method", "thread"]
    return [*command, *map(str, files)]


def run_step(step: Step, log: Path, work: Path, environment: dict[str, str]) -> dict[str, object]:
    """Run a step and append its output to the log. At the time limit, its whole process group is killed."""
    start = time.monotonic()
    with log.open("a") as file:
        print(f"\n=== {step.name}: {' '.join(step.command)}", file=file, flush=True)
        try:
            process = subprocess.Popen(
                step.command,
                cwd=work,
                env=environment | step.variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = process.wait(step.seconds)
            outcome = "passed" if code == 0 else f"failed with {code}"
        except OSError as error:
            outcome = f"cannot run: {error}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped after {step.seconds:g} s"
        print(f"=== {step.name}: {outcome}", file=file)
    return {"step": step.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks session", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="where logs and results go")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU, through Triton's interpreter")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="otalign-gpu-"))
    site, log = work / "site", out / "log.txt"
    log.write_text("")
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    if args.dry:
        environment["TRITON_INTERPRET"] = "1"
    summary = []
    for step in steps(out, site, args.wheels and args.wheels.resolve(), dry=args.dry):
        print(f"{step.name} ...", flush=True)
        summary.append(run_step(step, log, work, environment))
        if step.needed_for and summary[-1]["outcome"] != "passed":
            environment[step.needed_for] = "1"
        print(
            *log.read_text().splitlines()[-9:-1], "  {outcome}, {seconds} s".format(**summary[-1]), sep="\n", flush=True
        )
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(work, ignore_errors=True)
    print("---", *("{step}: {outcome}, {seconds} s".format(**entry) for entry in summary), sep="\n")
    if (out / "targets.txt").exists():
        print((out / "targets.txt").read_text())
    return int(any(entry["outcome"] != "passed" for entry in summary))
