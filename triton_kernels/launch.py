"""From tensors to launches: what every kernel is given, and kernels kept compiled.

The arguments of all kernels come from one dictionary, by name: `Batch.values`. A launch picks those of its kernel.
"""

from __future__ import annotations

import copy
import functools
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import rule
from .common import COUNTS, EXCHANGE_TAIL, INTERPRETED, STRIDES
from .cost import cost_kernel
from .plan import assign_kernel, dense_kernel, lift_kernel, project_kernel, weights_kernel
from .sinkhorn import sinkhorn_kernel

INT32_MAX = 2**31 - 1

# Kernels ---------------------------------------------------------------------------------------------------------------


class Kernel:
    """A Triton kernel that takes its arguments from a dictionary and keeps its compiled variants.

    Triton finds the variant for a call by looking at all arguments in Python, at tens of microseconds. The key here has
    what can differ between calls: constants, types, and, where Triton looks, whether pointers are aligned and whether
    numbers are one or multiples of 16. (A number beyond 32 bits has another type: such calls go Triton's own way.)
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[Any, Any] = {}
        if INTERPRETED:
            return
        parameters = [p for p in function.params if not p.is_constexpr]
        numbers = [p for p in parameters if not p.annotation_type and p.name in (*STRIDES, *COUNTS)]
        pointers = [p for p in parameters if not p.annotation_type and p.name not in (*STRIDES, *COUNTS)]
        self._arguments = itemgetter(*[p.name for p in parameters])
        self._constants = itemgetter(*[p.name for p in function.params if p.is_constexpr])
        self._numbers = itemgetter(*[p.name for p in numbers])
        self._pointers = itemgetter(*[p.name for p in pointers])
        self._aligned = itemgetter(*[p.name for p in pointers if not p.do_not_specialize_on_alignment])
        self._classes = [p.name for p in numbers if not p.do_not_specialize]
        self._names = [p.name for p in parameters]

    def launch(
        self, grid: tuple[int, ...], values: dict[str, Any], constants: dict[str, Any], device: torch.device
    ) -> None:
        """Launch on the current stream of `device`. `constants` are the kernel's, and Triton's options."""
        if INTERPRETED:
            function = self.function
            function[grid](**{name: values[name] for name in function.arg_names if name in values}, **constants)
        elif device.index == torch.accelerator.current_device_index():
            self._launch(grid, values, constants, device)
        else:
            with device_guard(device):
                self._launch(grid, values, constants, device)

    def _launch(
        self, grid: tuple[int, ...], values: dict[str, Any], constants: dict[str, Any], device: torch.device
    ) -> None:
        wide = max(self._numbers(values)) > INT32_MAX
        key = (
            device.index,
            *constants.values(),
            *[pointer.dtype for pointer in self._pointers(values)],
            *[pointer.data_ptr() % 16 == 0 for pointer in self._aligned(values)],
            *[(values[name] == 1, values[name] % 16 == 0) for name in self._classes],
        )
        compiled = None if wide else self.compiled.get(key)
        arguments = self._arguments(values)
        if compiled is not None:
            compiled[grid](*arguments, *self._constants(constants))
            return
        named = dict(zip(self._names, arguments, strict=True))
        # Multiply-adds are contracted, whatever the version of Triton: its default will change.
        compiled = self.function[grid](**named, **constants, enable_fp_fusion=True)
        if not wide:
            self.compiled[key] = compiled


_cost, _sinkhorn, _lift = Kernel(cost_kernel), Kernel(sinkhorn_kernel), Kernel(lift_kernel)
_project_kernel, _weights = Kernel(project_kernel), Kernel(weights_kernel)
_dense, _assign = Kernel(dense_kernel), Kernel(assign_kernel)


@functools.cache
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What stands for a tensor that is not given; it is never read."""
    return torch.zeros(1, dtype=dtype, device=device)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs of one launch certainly run at the same time."""
    if INTERPRETED or device.type != "cuda":
        return 1  # no cooperative launches
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether this is NVIDIA's Hopper or a later chip."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


def device_guard(device: torch.device) -> Any:
    """Makes `device` the current one, whose stream Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else getattr(torch, device.type).device(device)


