"""`import_orders.py MODULE...` imports these modules in this order, and uses each of them at once, with threads if it has any.

Then it solves with two threads, uses each again, and solves again. Prints as JSON the largest error against the reference in
units of its tolerance, whether the bits stayed, the BLAS, and the files of the BLAS and of the OpenMP that the engine and
torch call.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any


class Place(ctypes.Structure):
    """Dl_info of dladdr."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("at", ctypes.c_void_p),
    )


def file_of(address: int | None) -> str:
    place = Place()
    found = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(place))
    return place.file.decode() if found else ""


def openmp_of(library: str) -> str:
    return file_of(ctypes.cast(ctypes.CDLL(library).GOMP_parallel, ctypes.c_void_p).value)


def use_numpy() -> None:
    import numpy as np

    a = np.random.default_rng(0).random((400, 400))
    assert np.isfinite(a @ a).all()


def use_scipy() -> None:
    import numpy as np
    import scipy.linalg

    a = np.random.default_rng(0).random((300, 300))
    assert np.allclose(scipy.linalg.solve(a, a), np.eye(300), atol=1e-6)


def use_sklearn() -> None:
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances_argmin

    a = np.random.default_rng(0).random((5000, 8))
    centers = KMeans(n_clusters=3, n_init=1, random_state=0).fit(a).cluster_centers_
    assert len(pairwise_distances_argmin(a, centers)) == 5000


def use_ot() -> None:
    import numpy as np
    import ot

    C = np.random.default_rng(0).random((200, 150))
    for plan in (ot.sinkhorn([], [], C, 0.1), ot.emd([], [], C)):
        assert abs(plan.sum() - 1) < 1e-6


def use_torch() -> None:
    import torch

    a = torch.rand(700, 700)
    assert (a @ a).log().isfinite().all()


def use_otalign() -> None:
    solve("cpu")


def solve(backend: str) -> list[Any]:
    import torch

    import otalign

    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    kind = torch.float64 if backend == "reference" else torch.float32
    x, y = (torch.randn(16, n, 48, generator=generator).to(kind).requires_grad_() for n in (120, 100))
    loss = otalign.sinkhorn_loss(x, y, reg=0.3, tol=0, max_iter=20, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, (x, y))]


USES: dict[str, Callable[[], None]] = {
    "numpy": use_numpy,
    "scipy": use_scipy,
    "sklearn": use_sklearn,
    "ot": use_ot,
    "torch": use_torch,
    "otalign": use_otalign,
}


def main(order: list[str]) -> None:
    for name in order:
        __import__(name)
        USES[name]()
    found = solve("cpu")
    for name in reversed(order):
        USES[name]()
    import torch

    from otalign.backends import extension

    same = all(torch.equal(a, b) for a, b in zip(found, solve("cpu"), strict=True))
    true = solve("reference")
    worst = max(float((a - b).abs().max() / b.abs().max()) / 2e-5 for a, b in zip(found, true, strict=True))
    blas = extension._blas()
    report = {
        "worst": worst,
        "same": same,
        "blas": extension.module().blas(),
        "blas file": file_of(blas.sgemm),
        "openmp": openmp_of(extension.module().__file__),
        "openmp of torch": openmp_of(f"{torch.__path__[0]}/lib/libtorch_cpu.so"),
    }
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        pass
    else:
        report["libraries"] = sorted(library["filepath"].rsplit("/", 1)[-1] for library in threadpool_info())
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
