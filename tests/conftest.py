"""Fixtures and settings that all tests share."""

import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch

import otalign.backends

from .helpers.combinations import covering

collect_ignore = ["helpers/programs"]  # some import what only the tests that run them put on the path

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=20, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=["reference", "cpu", "triton"], scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend, Triton's kernels through its interpreter. One that is not built fails its tests; it does not skip."""
    return request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU of the tests that are marked so. Where there is none they fail; they are not skipped."""
    assert torch.cuda.is_available(), "these tests need a GPU"
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Memory that is allocated without being filled holds NaN (integers: the largest), so that a hole in an output shows.

    torch fills it only while deterministic algorithms are on, and these would change what some tests look at; those
    are marked `unpoisoned`.
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    if otalign.backends.reason_missing("cpu") is None:
        engine = otalign.backends.extension()
        monkeypatch.setattr(engine, "Block", poisoned(engine.Block))  # the engine's own pool, unknown to torch
    yield
    torch.use_deterministic_algorithms(False)


def poisoned(allocate: Callable[[int], Any]) -> Callable[[int], Any]:
    def block(size: int) -> Any:
        memory = allocate(size)
        torch.frombuffer(memory, dtype=torch.uint8).fill_(0xFF)  # NaN in every float type
        return memory

    return block


# Through Triton's interpreter a solve takes a second. Of the tests with it that are marked `quick`, and of those in these
# modules, `make test` runs as many as hold every pair of parameters' values, `make test-all` all; elsewhere all are slow.
QUICK_WITH_TRITON = (
    "test_agreement",
    "test_agreement_gradients",
    "test_compile",
    "test_layouts",
    "test_massless",
    "test_odd_input",
    "test_ops",
)
LONG = (
    "test_triton",
    "test_cuda",
    "test_study",
    "test_distributed",
    "test_trainers",
)  # first, or a process waits for them
IN_PAIRS = ("test_cuda", "test_triton")  # whose programs run together, as fibers and threads


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    refused = [item for item in items if is_refused(item)]
    if refused:
        config.hook.pytest_deselected(items=refused)
        items[:] = [item for item in items if item not in refused]
    dear: dict[str, list[pytest.Item]] = {}
    for item in items:
        if takes_triton(item) and item.path.stem not in QUICK_WITH_TRITON and not item.get_closest_marker("quick"):
            item.add_marker(pytest.mark.slow)
        elif takes_triton(item) or item.path.stem in IN_PAIRS:
            dear.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for variants in dear.values():
        leave_pairs(variants)
    items.sort(key=lambda item: item.path.stem not in LONG)


def takes_triton(item: pytest.Item) -> bool:
    """Whether it runs Triton's interpreter, as the CUDA kernels on the CPU do for their costs."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("backend") == "triton" or parameters.get("engine") in ("triton", "cuda")


def leave_pairs(variants: list[pytest.Item]) -> None:
    """Mark those of one test's variants as slow whose pairs of parameters' values are all in others.

    A divergence is three solves: one variant is enough to see that they are put together rightly.
    """
    quick = [item for item in variants if not item.get_closest_marker("slow")]
    rows = [item.callspec.params if hasattr(item, "callspec") else {} for item in quick]
    thrice = [place for place, row in enumerate(rows) if row.get("objective") == "divergence"]
    once = [place for place in range(len(quick)) if place not in thrice]
    # Values need no hash; one that stands in several combinations is the same object in each.
    keys = [{name: id(value) for name, value in rows[place].items()} for place in once]
    needed = {once[place] for place in covering(keys)}.union(thrice[-1:])
    for place in set(range(len(quick))).difference(needed):
        quick[place].add_marker(pytest.mark.slow)


def is_refused(item: pytest.Item) -> bool:
    """Whether this asks the CUDA kernels for float64, which they have a test for refusing, or they are to be left out."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    left_out = parameters.get("dtype") == torch.float64 or "OTALIGN_WITHOUT_CUDA" in os.environ
    return parameters.get("gpu_backend") == "cuda" and left_out


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many processes as cores that this one may use (taskset, containers); more than eight only use memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(2)  # the cores are shared, but what several threads do is to be tested
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        from .helpers.interpreter import make_quicker

        make_quicker()
    config.addinivalue_line("markers", "unpoisoned: leaves uninitialised memory as torch gives it")
