"""Which tests run: those for a GPU only where they are asked for, and then they never pass or skip without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import selects_gpu_only

GPU_TESTS = Path(__file__).parents[1] / "backends" / "test_gpu.py"


@pytest.mark.parametrize(
    "expression, only",
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("slow and gpu", True),
        ("not (slow or not gpu)", True),
        ("", False),
        ("not gpu", False),
        ("not slow and not gpu", False),
        ("slow", False),
        ("gpu or slow", False),
    ],
)
def test_which_expressions_select_only_tests_for_a_gpu(expression, only):
    assert selects_gpu_only(expression) == only


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param(["-m", "gpu and not slow"], "this test needs a GPU", id="without a GPU"),
        pytest.param([], "select it by `-m gpu`", id="not selected"),
    ],
)
def test_tests_for_a_gpu_fail_elsewhere(tmp_path, options, message):
    """Not selected by a mark, they would run in Triton's interpreter, with or without a GPU."""
    pretend = tmp_path / "pretend.py"
    pretend.write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *options,
        str(GPU_TESTS),
        "-k",
        "warm_start",
    ]
    command += [] if options else ["-p", "pretend"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1, done.stdout
    assert message in done.stdout
    summary = done.stdout.splitlines()[-1]
    assert "2 errors" in summary
    assert "skipped" not in summary
