"""Is it told truly what runs on a GPU and its driver, and does a first call load no more than it needs?

The extension's part is tested with a fake CUDA runtime (tests/cuda_on_cpu/fake_runtime.py), Python's part with a fake torch.cuda.
"""

from __future__ import annotations

import contextlib
import re
import types

import pytest
import torch

from otalign import backends
from otalign.cli import doctor

from ..cuda_on_cpu.fake_runtime import Gpu, allow_early_launch, force
from ..cuda_on_cpu.host_cuda import ACCELERATED, ADJOINT, STRICT

SHAPES = {32: (0, 1), 64: (2, 3), 128: (4, 5), 256: (6,), 512: (7,), 1024: (8,)}
NO_IMAGE, UNSUPPORTED_PTX, NO_MEMORY, NO_JIT = 209, 222, 2, 223  # of cudaError_t
OTHER_CODE = (
    r"the extension was built for compute capability 8\.0 9\.0a 10\.0\+PTX, and the GPU has 12\.0; "
    r"build the extension with TORCH_CUDA_ARCH_LIST=12\.0 \(cudaError: error {}\)"
)

# The extension -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"driver": 0}, "no NVIDIA driver was found"),
        (
            {"driver": 12020},
            r"the driver supports CUDA 12\.2, but the extension was built with CUDA 13\.0; update the driver, or build the "
            r"extension with an older toolkit \(cudaError: error 35\)",
        ),
        ({"major": 7, "minor": 5}, r"the kernels need compute capability 8\.0, and the GPU has 7\.5"),
        ({"major": 12, "load_error": NO_IMAGE}, OTHER_CODE.format(NO_IMAGE)),
        ({"major": 12, "load_error": UNSUPPORTED_PTX}, OTHER_CODE.format(UNSUPPORTED_PTX)),
        ({"major": 12, "load_error": NO_JIT}, OTHER_CODE.format(NO_JIT)),
        ({"load_error": NO_MEMORY}, "cudaError: error 2"),
    ],
    ids=["no driver", "old driver", "old GPU", "no code", "newer PTX", "no JIT", "no memory"],
)
def test_why_the_kernels_cannot_run(changes, reason):
    found = Gpu(**changes).reason_missing()
    assert found is not None
    assert re.fullmatch(reason, found), found


@pytest.mark.parametrize(
    "changes", [{}, {"major": 8, "minor": 9, "code": 80}, {"driver": 13010}, {"capturing": 1}], ids=str
)
def test_the_kernels_can_run(changes):
    gpu = Gpu(**changes)
    assert gpu.reason_missing() is None
    assert not gpu.loaded(), "the query needs none of the large kernels"
    assert gpu.capture_mode() == 0, "as before"


@pytest.mark.parametrize("size_y", [1, 32, 33, 128, 200, 512, 1024])
def test_a_call_loads_only_the_kernels_that_it_may_choose(size_y):
    gpu = Gpu()
    shapes = SHAPES[min(width for width in SHAPES if width >= size_y)]
    assert gpu.configure(8, 100, size_y).shape in shapes
    assert gpu.loaded() == {(shape, STRICT) for shape in shapes}
    gpu.configure(8, 100, size_y, ADJOINT)
    assert gpu.loaded() == {(shape, kind) for shape in shapes for kind in (STRICT, ADJOINT)}


def test_the_chosen_kernel_is_launched():
    gpu = Gpu()
    config = gpu.configure(8, 100, 100)
    gpu.solve(8, 100, 100)
    assert gpu.launched(config.shape, STRICT)


