"""What a call of the Triton backend costs the host, measured without a GPU: `python benchmarks launch`.

Kernels are compiled for a GPU that is not there, and a driver that does nothing takes their launches. The time of a
call is therefore the time of Python, torch and Triton up to the driver. The driver's own few microseconds a launch are
not included.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from otalign.triton_kernels import runtime
from triton.backends.compiler import GPUTarget

import otalign
from common import environment
from otalign import backends
from otalign.backends import triton as kernels
from otalign.backends.autograd import flatten
from otalign.options import Options

# The private names of the package that this file depends on. The code below these lines uses no others.
REPLACED = (  # owner, name, replacement: tensors on the CPU then pass for tensors on a GPU with 132 multiprocessors
    (runtime, "processors", lambda device: 132),
    (runtime, "generation", lambda device: 90),
    (backends, "_why_no_triton", lambda: None),
    (backends, "_interpreting", lambda: True),
)
Inputs, align, align_backward = kernels._Inputs, kernels._align_kernel, kernels._align_backward_kernel
LAUNCH = "_launch"  # the method of runtime.Kernel that launches a compiled kernel


def compiled_launch(kernel: runtime.Kernel, grid: Any, values: Any, constants: Any, device: Any) -> tuple[Any, ...]:
    """The function that the method `LAUNCH` calls, and its arguments."""
    compiled = kernel.compiled[(device, *kernel.key(values), *constants.values())]
    return (compiled[grid], *kernel._arguments(values), *kernel._constants(constants))


class NoDriver:
    """The part of a driver that Triton uses. It counts the launches."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 232448}
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def run(*_: Any) -> None:
            self.launches += 1

        return run


def pretend() -> NoDriver:
    """Make the Triton backend accept CPU tensors and launch its kernels through `NoDriver`."""
    driver = NoDriver()
    triton.runtime.driver.set_active(driver)
    torch.accelerator.current_device_index = lambda: None  # type: ignore[assignment]
    for owner, name, replacement in REPLACED:
        setattr(owner, name, replacement)
    return driver


def microseconds(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        function()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


class TorchAlone(torch.autograd.Function):
    """A function with the inputs and outputs of a loss that computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return x.new_empty(len(x))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors


def bare_launches(run: Callable[[], Any]) -> Callable[[], None]:
    """The launches that `run` makes, without the work of preparing their arguments."""
    calls: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> None:
        calls.append(compiled_launch(*arguments))

    old = getattr(runtime.Kernel, LAUNCH)
    setattr(runtime.Kernel, LAUNCH, record)
    run()
    setattr(runtime.Kernel, LAUNCH, old)

    def again() -> None:
        for function, *arguments in calls:
            function(*arguments)

    return again


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks launch", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5000)
    parser.add_argument("--out", type=Path, help="a CSV file to write, besides what is printed")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    driver = pretend()
    x = torch.zeros(32, 75, 16, dtype=torch.bfloat16, requires_grad=True)
    y = torch.zeros(32, 20, 16, dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.full((32,), 75), torch.full((32,), 20)

    def loss() -> torch.Tensor:
        return otalign.sinkhorn_loss(x, y, *lengths, backend="triton")

    def full() -> None:
        torch.autograd.grad(loss(), (x, y))

    empty = (None,) * 3
    options = Options("cosine", None, 0.05, 200, 1e-3)
    problem = Inputs(
        x.detach(), y.detach(), *empty, *lengths, math.inf, math.inf, False, False, 32, 75, 20, torch.float32, "triton",
        False, False, options,
    )  # fmt: skip
    inputs = flatten(problem)
    grad = torch.ones(()).expand(32)

    def forward() -> tuple[torch.Tensor, ...]:
        return align(*inputs, None)

    saved = forward()[4:]

    def backward() -> None:
        align_backward(*inputs, *saved, grad, None, None, [True, True, False, False, False])

    backward()
    driver.launches = 0
    full()
    launches = driver.launches
    rows = {
        "launches": float(launches),
        "launches alone, us": microseconds(bare_launches(lambda: (forward(), backward())), args.repeats),
        "launcher forward, us": microseconds(forward, args.repeats),
        "launcher backward, us": microseconds(backward, args.repeats),
        "autograd of torch alone, us": microseconds(
            lambda: torch.autograd.grad(TorchAlone.apply(x, y).sum() / 32, (x, y)), args.repeats
        ),
        "loss and both gradients, us": microseconds(full, args.repeats),
    }
    for name, value in rows.items():
        print(f"{name}: {value:.1f}")
    if args.out:
        about = environment.describe(threads=1, memory_kept=False)
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["what", "value", *about])
            writer.writerows([[name, f"{value:.1f}", *about.values()] for name, value in rows.items()])
    return 0
