"""The torch.library boundary of the compiled engine: operators with fakes and gradients, and nothing besides.

`otalign::align` solves a batch and `otalign::align_backward` takes gradients by its value, linear value and plan back to
all inputs; `otalign::unpack` and `otalign::pack` turn the plans, kept one behind the other, into (B, N, M) and back.
Lengths, offsets and reg are tensors on the CPU. Arity is fixed: what does not apply is None, or comes back empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .prior import KINDS
from .problem import COSTS, Problem, Solution, fixed_plan_cost

_PROBLEM = (
    "Tensor? x, Tensor? y, Tensor? C, Tensor x_lengths, Tensor y_lengths, Tensor? x_starts, Tensor? y_starts, "
    "Tensor? a, Tensor? b, Tensor? init, Tensor reg, str cost, str prior, float[] prior_parameters, float rho_x, "
    "float rho_y, int max_iter, float tol, bool symmetric, SymInt size_x, SymInt size_y, SymInt capacity, ScalarType dtype"
)
_SAVED = "Tensor plan, Tensor f, Tensor g, Tensor error, Tensor of_x, Tensor of_y, Tensor distance"
_SCALARS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_COSTS = {word: index for index, word in enumerate((*COSTS, "given"))}
_PRIORS = {word: index for index, word in enumerate(KINDS)}
_GAP = 16  # zeros between plans, so that the engine may read past a row's end: kPlanGap of csrc/problem.h

_LARGE = 2**18  # bytes
_STRIDES = 2**31  # what a BLAS takes is below

_library = torch.library.Library("otalign", "DEF")
_library.define(
    f"align({_PROBLEM}) -> (Tensor value, Tensor linear, Tensor plan, Tensor f, Tensor g, Tensor error, Tensor n_iter, "
    "Tensor of_x, Tensor of_y, Tensor distance)"
)
_library.define(
    f"align_backward(Tensor? grad_value, Tensor? grad_linear, Tensor? grad_plan, {_PROBLEM}, {_SAVED}, bool[] wanted) "
    "-> (Tensor x, Tensor y, Tensor C, Tensor a, Tensor b)"
)
_library.define("unpack(Tensor plan, Tensor x_lengths, Tensor y_lengths, SymInt size_x, SymInt size_y) -> Tensor")
_library.define("pack(Tensor dense, Tensor x_lengths, Tensor y_lengths, SymInt capacity) -> Tensor")


def launch(problem: Problem) -> Solution:
    """Solve a batch with the compiled engine."""
    p, xs, ys = problem, problem.x_segments, problem.y_segments
    x_lengths, y_lengths = xs.lengths, ys.lengths
    prior, parameters = ("none", ()) if p.prior is None else (p.prior.kind, p.prior.parameters)
    align: Any
    if torch.compiler.is_compiling():
        align = torch.ops.otalign.align
    else:
        align = _TransformedAlign.apply if _transformed() else _Align.apply
    value, linear, plan, f, g, error, n_iter, _, _, _ = align(
        p.x, p.y, p.C, x_lengths, y_lengths, xs.starts, ys.starts, p.a, p.b, p.init, p.regs, p.cost,
        prior, parameters, p.rho[0], p.rho[1], p.max_iter, p.tol, p.symmetric, xs.size, ys.size, _capacity(p), p.dtype,
    )  # fmt: skip
    return Solution(
        value=value,
        value_linear=linear,
        plan_cost=partial(fixed_plan_cost, linear, value),
        f=f,
        g=g,
        n_iter=n_iter,
        error=error,
        plan=partial(_dense_plan, plan, x_lengths, y_lengths, xs.size, ys.size),
    )


def _dense_plan(plan: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> Tensor:
    unpack = _Unpack.apply if _transformed() else torch.ops.otalign.unpack
    return unpack(plan, x_lengths, y_lengths, size_x, size_y)


def _capacity(p: Problem) -> int:
    """Numbers that the plans of this batch take; under torch.compile, where lengths are unknown, a bound."""
    n, m = p.x_segments.counts, p.y_segments.counts
    if n is None or m is None:
        return p.x_segments.rows * p.y_segments.size + 2 * _GAP * p.items
    return sum((i * j + _GAP + 15) // 16 * 16 for i, j in zip(n, m, strict=True))


# Kernels ------------------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """The operators' problem, in the order of the schema."""

    x: Tensor | None
    y: Tensor | None
    C: Tensor | None
    x_lengths: Tensor
    y_lengths: Tensor
    x_starts: Tensor | None
    y_starts: Tensor | None
    a: Tensor | None
    b: Tensor | None
    init: Tensor | None
    reg: Tensor
    cost: str
    prior: str
    prior_parameters: Sequence[float]
    rho_x: float
    rho_y: float
    max_iter: int
    tol: float
    symmetric: bool
    size_x: int
    size_y: int
    capacity: int
    dtype: torch.dtype

    def like(self) -> Tensor:
        tensor = self.C if self.x is None else self.x
        assert tensor is not None
        return tensor


