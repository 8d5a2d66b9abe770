"""Can a child that is forked at any moment solve, with the bits of its parent, and does the parent go on?"""

import json
import os

import pytest

from ..helpers.processes import run_program, run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CASES = (
    "one thread",
    "two threads",
    "more threads in the child",
    "after threads of torch",
    "a grandchild",
    "from another thread",
    "in threads of the child",
    "while others solve",
)


@pytest.fixture(scope="module")
def children():
    """The exit code of a child for each case: 0, or -14 after half a minute if it hangs."""
    return json.loads(run_program("forked_solves", "1", timeout=600))


@pytest.mark.parametrize("case", CASES)
def test_forked_child_solves(children, case):
    assert children[case] == {"codes": [0], "parent": True}


@pytest.mark.slow
def test_many_children_while_others_solve():
    """The locks of the engine and of its BLAS are free in every child, whenever it is forked."""
    found = json.loads(run_program("forked_solves", "100", "while others solve", timeout=900))
    assert found["while others solve"] == {"codes": [0] * 100, "parent": True}


FIRST_USE = """
import os, signal, torch, otalign
from otalign.backends import extension

torch.set_num_threads(2)
x, y = torch.rand(16, 140, 32), torch.rand(16, 120, 32)
torch.rand(2000, 2000).exp().sum()
if os.fork() == 0:
    signal.alarm(30)
    loss = otalign.sinkhorn_loss(x, y, max_iter=30, backend="cpu")
    os._exit(0)
code = os.waitstatus_to_exitcode(os.wait()[1])
print(code, extension._loaded.cache_info().currsize)
"""


@pytest.mark.slow
def test_first_use_in_a_child():
    """The extension is loaded in the child, and torch's threads were lost before."""
    assert run_python(FIRST_USE).split() == ["0", "0"]
