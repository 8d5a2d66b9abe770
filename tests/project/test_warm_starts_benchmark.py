"""Does the benchmark of warm starts count visits, moves and passes as it says?"""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch

import otalign

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_of_warm_starts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("methods.warm_starts")


def test_visits(benchmark_of_warm_starts, monkeypatch):
    """Steps 1 and 2 have the same points; in step 3, a pair has moved, one is new, and one has another partner's text."""
    monkeypatch.setattr(benchmark_of_warm_starts, "SETTINGS", [(0.05, False)])
    monkeypatch.setattr(benchmark_of_warm_starts, "PARTS", 3)
    meter = benchmark_of_warm_starts.Meter()
    x, y, n, m = torch.randn(3, 20, 8), torch.randn(3, 7, 8), torch.tensor([20, 11, 3]), torch.tensor([7, 4, 1])
    meter.visit(["a", "b", None], x, y, n, m)
    meter.visit(["b", "a", None], x[[1, 0, 2]], y[[1, 0, 2]], n[[1, 0, 2]], m[[1, 0, 2]])
    turned = x.clone()
    turned[0] = -x[0]
    meter.visit(["a", "c", None], turned, y, n, m)

    visits = meter.settings[0].visits
    assert [v.step for v in visits] == [1] * 3 + [2] * 3 + [3] * 3
    assert [v.since for v in visits] == [None] * 3 + [1, 1, None] + [1, None, None]
    assert visits[3].moved == visits[4].moved == 0
    cost = 1 - torch.cosine_similarity(x[0, :, None], y[0, None], dim=2)
    assert visits[6].moved == pytest.approx(float((2 - 2 * cost).abs().max() / (cost.max() - cost.min())), rel=1e-5)
    assert all(math.isnan(v.moved) for v in visits if v.since is None)
    cold = otalign.solve(x, y, n, m, accelerate=False)
    assert [v.cold for v in visits[:3]] == [v.warm for v in visits[:3]] == cold.n_iter.tolist()
    assert [v.warm for v in visits[3:5]] == [1, 1]
    assert visits[3].cold > 5
    assert visits[7].warm == visits[7].cold  # new
    assert all(v.cold_converged and v.warm_converged and v.difference < 1e-3 for v in visits)

    part = dict(zip(benchmark_of_warm_starts.COLUMNS, list(meter.rows("test"))[1], strict=True))
    passes = [v.cold for v in visits[3:6]]
    assert (part["part"], part["items"], part["revisited"], part["cold_longest"]) == (2, 3, 2, str(max(passes)))
    assert float(part["saved_of_revisited"]) == pytest.approx(1 - 2 / sum(passes[:2]), abs=1e-4)
    assert float(part["saved_of_all"]) == pytest.approx(1 - (2 + passes[2]) / sum(passes), abs=1e-4)
