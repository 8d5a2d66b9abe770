"""`python benchmarks small-reg` at a toy size: its rows, its checks, and the tables and the plot that are made of them."""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIZE = (40, 12)
ON_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"  # where RegOT is among the packages


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def toy(monkeypatch):
    """The arguments of a run at a toy size, with one thread as the program sets it."""
    from cpu import small_reg

    monkeypatch.setattr(small_reg, "SIZES", (SIZE,))
    monkeypatch.setattr(small_reg, "REGS", (0.1, 0.05))
    monkeypatch.setattr(small_reg, "keep_memory", lambda: False)  # it holds for the whole process
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield ["--quick", "--seeds", "2", "--rounds", "1", "--budget", "0"]
    torch.set_num_threads(threads)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_rows_and_report(toy, tmp_path, capsys):
    from cpu import small_reg, small_reg_report

    out = tmp_path / "small_reg.csv"
    small_reg.main(
        [*toy, "--out", str(out)]
    )  # a busy machine may miss a target of time, which is no error of the program
    rows = rows_of(out)
    assert {row["costs"] for row in rows} == {"spoken", "unstructured"}
    for reg in ("0.1", "0.05"):
        here = [row for row in rows if row["reg"] == reg and row["costs"] == "spoken"]
        names = {row["name"] for row in here}
        assert {
            "otalign",
            "otalign, plain",
            "RegOT SSNS",
            "passes, plain / otalign",
            "otalign / otalign, plain",
        } <= names
        assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in here)
        plain, fast = (
            float(row["passes"]) for name in ("otalign, plain", "otalign") for row in here if row["name"] == name
        )
        assert plain >= fast > 0
    assert "RED" not in {row["verdict"] for row in rows}
    # BUSY figures are left out: this machine may be.
    out.write_text(out.read_text().replace("BUSY", "ok"))
    page, readme, figure = (tmp_path / name for name in ("page.md", "readme.md", "figure.png"))
    for document in (page, readme):
        document.write_text("<!-- bench:small-reg -->\n<!-- /bench:small-reg -->\n")
    arguments = ["--csv", str(out), "--page", str(page), "--readme", str(readme), "--figure", str(figure)]
    assert small_reg_report.main(arguments) == 0
    assert page.read_text().count("| spoken | 40 x 12 |") == 2
    assert "plain iterations, 40 x 12" in readme.read_text()
    assert figure.stat().st_size > 1000


def test_a_wrong_plan_gets_no_time(toy, monkeypatch):
    from cpu import small_reg, small_reg_report

    right = small_reg.ours

    def wrong(*args, **options):
        found = right(*args, **options)
        return small_reg.Contestant(found.run, found.passes, 1.0) if options["accelerate"] else found

    monkeypatch.setattr(small_reg, "ours", wrong)
    args = argparse.Namespace(seeds=1, rounds=1, budget=0.0, without_peer=True)
    rows = list(small_reg.measure("spoken", SIZE, 0.1, 1e-5, args))
    verdicts = {row.name: row.verdict for row in rows}
    assert verdicts["otalign"] == verdicts["otalign / otalign, plain"] == "RED"
    assert verdicts["otalign, plain"] != "RED"
    assert "RED" not in small_reg_report.TRUSTED


@pytest.mark.skipif(not ON_LINUX, reason="RegOT is a package of the benchmarks on Linux on x86-64 only")
def test_newton_makes_the_fewest_steps(monkeypatch):
    """One step fewer does not reach the error."""
    import numpy as np
    import regot
    from cpu import small_reg

    C = small_reg.spoken_costs(*SIZE, 0)
    reg = 0.05 * float(C.max() - C.min())
    found = small_reg.newton(C, reg, 1e-4)
    assert found.reached <= 1e-4
    a, b = (np.full(size, 1 / size) for size in SIZE)
    before = regot.sinkhorn_ssns(np.asfortranarray(C.double().numpy()), a, b, reg, tol=0.0, max_iter=found.passes - 1)
    assert small_reg.marginal_error(before.plan) > 1e-4


@pytest.mark.slow
def test_a_missing_peer_leaves_the_rest(toy, tmp_path, monkeypatch, capsys):
    from cpu import small_reg

    monkeypatch.setitem(sys.modules, "regot", None)
    monkeypatch.setattr(small_reg, "missing_peer", lambda: "regot is not installed")
    small_reg.main([*toy, "--out", str(tmp_path / "some.csv")])
    assert "RegOT SSNS is missing: regot is not installed" in capsys.readouterr().out
    assert {"otalign", "otalign, plain"} <= {row["name"] for row in rows_of(tmp_path / "some.csv")}


def test_committed_tables_are_those_of_the_results():
    from cpu import small_reg_report

    rows = small_reg_report.read()
    assert small_reg_report.table(rows) in (ROOT / "docs" / "performance.md").read_text()
    assert small_reg_report.short_table(rows) in (ROOT / "README.md").read_text()
