"""Are the results of every backend within the budgets of the oracle, and does the fuzzer find what is wrong?"""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import otalign

from ..helpers import oracle as other_oracle
from . import check, oracle
from .__main__ import engine, fuzz
from .budget import Budget
from .case import Case
from .script import CORPUS, load

pytestmark = pytest.mark.unpoisoned

NEVER = math.inf
SLOW = pytest.mark.slow


def parts(backend: str, quick: int, size: int, count: int) -> list:
    """Parts of a campaign: a backend, the number of cases and the seed. The first `quick` run in `make test`."""
    return [
        pytest.param(
            backend, size, part, marks=[] if part < quick else SLOW, id=f"{backend}, {size} cases, part {part}"
        )
        for part in range(count)
    ]


# Triton's interpreter and the emulated CUDA kernels take most of a second for a case, so most of theirs are slow tests.
CAMPAIGN = [
    *parts("cpu", quick=8, size=250, count=8),
    *parts("reference", quick=1, size=125, count=16),
    *parts("triton", quick=1, size=50, count=40),
    *parts("cuda", quick=1, size=50, count=40),
]


@pytest.mark.parametrize(("fuzzed", "cases", "part"), CAMPAIGN)
def test_random_problems_are_within_their_budgets(fuzzed, cases, part, tmp_path):
    report = fuzz(fuzzed, cases, NEVER, 1_000 + part, tmp_path)
    assert report.cases == cases
    assert not report.faults, Path(report.faults[0]).read_text()
    assert max(report.shares.values()) <= 1


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.py")), ids=lambda path: path.stem)
def test_what_once_failed(path):
    """The corpus: each script is a shrunk failure that was mended."""
    case, backends = load(path)
    for backend in backends:
        with engine(backend) as device:
            check.run(case, backend, device=device)


# Planted faults ------------------------------------------------------------------------------------------------------

ONE = {"value": lambda v: v * (1 + 1e-4), "value_linear": lambda v: v * (1 + 3e-4), "n_iter": lambda v: v + 1}
OTHERS = {"error": lambda v: v * 1.01 + 1e-4, "converged": lambda v: ~v}


@pytest.fixture
def planted(monkeypatch):
    """Changes an attribute of every result."""

    def plant(name, change):
        solve = check.solve
        monkeypatch.setattr(check, "solve", lambda arguments: changed(solve(arguments)))

        def changed(result):
            if name in ("f", "g"):
                potentials = tuple(
                    change(p) if side == name else p for side, p in zip("fg", result.potentials, strict=True)
                )
                return replace(result, potentials=potentials)
            return replace(result, **{name: change(getattr(result, name))})

    return plant


@pytest.mark.parametrize(
    "name", ["value", *(pytest.param(n, marks=SLOW) for n in [*ONE, *OTHERS, "f", "g"] if n != "value")]
)
def test_a_wrong_number_is_found(name, planted, tmp_path):
    planted(name, {**ONE, **OTHERS}.get(name, lambda v: v * (1 + 1e-4)))
    report = fuzz("cpu", 250, NEVER, 1, tmp_path, shrinking=1)
    assert report.faults


WRONG_FORMULAS = {
    "gradient by points": ("cost_gradient", lambda slopes: slopes * (1 + 1e-3)),
    "adjoint": ("gradients", lambda found: found._replace(C=found.C * (1 + 1e-3))),
    "gradient by weights": ("gradients", lambda found: found._replace(a=found.a * (1 + 1e-3), b=found.b * (1 + 1e-3))),
    "prior": ("prior", lambda term: term * (1 + 1e-3)),
    "cost": ("cost", lambda C: C * (1 + 1e-3)),
}


@SLOW
@pytest.mark.parametrize("name", WRONG_FORMULAS)
def test_a_wrong_formula_is_found(name, monkeypatch, tmp_path):
    """As if the engine had one: here the oracle has it."""
    function, change = WRONG_FORMULAS[name]
    right = getattr(oracle, function)
    monkeypatch.setattr(oracle, function, lambda *arguments: change(right(*arguments)))
    report = fuzz("cpu", 500, NEVER, 2, tmp_path, shrinking=1)
    assert report.faults


@SLOW
def test_a_failure_is_shrunk_to_a_script(planted, tmp_path):
    planted("value", lambda v: v * (1 + 1e-4))
    report = fuzz("cpu", 250, NEVER, 1, tmp_path, shrinking=20)
    path = Path(report.faults[0])
    case, backends = load(path)
    assert backends == ["cpu"]
    assert sum(case.x_lengths + case.y_lengths) <= 6
    with pytest.raises(check.Fault, match="value"):
        check.run(case, "cpu")
    # Without the planted fault, the script itself finds nothing wrong.
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, path], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert "cpu: within its budget" in done.stdout, done.stderr


def test_the_command_writes_a_report(tmp_path):
    report = tmp_path / "report.csv"
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "30", "--seed", "3"]
    command += ["--failures", str(tmp_path), "--report", str(report)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu: 30 cases" in done.stdout
    with report.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["cases"] for row in rows} == {"30"}
    assert all(float(row["share"] or 0) <= 1 for row in rows)


