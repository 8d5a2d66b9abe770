"""Does the Triton kernel mix as the CPU engine does: the same policy, the same optimum, in as few passes?"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import triton.language as tl
from otalign.triton_kernels import heuristics, launch, policy, runtime
from torch import Tensor

import otalign
from otalign import Prior

from ..helpers.interpreter import together
from ..helpers.problems import close, identical, leaf, spoken_costs

INF = math.inf
ROOT = Path(__file__).parents[2]
MARGINALS = {"strict": None, "x": (0.5, INF), "y": (INF, 0.3), "both": (0.5, 0.2), "hardly": (20.0, 30.0)}


def costs(*sizes: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Spoken costs (B, N, M) with a range of one, of items of these sizes; and the lengths. The padding is NaN."""
    N, M = (max(size) for size in zip(*sizes, strict=True))
    C = torch.full((len(sizes), N, M), math.nan, dtype=torch.float64)
    for item, (n, m) in enumerate(sizes):
        if n and m:
            own = spoken_costs(n, m, seed=item)
            C[item, :n, :m] = (own - own.min()) / (own.max() - own.min()).clamp_min(1e-9)
    n, m = (torch.tensor(lengths) for lengths in zip(*sizes, strict=True))
    return C.to(dtype), n, m


def solve(C: Tensor, *lengths: Tensor, backend: str = "triton", **options) -> otalign.OTResult:
    return otalign.solve_cost(C, *lengths, backend=backend, **{"tol": 1e-3, "max_iter": 5000, **options})


def optimum(C: Tensor, *lengths: Tensor, **options) -> otalign.OTResult:
    """The oracle's optimum in float64."""
    wide = {name: o.double() if name in ("a", "b", "init") else o for name, o in options.items()}
    return solve(C.double(), *lengths, backend="reference", **wide | {"tol": 1e-11, "max_iter": 100_000})


def apart(result: otalign.OTResult, right: otalign.OTResult) -> Tensor:
    """The L1 distances (B,) of plans."""
    return (result.plan().double() - right.plan()).abs().sum((1, 2))


def true_error(C: Tensor, result: otalign.OTResult, reg: float) -> float:
    """The L1 error of both marginals of the plan of one item's potentials, with uniform weights, in float64."""
    f, g = (p[0].double() for p in result.potentials)
    plan = torch.exp((f[:, None] + g - C[0].double()) / reg) / (len(f) * len(g))
    return float((plan.sum(1) - 1 / len(f)).abs().sum() + (plan.sum(0) - 1 / len(g)).abs().sum())


def slow(*values: object, **options: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow, **options)


# The policy ------------------------------------------------------------------------------------------------------------


def test_constants_are_those_of_the_engines():
    """policy.FIRST is kFirst, and so on, for every constant there."""
    text = "".join((ROOT / "csrc" / path).read_text() for path in ("accelerate.h", "cpu/mixing.h"))
    found = {name: float(value) for name, value in re.findall(r"\bk(\w+) = ([-+.\de]+)\b", text)}
    constants = {name: c.value for name, c in vars(policy).items() if isinstance(c, tl.constexpr)}
    assert len(constants) == 11
    for name, value in constants.items():
        assert found[name.title().replace("_", "")] == value, name


@pytest.mark.parametrize("marginals", MARGINALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["registers", "memory"])
@pytest.mark.parametrize("reg", [0.05, slow(0.02)])
def test_as_many_passes_as_the_cpu_engine(reg, dtype, marginals):
    """Where it mixes, and does no more than that. Sums are made in another order, so counts differ by a few passes."""
    C, *_ = costs((60, 30), dtype=dtype)
    options = {"reg": reg, "unbalanced": MARGINALS[marginals]}
    ours, engine, plain = solve(C, **options), solve(C, backend="cpu", **options), solve(C, accelerate=False, **options)
    assert int(ours.error <= 1e-3)
    assert int(ours.n_iter) <= 0.7 * int(plain.n_iter)
    if marginals != "hardly":  # there, the CPU engine balances constants, and this kernel mixes them
        assert abs(int(ours.n_iter) - int(engine.n_iter)) <= max(4, 0.2 * int(engine.n_iter))


