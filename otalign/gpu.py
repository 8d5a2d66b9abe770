"""The torch.library boundary of the kernels on a GPU: operators with fakes and gradients, and nothing besides.

`otalign::gpu_align` solves a batch; what it saves, the costs and the potentials, is what gradients, plans, barycentric
projections and assignments are made of, by the operators that follow. Arity is fixed: what does not apply is None, or
comes back empty. Lengths and offsets are on the device, and nothing here waits for it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda
from .prior import KINDS
from .problem import COSTS, Problem, Solution, fixed_plan_cost
from .triton_kernels import heuristics

_PROBLEM = (
    "Tensor? x, Tensor? y, Tensor? C, Tensor? a, Tensor? b, Tensor? x_layout, Tensor? y_layout, Tensor? reg_items, "
    "float reg, str cost, str prior, float[] prior_parameters, float rho_x, float rho_y, bool x_packed, bool y_packed, "
    "SymInt items, SymInt size_x, SymInt size_y, ScalarType dtype, str engine, bool symmetric"
)
_SAVED = "Tensor f, Tensor g, Tensor costs, Tensor x_scale, Tensor y_scale"

_library = torch.library.Library("otalign", "FRAGMENT")
_library.define(
    f"gpu_align({_PROBLEM}, Tensor? init, int max_iter, float tol) -> (Tensor value, Tensor linear, Tensor error, "
    "Tensor n_iter, Tensor f, Tensor g, Tensor costs, Tensor x_scale, Tensor y_scale)"
)
_library.define(
    f"gpu_align_backward({_PROBLEM}, {_SAVED}, Tensor? grad_value, Tensor? grad_linear, Tensor? grad_plan, "
    "bool[] wanted) -> (Tensor x, Tensor y, Tensor C, Tensor a, Tensor b)"
)
_library.define(f"gpu_plan({_PROBLEM}, {_SAVED}) -> Tensor")
_library.define(f"gpu_barycentric({_PROBLEM}, {_SAVED}, bool by_y) -> (Tensor image, Tensor mass)")
_library.define(
    f"gpu_barycentric_backward({_PROBLEM}, {_SAVED}, Tensor image, Tensor mass, Tensor grad_image, bool by_y, "
    "bool[] wanted) -> (Tensor x, Tensor y, Tensor C, Tensor a, Tensor b)"
)
_library.define(f"gpu_assign({_PROBLEM}, {_SAVED}) -> Tensor")


class _Inputs(NamedTuple):
    """The operators' problem, in the order of the schema."""

    x: Tensor | None
    y: Tensor | None
    C: Tensor | None
    a: Tensor | None
    b: Tensor | None
    x_layout: Tensor | None
    y_layout: Tensor | None
    reg_items: Tensor | None
    reg: float
    cost: str
    prior: str
    prior_parameters: Sequence[float]
    rho_x: float
    rho_y: float
    x_packed: bool
    y_packed: bool
    items: int
    size_x: int
    size_y: int
    dtype: torch.dtype
    engine: str  # who iterates: "triton" or "cuda"
    symmetric: bool  # as in Problem

    def like(self) -> Tensor:
        tensor = self.C if self.x is None else self.x
        assert tensor is not None
        return tensor

    def rows_x(self) -> int:
        return self.x.shape[0] if self.x_packed and self.x is not None else self.items * self.size_x

    def rows_y(self) -> int:
        return self.y.shape[0] if self.y_packed and self.y is not None else self.items * self.size_y


_PROBLEM_ARITY = len(_Inputs._fields)
_SAVED_ARITY = 5
_DIFFERENTIABLE = _Inputs._fields[:5]


