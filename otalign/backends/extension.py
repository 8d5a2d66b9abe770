"""The compiled extension `otalign._C`: how it is loaded, why it may be missing, and which BLAS it uses."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch


def module() -> ModuleType:
    """The compiled module `otalign._C`, with the BLAS that torch has loaded plugged into it."""
    loaded, reason = _loaded()
    if loaded is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return loaded


def reason_missing() -> str | None:
    """Why the extension cannot be used here; None if it can."""
    return _loaded()[1]


def set_numbers(problem: Any, numbers: dict[str, int | float]) -> None:
    """Give the extension's problem the options that are plain numbers: they have the same names there."""
    for name, value in numbers.items():
        setattr(problem, name, value)


@functools.cache
def _loaded() -> tuple[ModuleType | None, str | None]:
    try:
        loaded = _load()
    except ImportError as error:
        return None, _why_not_built(error)
    loaded.use_blas(*_blas())
    if _is_child:
        loaded.set_forked()
    return loaded, None


_is_child = False


def _after_fork() -> None:
    """The extension itself notices the forks after it was loaded. Torch may have used OpenMP before, and it is too late then."""
    global _is_child
    _is_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
        from .._build_info import EXTENSION
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