def test_a_first_solve_may_be_captured():
    """It loads kernels, which is allowed in a relaxed mode only. Afterwards the mode is as before."""
    gpu = Gpu(capturing=1)
    gpu.solve(8, 100, 100)
    assert gpu.loaded() == {(4, STRICT), (5, STRICT)}
    assert gpu.capture_mode() == 0


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ({}, 16),
        ({"largest_cluster": 8}, 8),
        ({"processors": 16, "largest_cluster": 1}, 1),  # a slice of a GPU (MIG) in which no cluster finds room
        ({"code": 80}, 1),  # code from PTX for 8.0 has no clusters
        ({"major": 12, "code": 120, "shared": 99 * 1024, "processors": 170, "largest_cluster": 8}, 8),
    ],
    ids=["H100", "no cluster of 16", "MIG", "code for 8.0", "RTX 5090"],
)
def test_every_size_can_be_launched(changes, largest):
    gpu = Gpu(**changes)
    clusters = set()
    for items in (1, 32, 500):
        for size_x in (1, 300, 3000):
            for size_y in (20, 128, 1024):
                config = gpu.configure(items, size_x, size_y)
                assert 1 <= config.in_flight <= items
                clusters.add(config.cluster)
    assert max(clusters) == largest


def test_too_long_items_load_nothing():
    gpu = Gpu()
    with pytest.raises(RuntimeError, match="no kernel fits: y has items of up to 1025 points, 1024 are the most"):
        gpu.configure(8, 100, 1025)
    assert not gpu.loaded()


# Launches that may begin early ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(
    ("changes", "early"),
    [
        ({}, True),
        ({"capturing": 1}, True),
        ({"largest_cluster": 1}, True),  # one block an item, but code that waits
        ({"major": 12, "code": 120}, True),
        ({"major": 8, "code": 80}, False),
        ({"code": 80}, False),  # code from PTX for 8.0 does not wait
        ({"cudart": 12030, "driver": 12030}, True),
        ({"cudart": 12030, "driver": 12020}, False),
        ({"cudart": 12020, "driver": 13000}, False),
    ],
    ids=[
        "H100",
        "capturing",
        "no room for clusters",
        "RTX 5090",
        "A100",
        "code for 8.0",
        "12.3",
        "older driver",
        "older",
    ],
)
def test_kernels_begin_early_where_their_code_waits(changes, early, adjoint):
    """And where a graph may have such an edge. The attribute stands beside that of the cluster, and changes nothing else."""
    gpu = Gpu(**changes)
    config = gpu.configure(32, 750, 128, ADJOINT if adjoint else STRICT)
    for _ in range(2):  # the second launch is that of a configuration that is kept
        gpu.solve(32, 750, 128, adjoint=adjoint)
        assert gpu.launched(config.shape, ADJOINT if adjoint else STRICT)
        assert gpu.launched_early() == early
        assert gpu.launched_cluster() == (config.cluster if config.cluster > 1 else 0)


def test_early_launches_can_be_switched_off():
    """For a benchmark, which compares."""
    gpu = Gpu()
    config = gpu.configure(32, 750, 128)
    for allowed in (False, True):
        allow_early_launch(allowed)
        gpu.solve(32, 750, 128)
        assert gpu.launched_early() == allowed
        assert gpu.launched_cluster() == config.cluster


# A form that a benchmark asks for ---------------------------------------------------------------------------------------------


@pytest.fixture
def forced():
    """`force` until the test ends."""
    yield force
    force(-1, 0)


@pytest.mark.parametrize("kind", range(ADJOINT + 1))
@pytest.mark.parametrize("form", [(4, 6), (5, 1), (7, 3), (8, 16)], ids=str)
def test_a_form_takes_the_place_of_the_choice(form, kind, forced):
    gpu = Gpu()
    forced(*form)
    config = gpu.configure(32, 750, 128, kind)
    assert (config.shape, config.cluster) == form
    assert config.in_flight > 0
    assert gpu.loaded() == {(form[0], kind)}, "no other kernel"


def test_shape_a_in_two_blocks_a_processor(forced):
    """128 threads with 255 registers: two blocks fit. All rows are in registers, and all items run at once."""
    forced(4, 6)
    config = Gpu().configure(32, 750, 128)
    assert config.in_flight == 32
    assert config.in_flight * config.cluster > 132
    assert config.shared == 0


