"""Does the GPU benchmark check, refuse and report as documented? On the CPU, at toy sizes."""

from __future__ import annotations

import csv
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COLUMNS = [
    "shape",
    "mode",
    "provider",
    "dtype",
    "B",
    "N",
    "M",
    "D",
    "reg",
    "iterations",
    "marginal_error",
    "match",
    "median_us",
    "p20_us",
    "p80_us",
    "peak_mb",
    "floor_us",
    "ratio_to_floor",
    "device",
    "driver",
    "cuda",
    "torch",
    "triton",
    "commit",
    "date",
]


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_commands_have_modules():
    commands = runpy.run_path(str(BENCHMARKS / "__main__.py"), run_name="commands")["BENCHMARKS"]
    assert {"cpu", "gpu", "memory", "launch", "variants", "session"} <= commands.keys()
    for command in commands.values():
        text = (BENCHMARKS / f"{command.module.replace('.', '/')}.py").read_text()
        assert "def main(arguments: list[str]) -> int:" in text, command


def test_the_sources_are_not_measured():
    """With -m, Python would import otalign from the checkout, whose kernels are elsewhere."""
    command = [sys.executable, "-m", "benchmarks", "cpu"]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "expected `python benchmarks NAME`" in done.stderr


@pytest.fixture(scope="module")
def small():
    from common.shapes import SMALL, make_batch

    return make_batch(SMALL._replace(B=2, N=20, M=10))


def test_truth_agrees_with_the_reference(small):
    from gpu import oracle

    import otalign

    truth = oracle.solve(small, 0.05, iterations=7)
    x, y = small.x.double().requires_grad_(), small.y.double().requires_grad_()
    result = otalign.solve(x, y, small.n, small.m, reg=0.05, tol=0, max_iter=7, backend="reference")
    gradients = torch.autograd.grad(result.value.mean(), (x, y))
    assert truth.marginal_error == pytest.approx(float(result.error.max()), rel=1e-9)
    for actual, expected in zip(truth[:3], (result.value.mean(), *gradients), strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-9, atol=1e-12)


