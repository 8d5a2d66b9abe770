"""The Triton kernels beyond what every backend is tested for: programs that share an item, rules, compiled variants."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from otalign.triton_kernels import exchange, heuristics, launch, runtime
from otalign.triton_kernels.batch import Batch, Side

import otalign

from .interpreter import together
from .problems import close, draw, identical

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# Programs that share an item -------------------------------------------------------------------------------------------


@pytest.fixture
def processors(monkeypatch):
    def pretend(count: int) -> None:
        monkeypatch.setattr(runtime, "processors", lambda device: count)
        monkeypatch.setattr(runtime, "generation", lambda device: 0)

    return pretend


@pytest.fixture
def small_tiles(monkeypatch):
    """Kernel matrices of 16 rows a program in registers, so that few rows need several programs."""
    tile = heuristics.TileShape(width=32, groups=2, warps=1, min_programs=1, max_programs=16, max_before_hopper=16)
    monkeypatch.setattr(heuristics, "TILE_SHAPES", (tile,))
    heuristics.launch_config.cache_clear()
    yield
    heuristics.launch_config.cache_clear()


def everything(batch, backend="triton", **options):
    """What a solve gives, and gradients through the implicit system."""
    batch = batch.requires_grad()
    result = otalign.solve(*batch, backend=backend, **options)
    gradients = torch.autograd.grad(result.value_linear.sum(), (batch.x, batch.y))
    return result.value.detach(), *result.potentials, result.error, result.n_iter, *gradients


@pytest.mark.parametrize("rho", [None, (0.4, math.inf)], ids=["balanced", "relaxed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["registers", "memory"])
@pytest.mark.parametrize("count", [2, 4, 13], ids=lambda count: f"{count} processors")
def test_programs_that_share_an_item(processors, small_tiles, count, dtype, rho):
    """Rows that do not divide, fewer rows than programs, an empty item, more items than programs in flight."""
    batch = draw([30, 1, 3, 0, 16], [9, 5, 1, 4, 7], dtype=dtype)
    batch = batch._replace(x=batch.x[:, :31])
    options = {"reg": 0.2, "tol": 1e-4, "max_iter": 30, "unbalanced": rho}
    processors(count * 5 if count < 13 else count)
    with together(seed=count) as launches:
        actual = everything(batch, **options)
    assert max(launches) > 5, "several programs an item"
    for a, e in zip(actual, everything(batch.to(torch.float64), "reference", **options), strict=True):
        close(a, e, 1e-10 if dtype == torch.float64 else 3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["registers", "memory"])
def test_sharing_programs_absorb_together(processors, small_tiles, dtype):
    """A range of 400 reg makes scalings leave the range of multiply-adds again and again."""
    C = torch.rand(2, 40, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    options = {"reg": 1 / 400, "tol": 0, "max_iter": 25}
    processors(8)
    with together() as launches:
        actual = otalign.solve_cost(C, backend="triton", **options)
    assert max(launches) == 8
    expected = otalign.solve_cost(C.double(), backend="reference", **options)
    close(actual.value, expected.value, 1e-10 if dtype == torch.float64 else 1e-5)
    close(actual.plan(), expected.plan(), 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["registers", "memory"])
def test_order_of_programs_does_not_matter(processors, small_tiles, dtype):
    """Bit for bit the same, whoever comes first: sums are made in the order of ranks."""
    batch = draw([30, 20, 3], [9, 5, 1], dtype=dtype)
    processors(8)
    results = []
    for seed in range(4):
        with together(seed, odds=0.3):
            results.append(everything(batch, reg=0.2, tol=0, max_iter=4))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            identical(a, b)


def test_a_missing_barrier_shows(processors, small_tiles, monkeypatch):
    """The test above can fail: without its barriers the kernel reads what is not there yet."""
    batch = draw([30, 20], [9, 5], dtype=torch.float32)
    processors(8)
    with together():
        expected = everything(batch, reg=0.2, tol=0, max_iter=4)
    monkeypatch.setattr(exchange, "barrier", lambda counter, target: None)
    outcomes = []
    for seed in range(4):
        with together(seed, odds=0.3):
            actual = everything(batch, reg=0.2, tol=0, max_iter=4)
        outcomes.append(all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)))
    assert not all(outcomes)


def test_a_deadlock_shows(processors, small_tiles, monkeypatch):
    """The baton knows when everybody waits: here for one arrival more than there are programs."""
    original = exchange.barrier.fn
    monkeypatch.setattr(exchange, "barrier", lambda counter, target: original(counter, target + 1))
    processors(8)
    with together(), pytest.raises(Exception, match="wait for each other for ever"):
        everything(draw([30, 20], [9, 5], dtype=torch.float32), reg=0.2, tol=0, max_iter=2)


def test_packed_items_share_programs(processors, small_tiles):
    batch = draw([30, 1, 0, 16], [9, 5, 4, 7], dtype=torch.float32)
    processors(16)
    expected = otalign.solve(*batch, reg=0.2, backend="reference")
    with together():
        actual = otalign.solve(**batch.packed(), reg=0.2, backend="triton")
    close(actual.value, expected.value, 1e-5)
    close(
        actual.potentials[0],
        torch.cat([f[:n] for f, n in zip(expected.potentials[0], batch.x_lengths, strict=True)]),
        1e-5,
    )


# Rules -----------------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 20000)


@hypothesis.given(
    items=st.integers(1, 2000),
    size_x=sizes,
    size_y=st.integers(1, heuristics.MAX_SIZE_Y),
    double=st.booleans(),
    relaxed=st.booleans(),
    processors=st.sampled_from([1, 8, 108, 132, 148]),
    generation=st.sampled_from([0, 80, 90, 100]),
    in_memory=st.booleans(),
)
@hypothesis.settings(max_examples=500)
def test_rule_for_the_iterations(items, size_x, size_y, double, relaxed, processors, generation, in_memory):
    choice = heuristics.launch_config(
        items,
        size_x,
        size_y,
        double=double,
        relaxed=relaxed,
        processors=processors,
        generation=generation,
        in_memory=in_memory,
    )
    assert choice.programs in (1, 2, 4, 8, 16)
    assert choice.programs <= choice.max_programs
    assert choice.block_m >= size_y, "a program holds whole rows"
    assert 1 <= choice.in_flight <= items
    if choice.programs > 1:
        assert choice.in_flight * choice.programs <= processors, "or they would wait for programs that never start"
    if choice.groups:
        assert not double and not in_memory
        assert -(-size_x // choice.programs) <= choice.groups * choice.rows, "all rows in registers"
    for number in (choice.block_m, choice.block_n, choice.warps):
        assert number & (number - 1) == 0, "a power of two"


def test_too_long_a_side_is_refused():
    x, y = torch.zeros(1, 2, 3), torch.zeros(1, heuristics.MAX_SIZE_Y + 1, 3)
    with pytest.raises(ValueError, match="y: expected items of up to"):
        otalign.sinkhorn_loss(x, y, backend="triton")
    otalign.sinkhorn_loss(x, y, y_lengths=torch.tensor([3]), backend="reference")


# Compiled, in a process without the interpreter ------------------------------------------------------------------------


def compiled(*command: str) -> str:
    """What a Python program prints that may compile kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_run_of_changing_lengths_compiles_few_variants():
    """200 batches of random sizes, forward and backward, as in training: the count stays bounded, and soon stops growing."""
    program = """
import json, random, variants
random.seed(0)
counts = []
with variants.recording() as found:
    for _ in range(200):
        variants.Problem(random.randint(1, 64), random.randint(1, 1500), random.randint(1, 256), 2048).launch()
        counts.append(len(found))
print(json.dumps(counts))
"""
    counts = json.loads(compiled("-c", program))
    assert counts[-1] <= 60
    assert counts[-1] - counts[99] <= 5


