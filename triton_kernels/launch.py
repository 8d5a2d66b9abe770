"""From tensors to launches: what every kernel is given.

The arguments of all kernels come from one dictionary, by name: `Batch.values`. A launch picks those of its kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import heuristics, runtime
from .adjoint import lift_kernel
from .batch import Batch, Saved, Solved
from .cost import cost_kernel
from .exchange import EXCHANGE_TAIL
from .gradients import dense_kernel, project_kernel, weights_kernel
from .outputs import assign_kernel
from .runtime import INTERPRETED, Kernel, aligned, divide, tf32_allowed
from .sinkhorn import sinkhorn_kernel

_cost, _sinkhorn, _lift = Kernel(cost_kernel), Kernel(sinkhorn_kernel), Kernel(lift_kernel)
_project_kernel, _weights = Kernel(project_kernel), Kernel(weights_kernel)
_dense, _assign = Kernel(dense_kernel), Kernel(assign_kernel)


def _factors(batch: Batch, *tensors: Tensor) -> tuple[bool, int, str]:
    """How tensor cores multiply: whether 16-bit numbers as they are, the bits of the factors, and the precision.

    (The precision is that of float32 factors, which 16-bit points become where they have to be scaled.)
    """
    if batch.dtype == torch.float64:
        return False, 64, "ieee"
    types = {tensor.dtype for tensor in tensors}
    small = all(dtype.itemsize == 2 for dtype in types)
    same = small and len(types) == 1 and not INTERPRETED  # (the interpreter multiplies bfloat16 as integers)
    if not runtime.generation(batch.device):
        return same, 16 if same else 32, "ieee"
    # 16-bit numbers are exact in TF32.
    return same, 16 if same else 32, "tf32" if tf32_allowed() or (small and not same) else "tf32x3"


# Forward ---------------------------------------------------------------------------------------------------------------


def solve(batch: Batch, given: Tensor | None, init: Tensor | None, max_iter: int, tol: float) -> Solved:
    """Two launches: the costs of all pairs, and the iterations of all items. A symmetric problem starts at zero."""
    init = None if batch.symmetric else init
    items, empty = batch.items, batch.empty_tensor
    cosine = batch.cost == "cosine"
    out = Solved(
        value=empty(items),
        linear=empty(items),
        error=empty(items),
        n_iter=empty(items, dtype=torch.int32),
        f=batch.vector(batch.x),
        g=batch.vector(batch.y),
        costs=empty(batch.x.rows, batch.ld),
        x_scale=batch.vector(batch.x) if cosine else empty(0),
        y_scale=batch.vector(batch.y) if cosine else empty(0),
    )
    if batch.empty:
        for tensor in out:
            tensor.zero_()
        return out
    if batch.engine is not None and not batch.symmetric:
        fill_costs(batch, Saved(*out[4:]), given, batch.prior, empty(0, dtype=torch.int32))
        batch.engine.iterate(batch, out, init, max_iter, tol)
        return out
    choice = batch.solver()
    programs = choice.in_flight * choice.programs
    counters = empty(programs + 1, dtype=torch.int32)
    fill_costs(batch, Saved(*out[4:]), given, batch.prior, counters)
    constants = {
        "BLOCK_N": choice.block_n,
        "BLOCK_M": choice.block_m,
        "ROWS": choice.rows,
        "GROUPS": choice.groups,
        "PEERS": choice.peers,
        "UNBALANCED": batch.relaxed,
        "SYMMETRIC": batch.symmetric,
        "STAGES": choice.stages,
    }
    others = out._asdict() | {
        "C": out.costs,
        "K": out.costs if choice.groups else torch.empty_like(out.costs),
        "state": empty(4, batch.x.rows),
        "exchange": exchange(batch, choice, out.costs),
        "desks": empty(programs, choice.block_m),
        "counters": counters,
        "init": out.g if init is None else init,
        "has_init": int(init is not None),
        "programs": choice.programs,
        "max_iter": max_iter,
        "tol": tol,
    }
    batch.launch(_sinkhorn, (programs, 1, 1), constants | together(choice), others)
    return out


def exchange(batch: Batch, choice: heuristics.Solver, costs: Tensor) -> Tensor:
    """Where the programs of an item hand over what they have summed; if there is but one, any tensor."""
    if choice.programs == 1:
        return costs
    return batch.empty_tensor(choice.in_flight, 2, choice.programs, 2 * choice.block_m + EXCHANGE_TAIL.value)


def together(choice: heuristics.Solver) -> dict[str, Any]:
    """The options of a launch whose programs may have to wait for each other."""
    cooperative = {"launch_cooperative_grid": True} if choice.programs > 1 else {}
    return {"num_warps": choice.warps, "num_stages": 1} | cooperative


def fill_costs(batch: Batch, out: Saved, given: Tensor | None, prior: str, counters: Tensor) -> None:
    """Fill the costs (rows of x, ld) from the points, or with what is `given` (B, N, M); set the counters to zero."""
    others: dict[str, Any] = {"C": out.costs, "x_scale": out.x_scale, "y_scale": out.y_scale}
    others |= {"counters": counters, "counters_size": counters.numel()}
    beyond: tuple[Any, ...] = ()
    if given is None:
        same, bits, precision = _factors(batch, batch.values["x"], batch.values["y"])
        cost = batch.cost
    else:
        same, bits, precision, cost = False, 8 * batch.dtype.itemsize, "ieee", "given"
        item, row, column = given.stride()
        others |= {"x": given, "x_item": item, "x_row": row, "x_dim": column}
        others |= {"y": given, "y_item": 0, "y_row": 1, "y_dim": 1, "dim": 0}
        beyond = (given.dtype, aligned(given), row % 16 == 0, row == 1, column % 16 == 0, column == 1)
    tile = heuristics.cost(batch.y.size, bits=bits)
    constants = {
        "COST": cost,
        "PRIOR": prior,
        "PRECISION": precision,
        "SAME": same,
        "BLOCK_N": tile.rows,
        "BLOCK_M": tile.columns,
        "BLOCK_D": tile.inner,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    tiles = divide(batch.x.size, tile.rows) * divide(batch.y.size, tile.columns)
    batch.launch(_cost, (tiles * batch.items, 1, 1), constants, others, beyond)


# Backward --------------------------------------------------------------------------------------------------------------


def from_saved(saved: Saved) -> dict[str, Any]:
    """What was saved, as the kernels call it."""
    values = saved._asdict()
    values["C"] = values.pop("costs")
    return values


def gradients(
    batch: Batch,
    saved: Saved,
    value: Tensor | None,
    linear: Tensor | None,
    plan: Tensor | None,
    wanted: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The gradients by the inputs that are `wanted`, from those by value (B,), transport cost (B,) and plan (B, N, M).

    A launch for every input; two or three more if there is anything but a value.
    """
    if batch.empty:
        return {name: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for name, t in wanted.items()}
    values = from_saved(saved)
    for name, gradient in (("value", value), ("linear", linear)):
        if gradient is not None:
            values |= {"grad_" + name: gradient, name + "_step": gradient.stride(0)}
    implicit = linear is not None or plan is not None
    if plan is not None:
        values |= {"G": torch.empty_like(saved.costs), "has_plan": 1}
        counters = batch.counters()
        fill_costs(batch, saved._replace(costs=values["G"]), plan, "none", counters)
    elif implicit:
        counters = batch.counters().zero_()
    if implicit:
        values |= lifts(batch, values, counters)
    return _gradients(batch, values, wanted, implicit=implicit)


