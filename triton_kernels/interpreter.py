"""Triton's interpreter (TRITON_INTERPRET=1) with every NumPy 2.

The interpreter keeps a scalar as an array of one element. For `range` and for indices it converts the scalar to a Python
integer. Triton 3.6 calls `int` on the array itself. NumPy 2.4 and newer refuse this, NumPy 2.0 to 2.3 warn. Newer Triton
removes the array's dimensions first, and so does this module where Triton does not.
"""

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.runtime import interpreter


class StrictArray(np.ndarray):
    """An array that refuses with every NumPy what NumPy 2.4 refuses: `int` of an array with dimensions."""

    def __int__(self) -> int:
        if self.ndim:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return super().__int__()


def accept_scalars() -> None:
    """Let kernels use scalars in `range` and as indices, whatever the version of NumPy.

    This changes the interpreter for the whole process. A kernel of others only gains by it: the conversion gives the
    same integer as before, or an integer in place of an error. A second call changes nothing.
    """
    patch = getattr(interpreter, "_patch_lang_tensor", None)  # gives tl.tensor its conversions, at every launch
    if patch is not None and not accepts_scalars(patch):
        interpreter._patch_lang_tensor = with_scalars(patch)


def accepts_scalars(patch: Callable[[Any, Any], None]) -> bool:
    """Whether a tensor that was given its conversions by `patch` can be an integer with every NumPy."""

    class Scalar:
        handle = SimpleNamespace(data=np.ones(1, np.int32).view(StrictArray))

    patch(Scalar, SimpleNamespace(set_attr=setattr))
    try:
        return operator.index(Scalar()) == 1  # type: ignore[arg-type]
    except TypeError:
        return False


def with_scalars(patch: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`patch`, and a conversion to integers that removes the array's dimensions."""

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patch_lang_tensor