def test_launcher_and_triton_agree_on_variants():
    """Calls that Triton would compile differently never share a kept kernel, whatever their types, strides, alignment."""
    program = """
import itertools, random, torch, variants
from otalign.triton_kernels import runtime
random.seed(1)
seen = {}

def record(self, grid, values, constants, device):
    key = (self.function.fn.__name__, self.key(values), tuple(constants.values()))
    values = self.named(values)
    aligned = tuple(values[p.name].data_ptr() % 16 == 0 for p in self.function.params
                    if not p.is_constexpr and isinstance(values[p.name], torch.Tensor)
                    and not p.do_not_specialize_on_alignment)
    what = (variants.variant(self.function, values, constants)._replace(aligned=()), aligned,
            tuple((values[p.name] == 1, values[p.name] % 16 == 0) for p in self.function.params
                  if not p.is_constexpr and isinstance(values[p.name], int) and not p.do_not_specialize))
    assert seen.setdefault(key, what) == what, (key, seen[key], what)

runtime.Kernel.launch = record
runtime.processors = lambda device: 132
kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float64]

def points(shape, kind):
    form = random.choice(["plain", "sliced", "offset", "transposed", "expanded"])
    *rest, n, d = shape
    if form == "plain": return torch.zeros(*rest, n, d, dtype=kind)
    if form == "sliced": return torch.zeros(*rest, n, 2 * d + 1, dtype=kind)[..., :d]
    if form == "offset": return torch.zeros(*rest, n, d + 1, dtype=kind)[..., 1:]
    if form == "transposed": return torch.zeros(*rest, d, n, dtype=kind).mT
    return torch.zeros(*rest, 1, d, dtype=kind).expand(*rest, n, d)

import otalign
from otalign import backends, gpu, problem
for _ in range(400):
    x, y = random.choice(kinds), random.choice(kinds)
    N, M, D = random.choice([1, 16, 40]), random.choice([1, 7, 32, 150]), random.choice([1, 16, 24, 48])
    B = random.choice([1, 3])
    common = dict(prior=None, reg=0.1, unbalanced=random.choice([None, 1.0]), max_iter=5, tol=0.0)
    if random.random() < 0.3:
        C = points((B, N, M), x).requires_grad_()
        p = problem.from_cost(C, None, None, None, None, init=None, **common)
        leaves = [C]
    else:
        X, Y = points((B, N, D), x).requires_grad_(), points((B, M, D), y).requires_grad_()
        cost = random.choice(["cosine", "euclidean", "dot"])
        p = problem.from_points(X, Y, None, None, None, None, cu_seqlens_x=None, cu_seqlens_y=None,
                                max_seqlen_x=None, max_seqlen_y=None, cost=cost, **common)
        leaves = [X, Y]
    s = gpu.launch(p)
    for out in (s.value.sum(), s.value_linear.sum(), s.plan().sum()):
        torch.autograd.grad(out, leaves, retain_graph=True)
    if p.C is None:
        s.barycentric(False), s.barycentric(True)
    s.assign()
print(len(seen))
"""
    assert int(compiled("-c", program)) > 200


