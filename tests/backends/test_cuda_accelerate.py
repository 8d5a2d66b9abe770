"""The accelerated solver of the CUDA kernels, run on the CPU: the same optimum as plain iterations, in fewer passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import otalign
from otalign import Prior

from ..cuda_on_cpu import host_cuda
from ..cuda_on_cpu.host_cuda import HostExtension, emulated
from ..helpers.problems import close, draw, identical, leaf, spoken_costs

INF = math.inf
MARGINALS = {"strict": None, "x": (0.5, INF), "y": (INF, 0.3), "both": (0.5, 0.2), "hardly": (20.0, 30.0)}
WIDTHS = {1: 32, 3: 64, 5: 128, 6: 256, 7: 512, 8: 1024}


def costs(N: int, M: int, seed: int = 0) -> Tensor:
    """(1, N, M) in float64 with a range of one."""
    C = spoken_costs(N, M, seed=seed)
    return ((C - C.min()) / (C.max() - C.min()))[None]


def weights(size: int, seed: int) -> Tensor:
    drawn = torch.rand(1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2 + 1e-3
    drawn[:, 1::3] = 0
    return drawn / drawn.sum()


def solve(C: Tensor, extension: HostExtension | None = None, **options) -> otalign.OTResult:
    cast = {name: value.float() if name in ("a", "b") else value for name, value in options.items()}
    extension = extension or HostExtension(shape=3 if C.shape[2] <= 64 else 5, cluster=2, shared=8)
    with emulated(extension):
        result = otalign.solve_cost(C.float(), backend="cuda", **cast)
        result.plan()
    return result


def optimum(C: Tensor, **options) -> otalign.OTResult:
    """The optimum in float64, by plain iterations."""
    options = options | {"tol": 1e-10, "max_iter": 200_000, "accelerate": False}
    return otalign.solve_cost(C, backend="cpu", **options)


def apart(result: otalign.OTResult, right: otalign.OTResult) -> float:
    """The L1 distance of two plans of one item."""
    with emulated():
        return float((result.plan().double() - right.plan()).abs().sum())


# The optimum -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", MARGINALS.values(), ids=MARGINALS)
@pytest.mark.parametrize("reg", [0.05, 0.02, 0.01, 0.005])
def test_optimum(reg, rho):
    C = costs(100, 30)
    options = {"reg": reg, "unbalanced": rho, "a": weights(100, 1), "b": weights(30, 2)}
    result = solve(C, tol=1e-5, max_iter=20_000, **options)
    right = optimum(C, **options)
    assert result.converged.all()
    assert right.converged.all()
    assert apart(result, right) <= 5e-4, "the error over the distance to the optimum: below a fiftieth"
    close(result.value, right.value, 2e-5)


def test_optimum_of_the_reference():
    C = costs(60, 40)
    options = {"reg": 0.05, "prior": Prior.band(12)}
    result = solve(C, tol=1e-5, max_iter=20_000, **options)
    right = otalign.solve_cost(C, backend="reference", tol=1e-10, max_iter=100_000, **options)
    assert result.converged.all()
    assert apart(result, right) <= 1e-4


@pytest.mark.parametrize("reg", [0.05, 0.01])
@pytest.mark.parametrize("rho", [None, (0.5, 0.2)], ids=str)
def test_a_band(rho, reg):
    """Infinite costs outside of a band, and a point that nothing reaches."""
    C = costs(80, 40)
    near = (torch.arange(80)[:, None] / 80 - torch.arange(40) / 40).abs() < 0.15
    C = torch.where(near, C, INF)
    options = {"reg": reg, "unbalanced": rho}
    result, right = solve(C, tol=1e-5, max_iter=20_000, **options), optimum(C, **options)
    assert result.converged.all()
    assert apart(result, right) <= 5e-4
    C[0, 3] = INF
    result = solve(C, tol=1e-5, max_iter=300, **options)
    assert bool(result.converged.all()) == (rho is not None)
    assert result.value.isfinite().all()


@pytest.mark.parametrize(("shape", "cluster"), [(1, 1), (3, 4), (5, 3), (6, 2), (7, 4), (8, 1)])
@pytest.mark.parametrize("reg", [0.05, 0.01])
def test_shapes_and_clusters(shape, cluster, reg):
    """Rows in registers, in shared memory and beyond; columns that need several turns of the threads."""
    M = min(WIDTHS[shape] - 2, 200)
    rows = cluster * (host_cuda.library().host_held(shape) + 8) + 5 if shape < 8 else 60
    C = costs(min(rows, 300), M)
    extension = HostExtension(shape=shape, cluster=cluster, shared=8, scatter=shape % 2)
    result, right = solve(C, extension, reg=reg, tol=1e-5, max_iter=5000), optimum(C, reg=reg)
    assert result.converged.all()
    assert apart(result, right) <= 5e-4


def test_ragged_items_and_warm_starts():
    batch = draw([40, 1, 0, 23, 31], [20, 5, 3, 0, 32], D=8)
    options = {"reg": 0.02, "tol": 1e-5, "max_iter": 5000}
    right = otalign.solve(*batch, backend="cpu", **options | {"tol": 1e-10, "max_iter": 100_000})
    with emulated(HostExtension(shape=3, cluster=2, in_flight=2, ordered=1)):
        first = otalign.solve(*batch.to(torch.float32), backend="cuda", **options)
        close(first.plan(), right.plan(), 3e-4)
        again = otalign.solve(*batch.to(torch.float32), backend="cuda", init=first.potentials, **options)
    assert first.converged.all()
    assert again.converged.all()
    assert (again.n_iter <= 2).all()
    assert first.n_iter.tolist()[2:4] == [0, 0]


def test_gradients():
    batch = draw([40, 23], [20, 30], D=8)
    options = {"reg": 0.03, "tol": 1e-6, "max_iter": 5000, "objective": "transport"}
    found = []
    for part, backend in ((batch.to(torch.float32), "cuda"), (batch, "cpu")):
        x, y = leaf(part.x), leaf(part.y)
        with emulated(HostExtension(shape=3, cluster=2)):
            loss = otalign.sinkhorn_loss(x, y, part.x_lengths, part.y_lengths, backend=backend, **options)
            found.append((loss.detach(), *torch.autograd.grad(3 * loss, (x, y))))
    for actual, expected in zip(*found, strict=True):
        close(actual / expected.abs().max(), expected / expected.abs().max(), 2e-3)


# Passes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reg", "fewer"), [(0.05, 1.3), (0.02, 2), (0.01, 2.5), (0.005, 5)])
def test_fewer_passes(reg, fewer):
    C = costs(300, 60)
    plain, fast = (solve(C, reg=reg, tol=1e-4, max_iter=20_000, accelerate=accelerate) for accelerate in (False, True))
    cpu = otalign.solve_cost(C.float(), reg=reg, tol=1e-4, max_iter=20_000, backend="cpu")
    assert fast.converged.all()
    assert int(plain.n_iter) >= fewer * int(fast.n_iter)
    assert int(fast.n_iter) <= 2.5 * int(cpu.n_iter)


@pytest.mark.parametrize("rho", MARGINALS.values(), ids=MARGINALS)
@pytest.mark.parametrize("max_iter", [1, 3, 6, 9, 20, 50])
def test_stopped_early(rho, max_iter):
    """No more passes than allowed, and the error is that of the plan."""
    C = costs(100, 30, seed=3)
    for reg in (0.05, 0.005):
        result = solve(C, reg=reg, unbalanced=rho, tol=1e-6, max_iter=max_iter)
        assert 1 <= int(result.n_iter) <= max_iter
        if rho is None:
            plan = result.plan()[0].double()
            error = sum((plan.sum(1 - axis) - 1 / plan.shape[axis]).abs().sum() for axis in (0, 1))
            close(result.error, error[None], 1e-4)
        assert result.converged.all() == (result.error <= 1e-6).all()


@pytest.mark.parametrize("max_iter", [1, 7, 40])
def test_without_tolerance_all_iterations_are_plain(max_iter):
    C = costs(60, 30)
    plain, same = (solve(C, reg=0.02, tol=0, max_iter=max_iter, accelerate=accelerate) for accelerate in (False, True))
    assert int(same.n_iter) == max_iter
    for actual, expected in zip(same.potentials, plain.potentials, strict=True):
        identical(actual, expected)


def test_same_bits_in_any_order_of_threads():
    C = costs(100, 30)
    first, *others = (
        solve(C, HostExtension(seed, shape=3, cluster=4, shared=8), reg=0.01, tol=1e-4, max_iter=5000)
        for seed in range(4)
    )
    assert first.converged.all()
    for other in others:
        identical(other.n_iter, first.n_iter)
        for actual, expected in zip(other.potentials, first.potentials, strict=True):
            identical(actual, expected)


def test_a_bad_item_leaves_the_others_unchanged():
    C = torch.cat([costs(60, 30, seed) for seed in range(3)])
    spoilt = C.clone()
    spoilt[1, 5, 5] = math.nan
    good, found = (
        solve(part, HostExtension(shape=3, cluster=2, in_flight=1), reg=0.01, tol=1e-4, max_iter=5000)
        for part in (C, spoilt)
    )
    assert found.value[1].isnan()
    for k in (0, 2):
        identical(found.potentials[0][k], good.potentials[0][k])
        identical(found.n_iter[k], good.n_iter[k])
