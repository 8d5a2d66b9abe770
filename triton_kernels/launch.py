"""From tensors to launches: solve a batch, and make gradients, plans, projections and assignments of a solution.

The arguments of all kernels come from one dictionary, by name: `Batch.values`. A launch picks those of its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import heuristics, runtime
from .accelerated import memory_size
from .adjoint import adjoint_kernel
from .batch import Batch, Side
from .cost import cost_kernel
from .exchange import COUNTER_STRIDE, EXCHANGE_TAIL
from .gradients import coefficients_kernel, cost_gradient_kernel, points_gradient_kernel, weights_gradient_kernel
from .outputs import assign_kernel, barycentric_kernel, plan_kernel
from .runtime import INTERPRETED, Kernel, divide, tf32_allowed
from .sinkhorn import sinkhorn_kernel
from .solution import Saved, Solved

_cost, _sinkhorn, _adjoint = Kernel(cost_kernel), Kernel(sinkhorn_kernel), Kernel(adjoint_kernel)
_plan, _assign, _cost_gradient = Kernel(plan_kernel), Kernel(assign_kernel), Kernel(cost_gradient_kernel)
# Kernels for one side of a batch, by the name of the side.
_barycentric = {side: Kernel(barycentric_kernel, own=side) for side in "xy"}
_coefficients = {side: Kernel(coefficients_kernel, own=side) for side in "xy"}
_points_gradient = {side: Kernel(points_gradient_kernel, own=side) for side in "xy"}
_weights_gradient = {side: Kernel(weights_gradient_kernel, own=side) for side in "xy"}

# What a backend may put in the place of two kernels here: iterations that fill a solution from its costs, as
# (batch, out, init, numbers); and a solver of the adjoint system, that gives "x_adjoint" and "y_adjoint".
Iterate = Callable[[Batch, Solved, "Tensor | None", "dict[str, int | float]"], None]
SolveAdjoint = Callable[[Batch, dict[str, Any]], dict[str, Tensor]]


def factors(batch: Batch, *tensors: Tensor) -> tuple[bool, int, str]:
    """How tensor cores multiply: whether 16-bit numbers as they are, the bits of the factors, and the precision.

    (The precision is that of float32 factors. 16-bit points become such factors where they have to be scaled.)
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


def solve(
    batch: Batch,
    C: Tensor | None,
    init: Tensor | None,
    numbers: dict[str, int | float],
    *,
    iterate: Iterate | None = None,
) -> Solved:
    """Two launches: the costs of all pairs, and the iterations of all items.

    `C` (B, N, M) is the cost if it is given. `numbers` are the options by the names of the kernel's arguments. `iterate`
    replaces the kernel of the iterations, except on symmetric problems:
    these have an iteration of their own, which only the kernel makes, and start at zero.
    """
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
    if iterate is not None and not batch.symmetric:
        fill_costs(batch, out.saved, C, batch.prior, empty(0, dtype=torch.int32))
        iterate(batch, out, init, numbers)
        return out
    accelerates = bool(numbers["accelerate"]) and numbers["tol"] > 0 and not batch.symmetric
    config = batch.launch_config(mixes=accelerates)
    programs = config.in_flight * config.programs
    counters = empty_counters(batch, config)
    fill_costs(batch, out.saved, C, batch.prior, counters)
    constants = {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "ROWS": config.rows,
        "GROUPS": config.groups,
        "MAX_PROGRAMS": config.max_programs,
        "UNBALANCED": batch.relaxed,
        "SYMMETRIC": batch.symmetric,
        "ACCELERATE": config.mixes,
        "STAGES": config.stages,
    }
    others = {
        "value": out.value,
        "linear": out.linear,
        "error_out": out.error,
        "n_iter_out": out.n_iter,
        "f": out.f,
        "g": out.g,
        "C": out.costs,
        "K": out.costs if config.groups else torch.empty_like(out.costs),
        "state": empty(4, batch.x.rows),
        "exchange": exchange_memory(batch, config, out.costs),
        "buffers": empty(programs, memory_size(config.block_m) if config.mixes else config.block_m),
        "counters": counters,
        "init": out.g if init is None else init,
        "has_init": int(init is not None),
        "programs": config.programs,
    }
    others |= numbers
    batch.launch(_sinkhorn, programs, constants | cooperative(config), others)
    return out


