"""Public calls that together run every operator, and a recorder of the operators that they run."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import otalign

from .problems import draw, draw_weights, leaf


class Recorder(TorchDispatchMode):
    """Records the calls of otalign's operators, with their arguments."""

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
