"""What an installation contains, what it imports, and its messages if something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import otalign

ROOT = Path(__file__).parents[2]


def python(*args: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_version_has_one_source():
    assert otalign.__version__ == metadata.version("otalign")


def test_import_is_lazy(tmp_path):
    code = "import otalign, sys; print(*{'triton', 'otalign._C', 'matplotlib'}.intersection(sys.modules))"
    assert python("-c", code, cwd=tmp_path).strip() == ""


@pytest.mark.slow
def test_report_names_every_backend_and_why_one_is_missing(tmp_path):
    report = python("-m", "otalign", cwd=tmp_path)
    for name, reason in otalign.backends.available().items():
        assert f"backend {name}" in report
        assert reason is None or reason in report
    for word in ("otalign", "python", "torch", "triton", "numpy", "extension", "cuda"):
        assert word in report


@pytest.mark.slow
def test_triton_kernels_is_inside_the_package(tmp_path):
    # A top-level triton_kernels would shadow the package of that name that inference servers install.
    code = "import otalign.triton_kernels, importlib.util as u; print(u.find_spec('triton_kernels'))"
    assert python("-c", code, cwd=tmp_path).strip() == "None"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the tree to build in: builds of these tests never touch the installed extension."""
    copy = tmp_path / "checkout"
    junk = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "*.so", "_build_info.py", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=junk)
    return copy


def install(checkout: Path, target: Path, **env: str) -> str:
    flags = ["--no-deps", "--no-input", "--upgrade", "--verbose", "--target", str(target)]
    return python("-m", "pip", "install", *flags, str(checkout), cwd=checkout, **env)


@pytest.mark.slow
def test_wheel_has_the_extension_and_its_tag(checkout):
    for _ in range(2):  # the second build finds the build folder of the first
        python("-m", "pip", "wheel", "--no-deps", "-w", "dist", ".", cwd=checkout, OTALIGN_REQUIRE_EXT="1")
    (wheel,) = (checkout / "dist").iterdir()
    assert not wheel.name.endswith("-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("otalign/_C.") and name.endswith(".so") for name in names)
    assert {"otalign/py.typed", "otalign/_C.pyi", "otalign/triton_kernels/__init__.py"} <= set(names)
    assert not [name for name in names if not name.startswith("otalign")]


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_so(checkout, tmp_path):
    target = tmp_path / "site"
    assert "WITHOUT its C++ engine" in install(checkout, target, CXX="/nonexistent/c++", OTALIGN_REQUIRE_EXT="0")
    # The folder is named, since the hook of an editable installation would offer its own _C.
    report = python("-m", "otalign", cwd=tmp_path, PYTHONPATH=str(target), OTALIGN_EXT_DIR=str(target / "otalign"))
    assert str(target) in report
    assert re.search(r"otalign\._C was not built: .*/nonexistent/c\+\+", report)


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["OTALIGN_REQUIRE_EXT", "OTALIGN_BUILD_CUDA"])
def test_what_is_required_is_built_or_fails(checkout, tmp_path, variable):
    with pytest.raises(AssertionError, match=r"error: .*/nonexistent/c\+\+"):
        install(checkout, tmp_path / "site", CXX="/nonexistent/c++", **{variable: "1"})


@pytest.mark.slow
def test_without_cuda_the_report_says_so(checkout, tmp_path):
    target = tmp_path / "site"
    install(checkout, target, OTALIGN_BUILD_CUDA="0", OTALIGN_REQUIRE_EXT="1")
    report = python("-m", "otalign", cwd=tmp_path, PYTHONPATH=str(target))
    assert str(target) in report
    assert "otalign._C was built without CUDA: OTALIGN_BUILD_CUDA=0" in report


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_build_with_cuda_loads_without_a_driver(checkout, tmp_path):
    target = tmp_path / "site"
    install(checkout, target, OTALIGN_BUILD_CUDA="1", OTALIGN_REQUIRE_EXT="1", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    report = python("-m", "otalign", cwd=tmp_path, PYTHONPATH=str(target))
    assert str(target) in report
    assert re.search(r"backend cuda +missing: no NVIDIA GPU was found", report)
