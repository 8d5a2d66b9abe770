"""Does the accelerated solver reach the same optimum as plain iterations, in fewer passes, and keep its promises on the way?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import otalign
from otalign import Prior

from ..helpers.problems import close, identical, leaf, on_threads, spoken_costs

INF = math.inf
OPTIMUM = {"tol": 1e-11, "max_iter": 100_000}
# rho over the range of the cost: strict, one-sided, relaxed, and relaxed by so much that the total mass converges last.
MARGINALS = {"strict": None, "x": (0.5, INF), "y": (INF, 0.3), "both": (0.5, 0.2), "hardly": (20.0, 30.0)}
SIZES = {"tall": (150, 30), "wide": (30, 150), "square": (60, 60), "above the dense system": (40, 300)}


def costs(kind: str, N: int, M: int, seed: int = 0) -> Tensor:
    """(1, N, M) in float64, with a range of one."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "spoken":
        C = spoken_costs(N, M, seed=seed)
    elif kind == "line":  # near-diagonal plans: the slowest of all
        x, y = (torch.rand(n, generator=generator, dtype=torch.float64).sort().values for n in (N, M))
        C = (x[:, None] - y) ** 2
    elif kind == "clusters":
        x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (N, M))
        x, y = (p + 5 * torch.randint(0, 3, (len(p), 1), generator=generator) for p in (x, y))
        C = torch.cdist(x, y)
    else:
        C = torch.rand(N, M, generator=generator, dtype=torch.float64)
    return ((C - C.min()) / (C.max() - C.min()))[None]


def weights(size: int, seed: int, *, zeros: bool = True) -> Tensor:
    drawn = torch.rand(1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2 + 1e-3
    if zeros:
        drawn[:, 1::3] = 0
    return drawn / drawn.sum()


def solve(C: Tensor, dtype: torch.dtype = torch.float32, **options) -> otalign.OTResult:
    cast = {name: value.to(dtype) if name in ("a", "b") else value for name, value in options.items()}
    return otalign.solve_cost(C.to(dtype), backend="cpu", **cast)


def optimum(C: Tensor, **options) -> otalign.OTResult:
    """The oracle's optimum in float64."""
    return otalign.solve_cost(C, backend="reference", **options | OPTIMUM)


def apart(result: otalign.OTResult, right: otalign.OTResult) -> float:
    """The L1 distance of two plans of one item."""
    return float((result.plan().double() - right.plan()).abs().sum())


# The optimum -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rho", MARGINALS.values(), ids=MARGINALS)
@pytest.mark.parametrize("kind", ["spoken", "clusters"])
def test_optimum(kind, rho, size, dtype):
    C = costs(kind, *size)
    options = {"reg": 0.04, "unbalanced": rho, "a": weights(size[0], 1), "b": weights(size[1], 2)}
    tol = 1e-6 if dtype == torch.float32 else 1e-10
    result = solve(C, dtype, tol=tol, max_iter=20_000, **options)
    right = solve(C, torch.float64, accelerate=False, tol=1e-10, max_iter=100_000, **options)
    assert result.converged.all()
    assert right.converged.all()
    assert apart(result, right) <= (3e-5 if dtype == torch.float32 else 1e-8)
    close(result.value, right.value, 1e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("rho", MARGINALS.values(), ids=MARGINALS)
@pytest.mark.parametrize("band", [False, True])
def test_optimum_of_the_reference(rho, band):
    """The oracle itself, which takes a second for so many iterations: a small problem, with pairs that are forbidden."""
    C = costs("spoken", 40, 12)
    if band:
        i, j = torch.arange(40)[:, None] / 39, torch.arange(12) / 11
        C = C.masked_fill((i - j).abs() > 0.5, INF)
    result = solve(C, torch.float64, reg=0.03, unbalanced=rho, tol=1e-10, max_iter=5000)
    right = optimum(C, reg=0.03, unbalanced=rho)
    assert result.converged.all()
    assert apart(result, right) <= 1e-8
    for ours, theirs in zip(result.potentials, right.potentials, strict=True):
        close(ours, theirs, 1e-7)


@pytest.mark.parametrize(
    ("kind", "reg"), [("spoken", 0.005), ("spoken", 0.001), ("line", 0.001), ("clusters", 0.001), ("random", 0.005)]
)
def test_small_reg(kind, reg):
    C = costs(kind, 60, 25)
    result = solve(C, torch.float64, reg=reg, tol=1e-6, max_iter=100_000)
    plain = solve(C, torch.float64, reg=reg, tol=1e-9, max_iter=1_000_000, accelerate=False)
    assert result.converged.all()
    assert plain.converged.all()
    assert apart(result, plain) <= 1e-4
    assert (result.n_iter < plain.n_iter).all()


def test_prior_and_points():
    """From points, in a ragged batch, with a prior and a reg for each item."""
    x, y = torch.randn(3, 40, 8), torch.randn(3, 15, 8)
    lengths = torch.tensor([40, 1, 23]), torch.tensor([15, 7, 1])
    options = {"reg": torch.tensor([0.02, 0.01, 0.05]), "prior": Prior.quadratic(1.0), "tol": 1e-6, "max_iter": 20_000}
    result = otalign.solve(x, y, *lengths, backend="cpu", **options)
    options["reg"] = options["reg"].double()
    right = otalign.solve(x.double(), y.double(), *lengths, backend="reference", **options | OPTIMUM)
    assert result.converged.all()
    assert ((result.plan().double() - right.plan()).abs().sum((1, 2)) < 2e-5).all()


@pytest.mark.parametrize("objective", ["value", "plan_cost", "transport", "divergence"])
def test_gradients_at_the_optimum(objective):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (30, 12))
    options = {"reg": 0.02, "tol": 1e-11, "max_iter": 50_000, "objective": objective}
    grads = []
    for backend in ("cpu", "reference"):
        points = leaf(x), leaf(y)
        loss = otalign.sinkhorn_loss(*points, backend=backend, **options)
        grads.append(torch.autograd.grad(loss, points, torch.tensor(-2.5, dtype=torch.float64)))
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs, 1e-6)


