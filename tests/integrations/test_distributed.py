"""Training on several processes with torchrun and gloo. helpers/distributed_worker.py makes the checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from otalign.integrations import joined_mean_normalizer

WORKER = Path(__file__).parents[1] / "helpers/distributed_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_gradients_of_one(processes):
    """DDP and FSDP2, averaged by items and by tokens, with and without a rank that has nothing to align."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(WORKER),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "all equal" in done.stdout


def test_one_process():
    assert joined_mean_normalizer(torch.tensor([True, False, True])) == 2
    assert joined_mean_normalizer(torch.zeros(3)) == 1
    assert joined_mean_normalizer(torch.tensor([0.5, 2.0])) == 2.5
