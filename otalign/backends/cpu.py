"""The compiled C++ engine on the CPU: its operators, and what they pass to it.

`otalign::align` solves a batch, and `otalign::align_backward` takes the gradients by value, linear value and plan back to
all inputs. The plans of a batch are packed, one behind the other; `otalign::unpack` makes (B, N, M) of them, and
`otalign::pack` is its inverse. Lengths, offsets and reg are tensors on the CPU. Every operator has a fixed number of
inputs and outputs; unused inputs are None, unused outputs have 0 elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Segments
from ..options import COSTS, GIVEN, Options
from ..prior import KINDS
from ..problem import Problem, Side, Solution, fixed_plan_cost
from . import extension
from .autograd import Gradients, Incoming, Operator, flatten, schema, unflatten
from .composed import gradients as composed_gradients

_SCALARS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_COSTS = {word: index for index, word in enumerate((*COSTS, GIVEN))}
_PRIORS = {word: index for index, word in enumerate(KINDS)}
_GAP = 16  # zeros between plans, so that the engine may read past a row's end: kPlanGap of csrc/problem.h

_LARGE = 2**18  # bytes
_STRIDES = 2**31  # what a BLAS takes is below
_MOST = 2**31 - 2  # points of an item, and numbers of a point


def solve(problem: Problem) -> Solution:
    """Solve a batch with the compiled engine."""
    p, xs, ys = problem, problem.x.segments, problem.y.segments
    inputs = _Inputs(
        x=p.x.points,
        y=p.y.points,
        C=p.C,
        a=p.x.weights,
        b=p.y.weights,
        x_lengths=xs.lengths,
        y_lengths=ys.lengths,
        x_starts=xs.starts,
        y_starts=ys.starts,
        init=p.init,
        rho_x=p.x.rho,
        rho_y=p.y.rho,
        symmetric=p.symmetric,
        fixed_plan=p.fixed_plan,
        size_x=xs.size,
        size_y=ys.size,
        capacity=_capacity(p),
        dtype=p.dtype,
        options=p.options,
    )
    value, linear, plan, f, g, error, *_, n_iter = _align(*flatten(inputs))
    return Solution(
        value=value,
        value_linear=linear,
        plan_cost=partial(fixed_plan_cost, linear, value),
        f=f,
        g=g,
        n_iter=n_iter,
        error=error,
        plan=partial(_dense_plan, plan, inputs.x_lengths, inputs.y_lengths, xs.size, ys.size),
    )


def _dense_plan(plan: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> Tensor:
    return _unpack(plan, x_lengths, y_lengths, size_x, size_y)


def _capacity(p: Problem) -> int:
    """Numbers that the plans of this batch take; under torch.compile, where lengths are unknown, a bound."""
    n, m = p.x.segments.counts, p.y.segments.counts
    if n is None or m is None:
        return p.x.segments.rows * p.y.segments.size + 2 * _GAP * p.items
    return sum(map(_place, n, m))


def _place(n: int, m: int) -> int:
    """Numbers from the start of a packed plan to that of the next: plan_stride of csrc/problem.h."""
    return (n * m + _GAP + 15) // 16 * 16


# Kernels ------------------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """The operators' problem. The first five have gradients."""

    x: Tensor | None  # (B, N, D), or (total, D) if packed
    y: Tensor | None
    C: Tensor | None  # (B, N, M)
    a: Tensor | None  # (B, N), or (total,) if packed
    b: Tensor | None
    x_lengths: Tensor  # (B,) int64
    y_lengths: Tensor
    x_starts: Tensor | None  # (B,) int64, first rows of packed items; None = padded
    y_starts: Tensor | None
    init: Tensor | None  # g to start from
    rho_x: float
    rho_y: float
    symmetric: bool  # as in Problem
    fixed_plan: bool  # as in Problem
    size_x: int  # N
    size_y: int  # M
    capacity: int  # elements of all packed plans
    dtype: torch.dtype
    options: Options

    def like(self) -> Tensor:
        tensor = self.C if self.x is None else self.x
        assert tensor is not None
        return tensor


