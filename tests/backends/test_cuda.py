"""The CUDA kernels without a GPU: their source compiled for the CPU (tests/cuda_on_cpu), and nvcc's machine code for them."""

from __future__ import annotations

import collections
import importlib
import math
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import torch

import otalign
from otalign import Prior, backends
from otalign.backends import cuda

from ..cuda_on_cpu import host_cuda
from ..cuda_on_cpu.host_cuda import HostExtension, chosen, emulated
from ..helpers.problems import Batch, close, draw, draw_weights, identical

INF = math.inf
SHAPES = {32: (0, 1), 64: (2, 3), 128: (4, 5), 256: (6,), 512: (7,), 1024: (8,)}
ANY_SHAPE = [shape for shapes in SHAPES.values() for shape in shapes]
WIDTHS = {shape: width for width, shapes in SHAPES.items() for shape in shapes}


def everything(batch: Batch, backend: str, weights=(None, None), **options):
    """The result, and the gradients of a scalar computed from its value, transport cost and plan."""
    leaves = [t.detach().requires_grad_() for t in (batch.x, batch.y)]
    result = otalign.solve(*leaves, batch.x_lengths, batch.y_lengths, *weights, backend=backend, **options)
    total = result.value.sum() + 0.5 * result.value_linear.sum() + result.plan().square().sum()
    return result, torch.autograd.grad(total, leaves)


def compare(
    extension: HostExtension | None, batch: Batch, weights=(None, None), *, within=2e-5, **options
) -> otalign.OTResult:
    """Compare with the reference in float64: all outputs of a solve, and gradients through the implicit system."""
    with emulated(extension):
        single = [None if w is None else w.float() for w in weights]
        result, gradients = everything(batch.to(torch.float32), "cuda", single, **options)
    expected, right = everything(batch.to(torch.float32).to(torch.float64), "reference", weights, **options)
    assert result.n_iter.tolist() == expected.n_iter.tolist()
    for name in ("value", "value_linear", "error"):
        close(getattr(result, name), getattr(expected, name), within, name)
    for letter, actual, wanted in zip("fg", result.potentials, expected.potentials, strict=True):
        close(actual, wanted, within, f"potential {letter}")
    off = (result.plan().detach() - expected.plan().detach()).abs().sum((1, 2))
    assert (off <= within * expected.plan().detach().sum((1, 2)).clamp(min=1)).all(), f"plan is off by {off} (L1)"
    for actual, wanted in zip(gradients, right, strict=True):
        scale = float(wanted.abs().max())
        close(actual / scale, wanted / scale, 20 * within)
    return result


# Every place of the kernel matrix --------------------------------------------------------------------------------------------

RAGGED = ([40, 1, 0, 23, 31, 7], [20, 5, 3, 0, 32, 1])


# `make test` runs four tile shapes with one size of clusters each, `make test-all` every combination. Here and below, it
# leaves some shapes out altogether, since each takes seconds to compile.
SHAPES_AND_CLUSTERS = [
    pytest.param(
        shape,
        cluster,
        marks=[] if (shape, place) in ((0, 0), (3, 1), (5, 2), (7, 1)) else pytest.mark.slow,
    )
    for shape in ANY_SHAPE
    for place, cluster in enumerate((1, 2, 4))
]


@pytest.mark.parametrize(("shape", "cluster"), SHAPES_AND_CLUSTERS)
def test_forms_and_clusters(shape, cluster):
    extension = HostExtension(shape=shape, cluster=cluster, in_flight=2, scatter=shape % 2, ordered=1)
    compare(extension, draw(*RAGGED, D=8), reg=0.1, tol=0, max_iter=6)
    assert [config.cluster for config in extension.configs] == [cluster] * 3  # the iterations, and two implicit systems


