"""The order-preserving Wasserstein distance (Su and Hua, CVPR 2017)."""

from __future__ import annotations

from torch import Tensor

from ...functional import solve
from ...layout import Lengths
from ...prior import Prior
from .._states import inside, sides
from ._shared import Recipe, ground_cost


def opw(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    *,
    lambda1: float = 50.0,
    reg: float = 0.1,
    delta: float = 1.0,
    max_iter: int = 20,
    tol: float = 0.0,
) -> Recipe:
    """The order-preserving Wasserstein distance (Su and Hua, CVPR 2017): <P, D>, with the plan P of `Prior.order_preserving`.

    D is the squared distance. The prior has the paper's two temporal terms (eqs. 3, 5 and 7).

    Args:
        x: `(B, N, D)`.
        y: `(B, M, D)`.
        x_lengths: `(B,)` int32 or int64, in points; None = full.
        y_lengths: likewise.
        lambda1: weight of the inverse difference moment, in the unit of the squared distance.
        reg: the paper's lambda2, in the same unit.
        delta: the paper's sigma, in points: the width of the Gaussian over the distance from the diagonal.
        max_iter: 20 as in the paper's code.
        tol: as in `sinkhorn_loss`; 0 = make all iterations, as the paper's code does.

    Returns:
        `loss` `(B,)`, 0 for empty items, and `plan` `(B, N, M)`, both with gradients.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.
    """
    n, m = sides(x, y, x_lengths, y_lengths, ("x", "y"))
    result = solve(
        x, y, x_lengths, y_lengths, cost="sqeuclidean", prior=Prior.order_preserving(lambda1, delta), reg=reg,
        max_iter=max_iter, tol=tol,
    )  # fmt: skip
    plan = result.plan()
    return Recipe((plan * ground_cost(x, y, inside(x, n), inside(y, m), "sqeuclidean")).sum((1, 2)), plan)
