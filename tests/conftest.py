"""Fixtures and settings that all tests share."""

import os
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch

import otalign.backends

from .helpers.combinations import covering

collect_ignore = ["helpers/programs"]  # some import what only the tests that run them put on the path

# macOS has no Triton. With this variable, and only with it, tests that need Triton are left out.
WITHOUT_TRITON = "OTALIGN_WITHOUT_TRITON" in os.environ
if WITHOUT_TRITON:
    needing_triton = ("availability", "compiled", "cuda", "interpreter", "placements", "rehearsal", "triton")
    collect_ignore += [f"backends/test_{name}.py" for name in needing_triton]

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=20, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=["reference", "cpu", "triton"], scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend; Triton's kernels run in its interpreter. A backend that is not built fails its tests, it skips none."""
    return request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU for tests marked `gpu`."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Uninitialised memory is filled with NaN (integers: the largest), so that a missing write to an output is visible.

    torch fills it only while deterministic algorithms are on. Tests whose results these would change are marked `unpoisoned`.
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    if otalign.backends.reason_missing("cpu") is None:
        engine = otalign.backends.extension.module()
        # The engine has its own pool of memory, which torch does not fill.
        monkeypatch.setattr(engine, "PooledMemory", SimpleNamespace(new=poisoned(engine.PooledMemory.new)))
    yield
    torch.use_deterministic_algorithms(False)


def poisoned(allocate: Callable[[int], Any]) -> Callable[[int], Any]:
    def block(size: int) -> Any:
        memory = allocate(size)
        torch.frombuffer(memory, dtype=torch.uint8).fill_(0xFF)  # NaN in every float type
        return memory

    return block


# A solve in Triton's interpreter takes a second. Tests that use it are slow, except those in these modules and those marked
# `quick`: of their variants, `make test` runs a subset that contains every pair of parameter values, and `make test-all` runs all.
QUICK_WITH_TRITON = (
    "test_agreement",
    "test_agreement_gradients",
    "test_compile",
    "test_ops",
)
LONG = (
    "test_triton",
    "test_compiled",
    "test_rehearsal",
    "test_cuda",
    "test_study",
    "test_distributed",
    "test_trainers",
)  # they start first, or one process would still run them when the others are done
REHEARSAL = "test_rehearsal"  # `make test` runs one variant of each of its tests
IN_PAIRS = ("test_cuda", "test_triton")  # their programs run concurrently, as fibers or threads, which takes long


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselected = [item for item in items if never_applies(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    costly: dict[str, list[pytest.Item]] = {}
    rehearsed: dict[str, pytest.Item] = {}
    for item in items:
        quick = item.path.stem in QUICK_WITH_TRITON or item.get_closest_marker("quick")
        if item.path.stem == REHEARSAL:
            if rehearsed.setdefault(item.nodeid.partition("[")[0], item) is not item:
                item.add_marker(pytest.mark.slow)
        elif runs_interpreter(item) and not quick:
            item.add_marker(pytest.mark.slow)
        elif runs_interpreter(item) or item.path.stem in IN_PAIRS:
            costly.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for variants in costly.values():
        mark_redundant_variants(variants)
    items.sort(key=lambda item: item.path.stem not in LONG)


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def runs_interpreter(item: pytest.Item) -> bool:
    """Whether the test runs Triton's interpreter. The CUDA kernels on the CPU do so too, for their costs."""
    parameters = parameters_of(item)
    return parameters.get("backend") == "triton" or parameters.get("engine") in ("triton", "cuda")


def mark_redundant_variants(variants: list[pytest.Item]) -> None:
    """Mark those variants of one test as slow whose pairs of parameter values all occur in other variants.

    A divergence is three solves. One variant with it is enough to test how these are combined.
    """
    quick = [item for item in variants if not item.get_closest_marker("slow")]
    rows = [parameters_of(item) for item in quick]
    divergences = [place for place, row in enumerate(rows) if row.get("objective") == "divergence"]
    others = [place for place in range(len(quick)) if place not in divergences]
    # Values may have no hash. A value in several combinations is the same object in each.
    keys = [{name: id(value) for name, value in rows[place].items()} for place in others]
    needed = {others[place] for place in covering(keys)}.union(divergences[-1:])
    for place in set(range(len(quick))).difference(needed):
        quick[place].add_marker(pytest.mark.slow)


def never_applies(item: pytest.Item) -> bool:
    """Whether the test is for CUDA with float64, which it refuses (another test checks that), or for what is left out."""
    if WITHOUT_TRITON and (runs_interpreter(item) or item.get_closest_marker("triton")):
        return True
    parameters = parameters_of(item)
    backend = parameters.get("gpu_backend")
    left_out = backend in os.environ.get("OTALIGN_WITHOUT", "").split(",")
    types = [getattr(value, "dtype", value) for value in parameters.values()]
    return left_out or (backend == "cuda" and torch.float64 in types)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without a GPU, or with kernels that would run in Triton's interpreter, tests marked `gpu` fail: none is skipped."""
    if item.get_closest_marker("gpu"):
        assert torch.cuda.is_available(), "this test needs a GPU"
        assert os.environ.get("TRITON_INTERPRET") != "1", "this test needs compiled kernels: select it by `-m gpu`"


def selects_gpu_only(expression: str) -> bool:
    """Whether the option -m selects only tests marked `gpu`, as "gpu and not slow" does."""
    if not expression:
        return False
    unmarked: list[dict[str, bool]] = [defaultdict(lambda held=held: held, gpu=False) for held in (False, True)]
    return not any(eval(expression, {"__builtins__": {}}, marks) for marks in unmarked)


def pytest_report_header() -> list[str]:
    return ["OTALIGN_WITHOUT_TRITON: tests of the Triton and CUDA kernels are left out"] if WITHOUT_TRITON else []


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process for each core that this process may use (taskset, containers), at most eight: more only use memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(2)  # processes share the cores, but the tests need more than one thread
    if not selects_gpu_only(config.option.markexpr) and not WITHOUT_TRITON:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        from .helpers.interpreter import make_quicker

        make_quicker()