def _gradients(batch: Batch, values: dict[str, Any], wanted: dict[str, Tensor], *, implicit: bool) -> dict[str, Tensor]:
    out = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in wanted.items()}
    for name in ("x", "y"):
        if name in out:
            project(batch, out[name], values, batch.cost, by_y=name == "y", implicit=implicit)
    if "C" in out:
        _dense_launch(batch, out["C"], values, gradient=True, implicit=implicit)
    for name, side, rho in (("a", batch.x, "rho_x"), ("b", batch.y, "rho_y")):
        if name in out:
            tile = heuristics.WEIGHTS
            constants = {"IMPLICIT": implicit, "BY_Y": name == "b", "BLOCK_R": tile.rows, "BLOCK_K": tile.inner}
            constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
            grid = (divide(side.size, tile.rows) * batch.items, 1, 1)
            batch.launch(
                _weights, grid, constants, values | {"out": out[name], "rho": batch.values[rho]}, saved_kind(values)
            )
    return out


def lifts(batch: Batch, values: dict[str, Any], counters: Tensor) -> dict[str, Tensor]:
    """Solve the implicit system for what the gradients need of it."""
    if batch.engine is not None:
        return batch.engine.lift(batch, values)
    choice = batch.solver(in_memory=True)
    constants = {"BLOCK_N": choice.block_n, "BLOCK_M": choice.block_m, "PEERS": choice.peers}
    found = {"x_lift": batch.vector(batch.x), "y_lift": batch.vector(batch.y)}
    others: dict[str, Any] = {"state": batch.empty_tensor(2, batch.x.rows), "counters": counters}
    others |= {"exchange": exchange(batch, choice, values["C"]), "programs": choice.programs}
    grid = (choice.in_flight * choice.programs, 1, 1)
    batch.launch(_lift, grid, constants | together(choice), values | found | others, saved_kind(values))
    return found


def saved_kind(values: dict[str, Any], out: Tensor | None = None) -> tuple[Any, ...]:
    """What can differ between calls on saved costs: whether autograd gave them back aligned, and the type of `out`."""
    return aligned(values["C"]), None if out is None else out.dtype


