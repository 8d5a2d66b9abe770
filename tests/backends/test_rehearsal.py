"""The tests of test_gpu.py without a GPU: at small sizes, with Triton's interpreter and the CUDA kernels compiled for the CPU.

So their code is tried before one of the few machines that can run them does so.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from ..cuda_on_cpu.host_cuda import emulated
from ..helpers import problems
from . import test_gpu

# pytest collects them here as well, where other fixtures have the names that they ask for.
TESTS = {name: value for name, value in vars(test_gpu).items() if name.startswith("test_") or name == "tf32"}
globals().update({name: test for name, test in TESTS.items() if name != "test_items_far_apart"})


@pytest.fixture
def device():
    return torch.device("cpu")


def shrunk(lengths):
    """At most six lengths of at most twelve points; 0 and 1 stay what they are."""
    return [length if length < 2 else min(12, 2 + length // 25) for length in lengths[:6]]


def draw(x_lengths, y_lengths, **options):
    return problems.draw(shrunk(x_lengths), shrunk(y_lengths), **options)


def draw_cost(x_lengths, y_lengths, **options):
    return problems.draw_cost(shrunk(x_lengths), shrunk(y_lengths), **options)


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def gpu_backend(request, monkeypatch):
    for name, value in {"BACKEND": request.param, "draw": draw, "draw_cost": draw_cost, "NARROW": 3, "WIDE": 5}.items():
        monkeypatch.setattr(test_gpu, name, value)
    with emulated() if request.param == "cuda" else contextlib.nullcontext():
        yield


@pytest.mark.unpoisoned  # of gigabytes that are reserved, only the points are touched
@pytest.mark.parametrize("items, stride", [(3, 2**30 + 64), (2, 2**31 + 64)], ids=["addresses", "strides"])
def test_items_far_apart(device, items, stride):
    test_gpu.test_items_far_apart(device, items, stride)