@pytest.mark.parametrize(
    ("shape", "cluster"),
    [
        pytest.param(shape, cluster, marks=[] if (shape, cluster) in ((5, 3), (7, 3), (0, 7)) else pytest.mark.slow)
        for shape in (0, 3, 5, 6, 7, 8)
        for cluster in (2, 3, 4, 5, 6, 7, 8, 16)
    ],
)
def test_straight_code_for_every_cluster(shape, cluster):
    """Blocks scatter or not by the rule of the heuristics, so that the exchange is the one compiled for this cluster."""
    extension = HostExtension(shape=shape, cluster=cluster, scatter=-1)
    compare(extension, draw(*RAGGED, D=8), reg=0.1, tol=0, max_iter=4)
    assert {config.scatter for config in extension.configs} == {int(cluster * WIDTHS[shape] > 1024)}


@pytest.mark.parametrize("scatter", [0, 1])
@pytest.mark.parametrize(("cluster", "shared"), [(1, 0), (1, 24), (3, 8), (2, 64)])
@pytest.mark.parametrize("shape", [*(pytest.param(shape, marks=pytest.mark.slow) for shape in (3, 8)), 7])
def test_rows_beyond_registers(shape, cluster, shared, scatter):
    """The rows are in shared memory, and in L2 if shared memory is too small."""
    extension = HostExtension(shape=shape, cluster=cluster, shared=shared, scatter=scatter)
    compare(extension, draw([150, 70, 3], [40, 64, 9], D=8), reg=0.1, tol=0, max_iter=4)


@pytest.mark.parametrize("shape", [*(pytest.param(shape, marks=pytest.mark.slow) for shape in (1, 6)), 3, 5])
def test_long_items(shape):
    """More rows than the registers of a block of several warps hold."""
    extension = HostExtension(shape=shape, cluster=2, shared=32)
    rows = 2 * host_cuda.library().host_held(shape)
    compare(extension, draw([rows + 75, rows - 1], [WIDTHS[shape] - 2, 30], D=4), reg=0.2, tol=0, max_iter=3)


@pytest.mark.parametrize("unbalanced", [0.5, (0.3, INF), (INF, 0.4)], ids=str)
@pytest.mark.parametrize(("shape", "cluster"), [(0, 1), (3, 4), (5, 1), (7, 2)])
def test_relaxed(shape, cluster, unbalanced):
    extension = HostExtension(shape=shape, cluster=cluster, shared=8)
    compare(extension, draw(*RAGGED, D=8), unbalanced=unbalanced, reg=0.1, tol=0, max_iter=15)


@pytest.mark.parametrize("prior", [Prior.quadratic(0.5), Prior.band(4), Prior.order_preserving(0.1, 0.5)], ids=str)
def test_priors(prior):
    compare(None, draw(*RAGGED, D=8), prior=prior, reg=0.2, tol=0, max_iter=15)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rho", [None, 0.5])
def test_weights(zeros, rho):
    batch = draw(*RAGGED, D=8)
    sides = (batch.x_lengths, batch.x), (batch.y_lengths, batch.y)
    weights = [draw_weights(lengths, values.shape[1], zeros=zeros).nan_to_num(0) for lengths, values in sides]
    compare(HostExtension(shape=3, cluster=2), batch, weights, unbalanced=rho, reg=0.2, tol=0, max_iter=20)


# Tile shapes and clusters that a benchmark asks for ------------------------------------------------------------------------


H100 = {"processors": 132, "largest_cluster": 16}
KINDS = {
    "strict": {"tol": 0, "max_iter": 12},
    "relaxed": {"unbalanced": 0.5, "tol": 0, "max_iter": 12},
    "accelerated": {"tol": 1e-4},
}
# `make test` runs two forms, `make test-all` every combination with a kind.
FORMS_AND_KINDS = [
    pytest.param(form, KINDS[kind], id=f"{form}, {kind}", marks=[] if kind == usual else pytest.mark.slow)
    for form, usual in {(4, 6): "", (5, 3): "accelerated", (6, 2): "", (7, 1): "relaxed"}.items()
    for kind in KINDS
]


