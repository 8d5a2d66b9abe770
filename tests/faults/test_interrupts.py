"""Does Ctrl-C end a call within half a second at any moment, and is the engine as before?"""

import json
import sys

import pytest

from ..helpers.processes import run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's clock of another process")

BOUND = 0.5  # seconds; a hundredth of a second mostly
PATIENCE = 20.0  # seconds on the clock, on any machine
MOMENTS = 20
MEGABYTES = 64  # that may be lost, as heap between allocations; a lost result of one of these calls is larger, or there are many

CALLS = (
    "one long item",
    "one long item, float64",
    "one long item in the log domain",
    "one huge item",
    "one huge item in the log domain",
    "one huge item without a solution",
    "the other thread has the only long item",
    "the other thread has the only long item, the first",
    "many items",
    "many small items",
    "acceleration",
    "acceleration of many items",
    "products",
    "products, float64",
    "products of strided bfloat16",
    "euclidean",
    "euclidean, points far from the origin",
    "euclidean, points very far",
    "gradients by points",
    "gradients by points, float64",
    "gradients by many points",
    "the implicit system",
    "gradient by a cost",
    "divergence, there and back",
    "transport, there and back",
    "unpacked plans",
    "packed gradients of plans",
)


def interrupt(call: str, moments: int, threads: int, **environment: str) -> None:
    found = json.loads(
        run_program("interrupted_anywhere", call, str(moments), str(threads), timeout=900, **environment)
    )
    print(found)
    assert found["interrupted"] > moments / 4, "many moments are before the end of the call"
    assert found["bound"] <= BOUND, "on the clock, or in processor time if this process had to wait for a processor"
    assert found["wall"] <= PATIENCE
    assert found["works"], "the next call is right each time"
    assert found["same"], "the interrupted call has the same bits as before"
    assert found["grown"] < MEGABYTES


def test_control_c_ends_a_call():
    interrupt("transport, there and back", 5, 2)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_control_c_at_any_moment(call, threads):
    interrupt(call, MOMENTS, threads)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["products", "gradients by points"])
def test_control_c_without_a_blas(call):
    """The built-in product is a hundred times as slow, so its parts have to be smaller."""
    interrupt(f"{call}, small", 8, 1, OTALIGN_BLAS="built-in")
