"""What a call of the Triton backend costs the host, measured without a GPU: `python benchmarks/launch_cost.py`.

Kernels are compiled for a GPU that is not there, and a driver that does nothing takes their launches. So the time of a
call is that of Python, torch and Triton up to the driver; the driver's own few microseconds a launch are not in it.
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

import environment
import otalign
from otalign import backends


class NoDriver:
    """As much of a driver as Triton asks for; it counts launches."""

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
    """Let tensors on the CPU pass for tensors on a GPU with 132 multiprocessors."""
    driver = NoDriver()
    triton.runtime.driver.set_active(driver)
    torch.accelerator.current_device_index = lambda: None  # type: ignore[assignment]
    runtime.processors, runtime.generation = lambda device: 132, lambda device: 90  # type: ignore[assignment]
    backends._why_no_triton = lambda: None  # type: ignore[assignment]
    backends._interpreting = lambda: True
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
    """As many tensors in and out as a loss has, and nothing done."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return x.new_empty(len(x))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors


def bare_launches(run: Callable[[], Any]) -> Callable[[], None]:
    """The launches that `run` makes, with everything at hand."""
    calls: list[tuple[Any, ...]] = []

    def record(kernel: runtime.Kernel, grid: Any, values: Any, constants: Any, device: Any) -> None:
        compiled = kernel.compiled[(device, *kernel.key(values), *constants.values())]
        calls.append((compiled[grid], *kernel._arguments(values), *kernel._constants(constants)))

    old, runtime.Kernel._launch = runtime.Kernel._launch, record  # type: ignore[method-assign]
    run()
    runtime.Kernel._launch = old  # type: ignore[method-assign]

    def again() -> None:
        for function, *arguments in calls:
            function(*arguments)

    return again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5000)
    parser.add_argument("--out", type=Path, help="a CSV file to write, besides what is printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    driver = pretend()
    x = torch.zeros(32, 75, 16, dtype=torch.bfloat16, requires_grad=True)
    y = torch.zeros(32, 20, 16, dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.full((32,), 75), torch.full((32,), 20)

    def loss() -> torch.Tensor:
        return otalign.sinkhorn_loss(x, y, *lengths, backend="triton")

    def full() -> None:
        torch.autograd.grad(loss(), (x, y))

    from otalign import gpu

    empty = (None,) * 3
    inputs = gpu._Inputs(
        x.detach(), y.detach(), *empty, *lengths, None, 0.05, "cosine", "none", (), math.inf, math.inf,
        False, False, 32, 75, 20, torch.float32, "triton", False,
    )  # fmt: skip
    grad = torch.ones(()).expand(32)

    def forward() -> tuple[torch.Tensor, ...]:
        return gpu._align(*inputs, None, 200, 1e-3)

    saved = forward()[4:]

    def backward() -> None:
        gpu._align_backward(*inputs, *saved, grad, None, None, [True, True, False, False, False])

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


if __name__ == "__main__":
    main()