def tf32_allowed() -> bool:
    """Whether torch may round float32 factors to TF32 in matrix products, and so whether the cost may."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"


# A batch ---------------------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """One side of a batch."""

    points: Tensor | None  # (B, size, D) or (rows, D), any strides
    layout: Tensor | None  # int64: lengths (B,), or offsets (B + 1,) if packed; None = full
    weights: Tensor | None
    packed: bool
    size: int
    rows: int


class Saved(NamedTuple):
    """What is kept of a solution: potentials, costs (rows of x, ld), and reciprocal norms if the cost is the cosine."""

    f: Tensor
    g: Tensor
    costs: Tensor
    x_scale: Tensor
    y_scale: Tensor


class Batch:
    """A batch as the kernels take it."""

    def __init__(
        self,
        x: Side,
        y: Side,
        *,
        items: int,
        reg: float,
        reg_items: Tensor | None,
        cost: str,
        prior: str,
        prior_parameters: tuple[float, ...],
        rho: tuple[float, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.x, self.y, self.items = x, y, items
        self.cost, self.prior, self.dtype, self.device = cost, prior, dtype, device
        self.relaxed = min(rho) != float("inf")
        self.ld = rule.leading_dimension(y.size)
        self.empty = not (items and x.rows and y.rows)
        vector = _nothing(device, dtype)
        integers = _nothing(device, torch.int64)
        first, second = (*prior_parameters, 0.0, 0.0)[:2]
        self.values: dict[str, Any] = {
            "items": items,
            "reg": reg,
            "reg_items": _nothing(device, torch.float64) if reg_items is None else reg_items,
            "per_item": int(reg_items is not None),
            "prior_first": first,
            "prior_second": second,
            "rho_x": rho[0],
            "rho_y": rho[1],
            "ld16": self.ld // 16,
            "has_a": int(x.weights is not None),
            "has_b": int(y.weights is not None),
            "a": vector if x.weights is None else x.weights,
            "b": vector if y.weights is None else y.weights,
            "G": vector,
            "x_lift": vector,
            "y_lift": vector,
            "grad_value": vector,
            "grad_linear": vector,
            "value_step": -1,
            "linear_step": -1,
            "has_plan": 0,
        }
        for letter, side in (("x", x), ("y", y)):
            self.values[letter + "_layout"] = integers if side.layout is None else side.layout
            self.values[letter + "_mode"] = 2 if side.packed else int(side.layout is not None)
            self.values[letter + "_size"] = side.size
            self.values[letter + "_rows"] = side.rows
            if side.points is not None:
                self.points(letter, side.points)

    def with_points(self, x: Tensor, y: Tensor, cost: str) -> Batch:
        """This batch with other points."""
        other = copy.copy(self)
        other.values, other.cost = dict(self.values), cost
        other.points("x", x)
        other.points("y", y)
        return other

    def points(self, letter: str, points: Tensor) -> None:
        """Set the points of a side."""
        item = points.stride(0) if points.dim() == 3 else 0
        self.values[letter] = points
        self.values["dim"] = points.shape[-1]
        for name, stride in zip(("_item", "_row", "_dim"), (item, points.stride(-2), points.stride(-1)), strict=True):
            self.values[letter + name] = stride

    def solver(self, *, in_memory: bool = False) -> rule.Solver:
        """How this batch is solved; with the kernel matrix in memory at any rate, if so."""
        return rule.solver(
            self.items,
            self.x.size,
            self.y.size,
            double=self.dtype == torch.float64,
            relaxed=self.relaxed,
            processors=processors(self.device),
            hopper=hopper(self.device),
            in_memory=in_memory,
        )

    def counters(self) -> Tensor:
        """Where the programs of the implicit system count each other; to be set to zero."""
        choice = self.solver(in_memory=True)
        return self.empty_tensor(choice.in_flight * choice.programs + 1, dtype=torch.int32)

    def empty_tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def vector(self, side: Side) -> Tensor:
        """One number for every point of a side, in its layout."""
        return self.empty_tensor(side.rows) if side.packed else self.empty_tensor(self.items, side.size)

    def launch(self, kernel: Kernel, grid: tuple[int, ...], constants: dict[str, Any], /, **others: Any) -> None:
        """Launch a kernel on the values of the batch and `others`; the options of the launch come with the constants."""
        kernel.launch(grid, {**self.values, **others}, constants, self.device)


def _factors(dtype: torch.dtype, *tensors: Tensor) -> tuple[bool, int, str]:
    """How tensor cores multiply: whether 16-bit numbers as they are, the bits of the factors, and the precision."""
    if dtype == torch.float64:
        return False, 64, "ieee"
    types = {tensor.dtype for tensor in tensors}
    small = all(dtype.itemsize == 2 for dtype in types)
    if INTERPRETED or torch.version.hip or tensors[0].device.type == "xpu":
        return small and len(types) == 1 and not INTERPRETED, 32, "ieee"  # (the interpreter's bfloat16 is wrong)
    if small and len(types) == 1:
        return True, 16, "ieee"
    return False, 32, "tf32" if small or tf32_allowed() else "tf32x3"  # 16-bit numbers are exact in TF32


# Forward ---------------------------------------------------------------------------------------------------------------


class Solved(NamedTuple):
    """What `solve` fills; the last five are `Saved`."""

    value: Tensor
    linear: Tensor
    error: Tensor
    n_iter: Tensor
    f: Tensor
    g: Tensor
    costs: Tensor
    x_scale: Tensor
    y_scale: Tensor


def solve(batch: Batch, given: Tensor | None, init: Tensor | None, max_iter: int, tol: float) -> Solved:
    """Two launches: the costs of all pairs, and the iterations of all items."""
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
        "STAGES": choice.stages,
    }
    batch.launch(
        _sinkhorn,
        (programs, 1, 1),
        constants | together(choice),
        C=out.costs,
        K=out.costs if choice.groups else torch.empty_like(out.costs),
        state=empty(4, batch.x.rows),
        exchange=exchange(batch, choice),
        desks=empty(programs, choice.block_m),
        counters=counters,
        init=out.g if init is None else init,
        has_init=int(init is not None),
        programs=choice.programs,
        max_iter=max_iter,
        tol=tol,
        **out._asdict(),
    )
    return out


def exchange(batch: Batch, choice: rule.Solver) -> Tensor:
    """Where the programs of an item hand over what they have summed."""
    one = choice.programs == 1
    return batch.empty_tensor(
        0 if one else choice.in_flight, 2, choice.programs, 2 * choice.block_m + EXCHANGE_TAIL.value
    )


def together(choice: rule.Solver) -> dict[str, Any]:
    """The options of a launch whose programs may have to wait for each other."""
    cooperative = {"launch_cooperative_grid": True} if choice.programs > 1 else {}
    return {"num_warps": choice.warps, "num_stages": 1} | cooperative


def fill_costs(batch: Batch, out: Saved, given: Tensor | None, prior: str, counters: Tensor) -> None:
    """Fill the costs (rows of x, ld) from the points, or with what is `given` (B, N, M); set the counters to zero."""
    if given is None:
        x, y = batch.values["x"], batch.values["y"]
        (same, bits, precision), cost, others = _factors(batch.dtype, x, y), batch.cost, {}
    else:
        same, bits, precision, cost = False, 8 * batch.dtype.itemsize, "ieee", "given"
        others = dict(zip(("x_item", "x_row", "x_dim"), given.stride(), strict=True))
        others |= {"x": given, "y": given, "y_item": 0, "y_row": 1, "y_dim": 1, "dim": 0}
    tile = rule.cost(batch.x.size, batch.y.size, bits=bits)
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
    tiles = triton.cdiv(batch.x.size, tile.rows) * triton.cdiv(batch.y.size, tile.columns)
    batch.launch(
        _cost,
        (tiles, batch.items, 1),
        constants,
        C=out.costs,
        x_scale=out.x_scale,
        y_scale=out.y_scale,
        counters=counters,
        counters_size=counters.numel(),
        **others,
    )


# Backward --------------------------------------------------------------------------------------------------------------


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
        return {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    values: dict[str, Any] = {"C": saved.costs, "f": saved.f, "g": saved.g}
    values |= {"x_scale": saved.x_scale, "y_scale": saved.y_scale}
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
            tile = rule.WEIGHTS
            constants = {"IMPLICIT": implicit, "BY_Y": name == "b", "BLOCK_R": tile.rows, "BLOCK_K": tile.inner}
            constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
            grid = (triton.cdiv(side.size, tile.rows), batch.items, 1)
            batch.launch(_weights, grid, constants, **values, out=out[name], rho=batch.values[rho])
    return out


def lifts(batch: Batch, values: dict[str, Any], counters: Tensor) -> dict[str, Tensor]:
    """Solve the implicit system for what the gradients need of it."""
    choice = batch.solver(in_memory=True)
    constants = {"BLOCK_N": choice.block_n, "BLOCK_M": choice.block_m, "PEERS": choice.peers}
    found = {"x_lift": batch.vector(batch.x), "y_lift": batch.vector(batch.y)}
    batch.launch(
        _lift,
        (choice.in_flight * choice.programs, 1, 1),
        constants | together(choice),
        **values | found,
        state=batch.empty_tensor(2, batch.x.rows),
        exchange=exchange(batch, choice),
        counters=counters,
        programs=choice.programs,
    )
    return found


def project(
    batch: Batch, out: Tensor, values: dict[str, Any], cost: str, *, by_y: bool, implicit: bool = False
) -> None:
    """Fill `out` with the gradient by one side's points, or with their images if `cost` is "average"."""
    other = (batch.values | values)["x" if by_y else "y"]
    same, bits, precision = _factors(batch.dtype, other)
    if same and (cost == "average" or other.dtype == torch.float16):
        # The plan is beyond the range of float16, and an image is wanted better than in bfloat16.
        same, bits, precision = False, 32, "tf32" if precision == "ieee" and bits == 16 else precision
    dim = out.shape[-1]
    tile = rule.project(dim, bits=bits)
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
    grid = (triton.cdiv(side.size, tile.rows) * triton.cdiv(dim, tile.columns), batch.items, 1)
    batch.launch(_project_kernel, grid, constants, **values, out=out)


