"""`python -m otalign doctor`: a report of the installation, and a check of each backend against the reference."""

from __future__ import annotations

import argparse
import math
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

import otalign

from .. import backends
from .arguments import device_of
from .errors import first_line

HELP = "report what is installed and what is missing, and check each backend"
DESCRIPTION = """\
Prints versions, devices and all backends, with the reason if one is missing. Then each available backend solves a small
problem in float32. The result is compared with the reference in float64. The exit status is 1 if a backend fails or
disagrees."""
EXAMPLES = """\
examples:
  python -m otalign
  OTALIGN_EXT_DIR=path/to/build python -m otalign doctor   # another build of the extension"""

# Allowed errors of float32 against float64, relative to the largest entry of a tensor (forward: or to 1, if that is larger)
FORWARD = 2e-5
GRADIENTS = {"cpu": 1e-4, "gpu": 2e-4}


class Check(NamedTuple):
    """Errors of a backend against the reference, relative to the scale of each tensor; or the failure of the check."""

    forward: float  # largest error of value, potentials and plan
    gradients: float  # largest error of the points' gradients
    allowed: tuple[float, float]  # forward, gradients
    failure: str | None = None

    @property
    def passed(self) -> bool:
        ours = self.forward, self.gradients
        return self.failure is None and all(e <= most for e, most in zip(ours, self.allowed, strict=True))

    def __str__(self) -> str:
        if self.failure is not None:
            return f"FAILS: {self.failure}"
        (forward, gradients), word = self.allowed, "agrees" if self.passed else "DISAGREES"
        errors = f"{self.forward:.1e} (allowed {forward:g}), of gradients {self.gradients:.1e} (allowed {gradients:g})"
        return f"{word} with the float64 reference: largest error {errors}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    parser.add_argument("--report-only", action="store_true", help="print the report without the checks")


def run(arguments: argparse.Namespace) -> int:
    """Print the report and the checks. Returns 1 if an available backend fails its check."""
    for label, text in report():
        print(f"{label:<18} {text}", flush=True)
    if arguments.report_only:
        return 0
    healthy = True
    for name, reason in backends.available().items():
        if reason is None:
            found = check(name)
            print(f"{'check ' + name:<18} {found}", flush=True)
            healthy &= found.passed
    return 0 if healthy else 1


def report() -> Iterator[tuple[str, str]]:
    """The lines of the report: label and text."""
    yield "otalign", f"{otalign.__version__} in {otalign.__path__[0]}"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, BLAS: {_torch_blas()}"
    yield "triton", _installed("triton")
    yield "numpy", _installed("numpy")
    yield from _extension()
    yield from _devices()
    for name, reason in backends.available().items():
        yield f"backend {name}", "available" if reason is None else f"missing: {reason}"


def check(name: str) -> Check:
    """Solve a small problem on this backend, forward and backward, and compare with the reference."""
    device = device_of(name)
    allowed = FORWARD, GRADIENTS["cpu" if device.type == "cpu" else "gpu"]
    try:
        forward, gradients = _solved(name, torch.float32, device)
        expected, wanted = _solved("reference", torch.float64, torch.device("cpu"))
        at_least_one = [max(1.0, float(tensor.abs().max())) for tensor in expected]
        scales = [float(tensor.abs().max()) for tensor in wanted]
        return Check(_error(forward, expected, at_least_one), _error(gradients, wanted, scales), allowed)
    except Exception as error:  # a broken backend may raise any exception
        return Check(math.nan, math.nan, allowed, f"{type(error).__name__}: {first_line(error)}")


def _solved(backend: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Value, potentials and plan of a ragged batch, and the gradients of its points; all copied to the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, size, 8, generator=generator) / math.sqrt(8) for size in (9, 6))
    n, m = torch.tensor([9, 4]), torch.tensor([5, 6])
    x[1, 4:], y[0, 5:] = math.nan, math.nan  # the padding is never read
    x, y = (points.to(device, dtype).requires_grad_() for points in (x, y))
    result = otalign.solve(x, y, n.to(device), m.to(device), reg=0.1, tol=0.0, max_iter=20, backend=backend)
    gradients = torch.autograd.grad(result.value.sum(), (x, y))
    forward = [result.value, *result.potentials, result.plan()]
    return [tensor.detach().cpu() for tensor in forward], [tensor.cpu() for tensor in gradients]


def _error(actual: list[Tensor], expected: list[Tensor], scales: list[float]) -> float:
    """The largest difference relative to the scale of its tensor; NaN if any difference is."""
    errors = [(a - e).abs().max() / s for a, e, s in zip(actual, expected, scales, strict=True)]
    return float(torch.stack(errors).max())


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torch_blas() -> str:
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found[1] if found else "unknown"


def _extension() -> Iterator[tuple[str, str]]:
    reason = backends.available()["cpu"]
    if reason is not None:
        yield "extension", f"missing: {reason}"
        return
    module = backends.extension.module()
    threads = "OpenMP" if module.openmp else "one thread (built without OpenMP)"
    yield "extension", f"{module.compiler}, SIMD: {module.simd}, {threads}, BLAS: {module.blas()}"
    if not module.cuda_reason:
        runtime, driver = (f"{number // 1000}.{number % 1000 // 10}" for number in module.cuda_versions())
        supported = "no driver was found" if driver == "0.0" else f"the driver supports {driver}"
        yield "its cuda", f"{runtime}, for compute capability {module.cuda_architectures}; {supported}"


def _devices() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        reason = "it sees no usable GPU" if torch.version.cuda else "it is built without CUDA"
        yield "torch's devices", f"cpu; no cuda: {reason}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        chip = device.gcnArchName if torch.version.hip else f"compute capability {device.major}.{device.minor}"
        yield f"cuda:{index}", f"{device.name}, {chip}, {memory:.0f} GiB"
        for name in ("triton", "cuda"):  # the reason on the current GPU follows among the backends
            missing = backends.reason_missing(name, torch.device("cuda", index))
            if missing not in (None, backends.reason_missing(name)):
                yield f"cuda:{index}", f"backend {name} does not run here: {missing}"
