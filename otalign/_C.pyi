"""The compiled extension. Memory is a pair of its address, 0 for null, and its size in bytes.

Fields are those of csrc/problem.h and csrc/cuda/arguments.h, which document them.
"""

from typing import Any

_Memory = tuple[int, int]

simd: str
compiler: str
openmp: bool
cuda_reason: str  # why it was built without CUDA; "" if it was built with it
cuda_architectures: str  # as in TORCH_CUDA_ARCH_LIST; this and the functions below only if it was built with CUDA

class Options:
    rho_x: float
    rho_y: float
    max_iter: int
    tol: float
    accelerate: bool

class Side:
    @staticmethod
    def new() -> Side: ...
    lengths: _Memory
    starts: _Memory
    size: int
    rows: int
    points: _Memory
    points_type: int
    item_stride: int
    row_stride: int
    weights: _Memory
    potential: _Memory
    mass: _Memory
    scale: _Memory
    exponent: _Memory

class Problem(Options):
    @staticmethod
    def new() -> Problem: ...
    items: int
    dim: int
    is_double: bool
    x: Side
    y: Side
    cost: int
    given: _Memory
    given_type: int
    given_strides: tuple[int, int, int]
    prior: int
    prior_parameters: tuple[float, float]
    reg: _Memory
    init: _Memory
    symmetric: bool
    plan: _Memory
    distance: _Memory
    capacity: int
    value: _Memory
    linear: _Memory
    error: _Memory
    n_iter: _Memory
    threads: int

class Gradients:
    @staticmethod
    def new() -> Gradients: ...
    value: _Memory
    linear: _Memory
    plan: _Memory
    x: _Memory
    y: _Memory
    given: _Memory
    a: _Memory
    b: _Memory

class CudaSide:
    lengths: _Memory
    starts: _Memory
    size: int
    rows: int
    weights: _Memory
    potential: _Memory

class CudaProblem(Options):
    items: int
    @property
    def x(self) -> CudaSide: ...
    @property
    def y(self) -> CudaSide: ...
    costs: _Memory
    reg: _Memory
    reg_of_all: float
    init: _Memory
    value: _Memory
    linear: _Memory
    error: _Memory
    n_iter: _Memory
    pitch: int
    scratch: _Memory

class Adjoints:
    linear: _Memory
    linear_step: int
    plan: _Memory
    x: _Memory
    y: _Memory

class PooledMemory:
    """Memory of the engine's pool, through the buffer protocol."""

    @staticmethod
    def new(size: int, /) -> PooledMemory: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def cpu_forward(problem: Problem, /) -> None: ...
def cpu_backward(problem: Problem, gradients: Gradients, /) -> None: ...
def cpu_unpack(problem: Problem, dense: _Memory, /) -> None: ...
def cpu_pack(problem: Problem, dense: _Memory, /) -> None: ...
def use_blas(name: str, sgemm: int, dgemm: int, limit: int, threads: int, set_threads: int, /) -> None: ...
def set_forked() -> None:
    """This process is a child of one that may have used OpenMP."""

def blas() -> str: ...
def cuda_versions() -> tuple[int, int]:
    """Of the toolkit and of the driver, as 1000 * major + 10 * minor; 0 without a driver."""

def cuda_reason_missing(device: int, /) -> str | None:
    """Why this device cannot run the kernels; None if it can."""

def cuda_scratch(problem: CudaProblem, adjoint: bool, device: int, /) -> int: ...
def cuda_solve(problem: CudaProblem, device: int, stream: int, wait: bool, /) -> None: ...
def cuda_adjoint(problem: CudaProblem, adjoints: Adjoints, device: int, stream: int, wait: bool, /) -> None: ...

class testing:
    """A submodule: hooks for tests and benchmarks only."""

    @staticmethod
    def address(struct: CudaProblem | Adjoints, /) -> int: ...
    @staticmethod
    def pool_idle() -> int: ...
    @staticmethod
    def cuda_config(problem: CudaProblem, adjoint: bool, device: int, /) -> dict[str, Any]: ...
    @staticmethod
    def cuda_force(shape: int, cluster: int, /) -> None:
        """Every later batch of the process has this tile shape, an index into kTileShapes of csrc/cuda/tiling.h, and this
        many blocks an item, or a RuntimeError says why it cannot. With the shape -1 the heuristics choose again."""

    @staticmethod
    def cuda_allow_early_launch(allowed: bool, /) -> None:
        """Whether kernels may begin before the kernel before them has ended, where this is possible. At first they may."""
