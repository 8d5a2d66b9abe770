"""What stands between the kernels and Triton: kernels kept compiled, and what is asked of a device."""

from __future__ import annotations

import functools
import inspect
import threading
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when triton.jit decorated the kernels
INTERPRETER = threading.Lock()  # its grid and its patches of the language are global
INT32_MAX = 2**31 - 1

# Arguments that are integers. Triton compiles a kernel for each kind of integer (1, multiples of 16, others) and of
# pointer (aligned or not) unless told not to: only strides and the dimension gain anything by it.
STRIDES = ("x_row", "x_dim", "y_row", "y_dim", "dim")
COUNTS = ("items", "x_mode", "x_size", "x_rows", "y_mode", "y_size", "y_rows", "x_item", "y_item", "ld16")
COUNTS += ("has_a", "has_b", "has_init", "has_plan", "per_item", "value_step", "linear_step")
COUNTS += ("max_iter", "programs", "counters_size")
ANY_ALIGNMENT = ("f", "g", "a", "b", "init", "value", "linear", "error", "n_iter", "x_layout", "y_layout", "reg_items")
ANY_ALIGNMENT += ("x_scale", "y_scale", "x_lift", "y_lift", "grad_value", "grad_linear", "counters")


def kernel(function):
    """Compile with Triton, for any counts and any alignment of small vectors."""
    names = inspect.signature(function).parameters
    counts, any_alignment = ([name for name in given if name in names] for given in (COUNTS, ANY_ALIGNMENT))
    return triton.jit(function, do_not_specialize=counts, do_not_specialize_on_alignment=any_alignment)


class Kernel:
    """A Triton kernel that takes its arguments from a dictionary and keeps its compiled variants.

    Triton finds the variant for a call by looking at all arguments in Python, at tens of microseconds a launch. Here the
    caller says what can differ: the `kind` of the call, which has to tell types, whether pointers are aligned, and which
    strides are one or multiples of 16. (Integers beyond 32 bits have another type: such calls go Triton's own way.)
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[Any, Any] = {}
        if INTERPRETED:
            return
        names = [p.name for p in function.params if not p.is_constexpr]
        self._arguments = itemgetter(*names)
        self._constants = itemgetter(*[p.name for p in function.params if p.is_constexpr])
        self._integers = itemgetter(*[name for name in names if name in STRIDES or name in COUNTS])
        self._names = names

    def launch(
        self,
        grid: tuple[int, int, int],
        values: dict[str, Any],
        constants: dict[str, Any],
        device: torch.device,
        kind: tuple[Any, ...],
    ) -> None:
        """Launch on the current stream of `device`. `constants` are the kernel's, and Triton's options."""
        if INTERPRETED:
            arguments = {name: values[name] for name in self.function.arg_names if name in values}
            with INTERPRETER:
                self.function[grid](**arguments, **constants)
        elif device.index == torch.accelerator.current_device_index():
            self._launch(grid, values, constants, (device.index, kind))
        else:
            with device_guard(device):
                self._launch(grid, values, constants, (device.index, kind))

    def _launch(
        self, grid: tuple[int, int, int], values: dict[str, Any], constants: dict[str, Any], kind: tuple[Any, ...]
    ) -> None:
        narrow = max(self._integers(values)) <= INT32_MAX
        key = (kind, *constants.values())
        compiled = self.compiled.get(key) if narrow else None
        arguments = self._arguments(values)
        if compiled is not None:
            compiled[grid](*arguments, *self._constants(constants))
            return
        named = dict(zip(self._names, arguments, strict=True))
        # Multiply-adds are contracted, whatever the version of Triton: its default will change.
        compiled = self.function[grid](**named, **constants, enable_fp_fusion=True)
        if narrow:
            self.compiled[key] = compiled


def aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs of one launch certainly run at the same time."""
    if INTERPRETED or device.type != "cuda":
        return 1  # no cooperative launches
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def generation(device: torch.device) -> int:
    """NVIDIA's compute capability, 90 for 9.0; 0 for chips of others and in the interpreter."""
    if INTERPRETED or device.type != "cuda" or torch.version.hip:
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