class _Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    plan: Tensor  # (capacity,)
    f: Tensor  # in the layout of x
    g: Tensor  # in the layout of y
    error: Tensor  # (B,)
    of_x: Tensor  # (3, ...): of every x its mass in the plan over its weight, the scale of its products, and its power of two
    of_y: Tensor
    distance: Tensor  # (capacity,) for the Euclidean cost, else (0,)


class _Outputs(NamedTuple):
    """The first three have gradients; from the third on come the fields of `_Saved`."""

    value: Tensor  # (B,)
    linear: Tensor  # (B,)
    plan: Tensor
    f: Tensor
    g: Tensor
    error: Tensor
    of_x: Tensor
    of_y: Tensor
    distance: Tensor
    n_iter: Tensor  # (B,) int32


def _memory(tensor: Tensor | None) -> tuple[int, int]:
    """The address of a tensor's first number, and the bytes from there to the end of its storage."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), int(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize)


def _expect(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """What the engine reads through an address it takes for granted: the type, and a number for everything."""
    if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
        raise ValueError(
            f"{name}: expected {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def _check_inputs(inputs: _Inputs) -> None:
    """Raise for what the functions of otalign never pass, but a caller of the operators may."""
    items, dtype = tuple(inputs.x_lengths.shape), inputs.dtype
    if len(items) != 1 or dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x_lengths, dtype: expected shape (B,) and float32 or float64, got {items} and {dtype}")
    cost, reg = inputs.options.cost, inputs.options.reg
    if cost not in _COSTS:
        raise ValueError(f"cost: expected one of {tuple(_COSTS)}, got {cost!r}")
    given = cost == GIVEN
    for name, tensor in (("x", inputs.x), ("y", inputs.y), ("C", inputs.C)):
        if (tensor is not None) == (given != (name == "C")):
            raise ValueError(f"{name}: expected {'no ' * (tensor is not None)}tensor for cost {cost!r}")
        if tensor is not None and tensor.dtype not in _SCALARS:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
    _expect("reg", reg if isinstance(reg, Tensor) else None, torch.float64, items)
    if inputs.C is not None:
        _expect("C", inputs.C, inputs.C.dtype, (*items, inputs.size_x, inputs.size_y))
    dim = 0 if inputs.x is None or inputs.x.dim() == 0 else inputs.x.shape[-1]
    for name, points, lengths, starts, size in (
        ("x", inputs.x, inputs.x_lengths, inputs.x_starts, inputs.size_x),
        ("y", inputs.y, inputs.y_lengths, inputs.y_starts, inputs.size_y),
    ):
        _expect(f"{name}_lengths", lengths, torch.int64, items)
        _expect(f"{name}_starts", starts, torch.int64, items)
        if points is not None:
            _expect(name, points, points.dtype, (*(points.shape[:1] if starts is not None else (*items, size)), dim))
        elif starts is not None:
            raise ValueError(f"{name}_starts: expected None for a given cost")
        if size > _MOST or dim > _MOST:  # before memory is allocated for them
            what = "C" if given else name
            raise ValueError(
                f"{what}: expected items of at most {_MOST} points of as many numbers, got {size} of {dim}"
            )
    f, g = _vectors(inputs)
    for name, vector, shape in (("a", inputs.a, f), ("b", inputs.b, g), ("init", inputs.init, g)):
        _expect(name, vector, dtype, shape)


def _check_saved(inputs: _Inputs, saved: _Saved) -> None:
    f, g = _vectors(inputs)
    distance = inputs.capacity if inputs.options.cost == "euclidean" else 0
    shapes = _Saved((inputs.capacity,), f, g, inputs.x_lengths.shape, (3, *f), (3, *g), (distance,))  # type: ignore[arg-type]
    for name, tensor, shape in zip(_Saved._fields, saved, shapes, strict=True):
        _expect(name, tensor, inputs.dtype, shape)  # type: ignore[arg-type]


def _struct(inputs: _Inputs, saved: _Saved) -> tuple[Any, list[Tensor]]:
    """The problem as the engine takes it, and the tensors to keep as long as it points to them."""
    kept: list[Tensor] = []

    def memory(tensor: Tensor | None) -> tuple[int, int]:
        if tensor is not None:
            tensor = tensor.contiguous()
            kept.append(tensor)
        return _memory(tensor)

    options = inputs.options
    engine = extension.module()
    p = engine.Problem.new()
    p.items, p.is_double = inputs.x_lengths.shape[0], inputs.dtype == torch.float64
    p.cost = _COSTS[options.cost]
    if options.prior is not None:
        p.prior, p.prior_parameters = _PRIORS[options.prior.kind], (*options.prior.parameters, 0.0)[:2]
    p.rho_x, p.rho_y, p.symmetric = inputs.rho_x, inputs.rho_y, inputs.symmetric
    extension.set_numbers(p, options.numbers)
    reg = options.reg
    p.reg = memory(reg if isinstance(reg, Tensor) else torch.full((p.items,), reg, dtype=torch.float64, device="cpu"))
    p.init = memory(inputs.init)
    p.capacity, p.threads = inputs.capacity, torch.get_num_threads()
    p.plan, p.error, p.distance = memory(saved.plan), memory(saved.error), memory(saved.distance)
    # Sides are assigned when they are complete: if pybind11 has no memory to note that `p.x` keeps `p`, it ends the process.
    for name, points, lengths, starts, weights, size, potential, of_points in (
        ("x", inputs.x, inputs.x_lengths, inputs.x_starts, inputs.a, inputs.size_x, saved.f, saved.of_x),
        ("y", inputs.y, inputs.y_lengths, inputs.y_starts, inputs.b, inputs.size_y, saved.g, saved.of_y),
    ):
        side = engine.Side.new()
        side.size, side.rows = size, potential.numel()
        side.lengths, side.starts, side.weights = memory(lengths), memory(starts), memory(weights)
        side.potential = memory(potential)
        side.mass, side.scale, side.exponent = map(memory, of_points)
        if points is not None:
            rows, p.dim = points.shape[-2:]
            if points.stride(-1) != 1 or (rows > 1 and not p.dim <= points.stride(-2) < _STRIDES):
                points = points.contiguous()
            kept.append(points)
            side.points, side.points_type = _memory(points), _SCALARS[points.dtype]
            side.item_stride, side.row_stride = points.stride(0), max(points.stride(-2) if rows > 1 else p.dim, 1)
        setattr(p, name, side)
    if inputs.C is not None:
        p.given, p.given_type, p.given_strides = _memory(inputs.C), _SCALARS[inputs.C.dtype], inputs.C.stride()
    return p, kept


def _new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _pooled(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `_new_empty`, from the engine's pool of memory if it is large: see csrc/cpu/pool.h."""
    count = math.prod(shape)
    if count * dtype.itemsize < _LARGE:
        return like.new_empty(shape, dtype=dtype)
    block = extension.module().PooledMemory.new(count * dtype.itemsize)
    return torch.frombuffer(block, dtype=dtype, count=count).view(shape)


