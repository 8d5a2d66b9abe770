"""The compiled engine. Pointers are integers, 0 for null; fields are those of csrc/problem.h, which documents them."""

from typing import Any

simd: str
compiler: str
openmp: bool
cuda_reason: str

class Side:
    lengths: int
    starts: int
    size: int
    rows: int
    points: int
    points_type: int
    item_stride: int
    row_stride: int
    weights: int
    potential: int
    mass: int
    scale: int

class Problem:
    items: int
    dim: int
    is_double: bool
    @property
    def x(self) -> Side: ...
    @property
    def y(self) -> Side: ...
    cost: int
    given: int
    given_type: int
    given_strides: tuple[int, int, int]
    prior: int
    prior_parameters: tuple[float, float]
    reg: int
    rho_x: float
    rho_y: float
    init: int
    max_iter: int
    tol: float
    symmetric: bool
    plan: int
    distance: int
    capacity: int
    value: int
    linear: int
    error: int
    n_iter: int
    threads: int
    reg_of_all: float
    pitch: int
    scratch: int
    @property
    def itself(self) -> int: ...

class Lifts:
    linear: int
    linear_step: int
    plan: int
    x: int
    y: int
    @property
    def itself(self) -> int: ...

class Gradients:
    value: int
    linear: int
    plan: int
    x: int
    y: int
    given: int
    a: int
    b: int

class Block:
    """A block of the engine's memory pool, through the buffer protocol."""

    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def cpu_forward(problem: Problem, /) -> None: ...
def cpu_backward(problem: Problem, gradients: Gradients, /) -> None: ...
def cpu_unpack(problem: Problem, packed: int, dense: int, /) -> None: ...
def cpu_pack(problem: Problem, dense: int, packed: int, /) -> None: ...
def pool_idle() -> int: ...
def use_blas(name: str, sgemm: int, dgemm: int, limit: int, /) -> None: ...
def blas() -> str: ...
def cuda_scratch(problem: Problem, lift: bool, device: int, /) -> int: ...
def cuda_choice(problem: Problem, lift: bool, device: int, /) -> dict[str, Any]: ...
def cuda_solve(problem: Problem, device: int, stream: int, wait: bool, /) -> None: ...
def cuda_lift(problem: Problem, lifts: Lifts, device: int, stream: int, wait: bool, /) -> None: ...
def cuda_devices() -> list[tuple[str, int, int, int]]: ...
