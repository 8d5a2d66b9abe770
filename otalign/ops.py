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

    `of_x` and `of_y` hold, of every point, its mass in the plan over its weight, and what its products are scaled with.
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    error: Tensor
    of_x: Tensor
    of_y: Tensor
    distance: Tensor


def _struct(inputs: _Inputs, saved: _Saved) -> tuple[Any, list[Tensor]]:
    """The problem as the engine takes it, and the tensors to keep as long as it points to them."""
    kept: list[Tensor] = []

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    p = backends.extension().Problem()
    p.items, p.is_double = inputs.x_lengths.shape[0], inputs.dtype == torch.float64
    p.cost, p.prior = _COSTS[inputs.cost], _PRIORS[inputs.prior]
    p.prior_parameters = (*inputs.prior_parameters, 0.0, 0.0)[:2]
    p.rho_x, p.rho_y, p.max_iter, p.tol = inputs.rho_x, inputs.rho_y, inputs.max_iter, inputs.tol
    p.symmetric = inputs.symmetric
    p.reg, p.init = address(inputs.reg), address(inputs.init)
    p.capacity, p.threads = inputs.capacity, torch.get_num_threads()
    p.plan, p.error, p.distance = saved.plan.data_ptr(), saved.error.data_ptr(), saved.distance.data_ptr()
    for side, points, lengths, starts, weights, size, potential, of_points in (
        (p.x, inputs.x, inputs.x_lengths, inputs.x_starts, inputs.a, inputs.size_x, saved.f, saved.of_x),
        (p.y, inputs.y, inputs.y_lengths, inputs.y_starts, inputs.b, inputs.size_y, saved.g, saved.of_y),
    ):
        side.size, side.rows = size, potential.numel()
        side.lengths, side.starts, side.weights = address(lengths), address(starts), address(weights)
        side.potential = potential.data_ptr()
        side.mass, side.scale = of_points[0].data_ptr(), of_points[1].data_ptr()
        if points is not None:
            rows, p.dim = points.shape[-2:]
            if points.stride(-1) != 1 or (rows > 1 and not p.dim <= points.stride(-2) < _STRIDES):
                points = points.contiguous()
            kept.append(points)
            side.points, side.points_type = points.data_ptr(), _SCALARS[points.dtype]
            side.item_stride, side.row_stride = points.stride(0), max(points.stride(-2) if rows > 1 else p.dim, 1)
    if inputs.C is not None:
        p.given, p.given_type, p.given_strides = inputs.C.data_ptr(), _SCALARS[inputs.C.dtype], inputs.C.stride()
    return p, kept


def _new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _pooled(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `_new_empty`, from the engine's pool of memory if it is large: see csrc/cpu/pool.h."""
    count = math.prod(shape)
    if count * dtype.itemsize < _LARGE:
        return like.new_empty(shape, dtype=dtype)
    block = backends.extension().Block(count * dtype.itemsize)
    return torch.frombuffer(block, dtype=dtype, count=count).view(shape)


def _outputs(*arguments: Any, empty: Any = _new_empty) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments)
    items = (inputs.x_lengths.shape[0],)
    f, g = (
        (*items, size) if starts is None or points is None else (points.shape[0],)
        for points, starts, size in (
            (inputs.x, inputs.x_starts, inputs.size_x),
            (inputs.y, inputs.y_starts, inputs.size_y),
        )
    )
    distance = inputs.capacity if inputs.cost == "euclidean" else 0
    like = inputs.like()
    return (
        *(empty(like, shape, inputs.dtype) for shape in (items, items, (inputs.capacity,), f, g, items)),
        empty(like, items, torch.int32),
        *(empty(like, shape, inputs.dtype) for shape in ((2, *f), (2, *g), (distance,))),
    )


def _align(*arguments: Any) -> tuple[Tensor, ...]:
    outputs = _outputs(*arguments, empty=_pooled)
    value, linear, plan, f, g, error, n_iter, of_x, of_y, distance = outputs
    p, _kept = _struct(_Inputs(*arguments), _Saved(plan, f, g, error, of_x, of_y, distance))
    p.value, p.linear, p.n_iter = value.data_ptr(), linear.data_ptr(), n_iter.data_ptr()
    backends.extension().cpu_forward(p)
    return outputs


def _gradients(*arguments: Any, empty: Any = _new_empty) -> tuple[Tensor, ...]:
    inputs, wanted = _Inputs(*arguments[3 : 3 + len(_Inputs._fields)]), arguments[-1]
    tensors = zip((inputs.x, inputs.y, inputs.C, inputs.a, inputs.b), wanted, strict=True)
    none = inputs.like().new_empty((0,))
    return tuple(empty(t, t.shape, t.dtype) if want and t is not None else none.clone() for t, want in tensors)


def _align_backward(*arguments: Any) -> tuple[Tensor, ...]:
    outputs = _gradients(*arguments, empty=_pooled)
    count = 3 + len(_Inputs._fields)
    incoming, inputs, saved, wanted = arguments[:3], arguments[3:count], arguments[count:-1], arguments[-1]
    p, kept = _struct(_Inputs(*inputs), _Saved(*saved))
    gradients = backends.extension().Gradients()
    for name, grad in zip(("value", "linear", "plan"), incoming, strict=True):
        if grad is not None:
            kept.append(grad.contiguous())
            setattr(gradients, name, kept[-1].data_ptr())
    for name, output, want in zip(("x", "y", "given", "a", "b"), outputs, wanted, strict=True):
        setattr(gradients, name, output.data_ptr() if want else 0)
    backends.extension().cpu_backward(p, gradients)
    return outputs


def _plans(x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int, packed: Tensor) -> Any:
    p = backends.extension().Problem()
    p.items, p.is_double, p.capacity = x_lengths.shape[0], packed.dtype == torch.float64, packed.shape[0]
    p.x.lengths, p.y.lengths, p.x.size, p.y.size = x_lengths.data_ptr(), y_lengths.data_ptr(), size_x, size_y
    return p


def _unpack(plan: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> Tensor:
    plan, x_lengths, y_lengths = plan.contiguous(), x_lengths.contiguous(), y_lengths.contiguous()
    dense = _empty_dense(plan, x_lengths, y_lengths, size_x, size_y)
    problem = _plans(x_lengths, y_lengths, size_x, size_y, plan)
    backends.extension().cpu_unpack(problem, plan.data_ptr(), dense.data_ptr())
    return dense


def _empty_dense(plan: Tensor, x_lengths: Tensor, y_lengths: Tensor, size_x: int, size_y: int) -> Tensor:
    return plan.new_empty((x_lengths.shape[0], size_x, size_y))


def _pack(dense: Tensor, x_lengths: Tensor, y_lengths: Tensor, capacity: int) -> Tensor:
    dense, x_lengths, y_lengths = dense.contiguous(), x_lengths.contiguous(), y_lengths.contiguous()
    plan = dense.new_empty((capacity,))
    problem = _plans(x_lengths, y_lengths, dense.shape[1], dense.shape[2], plan)
    backends.extension().cpu_pack(problem, dense.data_ptr(), plan.data_ptr())
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
