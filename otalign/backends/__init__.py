"""Which backend solves a problem here, and why another is missing.

A backend is a module of this folder with a function `solve(problem) -> Solution`, imported when it is first used.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable

import torch

from ..options import BACKENDS, one_of
from ..problem import Problem, Solution
from . import extension

TRITON = (3, 6)  # the first version that compiles the kernels
TRITON_CAPABILITY = (7, 5)  # the least compute capability of NVIDIA's GPUs for which it compiles them
CUDA_DEVICES = "cuda"  # the device type of their tensors
NAMES = BACKENDS


def resolve(backend: str, device: torch.device) -> str:
    """The name of the backend that solves a problem on `device`; raises if the wanted backend cannot.

    "auto" means "cpu" for tensors on the CPU and "triton" for tensors on a GPU. Where that backend is missing, "auto" means
    "reference", and one warning gives the reason. "auto" never means "cuda" yet: first a measurement in benchmarks/results
    has to show the sizes for which "cuda" is faster, and there is none.
    """
    one_of("backend", backend, NAMES)
    if backend == "auto":
        if device.type == "meta":
            raise ValueError("x: expected numbers, got a tensor on the meta device, which has none")
        best = "cpu" if device.type == "cpu" else "triton"
        reason = reason_missing(best, device)
        if reason is None:
            return best
        _warn_of_reference(best, device.type, reason)
        return "reference"
    reason = reason_missing(backend, device)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' takes tensors on the CPU, got {device}")
    if backend == "cuda" and device.type != CUDA_DEVICES:
        raise ValueError(f"backend: 'cuda' takes tensors on a GPU, got {device}")
    if backend == "triton" and device.type == "cpu" and not _interpreting():
        raise ValueError("backend: 'triton' takes tensors on a GPU, or any with TRITON_INTERPRET=1; got cpu")
    if device.type == "meta":
        raise ValueError(f"backend: {backend!r} takes tensors with numbers, got some on the meta device")
    return backend


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and triton with it.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache  # once for each cause, whatever the filters of warnings are
def _warn_of_reference(best: str, device_type: str, reason: str) -> None:
    warnings.warn(
        f'backend="auto": tensors on {device_type} are solved by the slow reference, since {best!r} is not available: {reason}. '
        'backend="reference" is the same without this warning.',
        RuntimeWarning,
        stacklevel=3,
    )


def solver(name: str) -> Callable[[Problem], Solution]:
    """The function that solves problems on this backend."""
    # Imports, not `importlib`: torch.compile traces these.
    if name == "cpu":
        from . import cpu

        return cpu.solve
    if name == "triton":
        from . import triton

        return triton.solve
    if name == "cuda":
        from . import cuda

        return cuda.solve
    from . import reference

    return reference.solve


def available() -> dict[str, str | None]:
    """Every backend, with None if it can be used here, else with the reason. Of several GPUs, the current one is asked.

    Example:
        >>> otalign.backends.available()["reference"] is None
        True
    """
    return {name: reason_missing(name) for name in NAMES[1:]}


def reason_missing(name: str, device: torch.device | None = None) -> str | None:
    """Why this backend cannot be used here; None if it can. GPU backends: on this GPU, or by default on the current one."""
    if name == "reference":
        return None
    if name == "triton":
        return _why_no_triton() or _error(_try_triton, device)
    reason = extension.reason_missing()
    if name == "cpu" or reason is not None:
        return reason
    if extension.module().cuda_reason:
        return f"otalign._C was built without CUDA: {extension.module().cuda_reason}"
    return _error(_try_cuda, device)


def _error(check: Callable[[int | None], None], device: torch.device | None) -> str | None:
    """The error of a check on this GPU, or by default on the current one; None if there is no error."""
    index = device.index if device is not None and device.type == "cuda" else None
    try:
        if index is None and torch.cuda.is_available():
            index = torch.cuda.current_device()
        check(index)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


# Both checks run once for each GPU, since GPUs may differ. functools.cache keeps no errors: their cause may pass, such as
# memory that is full.


@functools.cache
def _try_triton(index: int | None) -> None:
    """Raise an error if Triton cannot compile the kernels for this GPU."""
    if index is None or torch.version.hip or _interpreting():
        return
    capability = torch.cuda.get_device_capability(index)
    if capability < TRITON_CAPABILITY:
        needed, found = (".".join(map(str, numbers)) for numbers in (TRITON_CAPABILITY, capability))
        raise RuntimeError(f"the kernels need compute capability {needed}, and cuda:{index} has {found}")


@functools.cache
def _try_cuda(index: int | None) -> None:
    """Raise an error if the kernels of the extension cannot run on this GPU."""
    if index is None or torch.version.hip:
        raise RuntimeError("no NVIDIA GPU was found")
    with torch.cuda.device(index):
        reason = extension.module().cuda_reason_missing(index)
    if reason is not None:
        raise RuntimeError(f"cuda:{index}: {reason}")
    reason = reason_missing("triton", torch.device("cuda", index))
    if reason is not None:
        raise RuntimeError(f"costs and gradients are made by Triton: {reason}")


@functools.cache
def _why_no_triton() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < TRITON:
        return f"triton {triton.__version__} is too old: the kernels need {'.'.join(map(str, TRITON))}"
    if _interpreting() or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return (
        "no GPU was found (TRITON_INTERPRET=1, set before the first import of triton, runs the kernels slowly without)"
    )


def _interpreting() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)