class _Saved(NamedTuple):
    """What the forward pass leaves for the backward pass, in the order of the schema.

    `of_x` and `of_y` hold, of every point, its mass in the plan over its weight, what its products are scaled with, and the
    power of two that it is divided by before.
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    error: Tensor
    of_x: Tensor
    of_y: Tensor
    distance: Tensor


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
    if inputs.cost not in _COSTS or inputs.prior not in _PRIORS:
        raise ValueError(f"cost, prior: expected words that the engine knows, got {inputs.cost!r} and {inputs.prior!r}")
    given = inputs.cost == "given"
    for name, tensor in (("x", inputs.x), ("y", inputs.y), ("C", inputs.C)):
        if (tensor is not None) == (given != (name == "C")):
            raise ValueError(f"{name}: expected {'no ' * (tensor is not None)}tensor for cost {inputs.cost!r}")
        if tensor is not None and tensor.dtype not in _SCALARS:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
    _expect("reg", inputs.reg, torch.float64, items)
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
    f, g = _vectors(inputs)
    for name, vector, shape in (("a", inputs.a, f), ("b", inputs.b, g), ("init", inputs.init, g)):
        _expect(name, vector, dtype, shape)


def _check_saved(inputs: _Inputs, saved: _Saved) -> None:
    f, g = _vectors(inputs)
    distance = inputs.capacity if inputs.cost == "euclidean" else 0
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

    p = backends.extension().Problem()
    p.items, p.is_double = inputs.x_lengths.shape[0], inputs.dtype == torch.float64
    p.cost, p.prior = _COSTS[inputs.cost], _PRIORS[inputs.prior]
    p.prior_parameters = (*inputs.prior_parameters, 0.0, 0.0)[:2]
    p.rho_x, p.rho_y, p.max_iter, p.tol = inputs.rho_x, inputs.rho_y, inputs.max_iter, inputs.tol
    p.symmetric = inputs.symmetric
    p.reg, p.init = memory(inputs.reg), memory(inputs.init)
    p.capacity, p.threads = inputs.capacity, torch.get_num_threads()
    p.plan, p.error, p.distance = memory(saved.plan), memory(saved.error), memory(saved.distance)
    for side, points, lengths, starts, weights, size, potential, of_points in (
        (p.x, inputs.x, inputs.x_lengths, inputs.x_starts, inputs.a, inputs.size_x, saved.f, saved.of_x),
        (p.y, inputs.y, inputs.y_lengths, inputs.y_starts, inputs.b, inputs.size_y, saved.g, saved.of_y),
    ):
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
    block = backends.extension().PooledMemory(count * dtype.itemsize)
    return torch.frombuffer(block, dtype=dtype, count=count).view(shape)


def _vectors(inputs: _Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a number for each point of x, and of y."""
    sides = (inputs.x, inputs.x_starts, inputs.size_x), (inputs.y, inputs.y_starts, inputs.size_y)
    f, g = (
        (inputs.x_lengths.shape[0], size) if starts is None or points is None else (points.shape[0],)
        for points, starts, size in sides
    )
    return f, g


def _outputs(*arguments: Any, empty: Any = _new_empty) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments)
    items = (inputs.x_lengths.shape[0],)
    f, g = _vectors(inputs)
    distance = inputs.capacity if inputs.cost == "euclidean" else 0
    like = inputs.like()
    return (
        *(empty(like, shape, inputs.dtype) for shape in (items, items, (inputs.capacity,), f, g, items)),
        empty(like, items, torch.int32),
        *(empty(like, shape, inputs.dtype) for shape in ((3, *f), (3, *g), (distance,))),
    )


