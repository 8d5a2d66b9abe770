"""The drop-in loss module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .convergence import KeepsLast
from .functional import solved_loss
from .layout import Lengths
from .options import Options, Unbalanced, checked_options
from .prior import Prior
from .problem import SideInput
from .warm_starts import Ids, WarmStarts, checked_store


class SinkhornLoss(KeepsLast, nn.Module):
    """Optimal transport between padded or packed sequences as a loss; called like `torch.nn.CTCLoss`.

    The arguments are the keywords of `sinkhorn_loss`. The constructor checks them.

    Args:
        warm_starts: potentials by utterance, see `WarmStarts`; not with the divergence, which has a start of its own. In the
            call, `ids` says which utterance each item is: strings, integers or tuples of these, one for each item, None for
            an item that will not come back. Without `ids`, a call neither reads nor changes the store.

    Attributes:
        last: `n_iter`, `error` and `converged` of each item in the last call, `(B,)` each and detached; None before the
            first call. Not in the state dict. Calls under `torch.compile` or `torch.func` do not change it.

    Shape:
        - x: `(B, N, D)` or `(total_x, D)`; y: `(B, M, D)` or `(total_y, D)`; lengths: `(B,)`
        - output: scalar, or `(B,)` with `reduction="none"`

    Example:
        >>> criterion = otalign.SinkhornLoss(reg=0.1, prior=otalign.Prior.quadratic(1.0))
        >>> x, y = torch.randn(2, 30, 16, requires_grad=True), torch.randn(2, 8, 16)
        >>> criterion(x, y, torch.tensor([30, 21]), torch.tensor([8, 5])).backward()
        >>> criterion.last.converged
        tensor([True, True])
    """

    def __init__(
        self,
        *,
        cost: str = "cosine",
        prior: Prior | None = None,
        reg: float | Tensor = 0.05,
        unbalanced: Unbalanced = None,
        max_iter: int = 200,
        tol: float = 1e-3,
        accelerate: bool = True,
        objective: str = "value",
        reduction: str = "mean",
        backend: str = "auto",
        warm_starts: WarmStarts | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = checked_options(
            cost=cost,
            prior=prior,
            reg=reg,
            unbalanced=unbalanced,
            max_iter=max_iter,
            tol=tol,
            accelerate=accelerate,
            objective=objective,
            reduction=reduction,
            backend=backend,
        )
        self.warm_starts = checked_store(warm_starts)
        if warm_starts is not None and objective == "divergence":
            raise ValueError("warm_starts: the divergence has a start of its own; expected another objective")

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_lengths: Lengths | None = None,
        y_lengths: Lengths | None = None,
        a: Tensor | str | None = None,
        b: Tensor | str | None = None,
        *,
        cu_seqlens_x: Lengths | None = None,
        cu_seqlens_y: Lengths | None = None,
        max_seqlen_x: int | None = None,
        max_seqlen_y: int | None = None,
        ids: Ids | None = None,
    ) -> Tensor:
        options = self.options
        loss, problem, solution = solved_loss(
            SideInput(x, x_lengths, a, cu_seqlens_x, max_seqlen_x),
            SideInput(y, y_lengths, b, cu_seqlens_y, max_seqlen_y),
            Options.pick(options),
            options["unbalanced"],
            options["objective"],
            options["reduction"],
            options["backend"],
            self.warm_starts,
            ids,
        )
        self.keep_last(solution.n_iter, solution.error, problem.options.tol)
        return loss

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
