"""Between the kernels and Triton: how kernels are specialised, compiled kernels that are kept, and what a device can do."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, itemgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when triton.jit decorated the kernels
INTERPRETER = threading.Lock()  # its grid and its patches of the language are global
if INTERPRETED:
    from .interpreter import accept_scalars

    accept_scalars()
INT32_MAX = 2**31 - 1
HIP = bool(torch.version.hip)  # torch calls AMD's GPUs "cuda", too

# Triton compiles a variant of a kernel for each kind of integer (1, multiples of 16, others) and of pointer (aligned to 16
# bytes or not), unless told not to. Only the strides and the dimension of points gain by it: 16-byte copies need every
# stride on the way to a row to be a multiple of 16. (A tuple as an argument would be specialised on all its members,
# whatever is told: so kernels take each number by itself.)
STRIDES = ("dim", *(f"{side}_{of}" for side in ("x", "y", "own", "other") for of in ("item", "row", "dim")))
COUNTS = ("items", "ld16", "per_item", "value_step", "linear_step", "has_init", "has_plan", "max_iter", "programs")
COUNTS += ("has_a", "has_b", "has_own", "has_other", "counters_size")
COUNTS += tuple(f"{side}_{of}" for side in ("x", "y", "own", "other") for of in ("addressing", "size", "rows"))
ANY_ALIGNMENT = ("f", "g", "a", "b", "init", "value", "linear", "error_out", "n_iter_out", "reg_items", "counters")
ANY_ALIGNMENT += ("grad_value", "grad_linear")
ANY_ALIGNMENT += tuple(f"{side}_{of}" for side in ("x", "y", "own", "other") for of in ("offsets", "scale", "adjoint"))
ANY_ALIGNMENT += ("own_f", "own_weights", "other_f", "other_weights")


def kernel(function: Any) -> Any:
    """Compile with Triton, for any counts and any alignment of small vectors."""
    names = inspect.signature(function).parameters
    counts, any_alignment = ([name for name in given if name in names] for given in (COUNTS, ANY_ALIGNMENT))
    return triton.jit(function, do_not_specialize=counts, do_not_specialize_on_alignment=any_alignment)


class Kernel:
    """A Triton kernel that takes its arguments from a dictionary and keeps its compiled variants.

    Triton finds the variant for a call by a look at each argument in Python, at tens of microseconds a launch. Here the
    key is made in less, from all of the kernel's own arguments: types, alignment, kinds of strides, and on AMD's GPUs sizes
    of tensors. (Integers beyond 32 bits have another type: such calls go Triton's own way.)
    """

    def __init__(self, function: Any, own: str = "x") -> None:
        """`own`, x or y, is the side that the parameters `own_...` stand for; `other_...` stand for the other side."""
        self.function = function
        self.compiled: dict[Any, Any] = {}
        parameters = inspect.signature(function.fn).parameters
        constants = [name for name, p in parameters.items() if p.annotation is tl.constexpr]
        # Where in the dictionary each argument is found.
        self.sources = {name: source(name, own) for name in parameters if name not in constants}
        integers = [name for name in self.sources if name in STRIDES or name in COUNTS]
        floats = [name for name in self.sources if parameters[name].annotation is tl.float64]
        tensors = [name for name in self.sources if name not in integers and name not in floats]
        aligned = [name for name in tensors if name not in ANY_ALIGNMENT]
        self._arguments = picks(self.sources.values())
        self._constants = picks(constants)
        self._integers, self._tensors, self._aligned, self._strides = (
            picks([self.sources[name] for name in names])
            for names in (integers, tensors, aligned, [name for name in integers if name in STRIDES])
        )

    def named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names of the kernel's parameters."""
        return {name: values[at] for name, at in self.sources.items()}

    def key(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """What Triton's choice of a variant depends on, beside constants and options, while integers have 32 bits."""
        tensors = self._tensors(values)
        return (
            *map(_dtype, tensors),
            *[address % 16 == 0 for address in map(_address, self._aligned(values))],
            *[1 if stride == 1 else 0 if stride % 16 == 0 else 2 for stride in self._strides(values)],
            *(map(within_2_gib, tensors) if HIP else ()),
        )

    def launch(
        self, grid: tuple[int, int, int], values: dict[str, Any], constants: dict[str, Any], device: torch.device
    ) -> None:
        """Launch on the current stream of `device`. `constants` are the kernel's, and Triton's options."""
        if INTERPRETED:
            with INTERPRETER:
                self.function[grid](**self.named(values), **constants)
        elif device.index == torch.accelerator.current_device_index():
            self._launch(grid, values, constants, device.index)
        else:
            with device_guard(device):
                self._launch(grid, values, constants, device.index)

    def _launch(
        self, grid: tuple[int, int, int], values: dict[str, Any], constants: dict[str, Any], device: int | None
    ) -> None:
        narrow = max(self._integers(values)) <= INT32_MAX
        key = (device, *self.key(values), *constants.values())
        compiled = self.compiled.get(key) if narrow else None
        if compiled is not None:
            compiled[grid](*self._arguments(values), *self._constants(constants))
            return
        # Multiply-adds are contracted, whatever the version of Triton: its default will change.
        compiled = self.function[grid](**self.named(values), **constants, enable_fp_fusion=True)
        if narrow:
            self.compiled[key] = compiled


_dtype, _address = attrgetter("dtype"), Tensor.data_ptr


def within_2_gib(tensor: Tensor) -> bool:
    """Whether 32-bit offsets reach all of a tensor's memory. For AMD's GPUs, Triton then compiles a kernel with such offsets."""
    return tensor.untyped_storage().nbytes() <= INT32_MAX


def source(parameter: str, own: str) -> str:
    """The name, among the values of a batch, of what a kernel's parameter stands for; see `Kernel`."""
    for role, side in (("own", own), ("other", "y" if own == "x" else "x")):
        f, weights = ("f", "a") if side == "x" else ("g", "b")
        names = {"points": side, "f": f, "weights": weights, "rho": f"rho_{side}"}
        if parameter == f"has_{role}":
            return f"has_{weights}"
        if parameter.startswith(f"{role}_"):
            name = parameter.removeprefix(f"{role}_")
            return names.get(name, f"{side}_{name}")
    return parameter


def picks(names: Iterable[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """A function that takes the values of these names out of a dictionary, as a tuple."""
    names = list(names)
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: tuple(values[name] for name in names)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs of one launch certainly run at the same time, and can wait for each other.

    On AMD's GPUs a program cannot wait for others: see `exchange.barrier`.
    """
    if INTERPRETED or device.type != "cuda" or HIP:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def lanes(device: torch.device) -> int:
    """The threads of a warp: 64 on AMD's GPUs for data centers, else 32."""
    if INTERPRETED or device.type != "cuda":
        return 32
    return torch.cuda.get_device_properties(device).warp_size


@functools.cache
def generation(device: torch.device) -> int:
    """NVIDIA's compute capability, 90 for 9.0; 0 for chips of others and in the interpreter."""
    if INTERPRETED or device.type != "cuda" or HIP:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def device_guard(device: torch.device) -> Any:
    """Makes `device` the current one, whose stream Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else getattr(torch, device.type).device(device)


def divide(count: int, size: int) -> int:
    """Blocks of `size` for `count`. (triton.cdiv takes microseconds.)"""
    return -(-count // size)


def tf32_allowed() -> bool:
    """Whether torch may round float32 factors to TF32 in matrix products, and so whether the cost may."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"