def _dense_launch(batch: Batch, out: Tensor, values: dict[str, Any], *, gradient: bool, implicit: bool = False) -> None:
    tile = rule.DENSE
    constants = {"GRADIENT": gradient, "IMPLICIT": implicit, "BLOCK_R": tile.rows, "BLOCK_K": tile.columns}
    constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    tiles = triton.cdiv(batch.x.size, tile.rows) * triton.cdiv(batch.y.size, tile.columns)
    batch.launch(_dense, (tiles, batch.items, 1), constants, **values, out=out)


# What is made of a plan ------------------------------------------------------------------------------------------------


def plan(batch: Batch, saved: Saved) -> Tensor:
    """The plan (B, N, M), zero on the padding."""
    out = batch.empty_tensor(batch.items, batch.x.size, batch.y.size)
    if batch.empty:
        return out.zero_()
    _dense_launch(batch, out, {"C": saved.costs, "f": saved.f, "g": saved.g}, gradient=False)
    return out


def barycentric(batch: Batch, saved: Saved, *, by_y: bool) -> tuple[Tensor, Tensor]:
    """The images of the points of x, or of y: (..., D), and their masses in the plan, in the layout of the side."""
    side = batch.y if by_y else batch.x
    mass = batch.vector(side)
    out = batch.empty_tensor(*mass.shape, batch.values["dim"])
    if batch.empty:
        return out.zero_(), mass.zero_()
    values = {"C": saved.costs, "f": saved.f, "g": saved.g, "x_scale": mass, "y_scale": mass}
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
        return {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    own, other = ("y", "x") if by_y else ("x", "y")
    points = batch.values[other].to(batch.dtype)
    mass = mass[..., None]
    load = torch.where(mass == 0, 0, -gradient / mass)
    offset = -(load * image).sum(-1, keepdim=True)
    product = batch.with_points(
        **{own: torch.cat([load, offset], -1), other: F.pad(points, (0, 1), value=1)}, cost="dot"
    )
    values: dict[str, Any] = {"C": saved.costs, "f": saved.f, "g": saved.g}
    values |= {"x_scale": saved.x_scale, "y_scale": saved.y_scale}
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
    tile = rule.ASSIGN
    constants = {"BLOCK_R": tile.inner, "BLOCK_K": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}
    grid = (triton.cdiv(batch.y.size, tile.columns), batch.items, 1)
    batch.launch(_assign, grid, constants, out=out, C=saved.costs, f=saved.f, g=saved.g)
    return out
