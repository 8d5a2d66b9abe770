"""Do 16 Python threads get the bits that they get alone, also while torch's number of threads changes all the time?"""

import json

import pytest

from ..helpers.processes import run_program

SLOW = pytest.mark.slow


@pytest.mark.parametrize("meanwhile", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize("threads", [pytest.param("1", marks=SLOW), "2", pytest.param("5", marks=SLOW)])
def test_calls_of_16_threads(threads, meanwhile):
    times = "1" if threads == "2" and meanwhile else "5"
    found = json.loads(run_program("concurrent_calls", threads, times, *["meanwhile"] * meanwhile))
    assert found["errors"] == []
    assert found["calls"] == 16 * 14 * int(times)
    assert found["other bits"] == 0
    assert found["threads after"] == found["threads set"], "torch and MKL keep what was set last"
    assert found["threads set"][0] == 3
