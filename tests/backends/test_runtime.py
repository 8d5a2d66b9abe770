"""Does the engine behave well inside its process: deterministic, multi-threaded, interruptible?"""

import itertools
import sys
import threading
import time

import pytest
import torch

import otalign

from ..helpers.problems import identical, loss_gradients_and_plan, same_on
from ..helpers.processes import run_program, run_python

pytestmark = pytest.mark.unpoisoned

OBJECTIVES = ["value", "plan_cost", "transport", "divergence"]


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_bits_on_any_number_of_threads(dtype, objective, restore_threads):
    torch.set_num_threads(1)
    expected = loss_gradients_and_plan("cpu", dtype, objective)
    for threads in (1, 2, 3, 4, 2):
        torch.set_num_threads(threads)
        for ours, theirs in zip(loss_gradients_and_plan("cpu", dtype, objective), expected, strict=True):
            identical(ours, theirs)


@pytest.mark.slow
def test_same_bits_in_another_process():
    code = """
        import hashlib, torch, otalign
        torch.manual_seed(3)
        x, y = (torch.randn(6, n, 32, requires_grad=True) for n in (50, 30))
        loss = otalign.sinkhorn_loss(x, y, torch.tensor([50, 3, 20, 1, 33, 40]), objective="transport", backend="cpu")
        loss.backward()
        print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in (loss, x.grad, y.grad))).hexdigest())
    """
    assert len({run_python(code, OMP_NUM_THREADS=threads) for threads in ("1", "2", "2")}) == 1


def test_torch_keeps_its_number_of_threads(restore_threads):
    """The engine changes the threads of the BLAS while it computes. Torch's own settings stay."""
    torch.set_num_threads(2)
    loss_gradients_and_plan("cpu")
    assert torch.get_num_threads() == 2


def test_calls_from_several_threads(backend):
    same = same_on(backend)
    expected = [loss_gradients_and_plan(backend, seed=seed) for seed in range(4)]
    results = [None] * 4

    def work(index):
        for _ in range(3):
            results[index] = loss_gradients_and_plan(backend, seed=index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for ours, theirs in zip(results, expected, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            same(one, two)


def long_solve(**options):
    """A solve of many items that takes the engine about a second."""
    C = torch.rand(400, 60, 60)
    return otalign.solve_cost(C, reg=0.01, tol=0, max_iter=2000, backend="cpu", **options)


def test_other_threads_run_meanwhile():
    """The engine releases the interpreter's lock while it computes."""
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.002):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    long_solve()
    end = time.perf_counter()
    stop.set()
    ticker.join()
    inside = [t for t in ticks if begin < t < end]
    assert end - begin > 0.1, "the solve is long enough to measure"
    assert len(inside) > 10
    assert max(b - a for a, b in itertools.pairwise(inside)) < 0.5 * (end - begin)


@pytest.mark.slow
def test_memory_does_not_grow():
    """Hundreds of losses leave no memory allocated."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    assert float(run_program("memory_growth", OMP_NUM_THREADS="1")) < 20


@pytest.mark.parametrize("most", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_the_reference(most):
    """OTALIGN_SIMD limits the choice. A machine without the given instruction set uses the best that it has."""
    simd, worst = run_program("instruction_set", OTALIGN_SIMD=most).split()
    order = ["baseline", "avx2", "avx512"]
    assert order.index(simd) <= order.index(most)
    assert float(worst) < 1
