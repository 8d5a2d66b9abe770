"""Small cases that reach every kernel, for compute-sanitizer: `compute-sanitizer --tool racecheck python benchmarks sanitize`.

Each result is compared with the reference, which runs on the CPU, outside the sanitizer. So the cases are also a test
without a sanitizer.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any, NamedTuple

import torch

import otalign
from gpu import backends
from otalign import Prior

INF = math.inf


class Case(NamedTuple):
    cost: str  # or "given"
    dtype: torch.dtype
    N: int
    M: int
    options: dict[str, Any]


# The cases that differ most come first, because a sanitizer may be stopped. On a GPU, one program solves 40 rows, and
# several programs solve 300 rows in registers; float64 and 300 columns are in memory.
CASES = (
    Case("cosine", torch.float32, 300, 24, {}),
    Case("cosine", torch.bfloat16, 40, 24, {"prior": Prior.quadratic(0.1)}),
    Case("sqeuclidean", torch.float64, 300, 24, {"unbalanced": 1.0}),
    Case("euclidean", torch.float32, 300, 24, {"unbalanced": (0.5, INF), "prior": Prior.band(30.0)}),
    Case("given", torch.float32, 300, 24, {}),
    Case("dot", torch.float16, 40, 24, {}),
    Case("cosine", torch.float32, 600, 300, {}),
    Case("cosine", torch.float32, 300, 100, {"prior": Prior.order_preserving(0.1, 1.0)}),
    Case("euclidean", torch.bfloat16, 70, 60, {"prior": Prior.absolute(0.1), "unbalanced": 1.0}),
    Case("given", torch.float64, 40, 24, {"unbalanced": 1.0}),
    Case("cosine", torch.float16, 300, 128, {}),
    Case("dot", torch.float64, 70, 24, {}),
)


def run(case: Case, backend: str, device: torch.device) -> float:
    """Compute all outputs of a solve and all gradients; return the largest error of values and of plans' marginals."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([case.N, 1, 0, case.N // 2]), torch.tensor([case.M - 1, 7, 5, case.M])
    sizes = (4, case.N, 48), (4, case.M, 48)
    points = [torch.randn(size, generator=generator).to(case.dtype) for size in sizes]
    weights = [torch.rand(size[:2], generator=generator).to(case.dtype) + 0.1 for size in sizes]
    given = torch.rand(4, case.N, case.M, generator=generator).to(case.dtype)
    options = {"reg": 0.5, "max_iter": 8, "tol": 0, **case.options}

    def solve(device: torch.device, backend: str, kind: torch.dtype) -> tuple[otalign.OTResult, list[torch.Tensor]]:
        inputs = [given] if case.cost == "given" else points
        leaves = [t.to(kind).to(device).requires_grad_() for t in (*inputs, *weights)]
        where = {"a": leaves[-2], "b": leaves[-1], "backend": backend}
        where |= {"x_lengths": lengths[0].to(device), "y_lengths": lengths[1].to(device)}
        if case.cost == "given":
            return otalign.solve_cost(leaves[0], **where, **options), leaves
        return otalign.solve(*leaves[:2], cost=case.cost, **where, **options), leaves

    result, leaves = solve(device, backend, case.dtype)
    plan = result.plan()
    torch.autograd.grad(result.value.sum(), leaves, retain_graph=True)
    total = result.value_linear.sum() + plan.square().sum()
    if case.cost != "given":
        total = total + result.barycentric_x().sum() + result.barycentric_y().sum()
    torch.autograd.grad(total, leaves)
    result.assign_y()
    expected, _ = solve(torch.device("cpu"), "reference", torch.float64)
    pairs = (result.value, expected.value), (plan.sum(1), expected.plan().sum(1)), (plan.sum(2), expected.plan().sum(2))
    return max(float((actual.detach().cpu() - right).abs().max()) for actual, right in pairs)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks sanitize", description=__doc__)
    parser.add_argument("--seconds", type=float, default=INF, help="no case starts after this time, except the first")
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    usable = backends.usable()
    if not usable:
        print("no backend for a GPU is available here")
        return 1
    start, done, failed = time.perf_counter(), 0, 0
    cases = [case if on_gpu else case._replace(N=9, M=7) for case in CASES]
    for case in cases:
        if done and time.perf_counter() - start > args.seconds:
            break
        for backend in usable:
            if backend == "cuda" and case.dtype == torch.float64:
                continue  # the CUDA kernels refuse float64
            error = run(case, backend, device)
            failed += not error < 1e-3
            print(
                f"{backend}, {case.cost}, {case.dtype}, {case.N} x {case.M}, {case.options}: off by {error:.1e}",
                flush=True,
            )
        done += 1
    print(f"{done} of {len(cases)} cases, {failed} wrong")
    return int(failed > 0)
