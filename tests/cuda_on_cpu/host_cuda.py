"""The CUDA kernels on the CPU: the same source, compiled with the shim in this folder, replaces those of the extension."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from otalign import backends
from otalign.backends import cuda_launch

ROOT = Path(__file__).parents[2]
STRICT, RELAXED, ACCELERATED, ADJOINT = range(4)  # Kind in csrc/cuda/tiling.h


class LaunchConfig(ctypes.Structure):
    """As in csrc/cuda/tiling.h."""

    NAMES = ("shape", "cluster", "in_flight", "shared", "bytes", "scatter", "ordered", "accelerate")
    _fields_ = [(name, ctypes.c_int32) for name in NAMES]

    def __repr__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name in self.NAMES)


def sources() -> list[Path]:
    return sorted(
        [
            *(ROOT / "csrc").glob("*.h"),
            *(ROOT / "csrc/cuda").glob("*.*h"),
            *(ROOT / "tests/cuda_on_cpu").rglob("*.[hc]*"),
        ]
    )


def compile_command(source: Path, output: Path, *options: str) -> list[str]:
    compiler = os.environ.get("CXX", "g++")
    include = [f"-I{ROOT / 'tests/cuda_on_cpu'}", f"-I{ROOT / 'csrc'}"]
    return [
        compiler,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-maybe-uninitialized",  # at -O1 g++ does not see that two loops have the same condition
        *include,
        *options,
        str(source),
        "-o",
        str(output),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The heuristics and the sizes."""
    loaded = built("host.cpp", sources())
    loaded.host_scratch.restype = ctypes.c_int64
    for name in ("host_choose", "host_why_no_form"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


@functools.cache
def kernels(shape: int) -> ctypes.CDLL:
    """The compiled kernels of a tile shape: several processes of tests compile several shapes at the same time."""
    return built("host_kernels.cpp", sources(), f"-DOTALIGN_TILE_SHAPE={shape}")


def built(name: str, sources: list[Path], *options: str) -> ctypes.CDLL:
    """A file of this folder as a library. Each version of its sources and options is built once."""
    content = [path.read_bytes() for path in sources] + [option.encode() for option in options]
    digest = hashlib.sha256(b"".join(content)).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"otalign-{Path(name).stem}-cuda-{os.getuid()}-{digest}.so"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one of several test processes builds
        if not path.exists():
            new = path.with_suffix(f".{os.getpid()}")
            command = compile_command(ROOT / "tests/cuda_on_cpu" / name, new, "-shared", "-fPIC", *options)
            subprocess.run(command, check=True)
            new.rename(path)
    return ctypes.CDLL(str(path))


class HostExtension:
    """Replaces the extension for the CUDA backend. Launch configurations are those for a small chip, or for `chip`, unless
    `force` sets all of them, or `testing.cuda_force` the tile shape and the cluster."""

    def __init__(self, seed: int = 0, chip: dict[str, int] | None = None, **force: int) -> None:
        self.seed, self.chip, self.force, self.form = seed, chip or {}, force, (-1, 0)
        self.configs: list[LaunchConfig] = []
        self.CudaProblem, self.Adjoints = backends.extension.module().CudaProblem, backends.extension.module().Adjoints
        self.testing = SimpleNamespace(
            cuda_force=self._cuda_force, cuda_config=self._cuda_config, cuda_allow_early_launch=lambda allowed: None
        )

    def _cuda_force(self, shape: int, cluster: int) -> None:
        _check(library().host_why_no_form(shape, cluster))
        self.form = (shape, cluster)

    def _cuda_config(self, problem: Any, adjoint: bool, device: int | None) -> dict[str, Any]:
        config = self.config(problem, ADJOINT if adjoint else self.kind(problem))
        shape = (ctypes.c_int32 * 4)()
        library().host_shape(config.shape, shape)
        numbers = {name: getattr(config, name) for name in ("cluster", "in_flight", "shared", "bytes")}
        return {"shape": tuple(shape), **numbers}

    def cuda_scratch(self, problem: Any, adjoint: bool, device: int | None) -> int:
        return library().host_scratch(
            address(problem), ctypes.byref(self.config(problem, ADJOINT if adjoint else self.kind(problem)))
        )

    def cuda_solve(self, problem: Any, device: int | None, stream: int, wait: bool) -> None:
        self._run(problem, None, self.kind(problem))

    def cuda_adjoint(self, problem: Any, adjoints: Any, device: int | None, stream: int, wait: bool) -> None:
        self._run(problem, adjoints, ADJOINT)

    def _run(self, problem: Any, adjoints: Any, kind: int) -> None:
        config = self.config(problem, kind)
        self.configs.append(config)
        of = address(problem), address(adjoints), ctypes.byref(config)
        kernels(config.shape).host_run(*of, kind, self.seed)

    @staticmethod
    def kind(problem: Any) -> int:
        if problem.accelerate and problem.tol > 0:
            return ACCELERATED
        return RELAXED if min(problem.rho_x, problem.rho_y) < float("inf") else STRICT

    def config(self, problem: Any, kind: int) -> LaunchConfig:
        accelerate = kind == ACCELERATED
        if self.force:
            return forced(**{"in_flight": 1, "accelerate": accelerate, **self.force})
        of = problem.items, problem.x.size, problem.y.size
        return chosen(*of, accelerate=accelerate, form=self.form, **self.chip)


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


def address(struct: Any) -> ctypes.c_void_p:
    """Where the extension's struct is in memory."""
    return ctypes.c_void_p(backends.extension.module().testing.address(struct) if struct else None)


def chosen(
    items: int,
    size_x: int,
    size_y: int,
    *,
    accelerate: bool = False,
    processors: int = 8,
    shared: int = 227 * 1024,
    largest_cluster: int = 4,
    form: tuple[int, int] = (-1, 0),
) -> LaunchConfig:
    """The configuration that the heuristics choose, or that of a form: a tile shape and a cluster. A RuntimeError says why
    this form cannot be."""
    config = LaunchConfig()
    of = (ctypes.c_int64(number) for number in (items, size_x, size_y))
    chip = (processors, shared, largest_cluster)
    _check(library().host_choose(*chip, *of, accelerate, *form, ctypes.byref(config)))
    return config


def forced(
    shape: int,
    cluster: int = 1,
    shared: int = 0,
    in_flight: int = 1,
    scatter: int = 0,
    ordered: int = 0,
    accelerate: bool = False,
) -> LaunchConfig:
    config = LaunchConfig()
    library().host_force(shape, cluster, shared, in_flight, scatter, ordered, accelerate, ctypes.byref(config))
    return config


@contextlib.contextmanager
def emulated(extension: HostExtension | None = None) -> Iterator[HostExtension]:
    """Let backend="cuda" take tensors on the CPU."""
    extension = extension or HostExtension()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "CUDA_DEVICES", "cpu")
        missing = backends.reason_missing
        patch.setattr(
            backends, "reason_missing", lambda name, device=None: None if name == "cuda" else missing(name, device)
        )
        patch.setattr(cuda_launch, "_extension", lambda: extension)
        patch.setattr(cuda_launch, "_stream", lambda device: 0)
        patch.setattr(cuda_launch, "_on", lambda device: contextlib.nullcontext())
        yield extension