def launch(problem: Problem, engine: str = "triton") -> Solution:
    """Solve a batch with the Triton kernels, or with those of CUDA for the iterations."""
    p, xs, ys = problem, problem.x_segments, problem.y_segments
    prior, parameters = ("none", ()) if p.prior is None else (p.prior.kind, p.prior.parameters)
    reg, reg_items = (0.0, p.reg) if isinstance(p.reg, Tensor) else (p.reg, None)
    inputs = (
        p.x, p.y, p.C, p.a, p.b, xs.layout, ys.layout, reg_items, reg, p.cost, prior, parameters,
        p.rho[0], p.rho[1], xs.packed, ys.packed, p.items, xs.size, ys.size, p.dtype, engine, p.symmetric,
    )  # fmt: skip
    if _eager(inputs):
        outputs = _Align.apply(*inputs[:5], inputs[5:], p.init, p.max_iter, p.tol)
    else:
        outputs = torch.ops.otalign.gpu_align(*inputs, p.init, p.max_iter, p.tol)
    value, linear, error, n_iter, *saved = outputs
    return Solution(
        value=value,
        value_linear=linear,
        plan_cost=partial(fixed_plan_cost, linear, value),
        f=saved[0],
        g=saved[1],
        n_iter=n_iter,
        error=error,
        plan=partial(_plan_of, inputs, saved),
        barycentric=partial(_barycentric_of, inputs, saved),
        assign=partial(_assign_of, inputs, saved),
        apply=partial(_apply_of, inputs, saved),
    )


def _plan_of(inputs: Sequence[Any], saved: Sequence[Tensor]) -> Tensor:
    return torch.ops.otalign.gpu_plan(*inputs, *saved)


def _barycentric_of(inputs: Sequence[Any], saved: Sequence[Tensor], by_y: bool) -> Tensor:
    return torch.ops.otalign.gpu_barycentric(*inputs, *saved, by_y)[0]


def _assign_of(inputs: Sequence[Any], saved: Sequence[Tensor]) -> Tensor:
    return torch.ops.otalign.gpu_assign(*inputs, *saved)


def _apply_of(inputs: Sequence[Any], saved: Sequence[Tensor], values: Tensor, by_y: bool) -> Tensor:
    """The plan times vectors of one side's points, in the layout of the other side; without gradients.

    The kernel averages the points of a side under the plan: here these are the `values`, of any dimension.
    """
    p = _Inputs(*inputs)
    shape = _vectors(p)[by_y]
    nothing = values.new_zeros(()).expand(*shape, values.shape[-1])
    x, y = (values, nothing) if by_y else (nothing, values)
    given = p._replace(x=x, y=y, C=None, cost="dot" if p.cost == "given" else p.cost)  # of which nothing is computed
    image, mass = torch.ops.otalign.gpu_barycentric(*given, *saved, by_y)
    return image * mass[..., None]


# Kernels ------------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> Any:
    return importlib.import_module(".triton_kernels.launch", __package__)


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
    """Raise for what the functions of otalign never pass, but a caller of the operators may."""
    p = inputs
    if p.items < 0 or p.size_x < 0 or p.size_y < 0 or p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sizes, dtype: got {p.items}, {p.size_x}, {p.size_y} and {p.dtype}")
    if p.engine not in ("triton", "cuda") or p.prior not in KINDS or p.cost not in (*COSTS, "given"):
        raise ValueError(f"engine, prior, cost: got {p.engine!r}, {p.prior!r} and {p.cost!r}")
    given = p.cost == "given"
    for name, tensor in (("x", p.x), ("y", p.y), ("C", p.C)):
        if (tensor is not None) == (given != (name == "C")):
            raise ValueError(f"{name}: expected {'no ' * (tensor is not None)}tensor for cost {p.cost!r}")
        if tensor is not None and not (tensor.is_floating_point() and 2 <= tensor.itemsize <= p.dtype.itemsize):
            raise ValueError(f"{name}: expected floating-point numbers as in {p.dtype} or shorter, got {tensor.dtype}")
    if p.C is not None:
        _expect("C", p.C, p.C.dtype, (p.items, p.size_x, p.size_y), strided=True)
    dim = 0 if p.x is None or p.x.dim() == 0 else p.x.shape[-1]
    for name, points, packed, layout, size, weight, weights in (
        ("x", p.x, p.x_packed, p.x_layout, p.size_x, "a", p.a),
        ("y", p.y, p.y_packed, p.y_layout, p.size_y, "b", p.b),
    ):
        if packed and (points is None or layout is None):
            raise ValueError(f"{name}: expected packed points with offsets")
        if points is not None:
            _expect(name, points, points.dtype, (*((len(points),) if packed else (p.items, size)), dim), strided=True)
        _expect(f"{name}_layout", layout, torch.int64, (p.items + packed,))
        _expect(weight, weights, p.dtype, (len(points),) if packed and points is not None else (p.items, size))
    _expect("reg_items", p.reg_items, torch.float64, (p.items,))