@pytest.mark.parametrize(("form", "options"), FORMS_AND_KINDS)
def test_a_form_gives_the_results_of_the_chosen_one(form, options):
    """To rounding, with the gradients through the implicit system. The heuristics choose again afterwards."""
    batch = draw([150, 1, 70, 31], [100, 5, 64, 9], D=8).to(torch.float32)
    extension = HostExtension(chip=H100)

    def run() -> list[torch.Tensor]:
        del extension.configs[:]
        result, gradients = everything(batch, "cuda", reg=0.1, **options)
        assert len(extension.configs) == 3, "the iterations, and two implicit systems"
        return [result.value, result.value_linear, result.plan(), *gradients]

    with emulated(extension):
        chosen, of = run(), [bytes(config) for config in extension.configs]
        extension.testing.cuda_force(*form)
        forced = run()
        assert [(config.shape, config.cluster) for config in extension.configs] == [form] * 3
        extension.testing.cuda_force(-1, 0)
        again = run()
    assert [bytes(config) for config in extension.configs] == of
    for actual, expected, first in zip(forced, chosen, again, strict=True):
        scale = float(expected.detach().abs().max())
        close(actual.detach() / scale, expected.detach() / scale, 2e-5 if options["tol"] == 0 else 2e-3)
        identical(first, expected)


def test_a_form_that_cannot_be_is_refused():
    batch = draw(*RAGGED, D=8).to(torch.float32)
    extension = HostExtension()  # a small chip, with clusters of four blocks
    with emulated(extension):
        for form, message in (((4, 6), "finds no room on this chip"), ((0, 1), "has 32 columns")):
            extension.testing.cuda_force(*form)
            with pytest.raises(RuntimeError, match=message):
                otalign.solve_cost(torch.rand(2, 40, 33), reg=0.1, backend="cuda")
        for form, message in (((9, 1), "a tile shape from 0 to 8"), ((4, 17), "a cluster of 1 to 16 blocks")):
            with pytest.raises(RuntimeError, match=message):
                extension.testing.cuda_force(*form)
        extension.testing.cuda_force(-1, 0)
        assert otalign.solve(*batch, reg=0.1, backend="cuda").value.isfinite().all()


# How items end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [1, 4])
def test_items_stop_by_themselves(cluster):
    result = compare(
        HostExtension(shape=2, cluster=cluster), draw(*RAGGED, D=8), reg=0.1, tol=1e-4, max_iter=500,
        accelerate=False,
    )  # fmt: skip
    assert result.converged.all()
    assert len(set(result.n_iter.tolist())) > 2


def test_one_iteration():
    compare(HostExtension(shape=2, cluster=2), draw(*RAGGED, D=8), reg=0.1, tol=0, max_iter=1)


@pytest.mark.parametrize("reg", [1e-4, 1e-2, 1e3])
def test_absorption(reg):
    """Cost ranges from 10^4 reg, where scalings leave the range of float32 again and again, to 10^-3 reg."""
    C = torch.rand(3, 50, 30, generator=torch.Generator().manual_seed(0))
    options = {"reg": reg, "tol": 0, "max_iter": 60}
    with emulated(HostExtension(shape=2, cluster=2, shared=4)):
        actual = otalign.solve_cost(C, backend="cuda", **options)
    expected = otalign.solve_cost(C.double(), backend="reference", **options)
    close(actual.value, expected.value, 1e-5 + 2e-7 * reg)
    off = (actual.plan() - expected.plan()).abs().sum((1, 2))
    assert (off <= max(1e-5, 1e-6 / reg)).all(), "float32, times the range over reg"


def test_warm_start():
    batch = draw(*RAGGED, D=8)
    first = otalign.solve(*batch, reg=0.1, max_iter=5, tol=0)
    compare(HostExtension(shape=2, cluster=2), batch, init=first.potentials, reg=0.1, max_iter=3, tol=0)


