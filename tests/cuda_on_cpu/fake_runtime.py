"""How the extension asks the CUDA runtime and launches its kernels: csrc/cuda/launch.cu and query.cu with a fake runtime."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import Any

from . import host_cuda
from .host_cuda import LaunchConfig


class FakeGpu(ctypes.Structure):
    """As in fake_runtime.cpp."""

    NAMES = ("driver", "major", "minor", "code", "processors", "shared", "largest_cluster", "load_error", "capturing")
    _fields_ = [(name, ctypes.c_int) for name in NAMES]


H100 = {
    "driver": 13000, "major": 9, "minor": 0, "code": 90, "processors": 132, "shared": 227 * 1024, "largest_cluster": 16,
}  # fmt: skip
CUDART = 13000  # the version of the runtime, as 1000 * major + 10 * minor
_numbers = itertools.count()  # of devices: the launcher remembers what it decided for each


class Gpu:
    """A GPU like an H100 except for `changes`, on which nothing is loaded yet. Only the newest one exists."""

    def __init__(self, cudart: int = CUDART, **changes: int) -> None:
        self.device, self.library = next(_numbers), library(cudart)
        self.library.fake_gpu(ctypes.byref(FakeGpu(**{**H100, **changes})))

    def reason_missing(self) -> str | None:
        return _text(self.library.fake_reason_missing(self.device))

    def configure(self, items: int, size_x: int, size_y: int, kind: int = host_cuda.STRICT) -> LaunchConfig:
        """The configuration of a batch; a RuntimeError if there is none."""
        config = LaunchConfig()
        sizes = (ctypes.c_int64(size) for size in (items, size_x, size_y))
        _check(self.library.fake_configure(self.device, *sizes, kind, ctypes.byref(config)))
        return config

    def solve(self, items: int, size_x: int, size_y: int, *, adjoint: bool = False) -> None:
        sizes = (ctypes.c_int64(size) for size in (items, size_x, size_y))
        _check(self.library.fake_solve(self.device, *sizes, adjoint))

    def loaded(self) -> set[tuple[int, int]]:
        """Shape and kind of the kernels that the driver has loaded."""
        kinds = range(host_cuda.ADJOINT + 1)
        return {of for of in itertools.product(range(9), kinds) if self.library.fake_loaded(*of)}

    def launched(self, shape: int, kind: int) -> bool:
        """Whether the last launch was of this kernel."""
        return self.library.fake_launched(shape, kind)

    def launched_cluster(self) -> int:
        """Blocks in a cluster of the last launch; 0 if it was without clusters."""
        return self.library.fake_launched_cluster()

    def launched_early(self) -> bool:
        """Whether the last launch may begin before the kernel before it has ended."""
        return self.library.fake_launched_early()

    def capture_mode(self) -> int:
        """That of the thread: 0 = global."""
        return self.library.fake_capture_mode()


@functools.cache
def library(cudart: int = CUDART) -> Any:
    """The launcher, compiled as for a version of CUDA's runtime."""
    folder = host_cuda.ROOT / "tests/cuda_on_cpu"
    sources = [*folder.glob("runtime/*.h"), folder / "fake_runtime.cpp"]
    sources += [*(host_cuda.ROOT / "csrc").glob("*.h"), *(host_cuda.ROOT / "csrc/cuda").glob("*.*")]
    loaded = host_cuda.built(
        "fake_runtime.cpp", sorted(sources), f"-I{folder / 'runtime'}", f"-DCUDART_VERSION={cudart}"
    )
    for name in ("fake_reason_missing", "fake_force", "fake_configure", "fake_solve"):
        getattr(loaded, name).restype = ctypes.c_char_p
    for name in ("fake_loaded", "fake_launched", "fake_launched_early"):
        getattr(loaded, name).restype = ctypes.c_bool
    return loaded


def force(shape: int, cluster: int) -> None:
    """The form of all later batches; with the shape -1 the heuristics choose."""
    _check(library().fake_force(shape, cluster))


def allow_early_launch(allowed: bool) -> None:
    library().fake_allow_early_launch(allowed)


def _text(of: bytes | None) -> str | None:
    return None if of is None else of.decode()


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())