def test_chosen_and_forced_forms_are_kept_apart(forced):
    """The same batch on the same device, in any order."""
    gpu = Gpu()
    chosen = bytes(gpu.configure(32, 750, 128))
    found = {form: [] for form in ((4, 6), (4, 2), (5, 6))}
    for _ in range(2):
        for form in found:
            forced(*form)
            config = gpu.configure(32, 750, 128)
            gpu.solve(32, 750, 128)
            assert gpu.launched(form[0], STRICT)
            found[form].append(bytes(config))
            forced(-1, 0)
            assert bytes(gpu.configure(32, 750, 128)) == chosen
    assert all(first == second for first, second in found.values())
    assert len({chosen, *(first for first, _ in found.values())}) == 4


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ((9, 1), "expected a tile shape from 0 to 8, or -1 for the heuristics, got 9"),
        ((4, 0), "expected a cluster of 1 to 16 blocks, got 0"),
        ((4, 17), "expected a cluster of 1 to 16 blocks, got 17"),
    ],
)
def test_forms_that_no_batch_can_have(form, message, forced):
    gpu = Gpu()
    chosen = bytes(gpu.configure(32, 750, 128))
    with pytest.raises(RuntimeError) as refusal:
        forced(*form)
    assert str(refusal.value) == message
    assert bytes(gpu.configure(32, 750, 128)) == chosen, "nothing has changed"


@pytest.mark.parametrize(
    ("changes", "form", "kind", "message"),
    [
        ({}, (3, 4), STRICT, r"tile shape 3 in clusters of 4 has 64 columns, and y has items of up to 128 points"),
        (
            {"code": 80},
            (4, 6),
            STRICT,
            r"tile shape 4 in clusters of 6: this chip, or the code that its driver has loaded, has no clusters of blocks",
        ),
        (
            {"largest_cluster": 8},
            (4, 16),
            ADJOINT,
            r"tile shape 4 in clusters of 16 needs \d+ bytes of shared memory for a block, and finds no room on this chip",
        ),
        (
            {"shared": 64 * 1024},
            (8, 1),
            ACCELERATED,
            r"tile shape 8 in clusters of 1 needs \d+ bytes of shared memory for a block, which has at most 65536",
        ),
    ],
    ids=["columns", "no clusters", "no room", "shared memory"],
)
def test_forms_that_a_batch_cannot_have_are_refused(changes, form, kind, message, forced):
    """Nothing else is launched in its place, and the heuristics choose afterwards."""
    gpu = Gpu(**changes)
    forced(*form)
    for _ in range(2):  # a refusal is not kept as a configuration
        with pytest.raises(RuntimeError) as refusal:
            gpu.configure(32, 750, 128, kind)
        assert re.fullmatch(message, str(refusal.value))
    forced(-1, 0)
    assert gpu.configure(32, 750, 128, kind).in_flight > 0


# Python --------------------------------------------------------------------------------------------------------------------


class Machine:
    """GPUs by their compute capability, and what the extension says of each."""

    def __init__(self, *capabilities: tuple[int, int]) -> None:
        self.capabilities, self.current = capabilities, 0
        self.reasons: dict[int, str | None] = {}
        self.asked: list[tuple[int, int]] = []  # device, and the current one at that time
        self.cuda_reason, self.cuda_architectures = "", "8.0 9.0a"

    def cuda_reason_missing(self, index: int) -> str | None:
        self.asked.append((index, self.current))
        return self.reasons.get(index)

    def cuda_versions(self) -> tuple[int, int]:
        return 13000, 12020

    @contextlib.contextmanager
    def device(self, index: int):
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.fixture
def machine(monkeypatch):
    """Pretends that torch sees an A100, a T4 and a Titan V, and that Triton compiles for them."""
    machine = Machine((8, 0), (7, 5), (7, 0))

    def capability(index: int) -> tuple[int, int]:
        return machine.capabilities[index]

    def properties(index: int) -> types.SimpleNamespace:
        major, minor = capability(index)
        return types.SimpleNamespace(
            name=f"GPU {index}", total_memory=2**34, major=major, minor=minor, gcnArchName="gfx942"
        )

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: len(machine.capabilities),
        "current_device": lambda: machine.current,
        "get_device_capability": capability,
        "get_device_properties": properties,
        "device": machine.device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    monkeypatch.setattr(backends.extension, "reason_missing", lambda: None)
    monkeypatch.setattr(backends.extension, "module", lambda: machine)
    checks = (backends._try_cuda, backends._try_triton, backends._why_no_triton)
    for check in checks:
        check.cache_clear()
    yield machine
    for check in checks:
        check.cache_clear()