def _vectors(inputs: _Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a number for each point of x, and of y."""
    sides = (inputs.x, inputs.x_starts, inputs.size_x), (inputs.y, inputs.y_starts, inputs.size_y)
    f, g = (
        (inputs.x_lengths.shape[0], size) if starts is None or points is None else (points.shape[0],)
        for points, starts, size in sides
    )
    return f, g


def _outputs(inputs: _Inputs, empty: Any) -> _Outputs:
    items, like = (inputs.x_lengths.shape[0],), inputs.like()
    f, g = _vectors(inputs)
    distance = inputs.capacity if inputs.options.cost == "euclidean" else 0
    shapes = (items, items, (inputs.capacity,), f, g, items, (3, *f), (3, *g), (distance,))
    floats = (empty(like, shape, inputs.dtype) for shape in shapes)
    return _Outputs(*floats, empty(like, items, torch.int32))  # type: ignore[call-arg]


def _align_kernel(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _ = unflatten(_Inputs, arguments)
    _check_inputs(inputs)
    outputs = _outputs(inputs, _pooled)
    p, _kept = _struct(inputs, _Saved(*outputs[2:-1]))
    p.value, p.linear, p.n_iter = _memory(outputs.value), _memory(outputs.linear), _memory(outputs.n_iter)
    extension.module().cpu_forward(p)
    return tuple(outputs)


def _align_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_outputs(unflatten(_Inputs, arguments)[0], _new_empty))


def _gradients(inputs: _Inputs, wanted: Sequence[bool], empty: Any) -> tuple[Tensor | None, ...]:
    pairs = zip((inputs.x, inputs.y, inputs.C, inputs.a, inputs.b), wanted, strict=True)
    return tuple(empty(t, t.shape, t.dtype) if want and t is not None else None for t, want in pairs)


def _align_backward_kernel(*arguments: Any) -> tuple[Tensor | None, ...]:
    inputs, others = unflatten(_Inputs, arguments)
    count = len(_Saved._fields)
    saved, incoming, wanted = _Saved(*others[:count]), Incoming(*others[count:-1]), others[-1]
    _check_inputs(inputs)
    _check_saved(inputs, saved)
    outputs = _gradients(inputs, wanted, _pooled)
    p, kept = _struct(inputs, saved)
    gradients = extension.module().Gradients.new()
    items = (p.items,)
    shapes = (items, items, (p.capacity,))
    for name, grad, shape in zip(Incoming._fields, incoming, shapes, strict=True):
        if grad is not None:
            _expect(name, grad, inputs.dtype, shape)
            kept.append(grad.contiguous())
            setattr(gradients, name.removeprefix("grad_"), _memory(kept[-1]))
    for name, output in zip(("x", "y", "given", "a", "b"), outputs, strict=True):
        setattr(gradients, name, _memory(output))
    extension.module().cpu_backward(p, gradients)
    return outputs


def _align_backward_fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    return _gradients(unflatten(_Inputs, arguments)[0], arguments[-1], _new_empty)


def _plans(packed: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> tuple[Any, list[Tensor]]:
    """What the engine has to know of plans one behind the other, and the tensors to keep as long."""
    items = tuple(x_lengths.shape)
    if len(items) != 1 or packed.dim() != 1 or packed.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"plan: expected a vector of float32 or float64 and lengths (B,), got {packed.dtype} and {items}"
        )
    _expect("x_lengths", x_lengths, torch.int64, items)
    _expect("y_lengths", y_lengths, torch.int64, items)
    kept = [packed, x_lengths.contiguous(), y_lengths.contiguous()]
    engine = extension.module()
    p, x, y = engine.Problem.new(), engine.Side.new(), engine.Side.new()
    p.items, p.is_double, p.capacity = items[0], packed.dtype == torch.float64, packed.shape[0]
    p.plan, x.lengths, y.lengths = map(_memory, kept)
    x.size, y.size, x.rows, y.rows = size_x, size_y, items[0] * size_x, items[0] * size_y
    p.x, p.y = x, y
    return p, kept


def _unpack_kernel(plan: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> Tensor:
    problem, _kept = _plans(plan.contiguous(), x_lengths, y_lengths, size_x, size_y)
    dense = _unpack_fake(plan, x_lengths, y_lengths, size_x, size_y)
    extension.module().cpu_unpack(problem, _memory(dense))
    return dense


def _unpack_fake(plan: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> Tensor:
    return plan.new_empty((x_lengths.shape[0], size_x, size_y))


def _pack_kernel(dense: Tensor, x_lengths: Tensor, y_lengths: Tensor, capacity: int) -> Tensor:
    if dense.dim() != 3 or dense.shape[:1] != x_lengths.shape:
        raise ValueError(
            f"dense: expected (B, N, M) and lengths (B,), got {tuple(dense.shape)}, {tuple(x_lengths.shape)}"
        )
    dense, plan = dense.contiguous(), _pack_fake(dense, x_lengths, y_lengths, capacity)
    problem, _kept = _plans(plan, x_lengths, y_lengths, dense.shape[1], dense.shape[2])
    extension.module().cpu_pack(problem, _memory(dense))
    return plan


def _pack_fake(dense: Tensor, x_lengths: Tensor, y_lengths: Tensor, capacity: int) -> Tensor:
    return dense.new_empty((capacity,))


# Operators ----------------------------------------------------------------------------------------------------------


def _align_gradient(arguments: Any, saved: Any, incoming: Any, wanted: Any) -> Sequence[Tensor | None]:
    return _align_backward(*arguments, *saved, *incoming, wanted)


def _align_composed(arguments: Any, saved: Any, incoming: Any, wanted: Any) -> Sequence[Tensor | None]:
    inputs, _ = unflatten(_Inputs, arguments)
    value, linear, plan = incoming
    if plan is not None:
        plan = _dense(plan, inputs.x_lengths, inputs.y_lengths, inputs.size_x, inputs.size_y)
    kept = _Saved(*saved)
    return composed_gradients(_problem(inputs), kept.f, kept.g, Incoming(value, linear, plan), wanted)


def _dense(packed: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> Tensor:
    """A gradient by packed plans as (B, N, M), in torch. (`unpack` clamps at zero, as is right for plans.)"""
    parts, start = [packed.new_zeros((0, size_x, size_y))], 0
    for n, m in zip(x_lengths.tolist(), y_lengths.tolist(), strict=True):
        part = packed[start : start + n * m].view(1, n, m)
        parts.append(torch.nn.functional.pad(part, (0, size_y - m, 0, size_x - n)))
        start += _place(n, m)
    return torch.cat(parts)


def _problem(inputs: _Inputs) -> Problem:
    """The problem of an operator's inputs."""

    def segments(lengths: Tensor, starts: Tensor | None, size: int, rows: int) -> Segments:
        layout = lengths if starts is None else torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return Segments(len(lengths), size, rows, starts is not None, layout, lengths.tolist(), inputs.like().device)

    f, g = map(math.prod, _vectors(inputs))
    p = inputs
    x = Side(p.x, segments(p.x_lengths, p.x_starts, p.size_x, f), p.a, p.rho_x)
    y = Side(p.y, segments(p.y_lengths, p.y_starts, p.size_y, g), p.b, p.rho_y)
    return Problem(x, y, p.C, p.options, p.dtype, None, p.symmetric, p.fixed_plan)


def _unpack_gradient(arguments: Any, saved: Any, incoming: Any, wanted: Any) -> Sequence[Tensor | None]:
    plan, x_lengths, y_lengths, _, _ = arguments
    return (_pack(incoming[0], x_lengths, y_lengths, plan.shape[0]),)


def _pack_gradient(arguments: Any, saved: Any, incoming: Any, wanted: Any) -> Sequence[Tensor | None]:
    dense, x_lengths, y_lengths, _ = arguments
    return (_dense(incoming[0], x_lengths, y_lengths, *dense.shape[1:]),)


_library = torch.library.Library("otalign", "DEF")
_operator = partial(Operator, _library, devices=("CPU",))
_align = _operator("align", schema(_Inputs, results=_Outputs), kernel=_align_kernel, fake=_align_fake)
_align_backward = _operator(
    "align_backward",
    schema(_Inputs, _Saved, Incoming, "bool[] wanted", results=Gradients),
    kernel=_align_backward_kernel,
    fake=_align_backward_fake,
)
_lengths = "Tensor x_lengths, Tensor y_lengths"
_unpack = _operator(
    "unpack",
    schema("Tensor plan", _lengths, "SymInt size_x, SymInt size_y", results="Tensor"),
    kernel=_unpack_kernel,
    fake=_unpack_fake,
)
_pack = _operator(
    "pack",
    schema("Tensor dense", _lengths, "SymInt capacity", results="Tensor"),
    kernel=_pack_kernel,
    fake=_pack_fake,
)
_align.set_gradient(_align_gradient, inputs=5, outputs=3, kept=slice(2, -1), composed=_align_composed)
_align_backward.forbid_gradient("second derivatives work in eager mode; elsewhere they need backend='reference'")
_unpack.set_gradient(_unpack_gradient, inputs=1, outputs=1)
_pack.set_gradient(_pack_gradient, inputs=1, outputs=1)
