"""The torch.library boundary of the compiled engine: operators with fakes and gradients, and nothing besides.

`otalign::align` solves a batch and `otalign::align_backward` takes gradients by its value, linear value and plan back to
all inputs; `otalign::unpack` and `otalign::pack` turn the plans, kept one behind the other, into (B, N, M) and back.
Lengths, offsets and reg are tensors on the CPU. Arity is fixed: what does not apply is None, or comes back empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .prior import KINDS
from .problem import COSTS, Problem, Solution

_PROBLEM = (
    "Tensor? x, Tensor? y, Tensor? C, Tensor x_lengths, Tensor y_lengths, Tensor? x_starts, Tensor? y_starts, "
    "Tensor? a, Tensor? b, Tensor? init, Tensor reg, str cost, str prior, float[] prior_parameters, float rho_x, "
    "float rho_y, int max_iter, float tol, SymInt size_x, SymInt size_y, SymInt capacity, ScalarType dtype"
)
_INPUTS = tuple(argument.split()[1] for argument in _PROBLEM.split(", "))
_SAVED = "Tensor plan, Tensor f, Tensor g, Tensor error, Tensor of_x, Tensor of_y, Tensor distance"
_SCALARS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_COSTS = {word: index for index, word in enumerate((*COSTS, "given"))}
_PRIORS = {word: index for index, word in enumerate(KINDS)}
_GAP = 16  # zeros between plans, so that the engine may read past a row's end: kPlanGap of csrc/problem.h

_LARGE = 2**18  # bytes

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
    prior, parameters = ("none", ()) if p.prior is None else (p.prior.kind, p.prior.parameters)
    align = torch.ops.otalign.align if torch.compiler.is_compiling() else _Align.apply
    value, linear, plan, f, g, error, n_iter, _, _, _ = align(
        p.x, p.y, p.C, xs.lengths, ys.lengths, xs.starts, ys.starts, p.a, p.b, p.init, p.reg, p.cost,
        prior, parameters, p.rho[0], p.rho[1], p.max_iter, p.tol, xs.size, ys.size, _capacity(p), p.dtype,
    )  # fmt: skip
    return Solution(
        value=value,
        value_linear=linear,
        # The number of one with the gradient of the other: with the plan fixed, d<P, C> = P dC = d value.
        plan_cost=lambda: linear.detach() + (value - value.detach()),
        f=f.detach(),
        g=g.detach(),
        n_iter=n_iter,
        error=error.detach(),
        plan=lambda: torch.ops.otalign.unpack(plan, xs.lengths, ys.lengths, xs.size, ys.size),
    )


def _capacity(p: Problem) -> int:
    """Numbers that the plans of this batch take; under torch.compile, where lengths are unknown, a bound."""
    if torch.compiler.is_compiling():
        return p.x_segments.rows * p.y_segments.size + 2 * _GAP * p.items
    each = p.x_segments.lengths * p.y_segments.lengths
    return int(((each + _GAP + 15) // 16 * 16).sum())


# Kernels ------------------------------------------------------------------------------------------------------------


class _Arguments:
    """The operators' problem as the engine's struct; holds on to the tensors that the struct points to."""

    def __init__(self, *values: Any) -> None:
        self.__dict__.update(zip(_INPUTS, values, strict=True))
        self._kept: list[Tensor] = []
        self.struct = p = backends.extension().Problem()
        p.items = self.x_lengths.shape[0]
        p.is_double = self.dtype == torch.float64
        p.cost, p.prior = _COSTS[self.cost], _PRIORS[self.prior]
        p.prior_parameters = (*self.prior_parameters, 0.0, 0.0)[:2]
        p.rho_x, p.rho_y, p.max_iter, p.tol = self.rho_x, self.rho_y, self.max_iter, self.tol
        p.capacity, p.threads = self.capacity, torch.get_num_threads()
        p.reg, p.init = self._pointer(self.reg), self._pointer(self.init)
        self._side(p.x, self.x, self.x_lengths, self.x_starts, self.a, self.size_x)
        self._side(p.y, self.y, self.y_lengths, self.y_starts, self.b, self.size_y)
        if self.C is not None:
            p.given, p.given_type, p.given_strides = self.C.data_ptr(), _SCALARS[self.C.dtype], self.C.stride()
        else:
            p.dim = self.x.shape[-1]

    def _side(self, side: Any, points: Any, lengths: Any, starts: Any, weights: Any, size: int) -> None:
        side.size, side.lengths, side.starts = size, self._pointer(lengths), self._pointer(starts)
        side.weights = self._pointer(weights)
        if points is None:
            side.rows = size * lengths.shape[0]
            return
        rows, dim = points.shape[-2:]
        side.rows = rows if starts is not None else rows * points.shape[0]
        if points.stride(-1) != 1 or (rows > 1 and points.stride(-2) < dim):
            points = points.contiguous()
        self._kept.append(points)
        side.points, side.points_type = points.data_ptr(), _SCALARS[points.dtype]
        side.row_stride = max(points.stride(-2) if rows > 1 else dim, 1)
        side.item_stride = points.stride(0)

    def _pointer(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def saved(self, plan: Tensor, f: Tensor, g: Tensor, error: Tensor, of_x: Tensor, of_y: Tensor, distance: Tensor) -> Any:
        """The struct, pointed to what the forward pass makes and the backward pass reads."""
        p = self.struct
        p.plan, p.error = plan.data_ptr(), error.data_ptr()
        p.distance = distance.data_ptr() if distance.numel() else 0
        for side, potential, of_points in ((p.x, f, of_x), (p.y, g, of_y)):
            side.potential, side.mass, side.scale = potential.data_ptr(), of_points[0].data_ptr(), of_points[1].data_ptr()
        return p


def _new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _pooled(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `_new_empty`, from the engine's pool of memory if it is large: see csrc/cpu/pool.h."""
    count = math.prod(shape)
    if count * dtype.itemsize < _LARGE:
        return like.new_empty(shape, dtype=dtype)
    block = backends.extension().Block(count * dtype.itemsize)
    return torch.frombuffer(block, dtype=dtype, count=count).view(shape)