def test_reg_of_every_item():
    compare(HostExtension(shape=2), draw(*RAGGED, D=8), reg=torch.linspace(0.05, 0.5, 6), max_iter=20, tol=0)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_bad_item_leaves_the_others_unchanged(bad):
    batch = draw(*RAGGED, D=8).to(torch.float32)
    spoilt = batch._replace(x=batch.x.clone())
    spoilt.x[3 + 1, 20, 4] = bad
    with emulated(HostExtension(shape=2, cluster=2)):
        good, found = (otalign.solve(*part, reg=0.1, backend="cuda") for part in (batch, spoilt))
    others = [0, 1, 2, 3, 5]
    for name in ("value", "value_linear", "error", "n_iter"):
        identical(getattr(found, name)[others], getattr(good, name)[others])
    identical(found.plan()[others], good.plan()[others])
    assert found.value[4].isnan()
    assert not found.converged[4]


def test_infeasible_item_does_not_converge():
    C = torch.rand(2, 6, 4)
    C[1, 2] = INF
    with emulated(HostExtension(shape=0)):
        result = otalign.solve_cost(C, reg=0.1, backend="cuda")
    assert result.value.isfinite().all()
    assert result.converged.tolist() == [True, False]
    assert not result.plan()[1, 2].any()


# The same bits -----------------------------------------------------------------------------------------------------------


def bits(extension: HostExtension, batch: Batch, **options) -> list[torch.Tensor]:
    with emulated(extension):
        result, gradients = everything(batch, "cuda", reg=0.1, **options)
    return [result.value, result.error, result.n_iter, *result.potentials, *gradients]


def test_same_bits_in_any_order_of_threads():
    batch = draw(*RAGGED, D=8).to(torch.float32)
    first, *others = (bits(HostExtension(seed, shape=3, cluster=4, in_flight=2, ordered=1), batch) for seed in range(5))
    for other in others:
        for actual, expected in zip(other, first, strict=True):
            identical(actual, expected)


@pytest.mark.slow
def test_same_bits_in_any_order_of_items():
    batch = draw([9, 40, 1, 22, 0, 31, 17, 3] * 2, [5, 20, 9, 30, 3, 0, 12, 1] * 2, D=8).to(torch.float32)
    first, *others = (
        bits(HostExtension(shape=2, cluster=2, in_flight=in_flight, ordered=ordered), batch)
        for in_flight, ordered in ((16, 0), (1, 1), (5, 1), (5, 0))
    )
    for other in others:
        for actual, expected in zip(other, first, strict=True):
            identical(actual, expected)


def test_packed_and_strided():
    batch = draw([40, 1, 0, 23], [20, 5, 7, 9], D=8).to(torch.float32)
    with emulated():
        expected = otalign.solve(*batch, reg=0.1, backend="cuda")
        packed = otalign.solve(**batch.packed(), reg=0.1, backend="cuda")
        views = batch._replace(x=batch.x.mT.contiguous().mT, y=torch.stack([batch.y, batch.y], 2).flatten(1, 2)[:, ::2])
        strided = otalign.solve(*views, reg=0.1, backend="cuda")
    for result in (packed, strided):
        close(result.value, expected.value, 1e-6)
        plan = result.plan()
        close(plan, expected.plan()[:, : plan.shape[1], : plan.shape[2]], 1e-6)
    close(
        packed.potentials[0],
        torch.cat([f[:n] for f, n in zip(expected.potentials[0], batch.x_lengths, strict=True)]),
        1e-6,
    )


@pytest.mark.parametrize("objective", ["value", "plan_cost", "transport", "divergence"])
def test_losses(objective):
    batch = draw(*RAGGED, D=8)
    outcomes = []
    for part, backend in ((batch.to(torch.float32), "cuda"), (batch, "reference")):
        x, y = (t.detach().requires_grad_() for t in (part.x, part.y))
        with emulated():
            options = {"objective": objective, "reg": 0.1, "tol": 0, "max_iter": 10, "backend": backend}
            loss = otalign.sinkhorn_loss(x, y, part.x_lengths, part.y_lengths, **options)
            outcomes.append((loss.detach(), *torch.autograd.grad(3 * loss, (x, y))))
    for actual, expected in zip(*outcomes, strict=True):
        close(actual / expected.abs().max(), expected / expected.abs().max(), 2e-4)