def _align(*arguments: Any) -> tuple[Tensor, ...]:
    _check_inputs(_Inputs(*arguments))
    outputs = _outputs(*arguments, empty=_pooled)
    value, linear, plan, f, g, error, n_iter, of_x, of_y, distance = outputs
    p, _kept = _struct(_Inputs(*arguments), _Saved(plan, f, g, error, of_x, of_y, distance))
    p.value, p.linear, p.n_iter = _memory(value), _memory(linear), _memory(n_iter)
    backends.extension().cpu_forward(p)
    return outputs


def _gradients(*arguments: Any, empty: Any = _new_empty) -> tuple[Tensor, ...]:
    inputs, wanted = _Inputs(*arguments[3 : 3 + len(_Inputs._fields)]), arguments[-1]
    tensors = zip((inputs.x, inputs.y, inputs.C, inputs.a, inputs.b), wanted, strict=True)
    none = inputs.like().new_empty((0,))
    return tuple(empty(t, t.shape, t.dtype) if want and t is not None else none.clone() for t, want in tensors)


def _align_backward(*arguments: Any) -> tuple[Tensor, ...]:
    count = 3 + len(_Inputs._fields)
    incoming, wanted = arguments[:3], arguments[-1]
    inputs, saved = _Inputs(*arguments[3:count]), _Saved(*arguments[count:-1])
    _check_inputs(inputs)
    _check_saved(inputs, saved)
    outputs = _gradients(*arguments, empty=_pooled)
    p, kept = _struct(inputs, saved)
    gradients = backends.extension().Gradients()
    items = (p.items,)
    shapes = (items, items, (p.capacity,))
    for name, grad, shape in zip(("value", "linear", "plan"), incoming, shapes, strict=True):
        if grad is not None:
            _expect(f"grad_{name}", grad, inputs.dtype, shape)
            kept.append(grad.contiguous())
            setattr(gradients, name, _memory(kept[-1]))
    for name, output, want in zip(("x", "y", "given", "a", "b"), outputs, wanted, strict=True):
        setattr(gradients, name, _memory(output) if want else (0, 0))
    backends.extension().cpu_backward(p, gradients)
    return outputs


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
    p = backends.extension().Problem()
    p.items, p.is_double, p.capacity = items[0], packed.dtype == torch.float64, packed.shape[0]
    p.plan, p.x.lengths, p.y.lengths = map(_memory, kept)
    p.x.size, p.y.size, p.x.rows, p.y.rows = size_x, size_y, items[0] * size_x, items[0] * size_y
    return p, kept