def _check_saved(inputs: _Inputs, saved: Any) -> None:
    x, y = _vectors(inputs)
    scales = (x, y) if inputs.cost == "cosine" else ((0,), (0,))
    costs = (inputs.rows_x(), heuristics.leading_dimension(inputs.size_y))
    for name, tensor, shape in zip(
        ("f", "g", "costs", "x_scale", "y_scale"), saved, (x, y, costs, *scales), strict=True
    ):
        _expect(name, tensor, inputs.dtype, shape)


def _batch(inputs: _Inputs) -> Any:
    kernels, p = _kernels(), inputs
    return kernels.Batch(
        kernels.Side(p.x, p.x_layout, p.a, p.x_packed, p.size_x, p.rows_x()),
        kernels.Side(p.y, p.y_layout, p.b, p.y_packed, p.size_y, p.rows_y()),
        items=p.items,
        reg=p.reg,
        reg_items=p.reg_items,
        cost=p.cost,
        prior=p.prior,
        prior_parameters=tuple(p.prior_parameters),
        rho=(p.rho_x, p.rho_y),
        dtype=p.dtype,
        device=p.like().device,
        engine=cuda if p.engine == "cuda" else None,
        symmetric=p.symmetric,
    )


def _split(arguments: Sequence[Any]) -> tuple[_Inputs, Sequence[Any], Sequence[Any]]:
    """The problem, what was saved, and what else there is."""
    end = _PROBLEM_ARITY + _SAVED_ARITY
    inputs, saved = _Inputs(*arguments[:_PROBLEM_ARITY]), arguments[_PROBLEM_ARITY:end]
    _check(inputs)
    _check_saved(inputs, saved)
    return inputs, saved, arguments[end:]


def _align(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments[:_PROBLEM_ARITY])
    init, max_iter, tol = arguments[_PROBLEM_ARITY:]
    _check(inputs)
    _expect("init", init, inputs.dtype, _vectors(inputs)[1])
    return tuple(_kernels().solve(_batch(inputs), inputs.C, init, max_iter, tol))


def _wanted(inputs: _Inputs, wanted: Sequence[bool]) -> dict[str, Tensor]:
    tensors = zip(_DIFFERENTIABLE, inputs, wanted)  # noqa: B905 - the first five
    return {name: tensor for name, tensor, want in tensors if want and isinstance(tensor, Tensor)}


