"""Programs of the tests that need a Python process of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAMS = Path(__file__).with_name("programs")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_python(code: str, **environment: str) -> str:
    """Standard output of a new interpreter that runs `code`."""
    return _run("-c", textwrap.dedent(code), **environment)


def run_program(name: str, *arguments: str, timeout: float = 120, **environment: str) -> str:
    """Standard output of a new interpreter that runs `programs/<name>.py`, for at most so many seconds."""
    return _run(program(name), *arguments, timeout=timeout, **environment)


def run_compiler(*command: str) -> str:
    """Standard output of a program that may compile kernels, and may import from the benchmarks."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def program(name: str) -> str:
    return str(PROGRAMS / f"{name}.py")


def _run(*arguments: str, timeout: float = 120, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
