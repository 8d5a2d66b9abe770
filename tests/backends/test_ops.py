"""Do the operators satisfy the contracts of torch.library?"""

import pytest
import torch

import otalign

from ..helpers.operators import RUNS, calls_of, given
from ..helpers.problems import draw, identical, leaf

OPERATORS = {
    "cpu": {"align", "align_backward", "pack", "unpack"},
    "triton": {
        *("gpu_align", "gpu_align_backward", "gpu_plan", "gpu_assign"),
        *("gpu_barycentric", "gpu_barycentric_backward"),
    },
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_opcheck(backend, run):
    calls = calls_of(lambda: run(backend))
    assert len(calls) >= 2
    for operator, args, kwargs in calls:
        args = [leaf(arg) if isinstance(arg, torch.Tensor) and arg.requires_grad else arg for arg in args]
        # Backward operators refuse a second derivative. gpu_align does not write the padding of its costs, so two calls
        # never have equal outputs (test_compile compares what is computed from them).
        compared = not operator._opname.endswith("backward") and operator._opname != "gpu_align"
        utilities = ["test_schema", "test_faketensor", "test_autograd_registration"]
        torch.library.opcheck(operator, args, kwargs, test_utils=utilities + ["test_aot_dispatch_dynamic"] * compared)


def test_every_operator_is_checked():
    for backend, operators in OPERATORS.items():
        assert operators == {call[0]._opname for run in RUNS for call in calls_of(lambda run=run: run(backend))}  # noqa: B023
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("otalign::")}
    assert known == {f"otalign::{name}" for name in set.union({"check"}, *OPERATORS.values())}


def test_opcheck_of_the_check():
    """`otalign::check` runs in compiled graphs only: none of RUNS calls it."""
    torch.library.opcheck(torch.ops.otalign.check.default, (torch.tensor(True), "message"))


def test_the_check_raises_its_message():
    with pytest.raises(ValueError, match=r"^message$"):
        torch.ops.otalign.check(torch.tensor(False), "message")


def test_one_operator_each_way():
    """A loss is one operator forward and one backward. Python does not loop over the batch."""
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
    """The fixture of conftest.py works: memory that an operator does not write is NaN."""
    assert torch.empty(7).isnan().all()
    assert torch.ones(2).new_empty(70_000).isnan().all()
    block = otalign.backends.extension.module().PooledMemory.new(2**20)
    assert torch.frombuffer(block, dtype=torch.bfloat16).isnan().all()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_rows_further_apart_than_a_blas_takes(layout):
    """They are copied. (The 4 GB between them are never touched, so the system never provides them.)"""
    memory = torch.empty(2**31 + 8, dtype=torch.float16)
    rows = torch.as_strided(memory, (2, 8), (2**31, 1))
    rows.copy_(torch.randn(2, 8))
    y = torch.randn(1, 3, 8)
    x, offsets = (rows[None], None) if layout == "padded" else (rows, torch.tensor([0, 2]))
    found = otalign.sinkhorn_loss(x, y, cu_seqlens_x=offsets, backend="cpu")
    identical(found, otalign.sinkhorn_loss(rows.clone()[None], y, backend="cpu"))