def dry_run(tmp_path, *providers):
    from gpu import benchmark

    code = benchmark.main(["--dry", "--out", str(tmp_path), "--providers", *providers])
    with (tmp_path / "benchmark.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        return code, reader.fieldnames, list(reader)


def test_rows(tmp_path):
    code, columns, rows = dry_run(tmp_path, "POT", "cuda", "torch log, compiled, graph")
    assert code == 0
    assert columns == COLUMNS
    assert {row["mode"] for row in rows} == {"forward", "backward", "full"}
    assert {row["dtype"] for row in rows} == {"bf16", "fp32"}
    assert {row["shape"] for row in rows} == {
        "small",
        "small, ragged",
        "small, early exit",
        "small, ragged, early exit",
    }
    for row in rows:
        assert bool(row["median_us"]) == (row["match"] == "True"), "exactly the right results have a time"
        assert "dry run" in row["device"]
        if row["provider"] != "POT":
            assert row["match"].startswith("missing: "), "a library that cannot run has a row with the reason"
    timed = [row for row in rows if row["median_us"]]
    assert timed
    for row in timed:
        assert float(row["floor_us"]) > 0
        assert float(row["ratio_to_floor"]) == pytest.approx(float(row["median_us"]) / float(row["floor_us"]), rel=0.02)
        if "early exit" in row["shape"]:
            assert float(row["marginal_error"]) <= 1.02e-3
    assert "no figure counts" in (tmp_path / "targets.txt").read_text()


def test_equal_marginal_error(tmp_path):
    """A library with another iteration runs until its marginal error is as small, and not much longer."""
    from gpu import benchmark, oracle

    _, _, rows = dry_run(tmp_path, "POT")
    shape = benchmark.SMALL._replace(B=2, N=20, M=10)
    for row in rows:
        assert row["match"] == "True"
        early = "early exit" in row["shape"]
        batch = benchmark.make(benchmark.Case(shape, "ragged" in row["shape"], row["dtype"], 0.0), torch.device("cpu"))
        wanted = 1e-3 if early else oracle.solve(batch, benchmark.REG, iterations=benchmark.FIXED_DRY).marginal_error
        assert 0.5 * wanted <= float(row["marginal_error"]) <= 1.02 * wanted


@pytest.mark.parametrize("wrong", ["loss", "gradient", "not converged"])
def test_a_wrong_answer_has_no_time(tmp_path, monkeypatch, wrong):
    from gpu import providers

    pot = providers.PROVIDERS["POT"]

    def spoilt(task):
        right = pot(task)
        if wrong == "not converged":
            return right._replace(marginal_error=1.0)
        if wrong == "loss":
            return right._replace(loss=lambda x, y: right.loss(x, y) * 1.01)
        return right._replace(loss=lambda x, y: (loss := right.loss(x, y)) + 0.1 * (loss - loss.detach()))

    monkeypatch.setitem(providers.PROVIDERS, "POT", spoilt)
    _, _, rows = dry_run(tmp_path, "POT")
    converging = [row for row in rows if "early exit" in row["shape"] and row["mode"] == "full"]
    assert converging
    assert all(row["match"] == "False" and not row["median_us"] for row in converging)


def test_a_failure_of_otalign_is_an_error(tmp_path, monkeypatch):
    from gpu import providers

    def broken(task):
        raise RuntimeError("it broke")

    monkeypatch.setitem(providers.PROVIDERS, "triton", broken)
    code, _, rows = dry_run(tmp_path, "triton")
    assert code == 1
    assert all(row["match"] == "failed: RuntimeError: it broke" for row in rows)


def test_floor(small):
    from gpu import oracle

    ceilings = oracle.Ceilings(1e12, {torch.bfloat16: 1e15, torch.float32: 1e9})
    numbers = int(small.n.sum() + small.m.sum()) * 64
    assert oracle.floor_us(small, torch.bfloat16, "forward", ceilings) == pytest.approx(numbers * 2 / 1e6)
    products = 2 * int((small.n * small.m).sum()) * 64
    assert oracle.floor_us(small, torch.float32, "full", ceilings) == pytest.approx(3 * products / 1e3)


def test_targets():
    from gpu import benchmark

    row = {"shape": "A", "mode": "forward", "dtype": "bf16"}
    rows = [{**row, "provider": "triton", "median_us": "300"}, {**row, "provider": "cuda", "median_us": "70.0"}]
    lines = list(benchmark.targets(rows))
    assert lines[0] == (
        "A forward: 70.0 us by cuda, target 85 us met (stretch 60 us); Triton alone 300.0 us, not within 3x"
    )
    assert lines[1] == "A full: not measured (target 130 us, stretch 105 us)"


def forms_run(tmp_path):
    from gpu import forms

    code = forms.main(["--dry", "--out", str(tmp_path)])
    with (tmp_path / "forms.csv").open(newline="") as file:
        return code, {row["form"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.triton
def test_forms(tmp_path, monkeypatch):
    """The kernels run on the CPU in the chosen form and in the forced one. Afterwards nothing is forced."""
    from gpu import forms

    forces, extension = [], forms.extension

    def told():
        found = extension()
        force = found.testing.cuda_force
        found.testing.cuda_force = lambda *form: (forces.append(form), force(*form))
        monkeypatch.setattr(forms, "extension", lambda: found)
        return found

    monkeypatch.setattr(forms, "extension", told)
    code, rows = forms_run(tmp_path)
    assert code == 0
    assert list(rows) == ["chosen", "two blocks a processor", "chosen, no early launch"]
    assert (4, 6) in forces
    assert forces[-1] == (-1, 0)
    assert rows["two blocks a processor"]["tile"] == "128 x 128, 4 warps"
    assert rows["two blocks a processor"]["cluster"] == "6"
    assert rows["chosen"]["tile"] == rows["chosen, no early launch"]["tile"] != rows["two blocks a processor"]["tile"]
    for row in rows.values():
        assert row["match"] == "True"
        assert float(row["median_us"]) > 0
        assert row["iterations"] == "5"
        assert "dry run" in row["device"]


@pytest.mark.triton
def test_a_form_that_is_refused_or_wrong_has_no_time(tmp_path, monkeypatch):
    from gpu import forms, oracle

    monkeypatch.setattr(forms, "FORMS", (forms.Form("chosen"), forms.Form("unknown", 9, 1), forms.Form("x", 4, 17)))
    code, rows = forms_run(tmp_path)
    assert code == 0
    assert rows["chosen"]["match"] == "True"
    assert rows["unknown"]["match"].startswith("missing: expected a tile shape from 0 to 8")
    assert rows["x"]["match"].startswith("missing: expected a cluster of 1 to 16 blocks")
    assert not rows["unknown"]["median_us"]
    monkeypatch.setattr(oracle, "matches", lambda *_, **__: False)
    code, rows = forms_run(tmp_path)
    assert code == 1
    assert rows["chosen"]["match"] == "False"
    assert not rows["chosen"]["median_us"]


def test_stages_of_equal_runs():
    from gpu import stages

    flush = ("void bitwise_not_kernel", 9.0)
    run = [("cost_kernel", 1.0), ("project_kernel", 2.0), ("project_kernel", 3.0)]
    again = [(name, time + 1) for name, time in run]
    events = [("late", 1.0), flush, *run, flush, *again, flush, *run[:2]]
    assert stages.by_stage(events) == [
        ("cost_kernel", [1.0, 2.0]),
        ("project_kernel", [2.0, 3.0]),
        ("project_kernel", [3.0, 4.0]),
    ]


def test_every_case_has_every_provider():
    from gpu import benchmark

    todo = list(benchmark.cases(list(benchmark.LARGE.values())))
    planned = [(case, name) for case, names in benchmark.plan(todo, list(benchmark.PROVIDERS)) for name in names]
    assert len(planned) == len(set(planned))
    assert set(planned) == {(case, name) for case in todo for name in benchmark.PROVIDERS}
    assert {case.name for case, _ in planned[:12]} >= {"A", "A, early exit", "B"}


def test_report(tmp_path):
    from common import tables
    from gpu import report

    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:gpu -->\nold\n<!-- /bench:gpu -->\nafter\n")
    tables.replace_block(readme, "bench:gpu", report.table(report.read(tmp_path)))
    assert readme.read_text() == "before\n<!-- bench:gpu -->\nNot measured on a GPU.\n<!-- /bench:gpu -->\nafter\n"
    (tmp_path / "chip").mkdir()
    row = dict.fromkeys(COLUMNS, "1") | {
        "shape": "A",
        "mode": "full",
        "dtype": "bf16",
        "device": "Chip",
        "date": "2026-01-02",
    }
    times = {"triton": "123.4", "POT": "4567.8"}
    with (tmp_path / "chip" / "benchmark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "provider": name, "median_us": time} for name, time in times.items())
        writer.writerow({**row, "provider": "cuda", "median_us": "", "match": "missing: no"})
        writer.writerow({**row, "provider": "dream", "median_us": "1", "device": "CPU (dry run)"})
    rows = report.read(tmp_path)
    tables.replace_block(readme, "bench:gpu", report.table(rows))
    assert "| `A` | 123 | 4568 | 1 |" in readme.read_text()
    assert "dream" not in readme.read_text()
    report.draw(rows, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000


def test_table_of_variants_is_made_from_the_committed_results(tmp_path):
    """The page shows what the report makes of benchmarks/results/variants.csv."""
    from codegen import variants_report

    page = variants_report.ROOT / "docs/performance.md"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text().replace("relaxed", "lost"))
    assert variants_report.main(["--document", str(copy)]) == 0
    table = page.read_text().split("<!-- variants -->")[1].split("<!-- /variants -->")[0]
    assert "relaxed" in table
    assert table in copy.read_text()


def test_variants_that_are_left_out_keep_their_rows(tmp_path, monkeypatch):
    """`--update` replaces the rows of what is compiled anew; chips stay in order."""
    from codegen import variants

    table = tmp_path / "variants.csv"
    kept = ["90,cost_kernel,COST=dot,8,1,0,0,0,1.0", "gfx942,sinkhorn_kernel,GROUPS=2,8,1,0,0,0,1.0"]
    old = ["80,sinkhorn_kernel,GROUPS=1,8,1,0,0,0,1.0", "90,sinkhorn_kernel,GROUPS=2,8,1,0,0,0,1.0"]
    header = ",".join(variants.Report._fields)
    table.write_text("\n".join([header, *old, *kept]))
    found = variants.Variant("sinkhorn_kernel", (), (("GROUPS", 3),), (("num_warps", 8),), ())
    other = found._replace(kernel="cost_kernel")
    monkeypatch.setattr(variants, "all_variants", lambda arch: [found, other])
    monkeypatch.setattr(
        variants,
        "report",
        lambda chosen, arch, _: [variants.Report(arch, v.kernel, v.label(), 8, 2, 0, 0, 0, 0.5) for v in chosen],
    )
    variants.main(["--arch", "120", "90", "80", "--only", "sinkhorn", "--update", "--out", str(table)])
    new = [f"{arch},sinkhorn_kernel,none GROUPS=3,8,2,0,0,0,0.5" for arch in (80, 90, 120)]
    assert table.read_text().splitlines() == [header, new[0], new[1], kept[0], new[2], kept[1]]
    with pytest.raises(SystemExit):
        variants.main(["--update"])


def test_results_are_added_by_device(tmp_path):
    from gpu import report

    session = tmp_path / "session"
    session.mkdir()
    (session / "summary.json").write_text("[]")
    (session / "log.txt").write_text("long")
    (session / "benchmark.csv").write_text("device,median_us\nNVIDIA H200,1.0\n")
    folder = report.add(session, tmp_path / "results")
    assert folder == tmp_path / "results" / "nvidia-h200"
    assert sorted(path.name for path in folder.iterdir()) == ["benchmark.csv", "summary.json"]
    (session / "benchmark.csv").unlink()  # of a session that did not come so far
    (session / "first.csv").write_text("device,backend\nNVIDIA B200,cuda\n")
    folder = report.add(session, tmp_path / "results")
    assert folder == tmp_path / "results" / "nvidia-b200"
    assert sorted(path.name for path in folder.iterdir()) == ["first.csv", "summary.json"]
    (session / "benchmark.csv").write_text("device,median_us\nCPU (dry run): x,1.0\n")
    with pytest.raises(SystemExit, match="expected the rows of one GPU"):
        report.add(session, tmp_path / "results")


def test_watched_blocks_leave_no_thread():
    """A thread that is left when Python ends can abort a process whose results are complete."""
    from gpu.timing import watched

    before = threading.enumerate()
    for _ in range(20):
        with watched(60, lambda: None):
            pass
        assert threading.enumerate() == before