def project(
    batch: Batch, out: Tensor, values: dict[str, Any], cost: str, *, by_y: bool, implicit: bool = False
) -> None:
    """Fill `out` with the gradient by one side's points, or with their images if `cost` is "average"."""
    other = batch.values["x" if by_y else "y"]
    same, bits, precision = _factors(batch, other)
    if same and (other.dtype == torch.float16 or out.dtype != other.dtype):
        # The plan is beyond the range of float16, and gradients and images in float32 are wanted better than in bfloat16.
        precise = "tf32" if out.dtype == torch.float16 or tf32_allowed() else "tf32x3"
        same, bits, precision = False, 32, precise if runtime.generation(batch.device) else "ieee"
    dim = out.shape[-1]
    tile = heuristics.project(dim, bits=bits)
    constants = {
        "COST": cost,
        "PRIOR": batch.prior if cost in ("cosine", "euclidean") else "none",  # whose gradients look at the cost
        "IMPLICIT": implicit,
        "BY_Y": by_y,
        "PRECISION": precision,
        "SAME": same,
        "BLOCK_R": tile.rows,
        "BLOCK_K": tile.inner,
        "BLOCK_D": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    side = batch.y if by_y else batch.x
    grid = (divide(side.size, tile.rows) * divide(dim, tile.columns) * batch.items, 1, 1)
    batch.launch(_project_kernel, grid, constants, values | {"out": out}, saved_kind(values, out))


def _dense_launch(batch: Batch, out: Tensor, values: dict[str, Any], *, gradient: bool, implicit: bool = False) -> None:
    tile = heuristics.DENSE
    constants = {"GRADIENT": gradient, "IMPLICIT": implicit, "BLOCK_R": tile.rows, "BLOCK_K": tile.columns}
    constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    tiles = divide(batch.x.size, tile.rows) * divide(batch.y.size, tile.columns)
    batch.launch(_dense, (tiles * batch.items, 1, 1), constants, values | {"out": out}, saved_kind(values, out))


# What is made of a plan ------------------------------------------------------------------------------------------------


def plan(batch: Batch, saved: Saved) -> Tensor:
    """The plan (B, N, M), zero on the padding."""
    out = batch.empty_tensor(batch.items, batch.x.size, batch.y.size)
    if batch.empty:
        return out.zero_()
    _dense_launch(batch, out, from_saved(saved), gradient=False)
    return out


def barycentric(batch: Batch, saved: Saved, *, by_y: bool) -> tuple[Tensor, Tensor]:
    """The images of the points of x, or of y: (..., D), and their masses in the plan, in the layout of the side."""
    side = batch.y if by_y else batch.x
    mass = batch.vector(side)
    out = batch.empty_tensor(*mass.shape, batch.values["dim"])
    if batch.empty:
        return out.zero_(), mass.zero_()
    values = from_saved(saved) | {"x_scale": mass, "y_scale": mass}
    project(batch, out, values, "average", by_y=by_y)
    return out, mass


def barycentric_gradients(
    batch: Batch,
    saved: Saved,
    image: Tensor,
    mass: Tensor,
    gradient: Tensor,
    wanted: dict[str, Tensor],
    *,
    by_y: bool,
) -> dict[str, Tensor]:
    """The gradients by the inputs that are `wanted` from that by the image of one side, without the plan.

    With d_i the gradient by image i over the mass r_i, dL/dP_ij = <d_i, y_j - image_i>: a product like that of a cost. The
    points y_j that are averaged have, besides, sum_i P_ij d_i.
    """
    if batch.empty:
        return {name: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for name, t in wanted.items()}
    own, other = ("y", "x") if by_y else ("x", "y")
    points = batch.values[other].to(batch.dtype)
    mass = mass[..., None]
    load = torch.where(mass == 0, 0, -gradient / mass)
    offset = -(load * image).sum(-1, keepdim=True)
    product = batch.with_points(
        **{own: torch.cat([load, offset], -1), other: F.pad(points, (0, 1), value=1)}, cost="dot"
    )
    values = from_saved(saved)
    values |= {"G": torch.empty_like(saved.costs), "has_plan": 1}
    counters = batch.counters()
    fill_costs(product, saved._replace(costs=values["G"]), None, "none", counters)
    values |= lifts(batch, values, counters)
    found = _gradients(batch, values, wanted, implicit=True)
    if other in found:
        one = torch.ones(1, dtype=batch.dtype, device=batch.device)
        direct = batch.empty_tensor(*points.shape)
        average = batch.with_points(**{own: load, other: points}, cost="dot")
        project(average, direct, values | {"has_plan": 0, "grad_value": one, "value_step": 0}, "dot", by_y=not by_y)
        found[other] = (found[other] + direct).to(found[other].dtype)
    return found


def assign(batch: Batch, saved: Saved) -> Tensor:
    """For every y the index of the x that gives it most mass, -1 where there is none: int64 in the layout of y."""
    out = torch.empty(saved.g.shape, dtype=torch.int64, device=batch.device)
    if batch.empty:
        return out.fill_(-1)
    tile = heuristics.ASSIGN
    constants = {"BLOCK_R": tile.inner, "BLOCK_K": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}
    grid = (divide(batch.y.size, tile.columns) * batch.items, 1, 1)
    values = from_saved(saved) | {"out": out}
    batch.launch(_assign, grid, constants, values, saved_kind(values))
    return out
