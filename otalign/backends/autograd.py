"""The operators of torch.library: schemas from annotations, and gradients, written once for all backends.

An operator takes a flat list of tensors, numbers and words. The backends read it as NamedTuples, whose annotations make
the schema: the fields of a problem, with its `Options` last, and the tensors that the forward pass saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from ..options import Options

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    Sequence[float]: "float[]",
}
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype, list, tuple))
_NO_FORWARD_MODE = (
    "forward-mode derivatives (torch.func.jvp, jacfwd) are not supported; take torch.func.grad, vjp or jacrev"
)

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])


class Incoming(NamedTuple):
    """The gradients that a backward operator starts from."""

    grad_value: Tensor | None  # (B,)
    grad_linear: Tensor | None  # (B,)
    grad_plan: Tensor | None  # (B, N, M), or packed as the backend keeps plans


class Gradients(NamedTuple):
    """The gradients that a backward operator returns, in the shapes of the inputs, which are a problem's first five."""

    x: Tensor
    y: Tensor
    C: Tensor
    a: Tensor
    b: Tensor


def schema(*arguments: type | str, results: type | str) -> str:
    """An operator's schema, from NamedTuples one after the other, and declarations of single arguments between them."""
    declared = _declared(results)
    return f"({', '.join(map(_declared, arguments))}) -> {declared if isinstance(results, str) else f'({declared})'}"


def _declared(fields: type | str) -> str:
    if isinstance(fields, str):
        return fields
    hints = get_type_hints(fields)
    if hints.pop("options", None) is Options:
        hints |= Options.flat_types()
    return ", ".join(f"{_TYPES[hint]} {name}" for name, hint in hints.items())


def flatten(inputs: Any) -> tuple[Any, ...]:
    """The fields of a problem, whose last are its `options`, as an operator takes them."""
    return (*inputs[:-1], *inputs.options.flat())


