"""What the compiler makes of the Triton kernels: how many variants, how they read memory, and what spills. No GPU is needed.

Programs that compile run in processes of their own, without the interpreter.
"""

from __future__ import annotations

import copy
import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from otalign.triton_kernels import heuristics, launch, runtime
from triton.backends.amd.compiler import HIPBackend

import otalign

from ..helpers.processes import BENCHMARKS, program, run_compiler

# Which variants --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_changing_lengths_compile_few_variants():
    """200 batches of random sizes, forward and backward, as in training: the number of variants soon stops growing."""
    counts = json.loads(run_compiler(program("count_variants")))
    assert counts[-1] <= 60
    assert counts[-1] - counts[99] <= 5


def test_launcher_and_triton_agree_on_variants():
    """Calls that Triton would compile differently never share a cached kernel, for any types, strides and alignment."""
    assert int(run_compiler(program("launch_keys"))) > 200


@pytest.mark.slow
def test_strides_beyond_32_bits_compile():
    """A stride that needs 64 bits is an argument of 64 bits, in a variant of its own."""
    found = json.loads(run_compiler(program("wide_strides")))
    both = ["other_item", "own_item"]
    assert found == {
        "cost_kernel": ["x_item", "y_item"],
        "points_gradient_kernel": both,
        "barycentric_kernel": both[:1],
    }


class CountingKernel:
    """Stands for a kernel of Triton, and for what it compiles: counts calls that look for a variant and calls of one."""

    def __init__(self):
        self.searches = self.reuses = 0

    def __getitem__(self, grid):
        def call(*arguments, **named):
            self.searches += bool(named)
            self.reuses += not named
            return self

        return call