def empty_counters(batch: Batch, config: heuristics.LaunchConfig) -> Tensor:
    """Memory in which the groups of programs count arrivals. The caller has to set it to zero."""
    groups = config.in_flight if config.programs > 1 else 0
    return batch.empty_tensor((groups + 1) * COUNTER_STRIDE.value, dtype=torch.int32)


def exchange_memory(batch: Batch, config: heuristics.LaunchConfig, costs: Tensor) -> Tensor:
    """Where the programs of an item exchange sums; a tensor that is not used if there is only one program an item."""
    if config.programs == 1:
        return costs
    return batch.empty_tensor(config.in_flight, 2, config.programs, 2 * config.block_m + EXCHANGE_TAIL.value)


def cooperative(config: heuristics.LaunchConfig) -> dict[str, Any]:
    """The options of a launch: cooperative if its programs have to wait for each other."""
    options = {"launch_cooperative_grid": True} if config.programs > 1 else {}
    return {"num_warps": config.warps, "num_stages": 1} | options


def product_options(tile: heuristics.ProductTile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def fill_costs(batch: Batch, out: Saved, C: Tensor | None, prior: str, counters: Tensor) -> None:
    """Fill the costs (rows of x, ld) from the points, or from a given `C` (B, N, M); set the counters to zero."""
    others: dict[str, Any] = {"C": out.costs, "x_scale": out.x_scale, "y_scale": out.y_scale}
    others |= {"counters": counters, "counters_size": counters.numel()}
    if C is None:
        same, bits, precision = factors(batch, batch.values["x"], batch.values["y"])
        cost = batch.cost
    else:
        same, bits, precision, cost = False, 8 * batch.dtype.itemsize, "ieee", "given"
        item, row, column = C.stride()
        others |= {"x": C, "x_item": item, "x_row": row, "x_dim": column}
        others |= {"y": C, "y_item": 0, "y_row": 1, "y_dim": 1, "dim": 0}
    tile = heuristics.cost(batch.y.size, bits=bits, generation=runtime.generation(batch.device))
    constants = {
        "COST": cost,
        "PRIOR": prior,
        "PRECISION": precision,
        "SAME": same,
        "BLOCK_N": tile.rows,
        "BLOCK_M": tile.columns,
        "BLOCK_D": tile.inner,
    }
    tiles = divide(batch.x.size, tile.rows) * divide(batch.y.size, tile.columns)
    batch.launch(_cost, tiles * batch.items, constants | product_options(tile), others)


# Backward --------------------------------------------------------------------------------------------------------------


def from_saved(saved: Saved) -> dict[str, Any]:
    """What was saved, by the names of the kernels' arguments."""
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
    *,
    solve_adjoint: SolveAdjoint | None = None,
) -> dict[str, Tensor]:
    """The gradients by the inputs in `wanted`, from those by value (B,), transport cost (B,) and plan (B, N, M).

    One launch for each input, two for points; two or three more unless only the value has a gradient. `solve_adjoint` replaces the kernel
    of the adjoint system.
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
        counters = adjoint_counters(batch, solve_adjoint)
        fill_costs(batch, saved._replace(costs=values["G"]), plan, "none", counters)
    elif implicit:
        counters = adjoint_counters(batch, solve_adjoint).zero_()
    if implicit:
        values |= adjoint(batch, values, counters, solve_adjoint)
    return _gradients(batch, values, wanted, implicit=implicit)


def _gradients(batch: Batch, values: dict[str, Any], wanted: dict[str, Tensor], *, implicit: bool) -> dict[str, Tensor]:
    out = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in wanted.items()}
    for name in ("x", "y"):
        if name in out:
            points_gradient(batch, out[name], values, batch.cost, by_y=name == "y", implicit=implicit)
    if "C" in out:
        tile = heuristics.PLAN
        constants = {"IMPLICIT": implicit, "BLOCK_R": tile.rows, "BLOCK_K": tile.columns}
        batch.launch(_cost_gradient, plan_grid(batch), constants | product_options(tile), values | {"out": out["C"]})
    for name, side in (("a", "x"), ("b", "y")):
        if name in out:
            tile = heuristics.WEIGHTS
            constants = {"IMPLICIT": implicit, "BY_Y": side == "y", "BLOCK_R": tile.rows, "BLOCK_K": tile.inner}
            grid = divide(batch.values[f"{side}_size"], tile.rows) * batch.items
            batch.launch(_weights_gradient[side], grid, constants | product_options(tile), values | {"out": out[name]})
    return out


def adjoint_counters(batch: Batch, solve_adjoint: SolveAdjoint | None) -> Tensor:
    """Memory in which the programs of the adjoint system count arrivals; the caller has to set it to zero."""
    if solve_adjoint is not None:
        return batch.empty_tensor(0, dtype=torch.int32)
    return empty_counters(batch, batch.launch_config(in_memory=True))


def adjoint(
    batch: Batch, values: dict[str, Any], counters: Tensor, solve_adjoint: SolveAdjoint | None
) -> dict[str, Tensor]:
    """Solve the adjoint system: "x_adjoint" and "y_adjoint", in the layouts of the sides."""
    if solve_adjoint is not None:
        return solve_adjoint(batch, values)
    config = batch.launch_config(in_memory=True)
    constants = {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "MAX_PROGRAMS": config.max_programs}
    found = {"x_adjoint": batch.vector(batch.x), "y_adjoint": batch.vector(batch.y)}
    others: dict[str, Any] = {"state": batch.empty_tensor(2, batch.x.rows), "counters": counters}
    others |= {"exchange": exchange_memory(batch, config, values["C"]), "programs": config.programs}
    grid = config.in_flight * config.programs
    batch.launch(_adjoint, grid, constants | cooperative(config), values | found | others)
    return found


def plan_factors(batch: Batch, other: Tensor, out: Tensor) -> tuple[bool, int, str]:
    """How tensor cores multiply matrices made of the plan with points of the other side; see `factors`."""
    same, bits, precision = factors(batch, other)
    if same and (other.dtype == torch.float16 or out.dtype != other.dtype):
        # The plan underflows in float16. Gradients and images in float32 have to be better than a product in bfloat16.
        precise = "tf32" if out.dtype == torch.float16 or tf32_allowed() else "tf32x3"
        same, bits, precision = False, 32, precise if runtime.generation(batch.device) else "ieee"
    return same, bits, precision


def points_gradient(
    batch: Batch, out: Tensor, values: dict[str, Any], cost: str, *, by_y: bool, implicit: bool
) -> None:
    """Fill `out` (..., D) with the gradient by one side's points.

    The first of two launches stores what the points are multiplied by, in the type of the product: so it is made once, and
    not for each tile of dimensions. Its memory is free again as soon as the launches are queued.
    """
    own, other = "yx" if by_y else "xy"
    side = batch.y if by_y else batch.x
    same, bits, precision = plan_factors(batch, batch.values[other], out)
    dtype = out.dtype if same else batch.dtype
    values = values | {
        "W": torch.empty(values["C"].shape, dtype=dtype, device=batch.device),
        "diagonal": batch.empty_tensor(2, side.rows),
        "out": out,
    }
    tile = heuristics.COEFFICIENTS
    constants: dict[str, Any] = {
        "COST": cost,
        "PRIOR": batch.prior if cost in ("cosine", "euclidean") else "none",  # only these gradients depend on the cost
        "IMPLICIT": implicit,
        "BY_Y": by_y,
        "BLOCK_R": tile.rows,
        "BLOCK_K": tile.inner,
    }
    grid = divide(side.size, tile.rows) * batch.items
    batch.launch(_coefficients[own], grid, constants | product_options(tile), values)
    sizes = side.size, batch.values[f"{other}_size"]
    tile = heuristics.points_gradient(out.shape[-1], *sizes, bits=bits, generation=runtime.generation(batch.device))
    constants = {"COST": cost, "BY_Y": by_y, "PRECISION": precision, "SAME": same}
    _launch_points(_points_gradient[own], batch, side, tile, values, constants)


def _launch_points(
    kernel: Kernel,
    batch: Batch,
    own: Side,
    tile: heuristics.ProductTile,
    values: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    """Launch a kernel that fills `values["out"]`, one vector for each point of a side, by tiles of points and dimensions."""
    constants |= {"BLOCK_R": tile.rows, "BLOCK_K": tile.inner, "BLOCK_D": tile.columns}
    grid = divide(own.size, tile.rows) * divide(values["out"].shape[-1], tile.columns) * batch.items
    batch.launch(kernel, grid, constants | product_options(tile), values)


# Outputs ---------------------------------------------------------------------------------------------------------------


def plan_grid(batch: Batch) -> int:
    """Programs that cover (B, N, M) with tiles of a plan."""
    tile = heuristics.PLAN
    return divide(batch.x.size, tile.rows) * divide(batch.y.size, tile.columns) * batch.items


def plan(batch: Batch, saved: Saved) -> Tensor:
    """The plan (B, N, M), zero on the padding."""
    out = batch.empty_tensor(batch.items, batch.x.size, batch.y.size)
    if batch.empty:
        return out.zero_()
    tile = heuristics.PLAN
    constants = {"BLOCK_R": tile.rows, "BLOCK_K": tile.columns} | product_options(tile)
    batch.launch(_plan, plan_grid(batch), constants, from_saved(saved) | {"out": out})
    return out


def barycentric(batch: Batch, saved: Saved, *, by_y: bool) -> tuple[Tensor, Tensor]:
    """The images of the points of x, or of y: (..., D), and their masses in the plan, in the layout of the side."""
    mass = batch.vector(batch.y if by_y else batch.x)
    out = batch.empty_tensor(*mass.shape, batch.values["dim"])
    if batch.empty:
        return out.zero_(), mass.zero_()
    own, other = "yx" if by_y else "xy"
    same, bits, precision = plan_factors(batch, batch.values[other], out)
    tile = heuristics.points(out.shape[-1], bits=bits, generation=runtime.generation(batch.device))
    constants = {"BY_Y": by_y, "PRECISION": precision, "SAME": same}
    values = from_saved(saved) | {"mass": mass, "out": out}
    _launch_points(_barycentric[own], batch, batch.y if by_y else batch.x, tile, values, constants)
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
    solve_adjoint: SolveAdjoint | None = None,
) -> dict[str, Tensor]:
    """The gradients by the inputs in `wanted` from that by the image of one side, without the plan.

    With d_i the gradient by image i over the mass r_i, dL/dP_ij = <d_i, y_j - image_i>: a product like that of a cost. The
    points y_j that are averaged also have the direct gradient sum_i P_ij d_i.
    """
    if batch.empty:
        return {name: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for name, t in wanted.items()}
    own, other = ("y", "x") if by_y else ("x", "y")
    points = batch.values[other].to(batch.dtype)
    mass = mass[..., None]
    load = torch.where(mass == 0, 0, -gradient / mass)
    offset = -(load * image).sum(-1, keepdim=True)
    # One dimension more, and zeros up to a multiple of 16, so that rows stay aligned.
    padding = -(points.shape[-1] + 1) % 16
    product = batch.with_points(
        **{
            own: F.pad(torch.cat([load, offset], -1), (0, padding)),
            other: F.pad(F.pad(points, (0, 1), value=1), (0, padding)),
        },
        cost="dot",
    )
    values = from_saved(saved)
    values |= {"G": torch.empty_like(saved.costs), "has_plan": 1}
    counters = adjoint_counters(batch, solve_adjoint)
    fill_costs(product, saved._replace(costs=values["G"]), None, "none", counters)
    values |= adjoint(batch, values, counters, solve_adjoint)
    found = _gradients(batch, values, wanted, implicit=True)
    if other in found:
        one = torch.ones(1, dtype=batch.dtype, device=batch.device)
        direct = batch.empty_tensor(*points.shape)
        average = batch.with_points(**{own: load, other: points}, cost="dot")
        values |= {"has_plan": 0, "grad_value": one, "value_step": 0}
        points_gradient(average, direct, values, "dot", by_y=not by_y, implicit=False)
        found[other] = (found[other] + direct).to(found[other].dtype)
    return found


def assign(batch: Batch, saved: Saved) -> Tensor:
    """For every y the index of the x that gives it most mass, -1 where there is none: int64 in the layout of y."""
    out = torch.empty(saved.g.shape, dtype=torch.int64, device=batch.device)
    if batch.empty:
        return out.fill_(-1)
    tile = heuristics.ASSIGN
    constants = {"BLOCK_R": tile.inner, "BLOCK_K": tile.columns} | product_options(tile)
    batch.launch(_assign, divide(batch.y.size, tile.columns) * batch.items, constants, from_saved(saved) | {"out": out})
    return out
