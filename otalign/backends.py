"""What is installed, what is not and why, and the one table of launchers."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from .problem import BACKENDS, Problem, Solution, one_of

TRITON = (3, 6)  # the first version that compiles the kernels
CUDA = (8, 0)  # the compute capability that the kernels need
CUDA_DEVICES = "cuda"  # the type of their tensors
NAMES = BACKENDS


def resolve(backend: str, device: torch.device) -> str:
    """The backend that will compute a problem on `device`; raises if the one asked for cannot.

    "auto" is "cpu" for tensors on the CPU and "triton" on GPUs; where that is missing, a warning says why, once, and it is "reference".
    It is not "cuda" anywhere yet: the rule is that a measurement in benchmarks/results has to show the sizes for which that is
    faster, and none has been made.
    """
    one_of("backend", backend, NAMES)
    if backend == "auto":
        if device.type == "meta":
            raise ValueError("x: expected numbers, got a tensor on the meta device, which has none")
        best = "cpu" if device.type == "cpu" else "triton"
        reason = reason_missing(best)
        if reason is None:
            return best
        _warn_of_reference(best, device.type, reason)
        return "reference"
    reason = reason_missing(backend)
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


def launcher(name: str) -> Callable[[Problem], Solution]:
    """The function that solves problems on this backend."""
    if name == "cpu":
        from . import ops

        return ops.launch
    if name == "triton":
        from . import gpu

        return gpu.launch
    if name == "cuda":
        from . import cuda

        return cuda.launch
    from . import reference

    return reference.launch


def available() -> dict[str, str | None]:
    """Every backend, with None if it can be used here or else the reason why not.

    Example:
        >>> otalign.backends.available()["reference"] is None
        True
    """
    return {name: reason_missing(name) for name in NAMES[1:]}


def reason_missing(name: str) -> str | None:
    """Why this backend cannot be used here; None if it can."""
    if name == "reference":
        return None
    if name == "triton":
        return _why_no_triton()
    module, reason = _extension()
    if name == "cpu" or module is None:
        return reason
    if module.cuda_reason:
        return f"otalign._C was built without CUDA: {module.cuda_reason}"
    return _why_no_cuda()


@functools.cache
def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available() or torch.version.hip:
        return "no NVIDIA GPU was found"
    if torch.cuda.get_device_capability() < CUDA:
        return "the GPU's compute capability is below {}.{}".format(*CUDA)
    reason = reason_missing("triton")
    return reason and f"costs and gradients are made by Triton: {reason}"


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


def extension() -> ModuleType:
    """The compiled module `otalign._C`, with the BLAS that torch has loaded plugged into it."""
    module, reason = _extension()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return module


@functools.cache
def _extension() -> tuple[ModuleType | None, str | None]:
    try:
        module = _load()
    except ImportError as error:
        return None, _why_not_built(error)
    module.use_blas(*_blas())
    return module, None


def _load() -> ModuleType:
    """`otalign._C`, or the build of it in OTALIGN_EXT_DIR (a sanitizer build, say)."""
    folder = os.environ.get("OTALIGN_EXT_DIR")
    if folder is None:
        return importlib.import_module("otalign._C")
    files = sorted(Path(folder).glob("_C*.so"))
    if not files:
        raise ImportError(f"no _C*.so in OTALIGN_EXT_DIR={folder}")
    spec = importlib.util.spec_from_file_location("otalign._C", files[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["otalign._C"] = module
    spec.loader.exec_module(module)
    return module


def _why_not_built(error: ImportError) -> str:
    try:
        from ._build_info import EXTENSION
    except ImportError:
        return f"the extension otalign._C cannot be imported ({error}); install the package to build it"
    return f"otalign._C was not built: {EXTENSION}" if EXTENSION != "built" else f"otalign._C does not load: {error}"


class Blas(NamedTuple):
    """A name, and the addresses of what the engine calls in a BLAS: 0 where there is no such function."""

    name: str = "built-in"
    sgemm: int = 0
    dgemm: int = 0
    limit: int = 0  # MKL's number of threads of the calling thread
    threads: int = 0  # OpenBLAS's numbers of threads of the process
    set_threads: int = 0


def _blas() -> Blas:
    """The BLAS that OTALIGN_BLAS names: "built-in", or the file of a library with 32-bit integers; if unset, torch's own."""
    wanted = os.environ.get("OTALIGN_BLAS")
    if not wanted:
        return _torch_blas()
    if wanted == "built-in":
        return Blas()
    try:
        library = ctypes.CDLL(wanted)
    except OSError as error:
        raise ValueError(
            f"OTALIGN_BLAS: expected 'built-in' or the file of a library, got {wanted!r}: {error}"
        ) from None
    # SciPy's OpenBLAS has a prefix, so that it can be loaded beside another.
    for prefix in ("", "scipy_"):
        blas = _functions(library, Path(wanted).name, prefix)
        if blas is not None:
            return blas
    raise ValueError(f"OTALIGN_BLAS: expected a library with sgemm_ and dgemm_, which {wanted!r} has not")


def _functions(library: ctypes.CDLL, name: str, prefix: str = "") -> Blas | None:
    sgemm, dgemm = (_address(library, f"{prefix}{letter}gemm_") for letter in "sd")
    if not (sgemm and dgemm):
        return None
    threads, set_threads = (_address(library, f"{prefix}openblas_{verb}_num_threads") for verb in ("get", "set"))
    limit = _address(library, "MKL_Set_Num_Threads_Local")
    return Blas(name, sgemm, dgemm, limit, threads, set_threads if threads else 0)


def _torch_blas() -> Blas:
    """The BLAS that torch itself has loaded.

    libtorch_cpu exports the MKL that it is linked to; where it is linked to OpenBLAS or Accelerate the same names are
    found through it. One BLAS in the process means one thread pool, and speed equal to torch.matmul's.
    """
    pattern = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / pattern))
    except OSError:
        return Blas()
    blas = _functions(library, "BLAS of torch") or Blas()
    return blas._replace(name="MKL of torch") if blas.limit else blas


def _address(library: ctypes.CDLL, symbol: str) -> int:
    try:
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0