def _outputs(
    x: Tensor | None,
    y: Tensor | None,
    C: Tensor | None,
    x_lengths: Tensor,
    y_lengths: Tensor,
    x_starts: Tensor | None,
    y_starts: Tensor | None,
    *rest: Any,
    empty: Any = _new_empty,
) -> tuple[Tensor, ...]:
    cost, (size_x, size_y, capacity, dtype) = rest[4], rest[-4:]
    like = C if x is None else x
    assert like is not None
    items = x_lengths.shape[0]
    shape_x = (items, size_x) if x_starts is None else (x.shape[0],)  # type: ignore[union-attr]
    shape_y = (items, size_y) if y_starts is None else (y.shape[0],)  # type: ignore[union-attr]

    # of_x and of_y hold, of every point, its mass in the plan over its weight, and what its products are scaled with.
    shapes = {
        "value": (items,),
        "linear": (items,),
        "plan": (capacity,),
        "f": shape_x,
        "g": shape_y,
        "error": (items,),
        "n_iter": (items,),
        "of_x": (2, *shape_x),
        "of_y": (2, *shape_y),
        "distance": (capacity if cost == "euclidean" else 0,),
    }
    return tuple(empty(like, shape, torch.int32 if name == "n_iter" else dtype) for name, shape in shapes.items())


def _align(*inputs: Any) -> tuple[Tensor, ...]:
    outputs = _outputs(*inputs, empty=_pooled)
    value, linear, plan, f, g, error, n_iter, of_x, of_y, distance = outputs
    p = _Arguments(*inputs).saved(plan, f, g, error, of_x, of_y, distance)
    p.value, p.linear, p.n_iter = value.data_ptr(), linear.data_ptr(), n_iter.data_ptr()
    backends.extension().cpu_forward(p)
    return outputs


def _gradients(*arguments: Any, empty: Any = _new_empty) -> tuple[Tensor, ...]:
    (x, y, C, _, _, _, _, a, b, *_), wanted = arguments[3:], arguments[-1]
    like = C if x is None else x
    tensors = zip((x, y, C, a, b), wanted, strict=True)
    return tuple(empty(t, t.shape, t.dtype) if want else like.new_empty((0,)) for t, want in tensors)


def _align_backward(grad_value: Any, grad_linear: Any, grad_plan: Any, *rest: Any) -> tuple[Tensor, ...]:
    inputs, saved, wanted = rest[: len(_INPUTS)], rest[len(_INPUTS) : -1], rest[-1]
    outputs = _gradients(grad_value, grad_linear, grad_plan, *rest, empty=_pooled)
    arguments = _Arguments(*inputs)
    engine = backends.extension()
    gradients = engine.Gradients()
    incoming = [None if grad is None else grad.contiguous() for grad in (grad_value, grad_linear, grad_plan)]
    for name, grad in zip(("value", "linear", "plan"), incoming, strict=True):
        setattr(gradients, name, 0 if grad is None else grad.data_ptr())
    for name, output, want in zip(("x", "y", "given", "a", "b"), outputs, wanted, strict=True):
        setattr(gradients, name, output.data_ptr() if want else 0)
    engine.cpu_backward(arguments.saved(*saved), gradients)
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
    problem = _plans(x_lengths, y_lengths, *dense.shape[1:], plan)
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
    tensors = saved[: len(_INPUTS)]
    inputs = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
    positions = [_INPUTS.index(name) for name in ("x", "y", "C", "a", "b")]
    wanted = [ctx.needs_input_grad[position] for position in positions]
    found = torch.ops.otalign.align_backward(value, linear, plan, *inputs, *saved[len(_INPUTS) :], wanted)
    gradients: list[Tensor | None] = [None] * len(_INPUTS)
    for position, gradient, want in zip(positions, found, wanted, strict=True):
        gradients[position] = gradient if want else None
    return tuple(gradients)


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



class _Align(torch.autograd.Function):
    """What is registered below, for eager calls: it saves the 100 us that the library's wrapper takes."""

    setup_context = staticmethod(_save)
    backward = staticmethod(_align_autograd)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return torch.ops.otalign.align(*inputs)


torch.library.register_autograd("otalign::align", _align_autograd, setup_context=_save, lib=_library)
torch.library.register_autograd("otalign::align_backward", _no_second_derivative, lib=_library)
torch.library.register_autograd("otalign::unpack", _unpack_autograd, setup_context=_save_unpack, lib=_library)
torch.library.register_autograd("otalign::pack", _pack_autograd, setup_context=_save_pack, lib=_library)
