"""Builds otalign into a folder with the tools of this machine, without a network or a virtual environment.

`python benchmarks build FOLDER --only files` copies the Python files, which takes a second: they are enough for the Triton
backend. `--only extension` then builds the extension beside them. The module is moved into place when it is complete, so
that a build that is late, fails or is killed leaves the Python files as they are.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SPARE = 2  # cores that the build leaves to the steps that run at the same time, if there are more than these


class Failed(Exception):
    """The reason why the extension was not built."""


def copy_files(site: Path) -> None:
    """Copy the Python files, as the installed package has them: with `triton_kernels` inside."""
    package = site / "otalign"
    shutil.rmtree(package, ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__", "_C*.so", "_C*.pyd", "_build_info.py")
    shutil.copytree(ROOT / "otalign", package, ignore=leave)
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels", ignore=leave)
    record(package, "its build has not ended")


def build_extension(site: Path) -> None:
    """Build the extension with CMake, and put the complete module beside the Python files."""
    package, folder = site / "otalign", site / "build"
    try:
        built = compiled(folder)
    except Failed as error:
        record(package, str(error))
        raise
    os.replace(built, package / built.name)
    record(package, "built")


def compiled(folder: Path) -> Path:
    """The module that CMake builds in `folder`."""
    try:
        import pybind11
    except ImportError as error:
        raise Failed(str(error)) from None
    shutil.rmtree(folder, ignore_errors=True)
    options = ["-G", "Ninja"] if shutil.which("ninja", path=search_path()) else []
    options += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    run("cmake", "-S", str(ROOT), "-B", str(folder), *options, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'module'}")
    run("cmake", "--build", str(folder), "--parallel", str(max(SPARE, cores() - SPARE)))
    modules = list((folder / "module").glob("_C*"))
    if len(modules) != 1:
        raise Failed(f"expected one module in {folder / 'module'}, found {len(modules)}")
    return modules[0]


def run(*command: str) -> None:
    """Run a command and print its output as it comes; raise Failed with the first error in it."""
    print("$", *command, flush=True)
    said = []
    environment = os.environ | {"PATH": search_path()}
    try:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                print(line, end="", flush=True)
    except OSError as error:
        raise Failed(str(error)) from None
    if process.returncode:
        error = re.search(r"^.*(?:\berror\b|CMake Error).*(?:\n\s+\S.*)?", "".join(said), re.MULTILINE | re.IGNORECASE)
        raise Failed(textwrap.shorten(error[0], 200) if error else f"{command[0]} failed with {process.returncode}")


def record(package: Path, outcome: str) -> None:
    """Write what the package knows of its extension. The file is complete at any time."""
    new = package / "_build_info.py.new"
    new.write_text(f"EXTENSION = {outcome!a}\nCOMPILER = None\n")
    os.replace(new, package / "_build_info.py")


def search_path() -> str:
    """PATH, and last the scripts of this Python: cmake may be one of its packages."""
    return os.environ.get("PATH", os.defpath) + os.pathsep + sysconfig.get_path("scripts")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def architectures() -> str | None:
    """TORCH_CUDA_ARCH_LIST for the GPUs of this machine alone, which compiles in a third of the time; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" + "a" * (major == 9) for major, minor in sorted(found))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python benchmarks build", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the package is put")
    parser.add_argument("--only", choices=("files", "extension"), help="one part of the work")
    args = parser.parse_args(arguments)
    site = args.folder.resolve()
    site.mkdir(parents=True, exist_ok=True)
    if args.only != "extension":
        copy_files(site)
    if args.only == "files":
        return 0
    wanted = architectures()
    if wanted is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = wanted  # a value from elsewhere may lack this GPU
    print("TORCH_CUDA_ARCH_LIST:", os.environ.get("TORCH_CUDA_ARCH_LIST", "the package's own"), flush=True)
    try:
        build_extension(site)
    except Failed as error:
        print(f"the extension was not built: {error}", flush=True)
        return 1
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    # Not in the checkout, where Python would import the sources and not what was built.
    subprocess.run([sys.executable, "-m", "otalign", "doctor", "--report-only"], cwd=site, check=False)
    reason = "from otalign import backends; r = backends.available()['cpu']; print('extension:', r or 'built'); exit(bool(r))"
    return subprocess.run([sys.executable, "-c", reason], cwd=site, check=False).returncode