# The oracle itself ---------------------------------------------------------------------------------------------------


def item(seed: int, rho: tuple[float, float]) -> oracle.State:
    """A converged item of 4 x 3."""
    random = np.random.default_rng(seed)
    C, a, b = random.random((4, 3)), random.random(4) + 0.1, random.random(3) + 0.1
    return optimum(C, a / a.sum(), b / b.sum(), 0.3, rho)


def optimum(C, a, b, reg, rho) -> oracle.State:
    path = oracle.iterates(C, a, b, reg, rho, np.zeros(len(b)))
    for _ in range(3000):
        f, g = next(path)
    return oracle.state(C, a, b, reg, rho, f, g)


@pytest.mark.parametrize("rho", [(math.inf, math.inf), (0.5, math.inf), (math.inf, 2.0), (0.3, 0.4)])
def test_the_oracle_agrees_with_the_other_oracle(rho):
    s = item(0, rho)
    expected = other_oracle.solve(s.C, s.a, s.b, s.reg, rho)
    assert np.abs(s.P - expected.plan).max() < 1e-12
    assert s.value == pytest.approx(expected.value, abs=1e-12)
    assert oracle.primal(s) == pytest.approx(s.value, abs=1e-12)
    assert s.linear == pytest.approx(expected.linear, abs=1e-12)
    assert check.dual_slope(s) < 1e-12 and oracle.residual(s).sum() < 1e-12


@pytest.mark.parametrize("rho", [(math.inf, math.inf), (0.5, math.inf), (0.3, 0.4)])
def test_the_oracles_gradients_are_finite_differences(rho):
    s, step = item(1, rho), 1e-6
    weights = np.random.default_rng(2).standard_normal(s.C.shape)

    def functional(C, a, b) -> float:
        at = optimum(C, a / a.sum(), b / b.sum(), s.reg, rho)
        return 0.7 * at.value - 1.3 * at.linear + (weights * at.P).sum()

    found = oracle.gradients(s, 0.7, -1.3, weights)
    along = np.random.default_rng(3).standard_normal
    dC, da, db = along(s.C.shape), along(4), along(3)
    for change, gradient in (
        ((dC, 0 * da, 0 * db), (found.C * dC).sum()),
        ((0 * dC, da, 0 * db), ((found.a - (found.a * s.a).sum()) * da).sum()),
        ((0 * dC, 0 * da, db), ((found.b - (found.b * s.b).sum()) * db).sum()),
    ):
        ends = [
            functional(*(t + sign * step * d for t, d in zip((s.C, s.a, s.b), change, strict=True))) for sign in (1, -1)
        ]
        assert gradient == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("word", ["cosine", "sqeuclidean", "euclidean", "dot"])
def test_the_oracles_cost_and_its_gradient(word):
    random = np.random.default_rng(0)
    x, y, step = random.standard_normal((4, 3)), random.standard_normal((5, 3)), 1e-6
    d = random.standard_normal(x.shape)
    ends = [oracle.cost(x + sign * step * d, y, word) for sign in (1, -1)]
    along = (oracle.cost_gradient(x, y, word) * d[:, None]).sum(-1)
    assert np.abs(along - (ends[0] - ends[1]) / (2 * step)).max() < 1e-8


@pytest.mark.parametrize(
    "prior",
    [
        otalign.Prior.quadratic(2.0),
        otalign.Prior.absolute(3.0),
        otalign.Prior.band(1.2),
        otalign.Prior.order_preserving(0.5, 2.0),
    ],
)
@pytest.mark.parametrize("lengths", [(7, 4), (1, 5), (5, 1), (1, 1), (3, 9)])
def test_the_oracles_prior(prior, lengths):
    expected = prior.matrix(*lengths, 0.3).numpy()
    found = oracle.prior(prior.kind, prior.parameters, *lengths, 0.3)
    assert np.allclose(found, expected, atol=1e-12) and (np.isinf(found) == np.isinf(expected)).all()


def test_budgets_follow_the_conditioning():
    """A tenth of reg makes the plan ten times as sensitive; float64 has nine more digits than float32."""
    wide, narrow = (Budget(fuzz_item(s), s, "given", torch.float32).worst for s in (item_at(1.0), item_at(0.1)))
    double = Budget(fuzz_item(item_at(1.0)), item_at(1.0), "given", torch.float64).worst
    assert 3 < narrow / wide < 30
    assert double < 1e-6 * wide
    assert wide < 1e-4, "the budget of an easy item is a few digits of float32"


def item_at(reg: float) -> oracle.State:
    random = np.random.default_rng(0)
    return optimum(10 * random.random((4, 3)), np.full(4, 0.25), np.full(3, 1 / 3), reg, (math.inf, math.inf))


def fuzz_item(s: oracle.State) -> check.Item:
    return check.Item(None, None, s.C, 0 * s.C, (None, None), s.a, s.b, s.reg, s.rho)


def test_the_simplest_case_is_checked_whole():
    record = check.run(Case(functional="all", reg=0.5), "cpu")
    for quantity in (
        "value",
        "plan",
        "error",
        "potentials",
        "gradient by points",
        "loss",
        "n_iter",
    ):
        assert record.compared[quantity], quantity