def test_every_gpu_is_asked_for_itself(machine):
    """An A100 runs what the other GPUs do not, whichever is the current one."""
    machine.reasons = {1: "too old", 2: "too old"}
    first, second, third = (torch.device("cuda", index) for index in range(3))
    assert backends.resolve("cuda", first) == "cuda"
    with pytest.raises(RuntimeError, match=r"backend 'cuda' is not available: cuda:1: too old"):
        backends.resolve("cuda", second)
    assert machine.asked == [(0, 0), (1, 1)], "of the current device"
    assert machine.current == 0
    assert backends.resolve("auto", first) == backends.resolve("triton", second) == "triton"
    with pytest.raises(RuntimeError, match=r"the kernels need compute capability 7\.5, and cuda:2 has 7\.0"):
        backends.resolve("triton", third)


def test_available_tells_of_the_current_gpu(machine):
    machine.reasons = {1: "too old"}
    assert backends.available()["cuda"] is None
    machine.current = 1
    assert backends.available() == {"reference": None, "cpu": None, "triton": None, "cuda": "cuda:1: too old"}
    machine.current = 2
    assert backends.available()["triton"] == "the kernels need compute capability 7.5, and cuda:2 has 7.0"
    assert backends.available()["cuda"].startswith("costs and gradients are made by Triton: the kernels need")


def test_auto_is_the_reference_on_a_gpu_that_triton_does_not_know(machine):
    backends._warn_of_reference.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow reference, .* cuda:2 has 7"):
        assert backends.resolve("auto", torch.device("cuda", 2)) == "reference"


def test_a_gpu_that_can_is_asked_once_and_one_that_cannot_again(machine):
    machine.reasons = {1: "cudaErrorMemoryAllocation"}
    for index in (0, 0, 1, 1):
        backends.reason_missing("cuda", torch.device("cuda", index))
    assert machine.asked == [(0, 0), (1, 1), (1, 1)]
    machine.reasons = {}
    assert backends.reason_missing("cuda", torch.device("cuda", 1)) is None


def test_the_error_of_torch_is_a_reason(machine, monkeypatch):
    def fail(*_):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.\nUse spawn.")

    monkeypatch.setattr(torch.cuda, "current_device", fail)
    assert backends.available()["triton"] == "Cannot re-initialize CUDA in forked subprocess."
    assert backends.available()["cuda"] == "Cannot re-initialize CUDA in forked subprocess."


def test_gpus_of_another_maker_run_no_cuda(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backends.available()["cuda"] == "no NVIDIA GPU was found"
    assert backends.available()["triton"] is None
    assert ("cuda:0", "GPU 0, gfx942, 16 GiB") in list(doctor._devices())


def test_the_doctor_tells_of_every_gpu(machine, monkeypatch):
    machine.reasons = {1: "too old", 2: "too old"}
    monkeypatch.setattr(machine, "openmp", True, raising=False)
    for name in ("compiler", "simd"):
        monkeypatch.setattr(machine, name, name, raising=False)
    monkeypatch.setattr(machine, "blas", lambda: "blas", raising=False)
    report = list(doctor.report())
    assert ("its cuda", "13.0, for compute capability 8.0 9.0a; the driver supports 12.2") in report
    assert [text for label, text in report if label.startswith("cuda:")] == [
        "GPU 0, compute capability 8.0, 16 GiB",
        "GPU 1, compute capability 7.5, 16 GiB",
        "backend cuda does not run here: cuda:1: too old",
        "GPU 2, compute capability 7.0, 16 GiB",
        "backend triton does not run here: the kernels need compute capability 7.5, and cuda:2 has 7.0",
        "backend cuda does not run here: cuda:2: too old",
    ]
    machine.cuda_reason = "nvcc was not found"
    told = [text for label, text in doctor.report() if "nvcc was not found" in text]
    assert told == ["missing: otalign._C was built without CUDA: nvcc was not found"], "once, not for every GPU"
