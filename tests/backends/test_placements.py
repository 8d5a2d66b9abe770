"""Whether the tests that need a GPU reach every tile shape of the kernel matrix, by the heuristics' choice for an H100."""

from __future__ import annotations

from otalign.triton_kernels import heuristics

from ..cuda_on_cpu.host_cuda import chosen
from .test_gpu import PLACEMENTS

PROCESSORS = 132


def placements():
    """Items and sizes of the batches; `draw` adds two rows of padding."""
    return [(len(x), max(x) + 2, max(y) + 2) for x, y in PLACEMENTS.values()]


def test_every_tile_shape_of_triton():
    options = {"double": False, "relaxed": False, "processors": PROCESSORS, "generation": 90}
    configs = [heuristics.launch_config(*sizes, **options) for sizes in placements()]
    reached = {(config.block_m, config.groups, config.warps) for config in configs}
    assert reached >= {(tile.width, tile.groups, tile.warps) for tile in heuristics.TILE_SHAPES}
    assert {config.max_programs for config in configs if config.groups} == set(heuristics.EXCHANGE_SIZES)


def test_every_tile_shape_of_cuda():
    configs = [chosen(*sizes, processors=PROCESSORS, largest_cluster=16) for sizes in placements()]
    assert {config.shape for config in configs} == set(range(9))
    assert {config.cluster for config in configs} >= {1, 4, 8, 16}
    assert {bool(config.shared) for config in configs} == {False, True}