def unflatten(fields: type[Inputs], arguments: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
    """The inverse of `flatten`, and the arguments that follow the problem's."""
    first = len(fields._fields) - 1  # type: ignore[attr-defined]
    end = first + _OPTIONS
    return fields(*arguments[:first], Options.from_flat(*arguments[first:end])), arguments[end:]  # type: ignore[call-arg]


_OPTIONS = len(Options.flat_types())


class Operator:
    """An operator with its kernel, its fake and its gradient. Calling it takes the shortest way that applies."""

    def __init__(
        self,
        library: torch.library.Library,
        name: str,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        devices: Sequence[str],
        check: Callable[..., None] = lambda *arguments: None,
    ) -> None:
        """Define the operator.

        Args:
            kernel: may return None for an unused output; the operator returns a tensor of 0 elements in its place.
            check: raises for arguments that the functions of otalign never pass. Calls from these skip it.
        """

        def checked(*arguments: Any) -> Any:
            check(*arguments)
            return _complete(arguments, kernel(*arguments))

        library.define(name + schema)
        for device in devices:
            library.impl(name, checked, device)
        torch.library.register_fake(
            f"otalign::{name}", lambda *arguments: _complete(arguments, fake(*arguments)), lib=library
        )
        self.library, self.name, self.kernel = library, name, kernel
        self.traced = getattr(torch.ops.otalign, name)
        self.inputs = self.outputs = 0  # how many of the first arguments, and of the first results, have gradients
        self.kept = slice(0)
        self.backward: Callable[..., Sequence[Tensor | None]] | None = None
        self.composed: Callable[..., Sequence[Tensor | None]] | None = None
        self.transformed: Any = None

    def set_gradient(
        self,
        backward: Callable[..., Sequence[Tensor | None]],
        *,
        inputs: int,
        outputs: int,
        kept: slice = slice(0),
        composed: Callable[..., Sequence[Tensor | None]] | None = None,
    ) -> None:
        """Give the operator gradients by its first `inputs` arguments, from those by its first `outputs` results.

        Args:
            backward: called with the arguments, the results that are `kept`, the incoming gradients (None where there
                are none) and, for each of the inputs, whether its gradient is wanted; returns a tensor for each.
            kept: the results that the backward pass reads.
            composed: called in the place of `backward` where the gradients will be differentiated again, in eager mode.
        """
        self.composed = composed
        self.backward, self.inputs, self.outputs, self.kept = backward, inputs, outputs, kept
        self._register(self.derivative, self.keep)

    def forbid_gradient(self, message: str) -> None:
        """Let differentiation raise NotImplementedError: for operators that are themselves a first derivative."""

        def refuse(ctx: Any, *_: Any) -> Any:
            raise NotImplementedError(message)

        self._register(refuse, lambda ctx, inputs, output: None)

    def _register(self, derivative: Callable[..., Any], keep: Callable[..., None]) -> None:
        torch.library.register_autograd(f"otalign::{self.name}", derivative, setup_context=keep, lib=self.library)
        operator = self

        class Transformed(_Mapped):
            """The operator under torch.func, which cannot transform what torch.library registers."""

            @staticmethod
            def forward(*arguments: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    return operator.traced(*arguments)

            setup_context = staticmethod(keep)  # type: ignore[assignment]
            backward = staticmethod(derivative)  # type: ignore[assignment]

        self.transformed = Transformed

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.traced(*arguments)
        if torch._C._are_functorch_transforms_active():
            return (self.transformed.apply if self.transformed else self.traced)(*arguments)
        if not _eager(arguments):
            return self.traced(*arguments)
        if not torch.is_grad_enabled():
            return self.kernel(*arguments)
        if self.backward is None:
            return self.traced(*arguments)
        return _Eager.apply(*arguments[: self.inputs], arguments[self.inputs :], self)

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep for the backward pass: tensors where autograd guards them, all other arguments beside them."""
        results = (output,) if isinstance(output, Tensor) else output
        ctx.others = list(inputs)
        ctx.places = [place for place, argument in enumerate(inputs) if isinstance(argument, Tensor)]
        for place in ctx.places:
            ctx.others[place] = None
        ctx.save_for_backward(*[inputs[place] for place in ctx.places], *results[self.kept])
        ctx.mark_non_differentiable(*results[self.outputs :])
        ctx.set_materialize_grads(False)

    def restore(self, ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
        """The arguments and the results that `keep` has kept."""
        arguments, saved, count = list(ctx.others), ctx.saved_tensors, len(ctx.places)
        for place, tensor in zip(ctx.places, saved[:count], strict=True):
            arguments[place] = tensor
        return arguments, saved[count:]

    def gradients(self, ctx: Any, incoming: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients by the first `inputs` arguments; None where they are not wanted."""
        incoming = incoming[: self.outputs]
        if all(gradient is None for gradient in incoming):
            return [None] * self.inputs
        assert self.backward is not None
        wanted = list(ctx.needs_input_grad[: self.inputs])
        arguments, saved = self.restore(ctx)
        if self.composed is None or not _differentiates_again(arguments):
            found = self.backward(arguments, saved, incoming, wanted)
        else:
            with torch.no_grad():
                numbers = self.backward(arguments, saved, incoming, wanted)
            graph = self.composed(arguments, saved, incoming, wanted)
            found = [
                None if gradient is None else _Numbers.apply(gradient, number)
                for gradient, number in zip(graph, numbers, strict=True)
            ]
        return [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]

    def derivative(self, ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients, spread over all arguments."""
        return (*self.gradients(ctx, incoming), *[None] * (len(ctx.others) - self.inputs))


def _complete(arguments: Sequence[Any], results: Any) -> Any:
    """The results of an operator, with tensors of 0 elements in the place of None."""
    if isinstance(results, Tensor):
        return results
    like = next(argument for argument in arguments if isinstance(argument, Tensor))
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _eager(arguments: Sequence[Any]) -> bool:
    """True in plain eager mode: no dispatch mode, no tensor subclass."""
    return torch._C._len_torch_dispatch_stack() == 0 and _PLAIN.issuperset(map(type, arguments))


class _Numbers(torch.autograd.Function):
    """The numbers of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, numbers: Tensor) -> Tensor:  # type: ignore[override]
        return numbers.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return incoming, None


def _differentiates_again(arguments: Sequence[Any]) -> bool:
    """Whether a backward pass runs under create_graph=True, in plain eager mode."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and _eager(arguments)
        and not any(isinstance(t, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in arguments)
    )


class _Eager(torch.autograd.Function):
    """An operator in plain eager mode: straight to its kernel, without the 100 us of torch.library's wrapper.

    The arguments with gradients come one by one, the rest as one tuple, which autograd passes on unseen.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:  # type: ignore[override]
        *inputs, rest, operator = arguments
        results = operator.kernel(*inputs, *rest)
        operator.keep(ctx, (*inputs, *rest), results)
        ctx.operator = operator
        return results

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return (*ctx.operator.gradients(ctx, incoming), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)


class _Mapped(torch.autograd.Function):
    """A Function for torch.func: vmap solves the slices of the mapped dimension one by one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:  # type: ignore[override]
        each = []
        for index in range(info.batch_size):
            pairs = zip(inputs, in_dims, strict=True)
            each.append(cls.apply(*(t.select(dim, index) if isinstance(dim, int) else t for t, dim in pairs)))
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
