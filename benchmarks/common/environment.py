"""The machine, the versions and the commit of a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # a session names its commit without torch, whose import takes seconds

PACKAGES = ("otalign", "torch", "triton", "POT", "numpy")


def describe(*, threads: int, memory_kept: bool) -> dict[str, str]:
    return {
        "date": date(),
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "cpu": _cpu(),
        "threads": str(threads),
        "load": f"{os.getloadavg()[0]:.1f}",
        "allocator": "memory kept" if memory_kept else "default",
        "versions": " ".join([f"Python={platform.python_version()}", *map(_version, PACKAGES)]),
    }


def describe_device(device: torch.device) -> dict[str, str]:
    """The columns of GPU results that describe the machine and the versions."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU (dry run): {_cpu()}",
        "driver": driver() if on_gpu else "none",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        "date": date(),
    }


def date() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


def version(package: str) -> str:
    """The installed version of a package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def driver() -> str:
    """The version of NVIDIA's driver."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return f"{package}={importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}=source"


def _cpu() -> str:
    """The model and its vector instructions. A virtual machine may hide the model, but not the instructions."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """The commit, with a + if tracked files differ from it. Without git: the variable OTALIGN_COMMIT."""

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("OTALIGN_COMMIT", "unknown")
