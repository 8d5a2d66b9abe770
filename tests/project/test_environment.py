"""Is the import light, and does the package report, choose and refuse backends as documented?"""

import importlib
import os
import re
import subprocess
import sys
import types
import warnings

import pytest
import torch

import otalign
from otalign import backends

from ..helpers.problems import draw, identical


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def forgetful():
    """Nothing about the extension is cached, within the test and after it."""
    backends.extension._loaded.cache_clear()
    yield
    backends.extension._loaded.cache_clear()


@pytest.fixture
def not_built(monkeypatch, forgetful):
    """An installation whose extension is missing."""

    def missing():
        raise ImportError("No module named 'otalign._C'")

    monkeypatch.setattr(backends.extension, "_load", missing)


def test_import_is_light():
    """It loads neither Triton nor the extension, nor modules that only some callers need."""
    code = (
        "import sys, torch; before = set(sys.modules); import otalign; loaded = set(sys.modules) - before; "
        "print(*sorted(loaded))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "otalign" in loaded
    for heavy in (
        "triton",
        "otalign._C",
        "otalign.backends.cpu",
        "otalign.backends.triton",
        "matplotlib",
        "numpy",
        "transformers",
        "lightning",
    ):
        assert heavy not in loaded


def test_public_names():
    for name in ("sinkhorn_loss", "solve", "solve_cost", "SinkhornLoss", "OTResult", "Prior", "debug", "layout"):
        assert name in otalign.__all__
        assert hasattr(otalign, name)
    assert otalign.__version__


def test_command_line():
    """`python -m otalign` names versions and every backend, with the reason for what is missing."""
    done = python("-m", "otalign")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert otalign.__version__ in done.stdout
    for name, reason in backends.available().items():
        assert name in done.stdout
        if reason is not None:
            assert reason in done.stdout


@pytest.mark.slow
def test_command_line_without_the_extension(tmp_path):
    done = python("-m", "otalign", OTALIGN_EXT_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"no _C*.so in OTALIGN_EXT_DIR={tmp_path}" in done.stdout


def test_every_backend_has_a_reason_or_works():
    known = backends.available()
    assert list(known) == ["reference", "cpu", "triton", "cuda"]
    for name, reason in known.items():
        if reason is None:
            if name != "cuda":
                assert otalign.sinkhorn_loss(*draw(), backend=name).isfinite()
        else:
            assert len(reason) > 10
            with pytest.raises(RuntimeError) as caught:
                otalign.sinkhorn_loss(*draw(), backend=name)
            assert reason in str(caught.value)


def test_auto_on_the_cpu_is_the_engine():
    assert backends.resolve("auto", torch.device("cpu")) == "cpu"
    batch = draw()
    identical(otalign.sinkhorn_loss(*batch), otalign.sinkhorn_loss(*batch, backend="cpu"))


@pytest.mark.filterwarnings("ignore:backend=:RuntimeWarning")
def test_auto_without_the_engine_is_the_reference(not_built):
    assert backends.resolve("auto", torch.device("cpu")) == "reference"
    batch = draw()
    identical(otalign.sinkhorn_loss(*batch), otalign.sinkhorn_loss(*batch, backend="reference"))


def test_auto_on_a_gpu_is_triton(monkeypatch):
    device = torch.device("cuda", 1)
    assert backends.resolve("auto", device) == "triton"
    monkeypatch.setattr(backends, "_why_no_triton", lambda: "not today")
    backends._warn_of_reference.cache_clear()
    with pytest.warns(RuntimeWarning, match="tensors on cuda are solved by the slow reference, .* not today"):
        assert backends.resolve("auto", device) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", device) == "reference"
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: not today"):
        backends.resolve("triton", device)


@pytest.mark.parametrize(
    "loss",
    [
        "otalign.sinkhorn_loss",
        pytest.param("torch.compile(otalign.sinkhorn_loss, backend='eager')", marks=pytest.mark.slow),
    ],
)
def test_auto_warns_once_that_it_uses_the_reference(tmp_path, loss):
    """In its own process, where no backend was resolved before. A call with backend="reference" does not warn."""
    code = (
        "import torch, otalign; x = torch.rand(1, 3, 2); expected = otalign.sinkhorn_loss(x, x, backend='reference'); "
        f"loss = {loss}; print(all(torch.equal(loss(x, x), expected) for _ in range(3)))"
    )
    done = python("-W", "always", "-c", code, OTALIGN_EXT_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
    (warned,) = [line for line in done.stderr.splitlines() if "RuntimeWarning: backend=" in line]
    assert "tensors on cpu are solved by the slow reference, since 'cpu' is not available: " in warned
    assert f"no _C*.so in OTALIGN_EXT_DIR={tmp_path}" in warned


def test_auto_does_not_warn_if_the_engine_is_built():
    done = python(
        "-W",
        "error::RuntimeWarning",
        "-c",
        "import torch, otalign; x = torch.rand(1, 3, 2); otalign.sinkhorn_loss(x, x)",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_triton_needs_a_gpu_or_its_interpreter():
    code = (
        "import sys, torch, otalign; x = torch.rand(1, 3, 2); otalign.sinkhorn_loss(x, x); "
        "assert 'triton' not in sys.modules; otalign.sinkhorn_loss(x, x, backend='triton')"
    )
    done = python("-c", code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "RuntimeError: backend 'triton' is not available: no GPU was found" in done.stderr


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "triton cannot be imported"),
        (types.SimpleNamespace(__version__="3.5.1"), "triton 3.5.1 is too old: .* 3.6"),
    ],
)
def test_triton_that_cannot_be_used(monkeypatch, module, reason):
    monkeypatch.setitem(sys.modules, "triton", module)
    assert re.match(reason, backends._why_no_triton.__wrapped__())


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_engine_that_is_not_built_is_an_error(not_built, name):
    with pytest.raises(RuntimeError, match=rf"backend '{name}' is not available: .*otalign\._C"):
        otalign.sinkhorn_loss(*draw(), backend=name)


def test_the_reason_of_a_failed_build_is_kept(not_built, monkeypatch):
    """The error of a call with the engine contains the compiler's message from the installation."""
    info = type(sys)("otalign._build_info")
    info.EXTENSION = "c++: command not found"
    monkeypatch.setitem(sys.modules, "otalign._build_info", info)
    assert backends.available()["cpu"] == "otalign._C was not built: c++: command not found"


def test_an_extension_from_elsewhere(monkeypatch, forgetful, tmp_path):
    """OTALIGN_EXT_DIR points to another build of the engine. If there is none, the error names the variable."""
    monkeypatch.setenv("OTALIGN_EXT_DIR", str(tmp_path))
    assert str(tmp_path) in backends.available()["cpu"]
    with pytest.raises(RuntimeError, match="OTALIGN_EXT_DIR"):
        otalign.sinkhorn_loss(*draw(), backend="cpu")


def test_debug_is_a_context():
    from otalign.layout import debugging

    assert not debugging()
    with otalign.debug():
        assert debugging()
        with otalign.debug():
            pass
        assert debugging()
    assert not debugging()


def test_module_repr_and_options():
    criterion = otalign.SinkhornLoss(reg=0.2, cost="sqeuclidean", prior=otalign.Prior.band(3))
    assert "reg=0.2" in repr(criterion)
    assert "sqeuclidean" in repr(criterion)
    assert not list(criterion.parameters())
    batch = draw()
    expected = otalign.sinkhorn_loss(*batch, reg=0.2, cost="sqeuclidean", prior=otalign.Prior.band(3))
    identical(criterion(*batch), expected)
    packed = criterion(**batch.packed())
    identical(packed, expected)


def test_module_can_be_copied_and_saved(tmp_path):
    criterion = otalign.SinkhornLoss(reg=0.2, prior=otalign.Prior.quadratic(1.0))
    torch.save(criterion, tmp_path / "criterion.pt")
    batch = draw()
    identical(torch.load(tmp_path / "criterion.pt", weights_only=False)(*batch), criterion(*batch))


def test_the_example_of_every_docstring():
    """The examples run with the names that a reader has imported."""
    import doctest

    names = ["functional", "modules", "layout", "prior", "problem", "result", "backends"]
    attempted = 0
    for name in names:
        module = importlib.import_module(f"otalign.{name}")
        globals_ = {**vars(module), "otalign": otalign, "torch": torch}
        finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        for example in finder.find(module, module.__name__, globs=globals_):
            result = runner.run(example)
            assert result.failed == 0, f"{example.name} fails: run python -m doctest on it"
            attempted += result.attempted
    assert attempted > 10