# The optimum -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marginals", MARGINALS)
@pytest.mark.parametrize("reg", [0.05, slow(0.01), slow(0.005)])
def test_optimum_and_fewer_passes(reg, marginals):
    C, *_ = costs((50, 24))
    options = {"reg": reg, "unbalanced": MARGINALS[marginals]}
    ours, plain, right = solve(C, **options), solve(C, accelerate=False, **options), optimum(C, **options)
    assert float(ours.error) <= 1e-3
    # At the smallest reg, it takes plain iterations long to come near enough; only levels of reg would be faster.
    assert int(ours.n_iter) <= (0.9 if reg < 0.01 else 0.7) * int(plain.n_iter)
    assert float(apart(ours, right)) <= 1.5 * float(apart(plain, right)) + 2e-3
    close(solve(C, backend="cpu", **options).value, ours.value, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [None, (0.5, 0.2)], ids=["strict", "relaxed"])
def test_small_tolerance_in_float64(rho):
    C, *_ = costs((50, 24), dtype=torch.float64)
    options = {"reg": 0.02, "tol": 1e-10, "unbalanced": rho}
    ours = solve(C, **options)
    assert float(ours.error) <= 1e-10
    assert int(ours.n_iter) <= 0.5 * int(solve(C, accelerate=False, **options).n_iter)
    assert float(apart(ours, optimum(C, **options))) <= 1e-8


@pytest.mark.parametrize(
    "prior", [Prior.band(0.2), slow(Prior.quadratic(1.0)), slow(Prior.order_preserving(0.05, 1.0))], ids=str
)
def test_priors(prior):
    C, *_ = costs((60, 30))
    options = {"reg": 0.02, "prior": prior}
    ours, right = solve(C, **options), optimum(C, **options)
    assert float(ours.error) <= 1e-3
    assert int(ours.n_iter) <= int(solve(C, accelerate=False, **options).n_iter)
    assert float(apart(ours, right)) <= 0.05


@pytest.mark.slow
def test_ragged_items_end_each_by_itself():
    """Full items, one of a single pair, an empty one, and one whose rows are a single point."""
    C, n, m = costs((60, 30), (1, 1), (0, 5), (40, 30), (1, 9), (33, 17))
    ours, right = solve(C, n, m, reg=0.02), optimum(C, n, m, reg=0.02)
    assert bool((ours.error <= 1e-3).all())
    assert int(ours.n_iter[2]) == 0
    assert float(apart(ours, right).max()) <= 0.03
    for item in (3, 5):
        alone = solve(C[item : item + 1, : n[item], : m[item]].contiguous(), reg=0.02)
        identical(alone.value[0], ours.value[item])
        identical(alone.n_iter[0], ours.n_iter[item])
        assert int(alone.n_iter) < int(
            solve(C[item : item + 1, : n[item], : m[item]].contiguous(), reg=0.02, accelerate=False).n_iter
        )


def test_zero_weights_and_unreachable_points():
    """Points without mass get finite potentials; costs of inf leave two rows and a column without partners."""
    C, *_ = costs((60, 30), dtype=torch.float64)
    a, b = torch.rand(1, 60, dtype=torch.float64) + 0.1, torch.rand(1, 30, dtype=torch.float64) + 0.1
    a[:, ::5] = b[:, 1::4] = 0
    a, b = a / a.sum(), b / b.sum()
    options = {"reg": 0.02, "a": a, "b": b}
    ours, right = solve(C, **options), optimum(C, **options)
    assert int(ours.n_iter) <= 0.7 * int(solve(C, accelerate=False, **options).n_iter)
    assert float(apart(ours, right)) <= 0.03
    assert all(bool(p.isfinite().all()) for p in ours.potentials)
    C[:, 3], C[:, :, 2] = INF, INF
    blocked = solve(C, reg=0.02, unbalanced=(0.5, 0.5), tol=1e-9)
    assert float(apart(blocked, optimum(C, reg=0.02, unbalanced=(0.5, 0.5)))) <= 1e-6


def test_warm_starts():
    """From the solution no pass more than plain iterations; from afar fewer."""
    C, *_ = costs((60, 30))
    f, g = solve(C, reg=0.02, tol=1e-4).potentials
    for part in (1, 0.3):
        ours, plain = (solve(C, reg=0.02, init=(f, part * g), accelerate=accelerate) for accelerate in (True, False))
        assert float(ours.error) <= 1e-3
        assert int(ours.n_iter) <= int(plain.n_iter)


# Several programs an item ----------------------------------------------------------------------------------------------


@pytest.fixture
def shared(monkeypatch):
    """Four programs an item, of 16 rows in registers each."""
    tile = heuristics.TileShape(width=32, groups=2, warps=1, min_programs=1, max_programs=16, max_before_hopper=16)
    monkeypatch.setattr(heuristics, "TILE_SHAPES", (tile,))
    monkeypatch.setattr(runtime, "processors", lambda device: 8)
    heuristics.launch_config.cache_clear()
    yield
    heuristics.launch_config.cache_clear()


