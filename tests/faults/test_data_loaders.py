"""Do the workers of torch's data loader solve, however they are started, with the bits of their parent?"""

import os

import pytest

from ..helpers.processes import run_program

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts workers by fork")

SLOW = pytest.mark.slow


@pytest.mark.parametrize("threads", ["1", pytest.param("2", marks=SLOW)])
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=SLOW), pytest.param("forkserver", marks=SLOW)])
def test_workers_solve(method, threads):
    """Forward and backward passes in two persistent workers, after the parent has used two threads."""
    found, others = map(int, run_program("data_loader", method, threads).split())
    assert found == 18
    assert others == 0
