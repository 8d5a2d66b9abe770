"""Do the operators keep the promises that torch.library makes for them?"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import otalign

from .problems import draw, draw_weights, identical, leaf

OPERATORS = {
    "cpu": {"align", "align_backward", "pack", "unpack"},
    "triton": {
        *("gpu_align", "gpu_align_backward", "gpu_plan", "gpu_assign"),
        *("gpu_barycentric", "gpu_barycentric_backward"),
    },
}


class Recorder(TorchDispatchMode):
    """Keeps the calls of otalign's operators, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "otalign":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def calls_of(run):
    with Recorder() as recorder:
        run()
    return recorder.calls


def padded(backend):
    result = otalign.solve(*draw(poison=0.0).requires_grad(), cost="sqeuclidean", backend=backend)
    (result.value.sum() + result.value_linear.sum() + result.plan().square().sum()).backward()


def packed(backend):
    arguments = draw(poison=0.0, dtype=torch.float32).packed()
    arguments |= {side: leaf(arguments[side]) for side in "xy"}
    options = {"prior": otalign.Prior.band(2.0), "unbalanced": (0.5, 1.0), "max_iter": 20}
    otalign.sinkhorn_loss(**arguments, **options, backend=backend).backward()


def weighted(backend):
    batch = draw(poison=0.0, dtype=torch.bfloat16).requires_grad()
    a = leaf(draw_weights(batch.x_lengths, batch.x.shape[1]).nan_to_num(0).float())
    reg = torch.tensor([0.1, 0.2, 0.3, 0.4])
    otalign.solve(*batch, a, cost="euclidean", reg=reg, max_iter=20, backend=backend).value_linear.sum().backward()


def given(backend):
    C = torch.rand(2, 5, 4, requires_grad=True)
    otalign.solve_cost(C, reg=0.1, max_iter=20, backend=backend).plan().square().sum().backward()


def images(backend):
    result = otalign.solve(*draw(poison=0.0).requires_grad(), max_iter=20, backend=backend)
    result.assign_y()
    (result.barycentric_x().square().sum() + result.barycentric_y().square().sum()).backward()


RUNS = (padded, packed, weighted, given, images)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_opcheck(backend, run):
    calls = calls_of(lambda: run(backend))
    assert len(calls) >= 2
    for operator, args, kwargs in calls:
        args = [leaf(arg) if isinstance(arg, torch.Tensor) and arg.requires_grad else arg for arg in args]
        # Backward operators refuse a second derivative; gpu_align leaves the padding of its costs as it is, so that no two
        # calls have equal outputs (test_compile looks at what becomes of them).
        compared = not operator._opname.endswith("backward") and operator._opname != "gpu_align"
        utilities = ["test_schema", "test_faketensor", "test_autograd_registration"]
        torch.library.opcheck(operator, args, kwargs, test_utils=utilities + ["test_aot_dispatch_dynamic"] * compared)


def test_every_operator_is_checked():
    for backend, operators in OPERATORS.items():
        assert operators == {call[0]._opname for run in RUNS for call in calls_of(lambda run=run: run(backend))}  # noqa: B023
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("otalign::")}
    assert known == {f"otalign::{name}" for name in set.union({"check"}, *OPERATORS.values())}


def test_opcheck_of_the_check():
    """`otalign::check` runs in compiled graphs only, so that none of RUNS calls it."""
    torch.library.opcheck(torch.ops.otalign.check.default, (torch.tensor(True), "message"))


def test_the_check_raises_its_message():
    with pytest.raises(ValueError, match=r"^message$"):
        torch.ops.otalign.check(torch.tensor(False), "message")


def test_one_operator_each_way():
    """A loss is one operator forward and one backward; nothing of the batch is looped over in Python."""
    leaves = draw(poison=0.0).requires_grad()
    for backend, names in (("cpu", ["align", "align_backward"]), ("triton", ["gpu_align", "gpu_align_backward"])):
        calls = calls_of(lambda backend=backend: otalign.sinkhorn_loss(*leaves, backend=backend).backward())
        assert [operator._opname for operator, _, _ in calls] == names


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_meta_tensors_have_no_kernel(backend):
    operator, arguments, _ = calls_of(lambda: given(backend))[0]
    moved = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in arguments]
    outputs = operator(*moved)
    assert all(output.device.type == "meta" for output in outputs)


def test_uninitialised_memory_is_poisoned_here():
    """The guard of conftest.py works: what an operator does not write is NaN."""
    assert torch.empty(7).isnan().all()
    assert torch.ones(2).new_empty(70_000).isnan().all()
    block = otalign.backends.extension().PooledMemory(2**20)
    assert torch.frombuffer(block, dtype=torch.bfloat16).isnan().all()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_rows_further_apart_than_a_blas_takes(layout):
    """They are copied. (The memory between them, 4 GB, is never touched, and so never there.)"""
    memory = torch.empty(2**31 + 8, dtype=torch.float16)
    rows = torch.as_strided(memory, (2, 8), (2**31, 1))
    rows.copy_(torch.randn(2, 8))
    y = torch.randn(1, 3, 8)
    x, offsets = (rows[None], None) if layout == "padded" else (rows, torch.tensor([0, 2]))
    found = otalign.sinkhorn_loss(x, y, cu_seqlens_x=offsets, backend="cpu")
    identical(found, otalign.sinkhorn_loss(rows.clone()[None], y, backend="cpu"))