@pytest.mark.parametrize("rho", [slow(None, id="strict"), pytest.param((0.5, 0.2), id="relaxed")])
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float64)], ids=["registers", "memory"])
def test_programs_that_share_an_item_decide_alike(shared, dtype, rho):
    """If one of them went another way, it would wait for ever or sum something else."""
    C, n, m = costs((60, 30), (41, 30), dtype=dtype)
    options = {"reg": 0.02, "unbalanced": rho}
    found = []
    for seed in (1, 2):
        with together(seed=seed) as launches:
            found.append(solve(C, n, m, **options))
        assert max(launches) == 8
    identical(found[0].potentials, found[1].potentials)
    identical(found[0].n_iter, found[1].n_iter)
    plain = solve(C, n, m, backend="cpu", accelerate=False, **options)
    assert bool((found[0].error <= 1e-3).all())
    assert bool((found[0].n_iter <= 0.7 * plain.n_iter).all())
    assert float(apart(found[0], optimum(C, n, m, **options)).max()) <= 0.03


# Limits and reports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_iter", [1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 20, 33])
@pytest.mark.parametrize("reg", [0.02, 0.002])
def test_never_more_passes_than_allowed_and_the_error_is_true(reg, max_iter):
    """Whatever the last pass was for: potentials belong together, with the error that they are said to have."""
    C, *_ = costs((40, 20), dtype=torch.float64)
    ours = solve(C, reg=reg, tol=1e-9, max_iter=max_iter)
    assert int(ours.n_iter) == max_iter
    assert float(ours.error) == pytest.approx(true_error(C, ours, reg), rel=1e-6)


@pytest.mark.parametrize("reg", [0.05, 0.005])
def test_reported_error_is_true_at_the_end(reg):
    C, *_ = costs((40, 20), dtype=torch.float64)
    ours = solve(C, reg=reg)
    assert float(ours.error) == pytest.approx(true_error(C, ours, reg), rel=1e-6)


@pytest.mark.slow
def test_scalings_that_leave_the_range_while_mixing():
    """At 1000 times less reg than the range of the costs, exact passes come in between, and mixing starts anew."""
    C, *_ = costs((40, 20))
    ours, plain = (solve(C, reg=1e-3, accelerate=accelerate) for accelerate in (True, False))
    assert float(ours.error) <= 1e-3
    assert int(ours.n_iter) < int(plain.n_iter)
    assert true_error(C, ours, 1e-3) <= 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["registers", "memory"])
def test_without_a_tolerance_iterations_are_plain(dtype):
    C, *_ = costs((40, 20), dtype=dtype)
    mixed, plain = (solve(C, reg=0.02, tol=0, max_iter=40, accelerate=accelerate) for accelerate in (True, False))
    identical(mixed.potentials, plain.potentials)
    identical(mixed.error, plain.error)


@pytest.mark.parametrize("accelerate, tol", [(False, 1e-3), (True, 0.0), (True, 1e-3)])
def test_the_kernel_is_compiled_with_mixing_only_where_it_mixes(monkeypatch, accelerate, tol):
    constants = []
    monkeypatch.setattr(
        runtime.Kernel, "launch", lambda kernel, grid, values, given, device: constants.append((kernel, given))
    )
    C, *_ = costs((4, 3))
    x = torch.zeros(1, 4, 2)
    solve(C, reg=0.1, accelerate=accelerate, tol=tol)
    otalign.sinkhorn_loss(x, x, objective="divergence", accelerate=accelerate, tol=tol, backend="triton")
    found = [given for kernel, given in constants if kernel is launch._sinkhorn]
    mixes = accelerate and tol > 0
    assert {(given["SYMMETRIC"], given["ACCELERATE"]) for given in found} == {(False, mixes), (True, False)}


def test_nan_costs_end_with_nan():
    C, *_ = costs((40, 20))
    C[0, 3, 5] = math.nan
    assert bool(solve(C, reg=0.02).value.isnan().all())


# Gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [None, (0.5, 0.2)], ids=["strict", "relaxed"])
def test_gradients(rho):
    """That of the value is the plan; that of the transport cost goes through the implicit system."""
    C, *_ = costs((40, 20), dtype=torch.float64)
    options = {"reg": 0.05, "tol": 1e-10, "unbalanced": rho}
    for of in ("value", "value_linear"):
        ours, right = leaf(C), leaf(C)
        getattr(solve(ours, **options), of).sum().backward()
        getattr(solve(right, backend="reference", **options), of).sum().backward()
        close(ours.grad, right.grad, 1e-5)
