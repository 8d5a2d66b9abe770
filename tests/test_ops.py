"""Do the operators keep the promises that torch.library makes for them?"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import otalign

from .problems import draw, draw_weights, leaf

OPERATORS = {"align", "align_backward", "pack", "unpack"}


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


def padded():
    result = otalign.solve(*draw(poison=0.0).requires_grad(), cost="sqeuclidean", backend="cpu")
    (result.value.sum() + result.value_linear.sum() + result.plan().square().sum()).backward()


def packed():
    arguments = draw(poison=0.0, dtype=torch.float32).packed()
    arguments |= {side: leaf(arguments[side]) for side in "xy"}
    otalign.sinkhorn_loss(**arguments, prior=otalign.Prior.band(2.0), unbalanced=(0.5, 1.0), backend="cpu").backward()


def weighted():
    batch = draw(poison=0.0, dtype=torch.bfloat16).requires_grad()
    a = leaf(draw_weights(batch.x_lengths, batch.x.shape[1]).nan_to_num(0).float())
    result = otalign.solve(*batch, a, cost="euclidean", reg=torch.tensor([0.1, 0.2, 0.3, 0.4]), backend="cpu")
    result.value_linear.sum().backward()


def given():
    C = torch.rand(2, 5, 4, requires_grad=True)
    otalign.solve_cost(C, reg=0.1, backend="cpu").plan().square().sum().backward()


@pytest.mark.parametrize("run", [padded, packed, weighted, given])
def test_opcheck(run):
    calls = calls_of(run)
    assert {call[0]._opname for call in calls} >= {"align", "align_backward"}
    for operator, args, kwargs in calls:
        args = [leaf(arg) if isinstance(arg, torch.Tensor) and arg.requires_grad else arg for arg in args]
        differentiable = operator._opname != "align_backward"  # it refuses a second derivative
        utilities = ["test_schema", "test_faketensor", "test_autograd_registration"]
        torch.library.opcheck(
            operator, args, kwargs, test_utils=utilities + ["test_aot_dispatch_dynamic"] * differentiable
        )


def test_every_operator_is_checked():
    seen = {operator._opname for run in (padded, packed, weighted, given) for operator, _, _ in calls_of(run)}
    assert seen == OPERATORS
    assert seen == {name for name in dir(torch.ops.otalign) if not name.startswith("_") and name != "name"}


def test_one_operator_each_way():
    """A loss is one launch forward and one backward; nothing of the batch is looped over in Python."""
    leaves = draw(poison=0.0).requires_grad()
    calls = calls_of(lambda: otalign.sinkhorn_loss(*leaves, backend="cpu").backward())
    assert [operator._opname for operator, _, _ in calls] == ["align", "align_backward"]


def test_meta_tensors_have_no_kernel():
    arguments = next(args for _, args, _ in calls_of(given))
    moved = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in arguments]
    outputs = torch.ops.otalign.align(*moved)
    assert all(output.device.type == "meta" for output in outputs)


def test_uninitialised_memory_is_poisoned_here():
    """The guard of conftest.py works: what an operator does not write is NaN."""
    assert torch.empty(7).isnan().all()
    assert torch.ones(2).new_empty(70_000).isnan().all()
    block = otalign.backends.extension().Block(2**20)
    assert torch.frombuffer(block, dtype=torch.bfloat16).isnan().all()