def reports(path: Path, *arguments: str) -> list[dict[str, str]]:
    compiled(str(BENCHMARKS / "variants.py"), "--out", str(path), *arguments)
    with path.open() as file:
        return list(csv.DictReader(file))


SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}  # bytes that a program may have


WIDEST = "GROUPS=[1-9] MAX_PROGRAMS=4 UNBALANCED=True"  # of each width the variant with the most rows


@pytest.mark.parametrize(
    "arch, which, fewest",
    [
        ("90", WIDEST, 4),
        *(pytest.param(arch, "GROUPS=[1-9]", 12, marks=pytest.mark.slow) for arch in ("80", "90", "100")),
    ],
)
def test_kernel_matrix_stays_in_registers(tmp_path, arch, which, fewest):
    """Every variant that keeps the kernel matrix in registers, on every NVIDIA generation since Ampere: no spills."""
    rows = reports(tmp_path / "a.csv", "--arch", arch, "--only", f"sinkhorn.*{which}")
    assert {row["arch"] for row in rows} == {arch}
    assert len(rows) >= fewest
    for row in rows:
        assert int(row["spills"]) == 0, row
        assert int(row["registers"]) <= 255, row
        assert int(row["shared"]) <= SHARED[row["arch"]], row


@pytest.mark.parametrize(
    "arch, every",
    [
        ("90", 250),
        *(pytest.param(arch, 1, marks=pytest.mark.slow) for arch in ("80", "90", "100", "gfx942")),
    ],
)
def test_variants_compile(tmp_path, arch, every):
    rows = reports(tmp_path / "a.csv", "--arch", arch, "--every", str(every))
    assert len(rows) > 900 / every
    for row in rows:
        assert int(row["shared"]) <= SHARED[arch], row


