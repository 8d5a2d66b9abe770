"""Is Ctrl-C answered at once, whatever the engine is at?"""

import os

import pytest

from ..helpers.processes import run_program
from ..helpers.programs.interrupted_calls import CALLS

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(os.name != "posix", reason="sends SIGINT"),
]


@pytest.mark.parametrize("call", CALLS)
def test_control_c_is_answered_at_once(call):
    first, second = run_program("interrupted_calls", call).splitlines()
    assert first.startswith("after"), first
    assert float(first.split()[1]) < 1.5  # a tenth of it, on a machine with nothing else to do
    assert second == "True", "the engine works afterwards"
