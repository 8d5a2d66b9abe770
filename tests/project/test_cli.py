"""The command line: what it prints and saves, and its one-line error messages."""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import otalign
from otalign import Prior, backends
from otalign.cli import bench, doctor, files, main
from otalign.cli.align import describe
from otalign.cli.arguments import device_of, prior, relaxation
from otalign.cli.errors import InputError
from otalign.speech import alignment_path_score, sequence_similarity

from ..helpers.problems import close, rounded

CHECKED = {"reference": None, "cpu": None}  # Triton's interpreter is meant for the subprocesses of other tests


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_hot(folder):
    """Three tokens of two frames each: the plan is known exactly."""
    np.save("text.npy", np.eye(3, 4, dtype=np.float32))
    np.save("speech.npy", np.eye(3, 4, dtype=np.float32).repeat(2, axis=0))


def refused(capsys, *argv: str) -> str:
    """The single line on stderr of a call that must fail with exit status 2."""
    try:
        status = main(argv)
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("python -m otalign")
    return err


# doctor ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(backends, "available", lambda: CHECKED)


@pytest.mark.parametrize("argv", [[], ["doctor"]])
def test_doctor_checks_available_backends(quick, capsys, argv):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for label, text in doctor.report():
        assert f"{label:<18} {text}" in lines
    for name in CHECKED:
        (line,) = [line for line in lines if line.startswith(f"check {name} ")]
        assert "agrees with the float64 reference: largest error " in line


def broken(monkeypatch, make):
    """The solver of the CPU backend, with `make` of its solution."""
    solver = backends.solver
    monkeypatch.setattr(
        backends, "solver", lambda name: (lambda p: make(solver(name)(p))) if name == "cpu" else solver(name)
    )


def test_doctor_can_skip_the_checks(capsys):
    assert main(["doctor", "--report-only"]) == 0
    said = capsys.readouterr().out
    assert "backend cpu" in said
    assert not [line for line in said.splitlines() if line.startswith("check ")]


def test_doctor_finds_a_backend_that_disagrees(quick, monkeypatch, capsys):
    broken(monkeypatch, lambda solution: solution._replace(value=solution.value + 1e-3))
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "check cpu          DISAGREES" in out
    assert "check reference    agrees" in out


def test_doctor_finds_nan(quick, monkeypatch):
    broken(monkeypatch, lambda solution: solution._replace(value=solution.value * math.nan))
    found = doctor.check("cpu")
    assert not found.passed
    assert math.isnan(found.forward)


def test_doctor_finds_wrong_gradients(quick, monkeypatch):
    broken(monkeypatch, lambda s: s._replace(value=s.value.detach() + 1.01 * (s.value - s.value.detach())))
    found = doctor.check("cpu")
    assert found.forward < 2e-5
    assert found.gradients == pytest.approx(0.01, rel=0.01)
    assert not found.passed


def test_doctor_finds_a_backend_that_fails(quick, monkeypatch, capsys):
    def fail(solution):
        raise RuntimeError("symbol not found\nand more")

    broken(monkeypatch, fail)
    assert main(["doctor"]) == 1
    assert "check cpu          FAILS: RuntimeError: symbol not found\n" in capsys.readouterr().out


def test_devices_of_backends(monkeypatch):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {device_of(name).type for name in backends.NAMES} == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of(name).type for name in ("auto", "reference", "cpu", "triton", "cuda")] == ["cpu"] * 3 + [
        "cuda"
    ] * 2


# align -----------------------------------------------------------------------------------------------------------------