def test_a_call_makes_four_launches():
    """Cost and iterations, then a gradient each; kept kernels serve the second call."""
    said = compiled(str(BENCHMARKS / "launch_cost.py"), "--repeats", "3")
    assert "launches: 4.0" in said


# Edges -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("rows", [(4, 0), (0, 4), (4, 4)], ids=str)
def test_rows_that_belong_to_no_item(backend, rows):
    """Packed sides whose items are all empty: zeros everywhere, attached to the graph."""
    x, y = (torch.randn(count, 3, requires_grad=True) for count in rows)
    offsets = torch.zeros(3, dtype=torch.int64)
    result = otalign.solve(x, y, cu_seqlens_x=offsets, cu_seqlens_y=offsets, backend=backend)
    for tensor in (result.value, result.error, *result.potentials):
        identical(tensor, torch.zeros_like(tensor))
    assert result.converged.all()
    assert (result.assign_y() == -1).all()
    for gradient, leaf in zip(torch.autograd.grad(result.value.sum(), (x, y)), (x, y), strict=True):
        identical(gradient, torch.zeros_like(leaf))


def test_offsets_beyond_the_rows_stay_inside():
    """Offsets on a GPU are not looked at by the host: the kernels keep to the rows that there are."""
    rows, items, guard = 6, 2, 3
    memory = {side: torch.randn(rows + guard, 4, dtype=torch.float64) for side in "xy"}
    offsets = torch.tensor([0, 4, 900])
    sides = [Side(memory[side][:rows], offsets, None, True, 5, rows) for side in "xy"]
    batch = Batch(
        *sides, items=items, reg=0.3, reg_items=None, cost="sqeuclidean", prior="none", prior_parameters=(),
        rho=(math.inf, math.inf), dtype=torch.float64, device=torch.device("cpu"),
    )  # fmt: skip
    actual = launch.solve(batch, None, None, 30, 0.0)
    points = [memory[side][:rows] for side in "xy"]
    inside = torch.tensor([0, 4, rows])
    expected = otalign.solve(
        *points, cu_seqlens_x=inside, cu_seqlens_y=inside, cost="sqeuclidean", reg=0.3, tol=0, max_iter=30,
        backend="reference",
    )  # fmt: skip
    close(actual.value, expected.value, 1e-10)
    close(actual.f, expected.potentials[0], 1e-10)


def test_lengths_that_change_before_the_backward_pass():
    """They change nothing: a solve keeps its own."""
    batch = draw([5, 3], [4, 2], dtype=torch.float32).requires_grad()
    (expected,) = torch.autograd.grad(otalign.sinkhorn_loss(*batch, backend="triton"), batch.x)
    loss = otalign.sinkhorn_loss(*batch, backend="triton")
    batch.x_lengths.fill_(1)
    identical(torch.autograd.grad(loss, batch.x)[0], expected)