def test_compiled_without_graph_breaks():
    """torch.compile uses the same operators, with their fake implementations, and gives the same bits."""
    torch._dynamo.reset()
    batch = draw([9, 4], [5, 3], D=8, poison=0.0).to(torch.float32)

    def loss(x, y, x_lengths, y_lengths):
        return otalign.sinkhorn_loss(x, y, x_lengths, y_lengths, reg=0.1, objective="transport", backend="cuda")

    outcomes = []
    with emulated():
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            x = batch.x.clone().requires_grad_()
            value = function(x, *batch[1:])
            outcomes.append((value.detach(), *torch.autograd.grad(value, x)))
    for actual, expected in zip(*outcomes, strict=True):
        identical(actual, expected)


# Random problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_problems(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    shape, items = pick(*ANY_SHAPE), pick(1, 3, 8)
    longest = pick(1, 20, 120), min(WIDTHS[shape], pick(1, 7, 33, 130)) - 2
    lengths = [torch.randint(0, max(n, 1) + 1, (items,), generator=generator).tolist() for n in longest]
    lengths[0][0], lengths[1][0] = longest[0], max(longest[1], 1)
    extension = HostExtension(
        seed, shape=shape, cluster=pick(1, 2, 3, 4, 5, 8), shared=pick(0, 1, 2) * host_cuda.library().host_step(shape),
        in_flight=pick(1, 2, items), scatter=pick(0, 1), ordered=pick(0, 1),
    )  # fmt: skip
    unbalanced = pick(None, None, 0.4, (0.3, INF), (INF, 1.0))
    options = {"reg": pick(0.02, 0.1, 2.0), "unbalanced": unbalanced, "max_iter": pick(1, 4, 15), "tol": 0}
    compare(extension, draw(*lengths, D=6, seed=seed), within=5e-5, cost=pick("cosine", "sqeuclidean"), **options)


# Sanitizers --------------------------------------------------------------------------------------------------------------

ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread", "-DOTALIGN_SHIM_THREADS"]


def program(path: Path, shapes: str, *options: str, rows: int) -> Path:
    """Compile tests/cuda_on_cpu/check.cpp for some tile shapes, with at most so many rows a block."""
    sizes = [f"-DOTALIGN_TILE_SHAPES={shapes}", f"-DOTALIGN_ROWS={rows}", "-DOTALIGN_ITERATIONS=3"]
    command = host_cuda.compile_command(host_cuda.ROOT / "tests/cuda_on_cpu/check.cpp", path / "check", *sizes)
    subprocess.run([*command, "-O1", "-g", "-pthread", *options], check=True)
    return path / "check"