@pytest.mark.unpoisoned  # of gigabytes that are reserved, none is touched
@pytest.mark.parametrize(
    "hip, stride, reused",
    [
        (False, 64, True),
        (False, 2**31 - 64, True),
        (False, 2**31 + 64, False),
        (True, 64, True),
        (True, 2**29, True),
        (True, 2**30, False),
    ],
)
def test_numbers_beyond_32_bits_never_reuse_a_variant(monkeypatch, hip, stride, reused):
    """A kept variant for 32 bits would read the wrong numbers. Strides may need more, and for HIP the bytes of a tensor.

    The stride is that of items of two bytes, so that 2^30 makes more than 2 GiB.
    """
    monkeypatch.setattr(runtime, "HIP", hip)
    launches = []
    monkeypatch.setattr(runtime.Kernel, "launch", lambda kernel, *arguments: launches.append((kernel, arguments)))
    for step in (32, stride):
        x = torch.empty_strided((2, 2, 16), (step, 16, 1), dtype=torch.bfloat16).requires_grad_()
        y = torch.zeros(2, 3, 16, dtype=torch.bfloat16)
        torch.autograd.grad(otalign.sinkhorn_loss(x, y, max_iter=1, backend="triton"), x)
    near, far = launches[: len(launches) // 2], launches[len(launches) // 2 :]
    strided = 0
    for (kernel, first), (same, second) in zip(near, far, strict=True):
        assert same is kernel
        fake, counting = copy.copy(kernel), CountingKernel()
        fake.function, fake.compiled = counting, {}
        for arguments in (first, first, second):
            fake._launch(*arguments)
        reads_points = stride in fake._integers(second[1])
        strided += reads_points
        expected = (1, 2) if reused or not reads_points else (2, 1)
        assert (counting.searches, counting.reuses) == expected
    assert strided == 2, "the cost and the gradient by x"


@pytest.mark.parametrize("size", [0, 1, 2**31 - 1, 2**31, 2**33])
@pytest.mark.parametrize("part", [slice(None), slice(0, 1)])
def test_launcher_and_triton_agree_on_32_bit_offsets(size, part):
    """For AMD's GPUs, Triton compiles for the size of the whole storage, which views share."""
    tensor = torch.empty(size, dtype=torch.int8, device="meta")[part]
    assert runtime.within_2_gib(tensor) == HIPBackend.is_within_2gb(tensor) == (size < 2**31)


def test_amd_gets_one_program_an_item_and_warps_of_64_lanes(monkeypatch):
    """Programs cannot wait for each other there, however many multiprocessors there are."""
    properties = SimpleNamespace(multi_processor_count=304, warp_size=64)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    gpu = torch.device("cuda", 0)
    for hip, expected in ((True, 1), (False, 304)):
        monkeypatch.setattr(runtime, "HIP", hip)
        assert runtime.processors.__wrapped__(gpu) == expected
        assert runtime.lanes.__wrapped__(gpu) == 64
    monkeypatch.setattr(runtime, "HIP", True)
    assert runtime.generation.__wrapped__(gpu) == 0
    config = heuristics.launch_config(1, 3000, 100, double=False, relaxed=False, processors=1, generation=0, lanes=64)
    assert config.programs == 1
    assert "launch_cooperative_grid" not in launch.cooperative(config)


# Registers and shared memory -------------------------------------------------------------------------------------------


def reports(path: Path, *arguments: str) -> list[dict[str, str]]:
    run_compiler(str(BENCHMARKS), "variants", "--out", str(path), *arguments)
    with path.open() as file:
        return list(csv.DictReader(file))


SHARED = {
    "80": 163 * 1024,
    "89": 99 * 1024,
    "90": 227 * 1024,
    "100": 227 * 1024,
    "120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}  # bytes of shared memory for a program


AMD = ("gfx942", "gfx950")


def most_registers(row: dict[str, str]) -> int:
    """Registers that a thread may have: on AMD's chips, 131072 are shared by all threads of a program."""
    return min(512, 131072 // (64 * int(row["warps"]))) if row["arch"] in AMD else 255


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100", "120", *AMD])
def test_kernel_matrix_stays_in_registers(tmp_path, arch):
    """No variant that keeps the kernel matrix in registers spills: on NVIDIA since Ampere, and on AMD's CDNA 3 and 4.

    This includes the variants that mix.
    """
    rows = reports(tmp_path / "a.csv", "--arch", arch, "--only", "sinkhorn.*GROUPS=[1-9]")
    assert {row["arch"] for row in rows} == {arch}
    plain, mixed = (8, 8) if arch in AMD else (15, 10) if arch == "80" else (20, 18)
    assert sum("ACCELERATE=False" in row["label"] for row in rows) == plain
    assert sum("ACCELERATE=True" in row["label"] for row in rows) == mixed
    for row in rows:
        assert int(row["spills"]) == 0, row
        assert int(row["registers"]) <= most_registers(row), row
        assert int(row["shared"]) <= SHARED[row["arch"]], row
        assert int(row["stack"]) == 0 or arch not in AMD, row


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_variants_compile(tmp_path, arch):
    """With memory that the chip has; on AMD's also without scratch, up to 4096 columns, in float64 up to 2048."""
    rows = reports(tmp_path / "a.csv", "--arch", arch)
    assert len(rows) > (550 if arch in AMD else 700)
    for row in rows:
        assert int(row["shared"]) <= SHARED[arch], row
        if arch in AMD and columns(row) <= (2048 if row["label"].startswith("fp64") else 4096):
            assert (int(row["stack"]), int(row["spills"])) == (0, 0), row


def columns(row: dict[str, str]) -> int:
    """Columns that a program holds at once."""
    found = re.search(r"BLOCK_M=(\d+)", row["label"])
    return int(found[1]) if found else 0


WIDE, NARROW = "BLOCK_M=128 ROWS=64 GROUPS=2 MAX_PROGRAMS=1", "BLOCK_M=64 ROWS=64 GROUPS=4 MAX_PROGRAMS="


@pytest.mark.parametrize("arch", [pytest.param("120", marks=pytest.mark.slow), "gfx942"])
def test_tightest_variants_do_not_spill(arch):
    """Plain iterations with 128 rows of 128 columns, and mixed ones with 256 relaxed rows of 64 columns.

    (The slow tests above try all.)
    """
    rows = json.loads(run_compiler(program("compile_tightest"), arch))
    tiles = [WIDE, NARROW + "1"] if arch in AMD else [NARROW + "4"]
    for row, tile in zip(rows, tiles, strict=True):
        relaxed = mixes = tile != WIDE
        assert f"{tile} UNBALANCED={relaxed} SYMMETRIC=False ACCELERATE={mixes}" in row["label"]
        assert (row["stack"], row["spills"]) == (0, 0), row
        assert row["registers"] <= most_registers(row | {"arch": arch}), row
        assert row["shared"] <= SHARED[arch], row


def mixing(relaxed: bool, generation: int, lanes: int = 32) -> dict[tuple[int, int, int], bool]:
    """Whether the iterations mix, if asked to: by columns, rows a program, and programs an item."""
    found = {}
    for tile in heuristics.TILE_SHAPES:
        for programs in (1, 2, 4, 8, 16):
            config = heuristics.launch_config(
                1, programs * tile.rows, tile.width, double=False, relaxed=relaxed, processors=programs,
                generation=generation, lanes=lanes, mixes=True,
            )  # fmt: skip
            if config.groups and config.programs == programs:
                found[config.block_m, config.groups * config.rows, programs] = config.mixes
    return found


def test_where_iterations_are_plain():
    """In registers, iterations mix except where the slow tests above would find spills."""
    for generation in (90, 100, 120):
        strict, relaxed = mixing(False, generation), mixing(True, generation)
        assert [shape for shape, mixes in strict.items() if not mixes] == [(128, 192, 8), (128, 192, 16)]
        assert [shape for shape, mixes in relaxed.items() if not mixes] == [(64, 256, 1)]
    assert all(mixing(False, 80).values())
    assert {columns for (columns, *_), mixes in mixing(True, 80).items() if mixes} == {32}
    for relaxed in (False, True):
        assert all(mixing(relaxed, 0, lanes=64).values())


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("relaxed", [False, True])
def test_wide_tiles_on_amd_take_four_warps(relaxed, mixes):
    """If they need more than 256 registers. Their rows are the same."""
    for width in (64, 128):
        config = heuristics.launch_config(
            4, 128, width, double=False, relaxed=relaxed, processors=1, generation=0, lanes=64, mixes=mixes
        )
        assert config.warps == (4 if width == 128 and (relaxed or mixes) else 8)
        assert config.groups * config.rows == 128


# Accesses to memory ----------------------------------------------------------------------------------------------------

OF_POINTS = (
    "cost_kernel",
    "points_gradient_kernel x",
    "points_gradient_kernel y",
    "barycentric_kernel x",
    "barycentric_kernel y",
)
OF_COSTS = ("sinkhorn_kernel", "adjoint_kernel", "plan_kernel", "assign_kernel")


@pytest.fixture(scope="module")
def shape_a():
    """The compiled kernels of shape A for Hopper: their accesses, constants and options, by type of points and kernel."""
    return json.loads(run_compiler(program("read_machine_code")))


def copies(found, elements: int, bytes_of_each: int) -> int:
    """Instructions with which a program's threads read a tile, 16 bytes each."""
    return elements * bytes_of_each // (16 * 32 * found["num_warps"])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", OF_POINTS)
@pytest.mark.parametrize("dtype, size", [("bf16", 2), ("fp32", 4)])
def test_points_and_costs_are_copied_16_bytes_at_a_time(shape_a, dtype, size, kernel):
    """Copies run several steps ahead of the products, and nothing spills."""
    found = shape_a[dtype][kernel]
    if kernel == "cost_kernel":
        tile = copies(found, (found["BLOCK_N"] + found["BLOCK_M"]) * found["BLOCK_D"], size)
    else:
        coefficients = 4 if kernel.startswith("barycentric") else size  # or costs, of which the plan is made
        tile = copies(found, found["BLOCK_K"] * found["BLOCK_D"], size) + copies(
            found, found["BLOCK_R"] * found["BLOCK_K"], coefficients
        )
    assert found["loads_2"] == 0
    assert found["copies_16"] == tile * found["num_stages"]
    assert found["spills"] == 0


@pytest.mark.slow
def test_tiles_fit_into_99_kib(shape_a):
    """On chips with less shared memory than Hopper, such as an RTX 4090, kernels with Hopper's tiles would not start."""
    assert set(shape_a["ada"]) == {"cost_kernel", "points_gradient_kernel x", "points_gradient_kernel y"}
    for found in shape_a["ada"].values():
        assert found["shared"] <= SHARED["89"]


@pytest.mark.slow
def test_matrix_of_shape_a_stays_in_registers(shape_a):
    """(The slow tests above try all.)"""
    found = shape_a["fp32"]["sinkhorn_kernel"]
    assert found["GROUPS"] * found["ROWS"] * 4 >= 750
    assert found["spills"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kernel", OF_COSTS)
def test_costs_are_loaded_four_at_a_time(shape_a, kernel):
    found = shape_a["fp32"][kernel]
    if kernel in ("sinkhorn_kernel", "adjoint_kernel"):
        tile, passes = copies(found, found["BLOCK_N"] * found["BLOCK_M"], 4), 3
        rows = found.get("GROUPS", 0) * found.get("ROWS", 0)
        expected = passes * tile + copies(found, rows * found["BLOCK_M"], 4)
    else:
        expected = copies(found, found["BLOCK_R"] * found["BLOCK_K"], 4)
    assert expected >= 8
    assert found["loads_16"] + found["copies_16"] >= expected


@pytest.mark.slow
def test_an_exchange_loads_all_parts_at_once(shape_a):
    """The column sums of four programs in four slabs: no barrier stands between these loads."""
    found = shape_a["fp32"]["sinkhorn_kernel"]
    assert found["MAX_PROGRAMS"] == 4
    assert found["exchanged_at_once"] >= 4 * found["BLOCK_M"] // 32


def test_exact_passes_take_many_rows_a_step():
    """While the kernel matrix is in registers. Eight rows a step took most of the time of an early exit."""
    for tile in heuristics.TILE_SHAPES:
        for programs in (1, 4, 16):
            config = heuristics.launch_config(
                1, programs * tile.rows, tile.width, double=False, relaxed=False, processors=132, generation=90
            )
            assert config.block_n * max(128, tile.width) >= 32 * 128 or not config.groups


def test_item_strides_are_part_of_the_key(monkeypatch):
    """A kernel that copies 16 bytes at a time is not launched on items that start anywhere, even if their rows are aligned."""
    keys: dict[str, list[object]] = {}

    def record(self, grid, values, *_):
        keys.setdefault(self.function.fn.__name__, []).append(self.key(values))

    monkeypatch.setattr(runtime.Kernel, "launch", record)
    for stride in (16 * 64, 16 * 64 + 1):
        x = torch.zeros(2 * stride, dtype=torch.bfloat16).as_strided((2, 16, 64), (stride, 64, 1))
        otalign.solve(x, x, backend="triton").barycentric_x()
    for kernel in ("cost_kernel", "barycentric_kernel"):
        aligned, odd = keys[kernel]
        assert aligned != odd
    assert len(set(keys["sinkhorn_kernel"])) == 1


def test_table_of_accesses_is_made_from_the_committed_results(monkeypatch):
    """The page shows what the report makes of benchmarks/results/accesses.csv, and 16-bit points have no narrow loads now."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from codegen import accesses

    page = (accesses.ROOT / "docs/performance.md").read_text()
    shown = page.split("<!-- accesses -->\n")[1].split("\n<!-- /accesses -->")[0]
    rows = accesses.read()
    assert shown == "\n".join(accesses.table(rows))
    assert {row["triton"] for row in rows} >= {"3.6.0", "3.9.0"}
    assert not any(int(row["loads_2"]) for row in rows if row["commit"] == rows[-1]["commit"])


# Launches --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_call_makes_six_launches():
    """Cost, iterations, and for each side coefficients and a gradient. The second call uses cached kernels."""
    said = run_compiler(str(BENCHMARKS), "launch", "--repeats", "3")
    assert "launches: 6.0" in said
