"""Launches of the CUDA kernels: Sinkhorn's iterations and the adjoint system, on a matrix that stays on the chip.

The Triton kernels compute the costs before, and gradients and plans after; a batch comes here in their form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layout import debugging
from . import extension

if TYPE_CHECKING:
    from ..triton_kernels.batch import Batch
    from ..triton_kernels.solution import Solved


def iterate(batch: Batch, out: Solved, init: Tensor | None, numbers: dict[str, int | float]) -> None:
    """Fill the solution from its costs, in one launch. `numbers` are the options by name."""
    p = _problem(batch, out.costs, out.f, out.g)
    p.init = _memory(init)
    extension.set_numbers(p, numbers)
    p.value, p.linear, p.error, p.n_iter = map(_memory, (out.value, out.linear, out.error, out.n_iter))
    with _on(batch.device):
        scratch = _scratch(batch, p, adjoint=False)
        _extension().cuda_solve(p, batch.device.index, _stream(batch.device), debugging())
    del scratch  # not before the launch: then it is the stream's


def solve_adjoint(batch: Batch, values: dict[str, Any]) -> dict[str, Tensor]:
    """Solve the adjoint system of a solution, in one launch: the adjoint variables of both sides, by name."""
    values = batch.values | values
    costs = values["C"]
    if costs.data_ptr() % 16:  # hooks of autograd may return a saved tensor at another address
        costs = costs.clone()
    p = _problem(batch, costs, values["f"], values["g"])
    found = {"x_adjoint": batch.vector(batch.x), "y_adjoint": batch.vector(batch.y)}
    adjoints = _extension().Adjoints()
    if values["linear_step"] >= 0:
        adjoints.linear, adjoints.linear_step = _memory(values["grad_linear"]), values["linear_step"]
    if values["has_plan"]:
        adjoints.plan = _memory(values["G"])
    adjoints.x, adjoints.y = _memory(found["x_adjoint"]), _memory(found["y_adjoint"])
    with _on(batch.device):
        scratch = _scratch(batch, p, adjoint=True)
        _extension().cuda_adjoint(p, adjoints, batch.device.index, _stream(batch.device), debugging())
    del scratch
    return found


def _problem(batch: Batch, costs: Tensor, f: Tensor, g: Tensor) -> Any:
    """The batch as the kernels take it, with its costs and potentials."""
    values = batch.values
    p = _extension().CudaProblem()
    p.items, p.pitch, p.costs = batch.items, batch.ld, _memory(costs)
    for to, side, potential in ((p.x, batch.x, f), (p.y, batch.y, g)):
        to.size, to.rows, to.potential = side.size, side.rows, _memory(potential)
        to.weights = _memory(side.weights)
        if side.packed:
            to.starts = _memory(side.offsets)
        else:
            to.lengths = _memory(side.offsets)
    if values["per_item"]:
        p.reg = _memory(values["reg_items"])
    p.reg_of_all, p.rho_x, p.rho_y = values["reg"], values["rho_x"], values["rho_y"]
    return p


def _memory(tensor: Tensor | None) -> tuple[int, int]:
    """A tensor's address and its size in bytes."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.nbytes)


def _scratch(batch: Batch, p: Any, *, adjoint: bool) -> Tensor | None:
    """Memory for the part of the matrix that does not fit on the chip."""
    size = _extension().cuda_scratch(p, adjoint, batch.device.index)
    if not size:
        return None
    scratch = torch.empty(size, dtype=torch.uint8, device=batch.device)
    p.scratch = _memory(scratch)
    return scratch


def _extension() -> Any:
    return extension.module()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _on(device: torch.device) -> Any:
    """Makes `device` the current one."""
    return torch.cuda.device(device)