def outcome(check: Path, seed: int = 0) -> tuple[bool, str]:
    """Whether the program succeeds, and its output."""
    done = subprocess.run([check, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    return done.returncode == 0, done.stdout


@pytest.mark.slow
def test_under_address_sanitizer(tmp_path):
    right, said = outcome(program(tmp_path, "2", *ADDRESS, rows=40))
    assert right, said


@pytest.mark.slow
def test_under_thread_sanitizer(tmp_path):
    right, said = outcome(program(tmp_path, "2", *THREAD, rows=9))
    assert right, said


@pytest.mark.slow
def test_more_under_sanitizers(tmp_path):
    for shapes, options, rows in (("0,1,3,5,6,7,8", ADDRESS, 150), ("3", THREAD, 9)):
        right, said = outcome(program(tmp_path, shapes, *options, rows=rows))
        assert right, said


# Faults in csrc/cuda that the compiler puts in for OTALIGN_MUTATE_n.
MUTATIONS = {
    "no barrier before an exchange": 1,
    "no barrier of a warp": 2,
    "no vote": 3,
    "one inbox": 4,
    "beyond shared memory": 5,
}


def mutated(path: Path, what: str, shapes: str, *options: str, rows: int) -> Path:
    """`program` with a fault."""
    return program(path, shapes, f"-DOTALIGN_MUTATE_{MUTATIONS[what]}", *options, rows=rows)


def test_every_mutation_is_in_the_source():
    """Each of them once, and no other."""
    sources = [path.read_text() for path in (host_cuda.ROOT / "csrc").rglob("*.*")]
    found = re.findall(r"^#if.*OTALIGN_MUTATE_(\d)", "\n".join(sources), re.MULTILINE)
    assert sorted(map(int, found)) == sorted(MUTATIONS.values())


@pytest.mark.parametrize("what", ["no barrier before an exchange", pytest.param("no vote", marks=pytest.mark.slow)])
def test_a_missing_barrier_gives_wrong_numbers(tmp_path, what):
    right, said = outcome(mutated(tmp_path, what, "3", rows=9))
    assert not right
    assert "WRONG" in said or "wait for each other for ever" in said


@pytest.mark.slow
@pytest.mark.parametrize("what", ["no barrier of a warp", "one inbox"])
def test_a_race_is_reported(tmp_path, what):
    right, said = outcome(mutated(tmp_path, what, "2", *THREAD, rows=9))
    assert not right
    assert "ThreadSanitizer: data race" in said


@pytest.mark.slow
def test_an_overrun_is_reported(tmp_path):
    right, said = outcome(mutated(tmp_path, "beyond shared memory", "2", *ADDRESS, rows=80))
    assert not right
    assert "heap-buffer-overflow" in said


# Heuristics ----------------------------------------------------------------------------------------------------------------

H200 = {"processors": 132, "shared": 227 * 1024, "largest_cluster": 16}
A100 = {"processors": 108, "shared": 163 * 1024, "largest_cluster": 1}
SMALL = {"processors": 20, "shared": 99 * 1024, "largest_cluster": 1}


@pytest.mark.parametrize("chip", [H200, A100, SMALL], ids=["H200", "A100", "small"])
def test_every_choice_can_be_launched(chip):
    held, step = host_cuda.library().host_held, host_cuda.library().host_step
    for items in (1, 7, 32, 500, 5000):
        for size_x in (1, 60, 300, 750, 3000, 40_000):
            for size_y in (1, 32, 33, 100, 512, 1000):
                config = chosen(items, size_x, size_y, **chip)
                assert config.bytes <= chip["shared"]
                assert 1 <= config.cluster <= min(chip["largest_cluster"], size_x)
                assert 1 <= config.in_flight <= items
                assert config.shared % step(config.shape) == 0
                assert WIDTHS[config.shape] == min(width for width in SHAPES if width >= size_y)
                assert bool(config.ordered) <= (config.in_flight < items)
                rows = -(-size_x // config.cluster)
                assert config.shared < max(1, rows - held(config.shape)) + step(config.shape), (
                    "no more shared memory than needed"
                )


def test_typical_batches_stay_on_the_chip():
    held = host_cuda.library().host_held
    for items, size_x, size_y in ((32, 750, 128), (16, 300, 100), (256, 60, 60), (8, 300, 128)):
        config = chosen(items, size_x, size_y, **H200)
        assert held(config.shape) + config.shared >= -(-size_x // config.cluster)
        assert config.in_flight == items, "all items at once"


def test_too_long_items_are_refused(monkeypatch):
    assert max(SHAPES) == cuda.LONGEST_Y
    assert chosen(4, 100, cuda.LONGEST_Y, **H200).in_flight > 0
    assert chosen(4, 100, cuda.LONGEST_Y + 1, **H200).in_flight == 0
    with emulated(), pytest.raises(ValueError, match="up to 1024 points, got 1025"):
        otalign.solve(torch.rand(1, 2, 3), torch.rand(1, 1025, 3), backend="cuda")


def test_float64_is_refused():
    with emulated(), pytest.raises(ValueError, match="computes in float32"):
        otalign.solve(torch.rand(1, 2, 3).double(), torch.rand(1, 2, 3), backend="cuda")


def test_debug_waits_for_the_kernels():
    """With debug, a fault is reported at its launch. Otherwise nothing waits, because waiting costs time."""

    class Waiting(HostExtension):
        waited: list[bool] = []  # noqa: RUF012 - only this test uses it

        def cuda_solve(self, problem, device, stream, wait):
            self.waited.append(wait)
            super().cuda_solve(problem, device, stream, wait)

    batch = draw(*RAGGED, D=8).to(torch.float32)
    with emulated(Waiting()):
        otalign.solve(*batch, backend="cuda")
        with otalign.debug():
            otalign.solve(*batch, backend="cuda")
    assert Waiting.waited == [False, True]


def test_tensors_on_the_cpu_are_refused(monkeypatch):
    monkeypatch.setattr(backends, "_try_cuda", lambda index: None)
    monkeypatch.setattr(backends.extension.module(), "cuda_reason", "")
    with pytest.raises(ValueError, match="takes tensors on a GPU"):
        otalign.solve(torch.rand(1, 2, 3), torch.rand(1, 2, 3), backend="cuda")


# Machine code -----------------------------------------------------------------------------------------------------


def why_no_kernels() -> str:
    """The reason why this extension may lack the CUDA kernels; empty if it must have them."""
    left_out = "OTALIGN_BUILD_CUDA=0"
    if shutil.which("nvcc") is None:
        return "needs nvcc, with which the extension has kernels"
    return (
        left_out
        if left_out in (backends.reason_missing("cpu") or backends.extension.module().cuda_reason or "")
        else ""
    )


needs_nvcc = pytest.mark.skipif(bool(why_no_kernels()), reason=why_no_kernels() or "it is there")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
CHIPS = {
    "A100": (8, 0), "RTX 3090": (8, 6), "RTX 4090": (8, 9), "H100, H200": (9, 0), "B200": (10, 0), "B300": (10, 3),
    "RTX 5090": (12, 0), "DGX Spark": (12, 1),
}  # fmt: skip
SPILLED = 64  # bytes of a thread that an accelerated kernel puts aside, at most


@pytest.fixture(scope="module")
def machine_code():
    """benchmarks/codegen/machine_code.py, which reads the kernels in the installed extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(host_cuda.ROOT / "benchmarks"))
        yield importlib.import_module("codegen.machine_code")


@needs_nvcc
def test_no_kernel_uses_local_memory(machine_code):
    """No spills and no arrays: all values of a thread are in registers, on every architecture. The accelerated kernels put a
    few scalars aside."""
    usages = machine_code.usages()
    assert collections.Counter(kernel.architecture for kernel in usages) == dict.fromkeys(
        ARCHITECTURES, len(machine_code.KINDS) * len(ANY_SHAPE)
    )
    for kernel, usage in usages.items():
        assert usage.local <= (SPILLED if kernel.kind == "accelerated" else 0), kernel
        assert usage.registers <= 255, kernel


def runs(code: str, chip: tuple[int, int], *, ptx: bool = False) -> bool:
    """Whether a chip runs code for `sm_90a`, say, or whether its driver compiles PTX for it: the rules of NVIDIA.

    Machine code runs on chips of the same major number and no lower minor number. PTX is compiled for every chip that is no
    older. The suffix "a" limits both to one chip, and "f" limits PTX to one major number.
    """
    found = re.fullmatch(r"sm_(\d+)(\d)([af]?)", code)
    assert found, code
    major, minor, suffix = int(found[1]), int(found[2]), found[3]
    if suffix == "a":
        return (major, minor) == chip
    if ptx and not suffix:
        return (major, minor) <= chip
    return major == chip[0] and minor <= chip[1]


def test_rules_of_compatibility():
    assert [runs(code, (10, 3)) for code in ("sm_80", "sm_100", "sm_100a", "sm_100f", "sm_103a", "sm_120")] == [
        False, True, False, True, True, False,
    ]  # fmt: skip
    assert [runs(code, (12, 0), ptx=True) for code in ("sm_90", "sm_90a", "sm_100f", "sm_120", "sm_121")] == [
        True, False, False, True, False,
    ]  # fmt: skip


@needs_nvcc
def test_machine_code_for_every_chip(machine_code):
    """No driver compiles a kernel for these chips, which takes seconds, but any later chip has PTX of all of them."""
    kernels = machine_code.usages()
    for name, chip in CHIPS.items():
        run = [kernel[1:] for kernel in kernels if runs(kernel.architecture, chip)]
        assert sorted(run) == sorted({kernel[1:] for kernel in kernels}), name
        assert len(run) == len(machine_code.KINDS) * len(ANY_SHAPE), name
    listed = re.findall(r"\.(sm_\w+)\.(ptx|cubin)$", machine_code.cuobjdump("-lelf", "-lptx"), re.MULTILINE)
    files = collections.Counter((kind, code) for code, kind in listed)
    modules = files["cubin", "sm_80"]
    assert modules > len(ANY_SHAPE), "a module for each shape, and others"
    assert sum(n for (kind, code), n in files.items() if kind == "ptx" and runs(code, (13, 0), ptx=True)) == modules


@needs_nvcc
def test_the_wheel_stays_small():
    """Below 13 MB. The extension is nearly all of it, and a wheel compresses it."""
    assert len(zlib.compress(Path(backends.extension.module().__file__).read_bytes())) < 12.5e6


@needs_nvcc
@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[pytest.mark.slow] * (a != "sm_90a")) for a in ARCHITECTURES]
)
def test_loops_of_the_iteration(machine_code, architecture):
    """The hot loop reads four numbers at once, and uses no local memory."""
    loops = machine_code.loops(architecture)
    assert len(loops) == 3 * len(ANY_SHAPE)
    for kernel, loop in loops.items():
        assert loop.count("LDL") + loop.count("STL") == 0, kernel
        assert loop.count("LDS", ".128") >= 4, kernel
        assert loop.count("LDG", ".128") + loop.count("LD.", ".128") >= 1, kernel


@needs_nvcc
@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[pytest.mark.slow] * (a != "sm_90a")) for a in ARCHITECTURES]
)
def test_kernels_wait_for_those_before_them(machine_code, architecture):
    """On chips with clusters a kernel may begin early. It waits (ACQBULK) before it reads or writes global memory."""
    kernels = machine_code.code(architecture)
    assert len(kernels) == len(machine_code.KINDS) * len(ANY_SHAPE)
    for kernel, instructions in kernels.items():
        words = [text.split(".")[0].split()[0] for _, text in instructions]
        access = next(place for place, word in enumerate(words) if word in ("LDG", "STG", "LD", "ST", "ATOMG", "RED"))
        assert ("ACQBULK" in words[:access]) == (architecture != "sm_80"), kernel
        assert words.count("ACQBULK") == (architecture != "sm_80"), kernel


@needs_nvcc
@pytest.mark.slow
def test_compiler_reports_no_spill(tmp_path):
    """The compiler agrees: `-Xptxas -v` reports no spill in the plain kernels, and few in the accelerated ones."""
    for shape in ANY_SHAPE:
        for architecture in ARCHITECTURES:
            command = ["nvcc", "-std=c++17", "-O3", f"-I{host_cuda.ROOT / 'csrc'}", f"-DOTALIGN_TILE_SHAPE={shape}"]
            command += [f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "out.cubin")]
            command += [str(host_cuda.ROOT / "csrc/cuda/tile_shape.cu")]
            report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
            assert len(spills) == 4, f"{shape} {architecture}"
            assert spills.count(("0", "0", "0")) >= 3, f"{shape} {architecture}"
            assert all(int(stack) <= SPILLED for stack, _, _ in spills), f"{shape} {architecture}"


@needs_nvcc
def test_without_a_driver_the_error_has_its_name():
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    problem = backends.extension.module().CudaProblem()
    with pytest.raises(RuntimeError, match=r"^cuda(ErrorInsufficientDriver|ErrorNoDevice): "):
        backends.extension.module().cuda_scratch(problem, False, 0)