def _found(inputs: _Inputs, found: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(found[name] if name in found else inputs.like().new_empty(0) for name in _DIFFERENTIABLE)


def _align_backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, saved, (value, linear, plan, wanted) = _split(arguments)
    items = (inputs.items,)
    for name, gradient, shape in (
        ("grad_value", value, items),
        ("grad_linear", linear, items),
        ("grad_plan", plan, (*items, inputs.size_x, inputs.size_y)),
    ):
        _expect(name, gradient, inputs.dtype, shape, strided=True)
    batch = _batch(inputs)
    found = _kernels().gradients(batch, _kernels().Saved(*saved), value, linear, plan, _wanted(inputs, wanted))
    return _found(inputs, found)


def _plan(*arguments: Any) -> Tensor:
    inputs, saved, _ = _split(arguments)
    batch = _batch(inputs)
    return _kernels().plan(batch, _kernels().Saved(*saved))


def _barycentric(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, saved, (by_y,) = _split(arguments)
    batch = _batch(inputs)
    return _kernels().barycentric(batch, _kernels().Saved(*saved), by_y=by_y)


def _barycentric_backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, saved, (image, mass, gradient, by_y, wanted) = _split(arguments)
    shape = _vectors(inputs)[by_y]
    for name, tensor, of in (("image", image, True), ("mass", mass, False), ("grad_image", gradient, True)):
        _expect(name, tensor, inputs.dtype, (*shape, *inputs.like().shape[-1:]) if of else shape, strided=True)
    batch, asked = _batch(inputs), _wanted(inputs, wanted)
    of = _kernels().barycentric_gradients
    return _found(inputs, of(batch, _kernels().Saved(*saved), image, mass, gradient, asked, by_y=by_y))


def _assign(*arguments: Any) -> Tensor:
    inputs, saved, _ = _split(arguments)
    batch = _batch(inputs)
    return _kernels().assign(batch, _kernels().Saved(*saved))


for _name, _function in (
    ("gpu_align", _align),
    ("gpu_align_backward", _align_backward),
    ("gpu_plan", _plan),
    ("gpu_barycentric", _barycentric),
    ("gpu_barycentric_backward", _barycentric_backward),
    ("gpu_assign", _assign),
):
    for _key in ("CUDA", "XPU", "CPU"):  # on the CPU, through Triton's interpreter
        _library.impl(_name, _function, _key)

# Fakes --------------------------------------------------------------------------------------------------------------


def _vectors(inputs: _Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    x = (inputs.rows_x(),) if inputs.x_packed else (inputs.items, inputs.size_x)
    y = (inputs.rows_y(),) if inputs.y_packed else (inputs.items, inputs.size_y)
    return x, y


def _fake_align(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments[:_PROBLEM_ARITY])
    (x, y), items = _vectors(inputs), (inputs.items,)
    new, dtype = inputs.like().new_empty, inputs.dtype
    pitch = heuristics.leading_dimension(inputs.size_y)
    scales = (x, y) if inputs.cost == "cosine" else ((0,), (0,))
    return (
        new(items, dtype=dtype), new(items, dtype=dtype), new(items, dtype=dtype), new(items, dtype=torch.int32),
        *(new(shape, dtype=dtype) for shape in (x, y, (inputs.rows_x(), pitch), *scales)),
    )  # fmt: skip


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, wanted = _Inputs(*arguments[:_PROBLEM_ARITY]), arguments[-1]
    found = {name: t.new_empty(t.shape) for name, t in _wanted(inputs, wanted).items()}
    return _found(inputs, found)


def _fake_plan(*arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments[:_PROBLEM_ARITY])
    return inputs.like().new_empty((inputs.items, inputs.size_x, inputs.size_y), dtype=inputs.dtype)


def _fake_barycentric(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, by_y = _Inputs(*arguments[:_PROBLEM_ARITY]), arguments[-1]
    shape, like = _vectors(inputs)[by_y], inputs.like()
    return like.new_empty((*shape, like.shape[-1]), dtype=inputs.dtype), like.new_empty(shape, dtype=inputs.dtype)


def _fake_assign(*arguments: Any) -> Tensor:
    inputs = _Inputs(*arguments[:_PROBLEM_ARITY])
    return inputs.like().new_empty(_vectors(inputs)[1], dtype=torch.int64)


torch.library.register_fake("otalign::gpu_align", _fake_align, lib=_library)
torch.library.register_fake("otalign::gpu_align_backward", _fake_backward, lib=_library)
torch.library.register_fake("otalign::gpu_plan", _fake_plan, lib=_library)
torch.library.register_fake("otalign::gpu_barycentric", _fake_barycentric, lib=_library)
torch.library.register_fake("otalign::gpu_barycentric_backward", _fake_backward, lib=_library)
torch.library.register_fake("otalign::gpu_assign", _fake_assign, lib=_library)

# Gradients ----------------------------------------------------------------------------------------------------------


def _keep(ctx: Any, arguments: Sequence[Any], outputs: Sequence[Tensor] = ()) -> None:
    """Keep the arguments of an operator for the backward pass: tensors where autograd wants them, the rest beside."""
    ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in arguments), *outputs)
    ctx.others = [None if isinstance(t, Tensor) else t for t in arguments]
    ctx.set_materialize_grads(False)


def _kept(ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
    saved, count = ctx.saved_tensors, len(ctx.others)
    pairs = zip(saved[:count], ctx.others, strict=True)
    return [other if tensor is None else tensor for tensor, other in pairs], saved[count:]


def _spread(ctx: Any, wanted: Sequence[bool], found: Sequence[Tensor]) -> tuple[Any, ...]:
    """The gradients, each at its place among the arguments."""
    gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    return (*gradients, *[None] * (len(ctx.others) - len(gradients)))


def _needed(ctx: Any) -> Sequence[bool]:
    return ctx.needs_input_grad[: len(_DIFFERENTIABLE)]


def _save_align(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, error, n_iter, *saved = output
    _keep(ctx, inputs, saved)
    ctx.mark_non_differentiable(error, n_iter, *saved)


def _align_autograd(ctx: Any, value: Any, linear: Any, *_: Any) -> tuple[Any, ...]:
    inputs, saved = _kept(ctx)
    wanted = _needed(ctx)
    if value is None and linear is None:
        return (None,) * len(inputs)
    backward = torch.ops.otalign.gpu_align_backward
    found = backward(*inputs[:_PROBLEM_ARITY], *saved, value, linear, None, wanted)
    return _spread(ctx, wanted, found)


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep(ctx, inputs)


def _plan_autograd(ctx: Any, grad: Any) -> tuple[Any, ...]:
    inputs, _ = _kept(ctx)
    wanted = _needed(ctx)
    if grad is None:
        return (None,) * len(inputs)
    found = torch.ops.otalign.gpu_align_backward(*inputs, None, None, grad, wanted)
    return _spread(ctx, wanted, found)


def _save_barycentric(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _keep(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _barycentric_autograd(ctx: Any, image: Any, _: Any) -> tuple[Any, ...]:
    inputs, output = _kept(ctx)
    wanted = _needed(ctx)
    if image is None:
        return (None,) * len(inputs)
    *problem, by_y = inputs
    found = torch.ops.otalign.gpu_barycentric_backward(*problem, *output, image, by_y, wanted)
    return _spread(ctx, wanted, found)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("second derivatives need backend='reference'; the kernels have first ones only")


def _eager(inputs: Sequence[Any]) -> bool:
    """Whether nobody traces: the tensors are real, and no mode listens to operators."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in inputs[:8] if t is not None)


class _Align(torch.autograd.Function):
    """What is registered below, for eager calls: straight to the kernels, without the library's 100 us and more.

    Of the problem, the five inputs with gradients come one by one and the `rest` as a tuple.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Any, y: Any, C: Any, a: Any, b: Any, rest: Any, init: Any, max_iter: int, tol: float
    ) -> tuple[Tensor, ...]:
        outputs = tuple(_kernels().solve(_batch(_Inputs(x, y, C, a, b, *rest)), C, init, max_iter, tol))
        ctx.save_for_backward(x, y, C, a, b, *rest[:3], *outputs[4:])
        ctx.rest = rest[3:]
        ctx.mark_non_differentiable(*outputs[2:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, value: Any, linear: Any, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if value is None and linear is None:
            return (None,) * 9
        tensors, wanted = ctx.saved_tensors, _needed(ctx)
        inputs, saved = _Inputs(*tensors[:8], *ctx.rest), tensors[8:]
        if torch.is_grad_enabled():  # a second derivative is wanted: let the library say that there is none
            backward = torch.ops.otalign.gpu_align_backward
            found = backward(*inputs, *saved, value, linear, None, wanted)
            return (*[grad if want else None for grad, want in zip(found, wanted, strict=True)], None, None, None, None)
        kernels = _kernels()
        found = kernels.gradients(_batch(inputs), kernels.Saved(*saved), value, linear, None, _wanted(inputs, wanted))
        return (*[found.get(name) for name in _DIFFERENTIABLE], None, None, None, None)


torch.library.register_autograd("otalign::gpu_align", _align_autograd, setup_context=_save_align, lib=_library)
torch.library.register_autograd("otalign::gpu_align_backward", _no_second_derivative, lib=_library)
torch.library.register_autograd("otalign::gpu_plan", _plan_autograd, setup_context=_save_plan, lib=_library)
torch.library.register_autograd(
    "otalign::gpu_barycentric", _barycentric_autograd, setup_context=_save_barycentric, lib=_library
)
torch.library.register_autograd("otalign::gpu_barycentric_backward", _no_second_derivative, lib=_library)