def test_align_of_a_known_case(one_hot, capsys):
    argv = ["align", "speech.npy", "text.npy", "--reg", "0.02", "--tokens", "the, cat,sat", "--out", "out.json"]
    assert main([*argv, "--seconds-per-frame", "0.1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[:4] == [
        "token  label  frame  mean frame  spread  time, s  spread, s  mass, %",
        "    0  the        0        0.50    0.50    0.100      0.050    33.33",
        "    1  cat        2        2.50    0.50    0.300      0.050    33.33",
        "    2  sat        4        4.50    0.50    0.500      0.050    33.33",
    ]
    assert "converged       yes\n" in out
    held = json.loads(Path("out.json").read_text())
    assert held["value"] == pytest.approx(0.02 * math.log(3), rel=1e-5)
    assert held["transport_cost"] == pytest.approx(0, abs=1e-6)
    assert held["mass"] == pytest.approx(1, rel=1e-6)
    assert held["converged"] is True
    assert held["backend"] == "cpu"
    assert [token["label"] for token in held["tokens"]] == ["the", "cat", "sat"]
    assert [token["mean_frame"] for token in held["tokens"]] == pytest.approx([0.5, 2.5, 4.5], abs=1e-6)


def test_align_agrees_with_the_library(folder, capsys):
    speech, text = torch.randn(11, 6), torch.randn(4, 6)
    torch.save(speech, "speech.pt")
    np.savez("text.npz", text.numpy())
    argv = "align speech.pt text.npz --reg 0.2 --cost sqeuclidean --prior quadratic:1.5 --unbalanced inf,0.5 --tol 1e-5"
    assert main([*argv.split(), "--max-iter", "400", "--backend", "reference", "--out", "out.npz"]) == 0
    options = {"prior": Prior.quadratic(1.5), "unbalanced": (math.inf, 0.5), "backend": "reference"}
    result = otalign.solve(speech[None], text[None], reg=0.2, cost="sqeuclidean", tol=1e-5, max_iter=400, **options)
    held = np.load("out.npz")
    rounded(torch.tensor(held["plan"]), result.plan()[0])  # a file is at another address
    assert held["frame"].tolist() == result.assign_y()[0].tolist()
    assert held["share"].sum() == pytest.approx(1)
    assert held["mass"] == pytest.approx(float(result.plan().sum()), rel=1e-5)
    assert held["value"] == float(result.value)
    assert held["iterations"] == int(result.n_iter)
    assert "label" not in held
    assert "time" not in held
    assert f"iterations      {int(result.n_iter)}\n" in capsys.readouterr().out


def test_align_saves_csv_with_labels_of_a_file(one_hot):
    labels = ["▁the", "a,b", ' "']
    Path("tokens.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    assert main(["align", "speech.npy", "text.npy", "--tokens", "tokens.txt", "--out", "out.csv"]) == 0
    with open("out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == labels
    assert [row["frame"] for row in rows] == ["0", "2", "4"]


def test_align_reports_items_that_did_not_converge(folder, capsys):
    np.save("speech.npy", np.random.default_rng(0).normal(size=(30, 3)))
    np.save("text.npy", np.random.default_rng(1).normal(size=(9, 3)))
    assert main(["align", "speech.npy", "text.npy", "--reg", "0.01", "--max-iter", "2"]) == 0
    out, err = capsys.readouterr()
    assert "converged       no\n" in out
    assert err.startswith("warning: not converged: marginal error 0.")
    assert err.endswith("after 2 iterations, above 0.001; raise --max-iter or --reg\n")
    main(["align", "speech.npy", "text.npy", "--prior", "band:0.1"])
    assert "widen the band, or relax one side" in capsys.readouterr().err


def test_file_extensions_in_capitals(one_hot):
    for name in ("plan.PNG", "all.NPZ", "all.JSON", "all.CSV"):
        assert main(["align", "speech.npy", "text.npy", "--plot" if "PNG" in name else "--out", name]) == 0
    assert np.load("all.NPZ")["plan"].shape == (6, 3)
    assert json.loads(Path("all.JSON").read_text())["converged"]
    assert Path("all.CSV").read_text().startswith("token,")
    assert Path("plan.PNG").read_bytes()[1:4] == b"PNG"
    Path("speech.npy").rename("speech.NPY")
    assert main(["align", "speech.NPY", "text.npy"]) == 0


def test_tokens_without_mass():
    found = describe(torch.tensor([[0.5, 0.0], [0.5, 0.0]]))
    assert found.frame.tolist() == [0, -1]
    assert found.share.tolist() == [1, 0]
    assert found.mean[0] == 0.5
    assert found.mean[1].isnan()
    rows = otalign.cli.align.records(found, ["a\tb", "猫"], None)
    first, second = otalign.cli.align.show(rows).splitlines()[1:]
    assert first.split()[1:3] == ["a\\tb", "0"]
    assert second.split()[2:5] == ["-", "-", "-"]
    assert json.loads(otalign.cli.align.to_json(rows))[1]["mean_frame"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quadratic:1.0", Prior.quadratic(1.0)),
        ("absolute:0.5", Prior.absolute(0.5)),
        ("band:3", Prior.band(3.0)),
        ("order:0.4,1", Prior.order_preserving(0.4, 1.0)),
    ],
)
def test_priors(text, expected):
    assert prior(text) == expected


def test_relaxations():
    assert relaxation("0.5") == 0.5
    assert relaxation("inf,0.5") == (math.inf, 0.5)


@pytest.mark.slow
def test_align_in_a_process_of_its_own_draws_a_picture(one_hot):
    from PIL import Image

    argv = ["align", "speech.npy", "text.npy", "--tokens", "the,cat,▁sat", "--plot", "plan.png"]
    done = subprocess.run([sys.executable, "-m", "otalign", *argv], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"marginal error" in done.stdout
    with Image.open("plan.png") as image:
        image.load()
        assert image.format == "PNG"
        width, height = image.size
        assert 600 <= width <= 3000
        assert 300 <= height <= 3000
        assert len(image.getcolors(1 << 20)) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.npy text.npy", "missing.npy: no such file"),
        ("speech.txt text.npy", "speech.txt: expected a file .npy, .npz, .pt, .pth"),
        ("cube.npy text.npy", "cube.npy: expected an array (N, D) that is not empty, got (2, 3, 4)"),
        ("empty.npy text.npy", "empty.npy: expected an array (N, D) that is not empty, got (0, 4)"),
        ("speech.npy wide.npy", "wide.npy: expected D = 4 as in speech.npy, got 5"),
        ("nan.npy text.npy", "nan.npy: NaN or infinity in row 1 (from 0)"),
        ("speech.npy inf.npy", "inf.npy: NaN or infinity in row 0 (from 0)"),
        ("damaged.npy text.npy", "damaged.npy: cannot be read as .npy: "),
        ("damaged.npz text.npy", "damaged.npz: cannot be read as .npz: "),
        ("damaged.pt text.npy", "damaged.pt: cannot be read as .pt: "),
        ("code.pt text.npy", "code.pt: cannot be read as .pt: "),
        ("objects.npy text.npy", "objects.npy: cannot be read as .npy: damaged, or more than plain arrays"),
        ("words.npy text.npy", "words.npy: expected numbers in a dense array, got an array of <U1"),
        ("complex.pt text.npy", "complex.pt: expected floats or integers, got torch.complex64"),
        ("sparse.pt text.npy", "sparse.pt: expected numbers in a dense array, got an array of torch.float32"),
        ("string.pt text.npy", "string.pt: expected numbers in a dense array, got str"),
        ("none.pt text.npy", "none.pt: there is no array in it"),
        ("two.npz text.npy", "two.npz: expected one array, got 2: a, b"),
        ("speech.npy text.npy --tokens a,b", "expected 3 labels, one for each row of the text, got 2"),
        ("speech.npy text.npy --tokens labels.lst", "(no file 'labels.lst', so a list): expected 3 labels"),
        ("speech.npy text.npy --tokens damaged.npy", "damaged.npy: 'utf-8' codec can't decode"),
        (
            "speech.npy text.npy --prior cubic:1",
            "unknown prior 'cubic:1'; one of quadratic:WEIGHT, absolute:WEIGHT, band",
        ),
        ("speech.npy text.npy --prior quadratic", "expected quadratic:WEIGHT, got 'quadratic'"),
        ("speech.npy text.npy --prior order:1", "expected order:LAMBDA1,DELTA, got 'order:1'"),
        ("speech.npy text.npy --prior band:x", "expected numbers with commas between them, got 'x'"),
        ("speech.npy text.npy --prior order:1,0", "'order:1,0': delta must be finite and positive, got 0.0"),
        ("speech.npy text.npy --unbalanced 1,2,3", "expected RHO or RHO_X,RHO_Y above 0 (inf = strict), got '1,2,3'"),
        ("speech.npy text.npy --unbalanced 0", "expected RHO or RHO_X,RHO_Y above 0 (inf = strict), got '0'"),
        ("speech.npy text.npy --reg -1", "argument --reg: expected a finite number above 0, got '-1'"),
        ("speech.npy text.npy --tol nan", "tol: expected a finite number >= 0, got nan"),
        ("speech.npy text.npy --max-iter 0", "argument --max-iter: expected a whole number above 0, got '0'"),
        ("speech.npy text.npy --cost l1", "argument --cost: invalid choice: 'l1'"),
        ("speech.npy text.npy --out plan.txt", "plan.txt: expected a name that ends in one of .npz, .json, .csv"),
        ("speech.npy text.npy --out no/plan.csv", "no/plan.csv: the folder no does not exist"),
        ("speech.npy text.npy --plot plan.gif2", "plan.gif2: expected a name that ends in one of "),
        ("speech.npy", "the following arguments are required: text"),
    ],
)
def test_align_refuses(one_hot, capsys, arguments, message):
    eye = np.eye(4)
    np.save("cube.npy", np.ones((2, 3, 4)))
    np.save("empty.npy", np.ones((0, 4)))
    np.save("wide.npy", np.ones((3, 5)))
    np.save("nan.npy", np.where(np.arange(4)[:, None] == 1, np.nan, eye))
    np.save("inf.npy", np.full((3, 4), np.inf))
    np.save("objects.npy", np.array([[print]]), allow_pickle=True)
    np.save("words.npy", np.array([["a"]]))
    np.savez("two.npz", b=eye, a=eye)
    held = {
        "complex": torch.ones(2, 2) * 1j,
        "sparse": torch.eye(2).to_sparse(),
        "string": "x",
        "none": [],
        "code": exec,
    }
    for name, value in held.items():
        torch.save(value, f"{name}.pt")
    for name in ("damaged.npy", "damaged.npz", "damaged.pt"):
        Path(name).write_bytes(b"\x93NUMPY nothing")
    assert message in refused(capsys, "align", *arguments.split())


@pytest.mark.parametrize("argv", [["align", "speech.npy", "text.npy"], ["bench", "--frames", "9", "--batch", "1"]])
def test_a_backend_that_is_missing(one_hot, capsys, monkeypatch, argv):
    monkeypatch.setattr(backends, "reason_missing", lambda name, device: "not today" if name == "cuda" else None)
    assert "backend 'cuda' is not available: not today" in refused(capsys, *argv, "--backend", "cuda")


def test_align_refuses_what_cannot_be_written(one_hot, capsys):
    Path("plan.csv").mkdir()
    assert main(["align", "speech.npy", "text.npy", "--out", "plan.csv"]) == 2
    assert capsys.readouterr().err == "python -m otalign align: error: plan.csv: Is a directory\n"


@pytest.mark.parametrize("command", ["align", "score"])
def test_a_picture_needs_matplotlib(one_hot, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = refused(capsys, command, "speech.npy", "text.npy", "--plot", "plan.png")
    assert "--plot needs matplotlib, pip install otalign[plot]: " in error


# score -----------------------------------------------------------------------------------------------------------------


def states(items: int = 3, layers: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """States of speech and text, `(L, B, N, D)` with NaN behind the lengths; one item is empty."""
    n, m = torch.tensor([9, 4, 0][:items]), torch.tensor([3, 5, 2][:items])
    speech, text = torch.randn(layers, items, 9, 6), torch.randn(layers, items, 5, 6)
    for values, lengths in ((speech, n), (text, m)):
        outside = torch.arange(values.shape[2]) >= lengths[:, None]
        values.masked_fill_(outside[None, :, :, None], math.nan)
    return speech, text, n, m


def scored(capsys, *argv: str) -> dict:
    assert main(["score", *argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_score_agrees_with_the_library(folder, capsys, metric):
    speech, text, n, m = states()
    np.savez("speech.npz", **{f"layer_{number}": layer.numpy() for number, layer in enumerate(speech)})
    torch.save({str(number): layer for number, layer in enumerate(text)}, "text.pt")
    np.save("n.npy", n.int().numpy())
    torch.save(m, "m.pt")
    argv = ["speech.npz", "text.pt", "--speech-lengths", "n.npy", "--text-lengths", "m.pt", "--metric", metric]
    held = scored(capsys, *argv)
    expected = alignment_path_score(list(speech), list(text), n, m, metric=metric)
    similarity = sequence_similarity(list(speech), list(text), n, m, metric=metric)
    assert held["items"] == 3
    # Up to rounding: a file is at another address, and the rounding of torch's products may depend on it.
    assert held["item_scores"][2] is None
    assert held["item_scores"][:2] == pytest.approx(expected.score[:2].tolist(), rel=1e-5)
    assert held["score"] == pytest.approx(float(expected.score.nanmean()), rel=1e-5)
    assert [layer["layer"] for layer in held["layers"]] == list(range(12))
    columns = expected.per_layer, expected.monotonicity, expected.consistency, similarity
    for name, values in zip(("score", "monotonicity", "consistency", "sequence_similarity"), columns, strict=True):
        assert [layer[name] for layer in held["layers"]] == pytest.approx(
            values.nanmean(1).tolist(), rel=1e-5, abs=1e-6
        )
    assert main(["score", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-1] == {"cosine": "similarity", "euclidean": "distance"}[metric]
    printed = [float(number) for number in lines[12].split()]
    assert printed == pytest.approx([11, *(float(values[11].nanmean()) for values in columns)], abs=1e-4)
    assert lines[-1].startswith("score ")
    assert float(lines[-1].split()[1]) == pytest.approx(held["score"], abs=1e-4)
    assert lines[-1].endswith("mean of 3 items)")


def test_score_of_equal_states_is_one(folder, capsys):
    np.save("states.npy", np.random.default_rng(0).normal(size=(2, 7, 4)))
    held = scored(capsys, "states.npy", "states.npy")
    for layer in held["layers"]:
        assert [layer[name] for name in ("score", "monotonicity", "sequence_similarity")] == pytest.approx([1, 1, 1])


def test_every_way_to_save_states_gives_the_same(folder, capsys):
    speech, text, *_ = states(items=1)
    np.save("stack.npy", speech[:, 0].numpy())
    np.save("stacks.npy", speech.numpy())
    np.savez("stack.npz", speech[:, 0].numpy())
    np.savez("positional.npz", *speech[:, 0].numpy())
    np.savez("layers.npz", **{f"model.layers.{number}": layer[0].numpy() for number, layer in enumerate(speech)})
    torch.save([layer[0] for layer in speech], "list.pt")
    torch.save(dict(enumerate(speech)), "dict.pt")
    np.save("text.npy", text[:, :, :3].numpy())
    names = ["stack.npy", "stacks.npy", "stack.npz", "positional.npz", "layers.npz", "list.pt", "dict.pt"]
    first, *others = [scored(capsys, name, "text.npy") for name in names]
    assert len(first["layers"]) == 12
    assert all(other == first for other in others)


def test_layers_keep_their_numbers(folder):
    torch.save({"h.10": torch.zeros(2, 5, 3), "h.9": torch.ones(2, 5, 3)}, "some.pt")
    found = files.layers("some.pt")
    assert list(found) == [9, 10]
    assert found[9].all()
    torch.save({"layer_4": torch.zeros(2, 5, 3)}, "one.pt")
    assert {number: tuple(layer.shape) for number, layer in files.layers("one.pt").items()} == {4: (2, 5, 3)}
    torch.save([torch.zeros(5, 3, dtype=torch.int16)], "one.pt")
    assert {number: tuple(layer.shape) for number, layer in files.layers("one.pt").items()} == {0: (1, 5, 3)}
    torch.save({"early": torch.zeros(5, 3), "late": torch.ones(5, 3)}, "words.pt")
    assert list(files.layers("words.pt")) == [0, 1]


@pytest.mark.parametrize("dtype", [">f4", "f2", "f8", "i4", "u1"])
def test_states_of_every_dtype_are_read(folder, dtype):
    values = np.arange(6).reshape(2, 3)
    np.save("values.npy", values.astype(dtype))
    close(files.points("values.npy"), torch.arange(6.0).reshape(2, 3).to(files.points("values.npy").dtype), 0)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_score_draws_layers(folder, metric):
    from PIL import Image

    np.save("states.npy", np.random.default_rng(0).normal(size=(5, 2, 7, 4)))
    assert main(["score", "states.npy", "states.npy", "--plot", "layers.png", "--metric", metric]) == 0
    with Image.open("layers.png") as image:
        assert min(image.size) >= 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.npy text.npy", "missing.npy: no such file"),
        (
            "flat.npy text.npy",
            "flat.npy: expected (L, N, D) or (L, B, N, D), or (N, D) or (B, N, D) for each layer, got (6,)",
        ),
        ("speech.npy few.npy", "few.npy: expected layers [0, 1] as in speech.npy, got [0]"),
        ("speech.npy wide.npy", "text_states[0]: expected 2 items of dimension 6, got (2, 5, 7)"),
        ("mixed.pt text.npy", "mixed.pt: expected layers of one shape, got (2, 9, 6), (2, 9, 7)"),
        ("speech.npy nan.npy", "nan.npy: NaN or infinity in layer 1, item 0 (from 0)"),
        ("speech.npy text.npy --speech-lengths far.npy", "expected values in [0, 9], got [3, 10]"),
        ("speech.npy text.npy --text-lengths many.npy", "expected shape (2,), got (3,)"),
        ("speech.npy text.npy --text-lengths shares.npy", "shares.npy: expected integers (B,), got torch.float64 (2,)"),
        ("speech.npy text.npy --metric dot", "argument --metric: invalid choice: 'dot'"),
    ],
)
def test_score_refuses(folder, capsys, arguments, message):
    speech, text = np.ones((2, 2, 9, 6)), np.ones((2, 2, 5, 6))
    np.save("speech.npy", speech)
    np.save("text.npy", text)
    np.save("flat.npy", np.ones(6))
    np.save("few.npy", text[:1])
    np.save("wide.npy", np.ones((2, 2, 5, 7)))
    torch.save([torch.ones(2, 9, 6), torch.ones(2, 9, 7)], "mixed.pt")
    text[1, 0, 4] = np.nan
    np.save("nan.npy", text)
    np.save("far.npy", np.array([3, 10]))
    np.save("many.npy", np.array([1, 1, 1]))
    np.save("shares.npy", np.array([0.5, 1.0]))
    assert message in refused(capsys, "score", *arguments.split())


# bench -----------------------------------------------------------------------------------------------------------------

SMALL = ["bench", "--batch", "2", "--frames", "9", "--tokens", "4", "--dim", "8", "--repeats", "2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_bench_times_the_requested_problem(capsys, monkeypatch, dtype):
    monkeypatch.setattr(bench, "BURST", 0)
    argv = [*SMALL, "--dtype", dtype, "--backend", "cpu", "reference", "--reg", "0.2", "--cost", "sqeuclidean"]
    monkeypatch.setattr(bench, "_burst", lambda call, device: call() and 2.0)
    assert main(argv) == 0
    out = capsys.readouterr().out
    for word in (otalign.__version__, torch.__version__, f"{torch.get_num_threads()} threads", dtype, "sqeuclidean"):
        assert word in out
    *_, products, cpu, reference = out.splitlines()
    assert products.split() == ["bare", "products", "2e+03", "2e+03", "-", "2e+03", "1"]
    assert cpu.split()[:8] == ["cpu", "2e+03", "2e+03", "-", "2e+03", "1.00", "1.00", "-"]
    assert reference.startswith("reference ")


def test_bench_leaves_the_reference_out(capsys, monkeypatch):
    monkeypatch.setattr(bench, "BURST", 1e-5)
    assert main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["bare", "cpu"]


def test_bench_times_rounds(monkeypatch):
    monkeypatch.setattr(bench, "BURST", 1e-6)
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = bench.interleave(contestants, 2, torch.device("cpu"))
    assert {name: tuple(samples.shape) for name, samples in times.items()} == dict.fromkeys("abc", (2,))
    assert all((samples > 0).all() for samples in times.values())
    turns = [name for index, name in enumerate(calls) if index == 0 or calls[index - 1] != name]
    assert turns == list("abcbca")


def test_bench_waits_for_a_gpu(monkeypatch):
    log = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert bench._seconds(lambda: log.append("call"), torch.device("cuda")) == pytest.approx(3e-3)
    assert log == ["record", "call", "record", "synchronize"]


def test_bench_leaves_out_backends_that_cannot_compute_it(capsys, monkeypatch):
    monkeypatch.setattr(bench, "of_device", lambda device: ["cuda", "cpu"])
    arguments = argparse.Namespace(backend=None, device="cpu", reg=0.1, cost="cosine")
    batch = bench.RaggedBatch(
        torch.rand(1, 3, 2, requires_grad=True), torch.rand(1, 2, 2, requires_grad=True), None, None
    )
    _, solved = bench.competitors(batch, arguments)
    assert list(solved) == ["cpu"]
    assert "warning: backend cuda is left out: backend" in capsys.readouterr().err
    monkeypatch.setattr(bench, "of_device", lambda device: ["cuda"])
    with pytest.raises(InputError, match="no backend can compute this"):
        bench.competitors(batch, arguments)


def test_bench_without_a_backend(monkeypatch):
    monkeypatch.setattr(backends, "reason_missing", lambda name: "not built")
    with pytest.raises(InputError, match=r"no backend but the reference \(--backend reference\): cpu: not built"):
        bench.of_device("cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch 0", "argument --batch: expected a whole number above 0, got '0'"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--backend fast", "argument --backend: invalid choice: 'fast'"),
        ("--device cuda", "--device cuda: torch sees no usable GPU"),
    ],
)
def test_bench_refuses(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refused(capsys, *SMALL, *arguments.split())


# All commands -------------------------------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"otalign {otalign.__version__}\n"


@pytest.mark.parametrize("command", [[], ["doctor"], ["align"], ["score"], ["bench"]])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "examples:\n  python -m otalign" in out
    assert max(map(len, out.splitlines())) <= 130


def test_unknown_command(capsys):
    assert "invalid choice: 'frobnicate'" in refused(capsys, "frobnicate")


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(one_hot):
    argv = [sys.executable, "-m", "otalign", "align", "speech.npy", "text.npy"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 1
