"""Builds otalign into a folder with the tools of this machine, without a network or a virtual environment.

`python benchmarks build FOLDER` tries pip, then CMake alone on the sources. If both fail, the Python files remain, which
are enough for the Triton backend. The command prints the result, and fails if the extension is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]


def succeeds(*command: str) -> bool:
    print("$", *command, flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    except OSError as error:
        print(error, flush=True)
        return False


def with_pip(site: Path) -> bool:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--upgrade", "--target", str(site)]
    return succeeds(sys.executable, "-m", "pip", "install", *options, str(ROOT))


def with_cmake(site: Path) -> bool:
    """Copy the Python files, and build the extension beside them with CMake."""
    package = site / "otalign"
    shutil.rmtree(package, ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__", "_C*", "_build_info.py", "triton_kernels")
    shutil.copytree(ROOT / "otalign", package, ignore=leave)
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels", ignore=leave)
    try:
        import pybind11
    except ImportError as error:
        print(f"the extension was not built: {error}")
        return False
    build = site / "build"
    found = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), *found, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}"]
    return succeeds(*configure) and succeeds("cmake", "--build", str(build), "--parallel")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks build", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the package is put")
    site = parser.parse_args(arguments).folder.resolve()
    site.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():  # for this GPU alone, in a third of the time
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}" + "a" * (major == 9))
    os.environ.pop("OTALIGN_REQUIRE_EXT", None)  # the Triton backend can be measured without the extension
    if not with_pip(site):
        with_cmake(site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    succeeds("nvidia-smi")
    # Not in the checkout, where Python would import the sources and not what was built.
    subprocess.run([sys.executable, "-m", "otalign", "doctor", "--report-only"], cwd=site, check=False)
    reason = "from otalign import backends; r = backends.available()['cpu']; print('extension:', r or 'built'); exit(bool(r))"
    return subprocess.run([sys.executable, "-c", reason], cwd=site, check=False).returncode
