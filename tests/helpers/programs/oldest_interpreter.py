"""Solve with backend="triton" in an interpreter that converts scalars as that of Triton 3.6. Prints the plan's mass."""

import numpy as np
from triton.runtime import interpreter

newest = interpreter._patch_lang_tensor


def oldest(tensor, scope):
    newest(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.view(Strict)))


class Strict(np.ndarray):
    def __int__(self):
        if self.ndim:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return super().__int__()


interpreter._patch_lang_tensor = oldest

import torch  # noqa: E402 the interpreter is changed before the kernels are imported

import otalign  # noqa: E402

result = otalign.solve(torch.rand(1, 5, 3), torch.rand(1, 4, 3), backend="triton")
print(float(result.plan().sum()))
