"""What `make gpu` does: build, test, sanitize, benchmark, each with a time limit, all outputs in one folder.

It takes the machine as it is, without network or virtual environment: torch, Triton and a compiler are there, and other
packages may come as wheels in a folder. A step that fails or takes too long is written down, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("memcheck", "racecheck")


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: float  # at most


def steps(out: Path, site: Path, wheels: Path | None, *, dry: bool) -> Iterator[Step]:
    python = sys.executable
    if wheels is not None:
        files = [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
        options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--upgrade", "--target", str(site)]
        yield Step("wheels", [python, "-m", "pip", "install", *options, *files], 20)
    if not dry:
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--upgrade", "--target", str(site)]
        yield Step("build", [python, "-m", "pip", "install", *options, str(ROOT)], 60)
    mark = "not gpu and not slow" if dry else "gpu"
    tests = [str(ROOT / "tests" / "test_gpu_benchmark.py")] if dry else [str(ROOT / "tests")]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-m", mark]
    yield Step("tests", [*pytest, f"--junitxml={out / 'tests.xml'}", *tests], 150)
    small = [python, str(ROOT / "benchmarks" / "sanitize_gpu.py")]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if dry:
        yield Step("sanitizer cases", small, 120)
    else:
        for kind in KINDS:
            tool = [sanitizer or "compute-sanitizer", "--tool", kind, "--error-exitcode", "9"]
            yield Step(kind, [*tool, *small, "--quick"], 50)
    benchmark = [python, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out)]
    yield Step("benchmark", [*benchmark, *(["--dry"] if dry else ["--seconds", "140"])], 170)
    stages = [python, str(ROOT / "benchmarks" / "gpu_stages.py"), "--out", str(out)]
    yield Step("stages", [*stages, *(["--dry"] if dry else [])], 30)


def run(step: Step, out: Path, environment: dict[str, str]) -> dict[str, object]:
    """Run a step with its output in a file; its whole process group ends with it."""
    log = out / f"{step.name.replace(' ', '_')}.log"
    start = time.monotonic()
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                step.command, cwd=out, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            file.write(f"{error}\n")
            return {"step": step.name, "outcome": f"cannot run: {error}", "seconds": 0.0}
        try:
            code = process.wait(step.seconds)
            outcome = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped after {step.seconds:.0f} s"
    return {"step": step.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="where logs and results go")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU, through Triton's interpreter")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    site = out.parent / f"{out.name}-site"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "OTALIGN_BUILD_CUDA": "auto"}
    if args.dry:
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    summary = []
    for step in steps(out, site, args.wheels and args.wheels.resolve(), dry=args.dry):
        print(f"{step.name} ...", flush=True)
        summary.append(run(step, out, environment))
        print("  {outcome}, {seconds} s".format(**summary[-1]), flush=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name in ("tests.log", "targets.txt"):
        if (out / name).exists():
            print(f"--- {name}", *(out / name).read_text().splitlines()[-12:], sep="\n")
    return int(any(entry["outcome"] != "passed" for entry in summary))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