def _unpack(plan: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> Tensor:
    problem, _kept = _plans(plan.contiguous(), x_lengths, y_lengths, size_x, size_y)
    dense = _empty_dense(plan, x_lengths, y_lengths, size_x, size_y)
    backends.extension().cpu_unpack(problem, _memory(dense))
    return dense


def _empty_dense(plan: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> Tensor:
    return plan.new_empty((x_lengths.shape[0], size_x, size_y))


def _pack(dense: Tensor, x_lengths: Tensor, y_lengths: Tensor, capacity: int) -> Tensor:
    if dense.dim() != 3 or dense.shape[:1] != x_lengths.shape:
        raise ValueError(
            f"dense: expected (B, N, M) and lengths (B,), got {tuple(dense.shape)}, {tuple(x_lengths.shape)}"
        )
    dense, plan = dense.contiguous(), dense.new_empty((capacity,))
    problem, _kept = _plans(plan, x_lengths, y_lengths, dense.shape[1], dense.shape[2])
    backends.extension().cpu_pack(problem, _memory(dense))
    return plan


_library.impl("align", _align, "CPU")
_library.impl("align_backward", _align_backward, "CPU")
_library.impl("unpack", _unpack, "CPU")
_library.impl("pack", _pack, "CPU")
torch.library.register_fake("otalign::align", _outputs, lib=_library)
torch.library.register_fake("otalign::align_backward", _gradients, lib=_library)
torch.library.register_fake("otalign::unpack", _empty_dense, lib=_library)
torch.library.register_fake("otalign::pack", lambda dense, xl, yl, capacity: dense.new_empty((capacity,)), lib=_library)

# Gradients ----------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, plan, f, g, error, n_iter, of_x, of_y, distance = output
    tensors = [t if isinstance(t, Tensor) else None for t in inputs]
    ctx.save_for_backward(*tensors, plan, f, g, error, of_x, of_y, distance)
    ctx.others = [None if isinstance(t, Tensor) else t for t in inputs]
    ctx.mark_non_differentiable(f, g, error, n_iter, of_x, of_y, distance)
    ctx.set_materialize_grads(False)


def _align_autograd(ctx: Any, value: Any, linear: Any, plan: Any, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors = saved[: len(_Inputs._fields)]
    inputs = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
    positions = [_Inputs._fields.index(name) for name in ("x", "y", "C", "a", "b")]
    wanted = [ctx.needs_input_grad[position] for position in positions]
    backward = _AlignBackward.apply if _transformed() else torch.ops.otalign.align_backward
    found = backward(value, linear, plan, *inputs, *saved[len(_Inputs._fields) :], wanted)
    gradients: list[Tensor | None] = [None] * len(_Inputs._fields)
    for position, gradient, want in zip(positions, found, wanted, strict=True):
        gradients[position] = gradient if want else None
    return tuple(gradients)


NO_FORWARD_MODE = (
    "forward-mode derivatives (torch.func.jvp, jacfwd) are not supported; take torch.func.grad, vjp or jacrev"
)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("second derivatives need backend='reference'; the compiled engine has first ones only")


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    plan, x_lengths, y_lengths, _, _ = inputs
    ctx.save_for_backward(x_lengths, y_lengths)
    ctx.capacity = plan.shape[0]


def _unpack_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.otalign.pack(grad, *ctx.saved_tensors, ctx.capacity), None, None, None, None


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, x_lengths, y_lengths, _ = inputs
    ctx.save_for_backward(x_lengths, y_lengths)
    ctx.sizes = dense.shape[1:]


def _pack_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.otalign.unpack(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None


def _transformed() -> bool:
    """Whether torch.func transforms this call: what the library registers does not support that, the classes below do."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class _Function(torch.autograd.Function):
    """What torch.func can transform: a dimension that it maps over is gone through one by one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_MODE)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:  # type: ignore[override]
        each = []
        for index in range(info.batch_size):
            pairs = zip(inputs, in_dims, strict=True)
            each.append(cls.apply(*(t.select(dim, index) if isinstance(dim, int) else t for t, dim in pairs)))
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])


class _AlignBackward(_Function):
    """`align_backward` under torch.func."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.otalign.align_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[override]
        pass

    backward = staticmethod(_no_second_derivative)  # type: ignore[assignment]


class _Unpack(_Function):
    """`unpack` under torch.func."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.otalign.unpack(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        _save_unpack(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _Pack.apply(grad, *ctx.saved_tensors, ctx.capacity), None, None, None, None


class _Pack(_Function):
    """`pack` under torch.func."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.otalign.pack(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        _save_pack(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _Unpack.apply(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None


class _Align(torch.autograd.Function):
    """What is registered below, for eager calls: straight to the kernel, without the 100 us of the library's wrapper."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_MODE)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # a second derivative is wanted: let the library say that there is none
            return _align_autograd(ctx, *grads)
        with torch._C._AutoDispatchBelowAutograd():
            return _align_autograd(ctx, *grads)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.otalign.align(*inputs)
        _save(ctx, inputs, outputs)
        return outputs


class _TransformedAlign(_Function):
    """`_Align` under torch.func."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.otalign.align(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[override]
        _save(ctx, inputs, output)

    backward = staticmethod(_align_autograd)  # type: ignore[assignment]


torch.library.register_autograd("otalign::align", _align_autograd, setup_context=_save, lib=_library)
torch.library.register_autograd("otalign::align_backward", _no_second_derivative, lib=_library)
torch.library.register_autograd("otalign::unpack", _unpack_autograd, setup_context=_save_unpack, lib=_library)
torch.library.register_autograd("otalign::pack", _pack_autograd, setup_context=_save_pack, lib=_library)
