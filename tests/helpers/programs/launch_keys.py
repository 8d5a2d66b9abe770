"""Launches random problems and checks that launches with the same key of a kept kernel are the same variant to Triton.

Types, strides and alignment of the points are drawn at random. Prints how many keys there were.
"""

import random
from typing import Any

import torch
from codegen import variants  # of the benchmarks
from otalign.triton_kernels import runtime

from otalign.backends import triton
from otalign.options import Options
from otalign.problem import Problem, SideInput, from_cost, from_points

KINDS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]

seen: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def record(self: runtime.Kernel, grid: Any, values: Any, constants: Any, device: Any) -> None:
    """Instead of a launch: compares what Triton would compile with what it would for an earlier launch of the same key."""
    key = (self.function.fn.__name__, self.key(values), tuple(constants.values()))
    values = self.named(values)
    parameters = [p for p in self.function.params if not p.is_constexpr]
    aligned = tuple(
        values[p.name].data_ptr() % 16 == 0
        for p in parameters
        if isinstance(values[p.name], torch.Tensor) and not p.do_not_specialize_on_alignment
    )
    integers = tuple(
        (values[p.name] == 1, values[p.name] % 16 == 0)
        for p in parameters
        if isinstance(values[p.name], int) and not p.do_not_specialize
    )
    compiled = (variants.variant(self.function, values, constants)._replace(aligned=()), aligned, integers)
    assert seen.setdefault(key, compiled) == compiled, (key, seen[key], compiled)


def points(shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
    """Zeros of the shape, with strides and an alignment drawn at random."""
    form = random.choice(["plain", "sliced", "offset", "apart", "transposed", "expanded"])
    *rest, n, d = shape
    if form == "plain":
        return torch.zeros(*rest, n, d, dtype=kind)
    if form == "sliced":
        return torch.zeros(*rest, n, 2 * d + 1, dtype=kind)[..., :d]
    if form == "offset":
        return torch.zeros(*rest, n, d + 1, dtype=kind)[..., 1:]
    if form == "apart":  # rows may be aligned where items are not
        items = rest[0] if rest else 1
        return torch.zeros(items, n * d + 1, dtype=kind)[:, : n * d].view(*rest, n, d)
    if form == "transposed":
        return torch.zeros(*rest, d, n, dtype=kind).mT
    return torch.zeros(*rest, 1, d, dtype=kind).expand(*rest, n, d)


def draw() -> tuple[Problem, list[torch.Tensor]]:
    """A problem and its leaves."""
    x, y = random.choice(KINDS), random.choice(KINDS)
    N, M, D = random.choice([1, 16, 40]), random.choice([1, 7, 32, 150]), random.choice([1, 16, 24, 48])
    B = random.choice([1, 3])
    unbalanced = random.choice([None, 1.0])
    if random.random() < 0.3:
        C, side = points((B, N, M), x).requires_grad_(), SideInput(None, None, None)
        return from_cost(C, side, side, Options("given", None, 0.1, 5, 0.0), unbalanced), [C]
    X, Y = points((B, N, D), x).requires_grad_(), points((B, M, D), y).requires_grad_()
    options = Options(random.choice(["cosine", "euclidean", "dot"]), None, 0.1, 5, 0.0)
    return from_points(SideInput(X, None, None), SideInput(Y, None, None), options, unbalanced), [X, Y]


def main() -> None:
    runtime.Kernel.launch = record
    runtime.processors = lambda device: 132
    random.seed(1)
    for _ in range(400):
        p, leaves = draw()
        s = triton.solve(p)
        for out in (s.value.sum(), s.value_linear.sum(), s.plan().sum()):
            torch.autograd.grad(out, leaves, retain_graph=True)
        if p.C is None:
            s.barycentric(False)
            s.barycentric(True)
        s.assign()
    print(len(seen))


if __name__ == "__main__":
    main()
