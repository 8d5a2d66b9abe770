"""`python -m otalign`: what is installed, what is missing, and why."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

import otalign
from otalign import backends


def report() -> Iterator[tuple[str, str]]:
    """The lines of the report, as pairs of a label and a text."""
    yield "otalign", f"{otalign.__version__} in {otalign.__path__[0]}"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, BLAS: {_torch_blas()}"
    yield "triton", _installed("triton")
    yield "numpy", _installed("numpy")
    yield from _extension()
    yield from _devices()
    for name, reason in backends.available().items():
        yield f"backend {name}", "available" if reason is None else f"missing: {reason}"


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
    module = backends.extension()
    threads = "OpenMP" if module.openmp else "one thread (built without OpenMP)"
    yield "extension", f"{module.compiler}, SIMD: {module.simd}, {threads}, BLAS: {module.blas()}"
    if not module.cuda_reason:
        try:
            yield "its cuda devices", ", ".join(name for name, *_ in module.cuda_devices()) or "none"
        except RuntimeError as error:
            yield "its cuda devices", f"none: {error}"


def _devices() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        reason = "it sees no usable GPU" if torch.version.cuda else "it is built without CUDA"
        yield "torch's devices", f"cpu; no cuda: {reason}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"cuda:{index}", f"{device.name}, compute capability {device.major}.{device.minor}, {memory:.0f} GiB"


if __name__ == "__main__":
    for label, text in report():
        print(f"{label:<18} {text}")
