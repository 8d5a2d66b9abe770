"""`WarmStarts` on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from otalign import SinkhornLoss, WarmStarts

from ..helpers.problems import draw

pytestmark = pytest.mark.gpu

LENGTHS = [17, 1, 0, 12], [9, 3, 4, 1]
IDS = ["a", "b", "c", "d"]


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request):
    return request.param


def loss(store: WarmStarts, backend: str) -> SinkhornLoss:
    return SinkhornLoss(
        cost="sqeuclidean", reg=0.2, tol=1e-4, max_iter=5000, accelerate=False, reduction="none", backend=backend,
        warm_starts=store,
    )  # fmt: skip


@pytest.mark.parametrize("place", [None, "cpu", "cuda"])
def test_stores(gpu_backend, place):
    """Entries follow the batches from device to device, or stay where the store is."""
    store = WarmStarts(device=place)
    batch = [side.float() if side.is_floating_point() else side for side in draw(*LENGTHS)]
    for visit, to in enumerate(("cuda", "cuda", "cpu", "cuda")):
        criterion = loss(store, gpu_backend if to == "cuda" else "cpu")
        criterion(*(side.to(to) for side in batch), ids=IDS)
        assert visit == 0 or criterion.last.n_iter[0] <= 2
        assert store._potentials.device.type == (place or to)


def test_nothing_waits_for_the_device(gpu_backend):
    x, y, n, m = (side.float().cuda() if side.is_floating_point() else side.cuda() for side in draw(*LENGTHS))
    criterion = loss(WarmStarts(), gpu_backend)
    criterion(x, y, n, m, ids=IDS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(x, y, n, m, ids=IDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert criterion.last.n_iter[0] <= 2
