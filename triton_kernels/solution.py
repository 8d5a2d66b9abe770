"""What a solve leaves behind, as the kernels and the operators of the backends pass it on. Imports no Triton."""

from typing import NamedTuple

from torch import Tensor


class Saved(NamedTuple):
    """What all later kernels read: potentials, costs, and reciprocal norms if the cost is the cosine."""

    f: Tensor  # in the layout of x
    g: Tensor  # in the layout of y
    costs: Tensor  # (rows of x, ld)
    x_scale: Tensor  # in the layout of x for the cosine, else (0,)
    y_scale: Tensor  # in the layout of y for the cosine, else (0,)


class Solved(NamedTuple):
    """What `launch.solve` fills. Value and transport cost have gradients; the last five are `saved`."""

    value: Tensor  # (B,)
    linear: Tensor  # (B,), the transport cost
    error: Tensor  # (B,)
    n_iter: Tensor  # (B,) int32
    f: Tensor
    g: Tensor
    costs: Tensor
    x_scale: Tensor
    y_scale: Tensor

    @property
    def saved(self) -> Saved:
        return Saved(*self[4:])
