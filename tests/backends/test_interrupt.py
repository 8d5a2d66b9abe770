"""Is Ctrl-C answered at once, whatever the engine is at?"""

import os
import textwrap

import pytest

from .test_runtime import run_python

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(os.name != "posix", reason="sends SIGINT"),
]

PRELUDE = """
import os, signal, threading, time, torch, otalign
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.manual_seed(0)
options = {"backend": "cpu", "tol": 0}
otalign.solve_cost(torch.rand(1, 4, 4), reg=0.1, backend="cpu")
"""

# Work of many seconds each.
CALLS = {
    "the other thread has the only long item": """
        C = torch.rand(2, 1500, 1500)
        C[0, 0, 0] = torch.nan  # this item comes first, and is done at once
        lengths = torch.tensor([1500, 1499])
        run = lambda: otalign.solve_cost(C, lengths, reg=0.01, max_iter=20_000, **options)
    """,
    "the other thread has the only long item, the first": """
        C = torch.rand(2, 1500, 1500)
        C[1, 0, 0] = torch.nan
        lengths = torch.tensor([1500, 1499])
        run = lambda: otalign.solve_cost(C, lengths, reg=0.01, max_iter=20_000, **options)
    """,
    "one item": """
        C = torch.rand(1, 3000, 3000)
        run = lambda: otalign.solve_cost(C, reg=0.01, max_iter=5000, **options)
    """,
    "the implicit system of one item": """
        x, y = torch.randn(1, 3000, 8, requires_grad=True), torch.randn(1, 3000, 8, requires_grad=True)
        loss = otalign.sinkhorn_loss(x, y, objective="transport", reg=0.002, max_iter=30, **options)
        run = lambda: loss.backward()
    """,
    "products of one item": """
        x, y = torch.randn(1, 3000, 16_000), torch.randn(1, 3000, 16_000)
        run = lambda: otalign.sinkhorn_loss(x, y, max_iter=1, **options)
    """,
    "gradients by the points of one item": """
        x, y = torch.randn(1, 3000, 12_000, requires_grad=True), torch.randn(1, 3000, 12_000)
        loss = otalign.sinkhorn_loss(x, y, max_iter=1, **options)
        run = lambda: loss.backward()
    """,
}

CHECK = """
sent = []
def send():
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)
torch.set_num_threads(2)
timer = threading.Timer(0.7, send)
timer.start()
try:
    run()
    print("finished")
except KeyboardInterrupt:
    print("after", time.perf_counter() - sent[0])
timer.join()
print(otalign.solve_cost(torch.rand(1, 4, 4), reg=0.1, backend="cpu").converged.item())
"""


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_control_c_is_answered_at_once(call):
    first, second = run_python(PRELUDE + textwrap.dedent(call) + CHECK).splitlines()
    assert first.startswith("after"), first
    assert float(first.split()[1]) < 1.5  # a tenth of it, on a machine with nothing else to do
    assert second == "True", "the engine works afterwards"
