"""The tests on a machine without Triton, such as a Mac."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_tests_are_collected_without_triton(tmp_path):
    """No test module needs Triton to be imported, unless the variable leaves it out."""
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "tests"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OTALIGN_WITHOUT_TRITON": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    collected = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    assert len(collected) > 1000
    assert not [
        test for test in collected if "test_triton.py" in test or ("test_agreement" in test and "triton" in test)
    ]
