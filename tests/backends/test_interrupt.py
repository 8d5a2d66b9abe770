"""Does Ctrl-C interrupt the engine at once, in every phase of its work?"""

import os

import pytest

from ..helpers.processes import run_program
from ..helpers.programs.interrupted_calls import CALLS

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(os.name != "posix", reason="sends SIGINT"),
]


# `make test` runs one call.
QUICK = ("the other thread has the only long item",)


@pytest.mark.parametrize(
    "call", [pytest.param(call, marks=[] if call in QUICK else pytest.mark.slow) for call in CALLS]
)
def test_control_c_interrupts_at_once(call):
    first, second = run_program("interrupted_calls", call).splitlines()
    assert first.startswith("after"), first
    assert float(first.split()[1]) < 1.5  # about 0.15 on an idle machine
    assert second == "True", "the engine works afterwards"
