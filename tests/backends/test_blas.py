"""Does the engine work with any BLAS, and leave the BLAS's number of threads as it is?"""

import ctypes
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import scipy

import otalign
from otalign import backends

from ..helpers.blas_by_address import by_address
from ..helpers.problems import draw, identical, loss_gradients_and_plan
from ..helpers.processes import run_program, run_python

pytestmark = pytest.mark.unpoisoned


def openblas() -> str:
    """SciPy's own OpenBLAS."""
    files = sorted(Path(scipy.__file__).parent.parent.glob("scipy.libs/*openblas*"))
    if not files:
        pytest.skip("this SciPy comes without OpenBLAS")
    return str(files[0])


@pytest.mark.parametrize("simd", ["baseline", "avx2", "avx512"])
def test_the_built_in_product_agrees_with_the_reference(simd):
    name, worst = run_program("blas_against_reference", OTALIGN_BLAS="built-in", OTALIGN_SIMD=simd).split()
    assert name == "built-in"
    assert float(worst) < 1


@pytest.mark.parametrize("core", ["Haswell", pytest.param("Sandybridge", marks=pytest.mark.slow)])
def test_openblas_agrees_with_the_reference(core):
    name, worst = run_program("blas_against_reference", OTALIGN_BLAS=openblas(), OPENBLAS_CORETYPE=core).split()
    assert "openblas" in name
    assert float(worst) < 1


def test_file_that_is_not_a_library_is_refused(monkeypatch):
    monkeypatch.setenv("OTALIGN_BLAS", "no-such-blas.so")
    with pytest.raises(ValueError, match="OTALIGN_BLAS: expected 'built-in' or the file of a library, got 'no-such"):
        backends.extension._blas()


def test_library_without_blas_functions_is_refused(monkeypatch):
    monkeypatch.setenv("OTALIGN_BLAS", backends.extension.module().__file__)
    with pytest.raises(ValueError, match="OTALIGN_BLAS: expected a library with sgemm_ and dgemm_"):
        backends.extension._blas()


@pytest.fixture
def counted_threads():
    """A BLAS with one number of threads for the whole process.

    Yields that number, those during its products, and those that another thread will set during the next products.
    """
    now, seen, meanwhile = [5], [], []

    def counted(product):
        def gemm(*arguments):
            seen.append(now[0])
            product(*arguments)
            if meanwhile:
                now[0] = meanwhile.pop()

        return type(product)(gemm)

    gemms = [counted(by_address(real)) for real in (ctypes.c_float, ctypes.c_double)]
    get = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: now[0])
    change = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda threads: now.__setitem__(0, threads))
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in (*gemms, get, change)]
    backends.extension.module().use_blas("counted", *addresses[:2], 0, *addresses[2:])
    yield now, seen, meanwhile
    backends.extension.module().use_blas(*backends.extension._blas())


def test_blas_has_one_thread_while_the_engine_computes(counted_threads):
    now, seen, _ = counted_threads
    loss_gradients_and_plan("cpu")
    assert set(seen) == {1}
    assert now == [5]


@pytest.mark.parametrize("threads", [3, 7])
def test_threads_of_the_blas_that_are_set_meanwhile_stay(counted_threads, threads):
    now, seen, meanwhile = counted_threads
    meanwhile.append(threads)
    loss_gradients_and_plan("cpu")
    assert seen[-1] == 1, "the next pass has one thread again"
    assert now == [threads]


def test_concurrent_calls_restore_the_threads_of_the_blas(counted_threads):
    now, seen, _ = counted_threads
    expected = otalign.solve(*draw(D=24), backend="cpu").value
    results = []

    def work():
        for _ in range(20):
            results.append(otalign.solve(*draw(D=24), backend="cpu").value)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 80
    for result in results:
        identical(result, expected)
    assert set(seen) == {1}
    assert now == [5]


@pytest.mark.slow
def test_openblas_keeps_its_threads():
    code = """
        import ctypes, os, torch, otalign
        library = ctypes.CDLL(os.environ["OTALIGN_BLAS"])
        library.scipy_openblas_set_num_threads(2)  # by default at most the number of cores
        before = library.scipy_openblas_get_num_threads()
        x, y = torch.randn(8, 60, 96), torch.randn(8, 40, 96)
        otalign.sinkhorn_loss(x, y, backend="cpu")
        print(before, library.scipy_openblas_get_num_threads())
    """
    before, after = run_python(code, OTALIGN_BLAS=openblas()).split()
    assert before == after == "2"


@pytest.mark.slow
def test_the_engine_without_python():
    """The program that `make aarch64` runs under an emulator, here with all instruction sets of this machine."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    script = Path(__file__).parent / "engine" / "run.sh"
    done = subprocess.run(["bash", script, compiler], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "baseline: all agree" in done.stdout
    assert "baseline, shared items: all agree" in done.stdout
