"""Microbenchmarks of the CPU engine: `pytest benchmarks --benchmark-compare` compares two commits.

They are not part of the test suite: `testpaths` leaves this folder out. compare.py measures peers and checks results.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import otalign
from common.peers import cosine_cost
from common.shapes import SHAPES, Batch, make_batch
from cpu.timing import keep_memory

OPTIONS = {"reg": 0.05, "tol": 1e-3, "max_iter": 5000, "backend": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    keep_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SHAPES)
def batch(request: pytest.FixtureRequest) -> Batch:
    return make_batch(SHAPES[request.param])


def _loss(batch: Batch) -> torch.Tensor:
    return otalign.sinkhorn_loss(batch.x, batch.y, batch.n, batch.m, **OPTIONS)


def test_solver(benchmark: BenchmarkFixture, batch: Batch) -> None:
    cost = cosine_cost(batch.x, batch.y)
    result = benchmark(otalign.solve_cost, cost, batch.n, batch.m, **OPTIONS)
    assert result.converged.all()


def test_forward(benchmark: BenchmarkFixture, batch: Batch) -> None:
    with torch.no_grad():
        loss = benchmark(_loss, batch)
    assert loss.isfinite()


def test_forward_backward(benchmark: BenchmarkFixture, batch: Batch) -> None:
    x, y = batch.x.detach().requires_grad_(), batch.y.detach().requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(_loss(batch._replace(x=x, y=y)), (x, y))

    assert all(grad.isfinite().all() for grad in benchmark(step))
