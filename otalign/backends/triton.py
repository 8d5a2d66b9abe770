"""The Triton kernels on a GPU, and the operators of both GPU backends.

`otalign::gpu_align` solves a batch. It saves the costs and the potentials; gradients, plans, barycentric projections and
assignments are computed from these by the operators that follow. Every operator has a fixed number of inputs and outputs;
unused inputs are None, unused outputs have 0 elements. Lengths and offsets are on the device, and nothing here waits for it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Segments
from ..options import COSTS, GIVEN, Options
from ..problem import Problem, Side, Solution, fixed_plan_cost
from ..triton_kernels import heuristics
from ..triton_kernels.solution import Saved, Solved
from . import cuda_launch
from .autograd import Gradients, Incoming, Operator, flatten, schema, unflatten
from .composed import gradients as composed_gradients


class _Inputs(NamedTuple):
    """The operators' problem. The first five have gradients."""

    x: Tensor | None  # (B, N, D), or (total, D) if packed
    y: Tensor | None
    C: Tensor | None  # (B, N, M)
    a: Tensor | None  # (B, N), or (total,) if packed
    b: Tensor | None
    x_offsets: Tensor | None  # int64: (B + 1,) offsets if packed, else (B,) lengths; None = full
    y_offsets: Tensor | None
    rho_x: float
    rho_y: float
    x_packed: bool
    y_packed: bool
    items: int  # B
    size_x: int  # N
    size_y: int  # M
    dtype: torch.dtype
    iterations: str  # the backend whose kernels iterate: "triton" or "cuda"
    symmetric: bool  # as in Problem
    fixed_plan: bool  # as in Problem
    options: Options

    def like(self) -> Tensor:
        tensor = self.C if self.x is None else self.x
        assert tensor is not None
        return tensor

    def rows_x(self) -> int:
        return self.x.shape[0] if self.x_packed and self.x is not None else self.items * self.size_x

    def rows_y(self) -> int:
        return self.y.shape[0] if self.y_packed and self.y is not None else self.items * self.size_y

    def vectors(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a number for each point of x, and of y."""
        x = (self.rows_x(),) if self.x_packed else (self.items, self.size_x)
        y = (self.rows_y(),) if self.y_packed else (self.items, self.size_y)
        return x, y


_SAVED = len(Saved._fields)


class _Images(NamedTuple):
    """Barycentric projections."""

    image: Tensor  # (..., D) in the layout of the side
    mass: Tensor  # (...)


def solve(problem: Problem, iterations: str = "triton") -> Solution:
    """Solve a batch with the Triton kernels; with `iterations="cuda"`, those of CUDA iterate."""
    p, xs, ys = problem, problem.x.segments, problem.y.segments
    inputs = _Inputs(
        x=p.x.points,
        y=p.y.points,
        C=p.C,
        a=p.x.weights,
        b=p.y.weights,
        x_offsets=xs.layout,
        y_offsets=ys.layout,
        rho_x=p.x.rho,
        rho_y=p.y.rho,
        x_packed=xs.packed,
        y_packed=ys.packed,
        items=p.items,
        size_x=xs.size,
        size_y=ys.size,
        dtype=p.dtype,
        iterations=iterations,
        symmetric=p.symmetric,
        fixed_plan=p.fixed_plan,
        options=p.options,
    )
    arguments = flatten(inputs)
    value, linear, error, n_iter, *saved = _align(*arguments, p.init)
    return Solution(
        value=value,
        value_linear=linear,
        plan_cost=partial(fixed_plan_cost, linear, value),
        f=saved[0],
        g=saved[1],
        n_iter=n_iter,
        error=error,
        plan=partial(_plan_of, arguments, saved),
        barycentric=partial(_barycentric_of, arguments, saved),
        assign=partial(_assign_of, arguments, saved),
        apply=partial(_apply_of, inputs, saved),
    )


def _plan_of(arguments: Sequence[Any], saved: Sequence[Tensor]) -> Tensor:
    return _plan(*arguments, *saved)


def _barycentric_of(arguments: Sequence[Any], saved: Sequence[Tensor], by_y: bool) -> Tensor:
    return _barycentric(*arguments, *saved, by_y)[0]


def _assign_of(arguments: Sequence[Any], saved: Sequence[Tensor]) -> Tensor:
    return _assign(*arguments, *saved)


def _apply_of(inputs: _Inputs, saved: Sequence[Tensor], values: Tensor, by_y: bool) -> Tensor:
    """The plan times vectors of one side's points, in the layout of the other side; without gradients.

    The kernel averages the points of a side under the plan: here these are the `values`, of any dimension.
    """
    zero = values.new_zeros(()).expand(*inputs.vectors()[by_y], values.shape[-1])
    x, y = (values, zero) if by_y else (zero, values)
    if inputs.options.cost == GIVEN:  # the operator wants a cost of points; it computes none from it here
        inputs = inputs._replace(options=inputs.options._replace(cost="dot"))
    image, mass = _barycentric(*flatten(inputs._replace(x=x, y=y, C=None)), *saved, by_y)
    return image * mass[..., None]


# Kernels ------------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> Any:
    """The launchers of the kernels, which import Triton."""
    return importlib.import_module("..triton_kernels.launch", __package__)


@functools.cache
def _batches() -> Any:
    """The classes that the launchers take, which import Triton."""
    return importlib.import_module("..triton_kernels.batch", __package__)


def _expect(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: Sequence[int], *, strided: bool = False
) -> None:
    """What kernels read through an address they take for granted: the type, a number for everything, and its place."""
    if tensor is None:
        return
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected {dtype} of shape {tuple(shape)}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    if not (strided or tensor.is_contiguous()):
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if tensor.numel():
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if (tensor.storage_offset() + last) * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name}: expected a tensor whose storage holds it, but that has been resized")


def _check(inputs: _Inputs) -> None:
    p, cost, reg = inputs, inputs.options.cost, inputs.options.reg
    if p.items < 0 or p.size_x < 0 or p.size_y < 0 or p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sizes, dtype: got {p.items}, {p.size_x}, {p.size_y} and {p.dtype}")
    if p.iterations not in ("triton", "cuda") or cost not in (*COSTS, GIVEN):
        raise ValueError(f"iterations, cost: got {p.iterations!r} and {cost!r}")
    given = cost == GIVEN
    for name, tensor in (("x", p.x), ("y", p.y), ("C", p.C)):
        if (tensor is not None) == (given != (name == "C")):
            raise ValueError(f"{name}: expected {'no ' * (tensor is not None)}tensor for cost {cost!r}")
        if tensor is not None and not (tensor.is_floating_point() and 2 <= tensor.itemsize <= p.dtype.itemsize):
            raise ValueError(f"{name}: expected floating-point numbers as in {p.dtype} or shorter, got {tensor.dtype}")
    if p.C is not None:
        _expect("C", p.C, p.C.dtype, (p.items, p.size_x, p.size_y), strided=True)
    dim = 0 if p.x is None or p.x.dim() == 0 else p.x.shape[-1]
    for name, points, packed, offsets, size, weight, weights in (
        ("x", p.x, p.x_packed, p.x_offsets, p.size_x, "a", p.a),
        ("y", p.y, p.y_packed, p.y_offsets, p.size_y, "b", p.b),
    ):
        if packed and (points is None or offsets is None):
            raise ValueError(f"{name}: expected packed points with offsets")
        if points is not None:
            _expect(name, points, points.dtype, (*((len(points),) if packed else (p.items, size)), dim), strided=True)
        _expect(f"{name}_offsets", offsets, torch.int64, (p.items + packed,))
        _expect(weight, weights, p.dtype, (len(points),) if packed and points is not None else (p.items, size))
    _expect("reg", reg if isinstance(reg, Tensor) else None, torch.float64, (p.items,))


def _saved_shapes(inputs: _Inputs) -> tuple[tuple[int, ...], ...]:
    x, y = inputs.vectors()
    scales = (x, y) if inputs.options.cost == "cosine" else ((0,), (0,))
    return x, y, (inputs.rows_x(), heuristics.leading_dimension(inputs.size_y)), *scales


def _batch(inputs: _Inputs) -> Any:
    batches, p, options = _batches(), inputs, inputs.options
    per_item = isinstance(options.reg, Tensor)
    return batches.Batch(
        batches.Side(p.x, p.x_offsets, p.a, p.x_packed, p.size_x, p.rows_x()),
        batches.Side(p.y, p.y_offsets, p.b, p.y_packed, p.size_y, p.rows_y()),
        items=p.items,
        reg=0.0 if per_item else options.reg,
        reg_items=options.reg if per_item else None,
        cost=options.cost,
        prior="none" if options.prior is None else options.prior.kind,
        prior_parameters=() if options.prior is None else options.prior.parameters,
        rho=(p.rho_x, p.rho_y),
        dtype=p.dtype,
        device=p.like().device,
        symmetric=p.symmetric,
    )


def _check_align(*arguments: Any) -> None:
    inputs, (init,) = unflatten(_Inputs, arguments)
    _check(inputs)
    _expect("init", init, inputs.dtype, inputs.vectors()[1])


def _check_solved(*arguments: Any) -> None:
    _checked(arguments)


def _checked(arguments: Sequence[Any]) -> tuple[_Inputs, Sequence[Any]]:
    """The problem, checked together with what was saved of its solution, and all other arguments."""
    inputs, others = unflatten(_Inputs, arguments)
    _check(inputs)
    for name, tensor, shape in zip(Saved._fields, others[:_SAVED], _saved_shapes(inputs), strict=True):
        _expect(name, tensor, inputs.dtype, shape)
    return inputs, others[_SAVED:]


def _check_align_backward(*arguments: Any) -> None:
    inputs, (*incoming, _) = _checked(arguments)
    items = (inputs.items,)
    shapes = (items, items, (*items, inputs.size_x, inputs.size_y))
    for name, gradient, shape in zip(Incoming._fields, incoming, shapes, strict=True):
        _expect(name, gradient, inputs.dtype, shape, strided=True)


def _check_barycentric_backward(*arguments: Any) -> None:
    inputs, (image, mass, gradient, by_y, _) = _checked(arguments)
    shape = inputs.vectors()[by_y]
    images = (*shape, *inputs.like().shape[-1:])
    for name, tensor, expected in (("image", image, images), ("mass", mass, shape), ("grad_image", gradient, images)):
        _expect(name, tensor, inputs.dtype, expected, strided=True)


def _iterate(inputs: _Inputs) -> Any:
    """What iterates in place of the Triton kernel; None = nothing."""
    return cuda_launch.iterate if inputs.iterations == "cuda" else None


def _solve_adjoint(inputs: _Inputs) -> Any:
    """What solves the adjoint system in place of the Triton kernel; None = nothing."""
    return cuda_launch.solve_adjoint if inputs.iterations == "cuda" else None


def _split(arguments: Sequence[Any]) -> tuple[_Inputs, Any, Any, Sequence[Any]]:
    """The problem; as the kernels take it, with what was saved of its solution; and all other arguments."""
    inputs, others = unflatten(_Inputs, arguments)
    return inputs, _batch(inputs), Saved(*others[:_SAVED]), others[_SAVED:]


def _align_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (init,) = unflatten(_Inputs, arguments)
    kernels, numbers = _kernels(), inputs.options.numbers
    return tuple(kernels.solve(_batch(inputs), inputs.C, init, numbers, iterate=_iterate(inputs)))


def _wanted(inputs: _Inputs, wanted: Sequence[bool]) -> dict[str, Tensor]:
    triples = zip(Gradients._fields, inputs[: len(Gradients._fields)], wanted, strict=True)
    return {name: tensor for name, tensor, want in triples if want and isinstance(tensor, Tensor)}


def _gradients(found: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(map(found.get, Gradients._fields))


def _align_backward_kernel(*arguments: Any) -> tuple[Tensor | None, ...]:
    inputs, batch, saved, (*incoming, wanted) = _split(arguments)
    found = _kernels().gradients(batch, saved, *incoming, _wanted(inputs, wanted), solve_adjoint=_solve_adjoint(inputs))
    return _gradients(found)


def _plan_kernel(*arguments: Any) -> Tensor:
    _, batch, saved, _ = _split(arguments)
    return _kernels().plan(batch, saved)


def _barycentric_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, batch, saved, (by_y,) = _split(arguments)
    return _kernels().barycentric(batch, saved, by_y=by_y)


def _barycentric_backward_kernel(*arguments: Any) -> tuple[Tensor | None, ...]:
    inputs, batch, saved, (image, mass, gradient, by_y, wanted) = _split(arguments)
    found = _kernels().barycentric_gradients(
        batch,
        saved,
        image,
        mass,
        gradient,
        _wanted(inputs, wanted),
        by_y=by_y,
        solve_adjoint=_solve_adjoint(inputs),
    )
    return _gradients(found)


def _assign_kernel(*arguments: Any) -> Tensor:
    _, batch, saved, _ = _split(arguments)
    return _kernels().assign(batch, saved)


# Fakes --------------------------------------------------------------------------------------------------------------


def _align_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _ = unflatten(_Inputs, arguments)
    new, dtype, items = inputs.like().new_empty, inputs.dtype, (inputs.items,)
    saved = (new(shape, dtype=dtype) for shape in _saved_shapes(inputs))
    numbers = (new(items, dtype=of) for of in (dtype, dtype, dtype, torch.int32))
    return (*numbers, *saved)


def _backward_fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    inputs, _ = unflatten(_Inputs, arguments)
    found = {name: t.new_empty(t.shape) for name, t in _wanted(inputs, arguments[-1]).items()}
    return _gradients(found)


def _plan_fake(*arguments: Any) -> Tensor:
    inputs, _ = unflatten(_Inputs, arguments)
    return inputs.like().new_empty((inputs.items, inputs.size_x, inputs.size_y), dtype=inputs.dtype)


def _barycentric_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, _ = unflatten(_Inputs, arguments)
    shape, like = inputs.vectors()[arguments[-1]], inputs.like()
    return like.new_empty((*shape, like.shape[-1]), dtype=inputs.dtype), like.new_empty(shape, dtype=inputs.dtype)


def _assign_fake(*arguments: Any) -> Tensor:
    inputs, _ = unflatten(_Inputs, arguments)
    return inputs.like().new_empty(inputs.vectors()[1], dtype=torch.int64)


# Operators ----------------------------------------------------------------------------------------------------------


def _align_gradient(arguments: Any, saved: Any, incoming: Any, wanted: Any) -> Sequence[Tensor | None]:
    return _align_backward(*arguments[:-1], *saved, *incoming, None, wanted)  # without `init`


def _plan_gradient(arguments: Any, saved: Any, incoming: Any, wanted: Any) -> Sequence[Tensor | None]:
    return _align_backward(*arguments, None, None, *incoming, wanted)


def _align_composed(arguments: Any, saved: Any, incoming: Any, wanted: Any) -> Sequence[Tensor | None]:
    inputs, _ = unflatten(_Inputs, arguments)
    value, linear = incoming
    return composed_gradients(_problem(inputs), saved[0], saved[1], Incoming(value, linear, None), wanted)


def _plan_composed(arguments: Any, saved: Any, incoming: Any, wanted: Any) -> Sequence[Tensor | None]:
    inputs, (f, g, *_) = unflatten(_Inputs, arguments)
    return composed_gradients(_problem(inputs), f, g, Incoming(None, None, *incoming), wanted)


def _problem(inputs: _Inputs) -> Problem:
    """The problem of an operator's inputs."""
    p, device = inputs, inputs.like().device
    x = Side(p.x, Segments(p.items, p.size_x, p.rows_x(), p.x_packed, p.x_offsets, None, device), p.a, p.rho_x)
    y = Side(p.y, Segments(p.items, p.size_y, p.rows_y(), p.y_packed, p.y_offsets, None, device), p.b, p.rho_y)
    return Problem(x, y, p.C, p.options, p.dtype, None, p.symmetric, p.fixed_plan)


def _barycentric_gradient(arguments: Any, images: Any, incoming: Any, wanted: Any) -> Sequence[Tensor | None]:
    *problem, by_y = arguments
    return _barycentric_backward(*problem, *images, *incoming, by_y, wanted)


_library = torch.library.Library("otalign", "FRAGMENT")
_operator = partial(Operator, _library, devices=("CUDA", "XPU", "CPU"))  # on the CPU, through Triton's interpreter
_align = _operator(
    "gpu_align",
    schema(_Inputs, "Tensor? init", results=Solved),
    kernel=_align_kernel,
    fake=_align_fake,
    check=_check_align,
)
_align_backward = _operator(
    "gpu_align_backward",
    schema(_Inputs, Saved, Incoming, "bool[] wanted", results=Gradients),
    kernel=_align_backward_kernel,
    fake=_backward_fake,
    check=_check_align_backward,
)
_plan = _operator(
    "gpu_plan", schema(_Inputs, Saved, results="Tensor"), kernel=_plan_kernel, fake=_plan_fake, check=_check_solved
)
_barycentric = _operator(
    "gpu_barycentric",
    schema(_Inputs, Saved, "bool by_y", results=_Images),
    kernel=_barycentric_kernel,
    fake=_barycentric_fake,
    check=_check_solved,
)
_barycentric_backward = _operator(
    "gpu_barycentric_backward",
    schema(_Inputs, Saved, _Images, "Tensor grad_image, bool by_y, bool[] wanted", results=Gradients),
    kernel=_barycentric_backward_kernel,
    fake=_backward_fake,
    check=_check_barycentric_backward,
)
_assign = _operator(
    "gpu_assign",
    schema(_Inputs, Saved, results="Tensor"),
    kernel=_assign_kernel,
    fake=_assign_fake,
    check=_check_solved,
)
_align.set_gradient(_align_gradient, inputs=5, outputs=2, kept=slice(4, None), composed=_align_composed)
_plan.set_gradient(_plan_gradient, inputs=5, outputs=1, composed=_plan_composed)
_barycentric.set_gradient(_barycentric_gradient, inputs=5, outputs=1, kept=slice(None))
for _derivative in (_align_backward, _barycentric_backward):
    _derivative.forbid_gradient(
        "second derivatives work in eager mode, of losses and plans; elsewhere they need backend='reference'"
    )
