"""Every example trains for a few steps, and improves what it should."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """The namespace of an example, run as if started from its folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "trainers"))

    def names(file: str) -> dict[str, Any]:
        return runpy.run_path(str(EXAMPLES / "trainers" / file), run_name="example")

    return names


def test_plain_loop(example):
    losses = example("plain_loop.py")["main"](steps=15)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.filterwarnings("ignore:.*ignores num_items_in_batch")
def test_hf_trainer(example, tmp_path):
    history = example("hf_trainer.py")["main"](steps=15, folder=str(tmp_path))
    losses = [entry["otalign/loss"] for entry in history if "otalign/loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    assert history[0]["loss"] > history[-2]["loss"]


@pytest.mark.filterwarnings("ignore")
def test_lightning(example, tmp_path):
    example("lightning_trainer.py")["main"](steps=15, folder=str(tmp_path))
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        losses = [float(row["otalign/loss"]) for row in csv.DictReader(lines) if row["otalign/loss"]]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_ddp():
    """With torchrun, on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "trainers" / "ddp.py"), "--steps", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "otalign/loss" in done.stdout


def test_conversions_agree(example):
    losses = example("conversions.py")["main"]()
    assert len(losses) == 6
    assert list(losses.values()) == pytest.approx([losses["packed"]] * 6, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_notebook(monkeypatch):
    """Runs all cells, with a model trained for few steps."""
    for folder in ("demo", "trainers"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    matplotlib.use("Agg")
    cells = json.loads((EXAMPLES / "demo" / "alignments.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any("STEPS = 300" in cell for cell in code)
    names: dict[str, Any] = {}
    for cell in code:
        exec(cell.replace("STEPS = 300", "STEPS = 2"), names)
    assert all(cell["outputs"] for cell in cells if "figure" in "".join(cell["source"]) and cell["cell_type"] == "code")