# Passes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 60), (750, 128)], ids=str)
def test_fewer_passes(size):
    """At a hundredth of the range, to 1e-5: at least eight times fewer than plain iterations, in the median."""
    ratios = []
    for seed in range(5):
        options = {"reg": 0.01, "tol": 1e-5, "max_iter": 20_000}
        fast, plain = (solve(costs("spoken", *size, seed), accelerate=on, **options) for on in (True, False))
        assert fast.converged.all()
        ratios.append(float(plain.n_iter / fast.n_iter))
    assert sorted(ratios)[2] >= 8


@pytest.mark.parametrize("max_iter", [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144])
@pytest.mark.parametrize("rho", MARGINALS.values(), ids=MARGINALS)
def test_stopped_early(rho, max_iter):
    """After any number of passes: no more than these, the error that the plan really has, and hardly more than plain."""
    for seed in range(4):
        C = costs("spoken", 100, 30, seed)
        options = {"reg": 0.01, "unbalanced": rho, "tol": 1e-6, "max_iter": max_iter}
        fast, plain = (solve(C, torch.float64, accelerate=on, **options) for on in (True, False))
        assert (fast.n_iter <= max_iter).all()
        assert float(fast.error) <= 1.1 * float(plain.error) + 1e-9
        if rho is None:
            plan = fast.plan()[0]
            error = (plan.sum(1) - 1 / 100).abs().sum() + (plan.sum(0) - 1 / 30).abs().sum()
            assert float(fast.error) == pytest.approx(float(error), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("max_iter", [1, 7, 60])
def test_without_tolerance_all_iterations_are_plain(max_iter):
    C = costs("spoken", 60, 20)
    options = {"reg": 0.005, "tol": 0, "max_iter": max_iter}
    one, two = (solve(C, accelerate=on, **options) for on in (True, False))
    assert one.n_iter.tolist() == [max_iter]
    for name in ("value", "error"):
        identical(getattr(one, name), getattr(two, name))
    identical(one.plan(), two.plan())


def test_easy_problems_stay_plain():
    """What converges at once is solved as without acceleration, to the last bit."""
    C = costs("random", 60, 20)
    one, two = (solve(C, reg=0.5, accelerate=on) for on in (True, False))
    assert int(one.n_iter) == int(two.n_iter) < 6
    identical(one.plan(), two.plan())


def test_warm_start():
    C = costs("spoken", 150, 30)
    options = {"reg": 0.01, "tol": 1e-5, "max_iter": 20_000}
    cold = solve(C, **options)
    assert int(solve(C, init=cold.potentials, **options).n_iter) <= 2
    moved = C + 0.002 * torch.rand(C.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    warm = solve(moved, init=cold.potentials, **options)
    assert warm.converged.all()
    assert int(warm.n_iter) < int(solve(moved, **options).n_iter)


# Bits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", MARGINALS.values(), ids=MARGINALS)
def test_same_bits_alone_and_on_any_threads(rho):
    C = torch.cat([costs(kind, 90, 40, seed) for seed in range(2) for kind in ("spoken", "line", "random")])
    regs = torch.tensor([0.01, 0.02, 0.05, 0.005, 0.003, 0.01], dtype=torch.float64)
    options = {"unbalanced": rho, "tol": 1e-5, "max_iter": 3000}
    together = [on_threads(n, lambda: solve(C, reg=regs, **options)) for n in (1, 2, 3)]
    for other in together[1:]:
        identical(other.plan(), together[0].plan())
        identical(other.value, together[0].value)
        assert other.n_iter.tolist() == together[0].n_iter.tolist()
    for index, reg in enumerate(regs.tolist()):
        alone = solve(C[index : index + 1], reg=reg, **options)
        identical(alone.plan()[0], together[0].plan()[index])
        assert int(alone.n_iter) == int(together[0].n_iter[index])


# Both orders of the updates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [None, (0.5, 0.5), (INF, 0.5)], ids=str)
def test_few_entries_do_not_depend_on_which_side_is_x(rho):
    """Without convergence as well: the plan of the transposed problem is the transposed plan."""
    generator = torch.Generator().manual_seed(0)
    swapped = None if rho is None else rho[::-1]
    for trial in range(60):
        N, M, max_iter = (int(torch.randint(1, most, (), generator=generator)) for most in (11, 11, 20))
        C = torch.rand(1, N, M, generator=generator, dtype=torch.float64)
        if trial % 4 == 0:
            C = (C[:, : min(N, M), : min(N, M)] + C[:, : min(N, M), : min(N, M)].mT).round(decimals=1)
        a, b = (weights(n, 7, zeros=trial % 3 == 1 and n > 2) for n in C.shape[1:])
        options = {"reg": 10 ** (-3 * trial / 60), "tol": 1e-7, "max_iter": max_iter}
        result = solve(C, torch.float64, a=a, b=b, unbalanced=rho, **options)
        other = solve(C.mT, torch.float64, a=b, b=a, unbalanced=swapped, **options)
        close(result.plan(), other.plan().mT, 1e-6)
        close(result.value, other.value, 1e-6)
        f, g = result.potentials
        dual = torch.exp((f[:, :, None] + g[:, None] - C) / options["reg"]) * a[:, :, None] * b[:, None]
        close(dual, result.plan(), 1e-9)
