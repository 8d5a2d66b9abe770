"""Is it a good citizen of its process: deterministic, threaded, interruptible?"""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import otalign

from ..helpers.problems import draw, identical, same_on

pytestmark = pytest.mark.unpoisoned

OBJECTIVES = ["value", "plan_cost", "transport", "divergence"]


def run_python(code: str, **environment: str) -> str:
    """Standard output of a new interpreter that runs `code`."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def everything(backend, dtype=torch.float32, objective="transport", seed=0):
    """Loss, gradients and plan of a ragged batch with items small and large."""
    leaves = draw([40, 3, 120, 17, 64, 1], [20, 9, 33, 17, 48, 5], D=48, dtype=dtype, seed=seed).requires_grad()
    loss = otalign.sinkhorn_loss(*leaves, objective=objective, reduction="none", backend=backend)
    loss.sum().backward()
    plan = otalign.solve(*(part.detach() for part in leaves), backend=backend).plan()
    return loss.detach(), leaves.x.grad, leaves.y.grad, plan


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_bits_on_any_number_of_threads(dtype, objective, restore_threads):
    torch.set_num_threads(1)
    expected = everything("cpu", dtype, objective)
    for threads in (1, 2, 3, 4, 2):
        torch.set_num_threads(threads)
        for ours, theirs in zip(everything("cpu", dtype, objective), expected, strict=True):
            identical(ours, theirs)


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


def test_other_products_keep_their_threads(restore_threads):
    """Whatever the engine does to the BLAS inside, torch's own settings are afterwards as before."""
    torch.set_num_threads(2)
    everything("cpu")
    assert torch.get_num_threads() == 2


def test_calls_from_several_threads(backend):
    same = same_on(backend)
    expected = [everything(backend, seed=seed) for seed in range(4)]
    results = [None] * 4

    def work(index):
        for _ in range(3):
            results[index] = everything(backend, seed=index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for ours, theirs in zip(results, expected, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            same(one, two)


def long_solve(**options):
    """About a second of work for the engine, in many items."""
    C = torch.rand(400, 60, 60)
    return otalign.solve_cost(C, reg=0.01, tol=0, max_iter=2000, backend="cpu", **options)


def test_other_threads_run_meanwhile():
    """The engine gives up the interpreter's lock while it computes."""
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
    assert end - begin > 0.1, "too quick to tell"
    assert len(inside) > 10
    assert max(b - a for a, b in itertools.pairwise(inside)) < 0.5 * (end - begin)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_control_c_stops_a_solve():
    code = """
        import signal, time, torch, otalign
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they start in the background
        C = torch.rand(4000, 60, 60)
        otalign.solve_cost(C[:4], reg=0.01, backend="cpu")
        print("ready", flush=True)
        begin = time.perf_counter()
        try:
            otalign.solve_cost(C, reg=0.01, tol=0, max_iter=200_000, backend="cpu")
            print("finished")
        except KeyboardInterrupt:
            print("interrupted after", time.perf_counter() - begin)
        print(otalign.solve_cost(C[:4], reg=0.1, backend="cpu").converged.tolist())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=20)
        finally:
            process.kill()
    first, second = output.splitlines()
    assert first.startswith("interrupted after")
    assert float(first.split()[-1]) < 6
    assert second == "[True, True, True, True]", "the engine works afterwards"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork():
    """A data loader's worker that was forked after a solve can solve as well."""
    code = """
        import os, torch, otalign
        x, y = torch.rand(16, 40, 32), torch.rand(16, 20, 32)
        before = otalign.sinkhorn_loss(x, y, backend="cpu")
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # as torch's data loader does
            same = bool(otalign.sinkhorn_loss(x, y, backend="cpu") == before)
            os._exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status))
    """
    assert run_python(code).strip() == "0"


def test_errors_of_the_engine_are_python_errors():
    """Memory that cannot be had is an exception, and the next call is as if nothing had been."""
    batch = draw(dtype=torch.float32)
    expected = otalign.sinkhorn_loss(*batch, backend="cpu")
    code = """
        import resource, torch, otalign
        x = torch.zeros(1, 40_000, 1).expand(1, 40_000, 1)
        y = torch.zeros(1, 1, 1).expand(1, 40_000, 1)
        small = torch.rand(1, 4, 2)
        otalign.sinkhorn_loss(small, small, backend="cpu")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
        try:
            otalign.sinkhorn_loss(x, y, cost="sqeuclidean", max_iter=1, backend="cpu")
            print("fitted")
        except (RuntimeError, MemoryError) as error:
            print("refused:", type(error).__name__)
        print(bool(otalign.sinkhorn_loss(small, small, backend="cpu").isfinite()))
    """
    if sys.platform == "linux":
        first, second = run_python(code).splitlines()
        assert first.startswith("refused:")
        assert second == "True"
    identical(otalign.sinkhorn_loss(*batch, backend="cpu"), expected)


def test_memory_does_not_grow():
    """Hundreds of losses leave nothing behind."""
    code = """
        import resource, torch, otalign
        x, y = torch.rand(4, 40, 64, requires_grad=True), torch.rand(4, 20, 64)
        def used():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
        for step in range(700):
            otalign.sinkhorn_loss(x, y, objective="transport", max_iter=5, backend="cpu").backward()
            x.grad = None
            if step == 200:
                start = used()
        print(used() - start)
    """
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    assert float(run_python(code, OMP_NUM_THREADS="1")) < 20


@pytest.mark.parametrize("most", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_the_reference(most):
    """The variable lowers the choice; a machine that cannot do what is asked for takes the best that it can."""
    code = """
        import torch, otalign
        from otalign import backends
        torch.manual_seed(0)
        worst = 0.0
        for dtype, unit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            for n, m in ((1, 1), (5, 3), (17, 33), (40, 40), (70, 130), (9, 300)):
                for reg, rho in ((0.05, None), (0.002, None), (0.05, 0.5)):
                    C = torch.rand(1, n, m, dtype=dtype)
                    ours, true = (
                        otalign.solve_cost(c, reg=reg, unbalanced=rho, tol=0, max_iter=30, backend=name).plan().double()
                        for c, name in ((C, "cpu"), (C.double(), "reference"))
                    )
                    worst = max(worst, float((ours - true).abs().sum()) / unit)
        print(backends.extension().simd, worst)
    """
    simd, worst = run_python(code, OTALIGN_SIMD=most).split()
    order = ["baseline", "avx2", "avx512"]
    assert order.index(simd) <= order.index(most)
    assert float(worst) < 1
