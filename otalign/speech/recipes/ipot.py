"""Inexact proximal transport between sequences (Chen et al., ICLR 2019)."""

from __future__ import annotations

from torch import Tensor

from ...functional import solve_cost
from ...layout import Lengths
from ...options import one_of
from .._states import at_least_one, inside, positive, sides
from ._shared import Recipe, ground_cost


def ipot(
    x: Tensor,
    y: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    *,
    beta: float = 0.5,
    steps: int = 50,
    cost: str = "cosine",
) -> Recipe:
    r"""Sequence-level supervision by inexact proximal transport (Chen et al., ICLR 2019; IPOT: Xie et al., UAI 2020, alg. 1).

    Each proximal step multiplies the plan by :math:`e^{-C / \beta}` and makes one Sinkhorn iteration, which starts from the last
    scaling of the columns. The t-th plan is therefore a plan of temperature beta / t. Here each step is one iteration of the
    solver at this temperature, from the same start. The plan is detached, as in the released code: the loss is <sg(P), C>.

    Args:
        x: `(B, N, D)`.
        y: `(B, M, D)`.
        x_lengths: `(B,)` int32 or int64, in points; None = full.
        y_lengths: likewise.
        beta: the proximal weight, in the unit of the cost, > 0. The paper's machine translation has 0.5, with `steps` 50.
        steps: number of proximal steps, at least 1.
        cost: `"cosine"` as in the paper, `"sqeuclidean"` or `"euclidean"`.

    Returns:
        `loss` `(B,)`, 0 for empty items, and `plan` `(B, N, M)`, detached.

    Raises:
        ValueError, TypeError: for bad input, naming the argument.
    """
    one_of("cost", cost, ("cosine", "sqeuclidean", "euclidean"))
    steps, beta = at_least_one("steps", steps), positive("beta", beta)
    n, m = sides(x, y, x_lengths, y_lengths, ("x", "y"))
    C = ground_cost(x, y, inside(x, n), inside(y, m), cost)
    fixed, log_v = C.detach(), C.new_zeros(len(C), C.shape[2])
    before = log_v
    for step in range(1, steps + 1):
        reg = beta / step
        init = (C.new_zeros(C.shape[:2]), reg * (2 * log_v - before))
        result = solve_cost(fixed, n, m, reg=reg, max_iter=1, tol=0, init=init)
        before, log_v = log_v, result.potentials[1] / reg
    plan = result.plan().detach()
    return Recipe((plan * C).sum((1, 2)), plan)
