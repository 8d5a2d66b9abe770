"""OTReg: pull the speech embeddings of a spoken language model towards those of its transcript (arXiv 2508.08131)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import flag, whole_number
from ..convergence import KeepsLast
from ..functional import ItemLosses, item_losses, item_plans
from ..layout import Lengths, expect_dense, padded_segments
from ..options import Unbalanced, checked_options, one_of
from ..prior import Prior
from ..warm_starts import Ids, WarmStarts, checked_store
from ._states import clean, device_of_buffers, finite, inside, positive, products, sides, unit, weighted_mean

FORMS = ("cost", "soft_target")
TOKEN_WEIGHTS = ("uniform", "count")


class UniqueTokens(NamedTuple):
    """First occurrences of the tokens of each item, in order of position; 0 from `lengths` on."""

    index: Tensor  # type: ignore[assignment]  # (B, M) int64, positions of first occurrences
    lengths: Tensor  # (B,) int64, number of different tokens
    counts: Tensor  # (B, M) int64, occurrences of each token


def unique_tokens(ids: Tensor, lengths: Lengths | None = None) -> UniqueTokens:
    """The different tokens of each item, without a loop and without waiting for the device.

    Args:
        ids: `(B, M)` integer token ids. The padding is ignored.
        lengths: `(B,)` int32 or int64; None = full.

    Returns:
        `index` `(B, M)`, `lengths` `(B,)` and `counts` `(B, M)`, all int64.

    Raises:
        ValueError, TypeError: for bad ids or lengths.

    Example:
        >>> otalign.speech.unique_tokens(torch.tensor([[7, 3, 7, 9]]), torch.tensor([3]))
        UniqueTokens(index=tensor([[0, 1, 0, 0]]), lengths=tensor([2]), counts=tensor([[2, 1, 0, 0]]))
    """
    if isinstance(ids, Tensor):
        expect_dense("ids", ids)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(f"ids: expected shape (B, M), got {tuple(ids.shape) if isinstance(ids, Tensor) else ids!r}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids: expected integers, got {ids.dtype}")
    size = ids.shape[1]
    valid = torch.arange(size, device=ids.device) < padded_segments("lengths", ids, size, lengths).lengths[:, None]
    # Sort equal tokens next to each other, the first occurrence first; padding comes last.
    order = ids.argsort(dim=1, stable=True)
    order = order.gather(1, (~valid).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    ordered, real = ids.gather(1, order), valid.gather(1, order)
    new = real.clone()
    new[:, 1:] &= (ordered[:, 1:] != ordered[:, :-1]) | ~real[:, :-1]
    run = (new.cumsum(1) - 1).clamp(min=0)  # number of the token among the different ones
    occurrences = torch.zeros_like(order).scatter_add_(1, run, real.long())
    # Back in the order of positions: whether a token is a first occurrence, and how often it occurs.
    first = torch.zeros_like(valid).scatter_(1, order, new)
    counts = torch.zeros_like(order).scatter_(1, order, torch.where(new, occurrences.gather(1, run), 0))
    index = (~first).to(torch.uint8).argsort(dim=1, stable=True)
    kept = torch.arange(size, device=ids.device) < first.sum(1, keepdim=True)
    return UniqueTokens(torch.where(kept, index, 0), first.sum(1), torch.where(kept, counts.gather(1, index), 0))


class OTRegLoss(KeepsLast, nn.Module):
    r"""OTReg's regulariser for spoken language models (Xu et al., arXiv 2508.08131).

    Known from the paper: each training iteration solves for the transport plan between the speech embeddings (the adapter's
    output, as it enters the LLM) and the transcript's embeddings. A loss from that plan pulls the speech towards the text. It
    needs no labels and has no parameters. A digest of the paper adds: duplicate tokens are removed, the cost is a similarity,
    and training starts without the regulariser. Everything else is our choice, and configurable: the cosine cost, uniform
    marginals, `reg`, and the two forms of the loss.

    With the plan P and the cost C (with the prior added, if there is one), the loss of an item is

    .. math:: \langle \mathrm{sg}(P), C \rangle \quad (\text{"cost"}), \qquad
              -\sum_{ij} \mathrm{sg}(P_{ij}) \log \mathrm{softmax}_j(\cos(x_i, y_j) / \tau) \quad (\text{"soft\_target"})

    times the schedule's present weight. sg is the stop-gradient. `detach_plan=False` leaves it out, and gives the exact gradient
    by the implicit function theorem.

    Args:
        reg: entropic regularisation of the plan, in the unit of the cost.
        weight: factor of the loss after the warm-up.
        form: `"cost"` or `"soft_target"`.
        detach_plan: whether to stop the gradient at the plan.
        unique: whether a token that occurs several times in an item counts once. `text_ids` in the call says which tokens are
            the same; without it every token counts.
        token_weights: `"uniform"`, or `"count"` = the number of occurrences, which needs `unique` and `text_ids`.
        temperature: tau of the softmax of `"soft_target"`, > 0.
        start_step: number of steps without the loss, as in the paper's first stage of plain fine-tuning.
        warmup_steps: number of steps in which the weight then rises linearly to `weight`.
        count_calls: whether each call in training mode counts as a step; if not, `set_step` sets the step.
        detach_text: whether to stop the gradient at the text embeddings.
        cost, prior, unbalanced, max_iter, tol, accelerate, backend: as in `sinkhorn_loss`.
        warm_starts: potentials by utterance, as in `SinkhornLoss`. The call says by `ids` which utterance each item is.

    The schedule's step is a buffer, and so part of the state dict.

    Attributes:
        last: convergence of the last call, as `SinkhornLoss.last`.

    If gradients are accumulated over batches of different sizes, or over processes, the mean of means is not the mean. In the
    call, `sample_weight` gives each item a weight, such as its number of label tokens. `normalizer` is the divisor of the
    weighted sum, such as the number of label tokens in the whole step; by default it is the sum of the weights.

    Shape:
        - speech: `(B, N, D)`, text: `(B, M, D)`, lengths: `(B,)`, text_ids: `(B, M)`, sample_weight: `(B,)`, normalizer: scalar
        - output: scalar, the mean over the items that are not empty; with a gradient for `speech` even if all are empty

    Raises:
        ValueError, TypeError: for bad options, and in the call for bad input, naming the argument.

    Example:
        >>> criterion = otalign.speech.OTRegLoss(weight=0.1, warmup_steps=100)
        >>> speech, text = torch.randn(2, 30, 16, requires_grad=True), torch.randn(2, 8, 16)
        >>> criterion(speech, text, torch.tensor([30, 21]), torch.tensor([8, 5]), torch.randint(9, (2, 8))).backward()
    """

    step: Tensor

    def __init__(
        self,
        *,
        reg: float = 0.05,
        weight: float = 1.0,
        form: str = "cost",
        detach_plan: bool = True,
        unique: bool = True,
        token_weights: str = "uniform",
        temperature: float = 0.1,
        start_step: int = 0,
        warmup_steps: int = 0,
        count_calls: bool = True,
        detach_text: bool = True,
        cost: str = "cosine",
        prior: Prior | None = None,
        unbalanced: Unbalanced = None,
        max_iter: int = 200,
        tol: float = 1e-3,
        accelerate: bool = True,
        backend: str = "auto",
        warm_starts: WarmStarts | None = None,
    ) -> None:
        super().__init__()
        one_of("form", form, FORMS)
        one_of("token_weights", token_weights, TOKEN_WEIGHTS)
        if form == "soft_target" and cost != "cosine":
            raise ValueError(f"cost: the form 'soft_target' compares cosines, got {cost!r}")
        if token_weights == "count" and not flag("unique", unique):
            raise ValueError('token_weights: "count" needs unique=True, and text_ids in the call')
        start_step, warmup_steps = whole_number("start_step", start_step), whole_number("warmup_steps", warmup_steps)
        if start_step < 0 or warmup_steps < 0:
            raise ValueError(f"start_step, warmup_steps: expected numbers >= 0, got {start_step} and {warmup_steps}")
        self.weight, self.temperature = finite("weight", weight), positive("temperature", temperature)
        self.form, self.token_weights = form, token_weights
        self.start_step, self.warmup_steps = start_step, warmup_steps
        self.detach_plan, self.unique = flag("detach_plan", detach_plan), flag("unique", unique)
        self.count_calls, self.detach_text = flag("count_calls", count_calls), flag("detach_text", detach_text)
        self.options: dict[str, Any] = checked_options(
            reg=reg,
            cost=cost,
            prior=prior,
            unbalanced=unbalanced,
            max_iter=max_iter,
            tol=tol,
            accelerate=accelerate,
            backend=backend,
        )
        self.warm_starts = checked_store(warm_starts)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device_of_buffers()))

    def forward(
        self,
        speech: Tensor,
        text: Tensor,
        speech_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
        text_ids: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        ids: Ids | None = None,
    ) -> Tensor:
        n, m = sides(speech, text, speech_lengths, text_lengths)
        weight = self.current_weight()
        if self.training and self.count_calls:
            self.step += 1
        losses = self.items(speech, text, n, m, text_ids, ids).loss
        loss = weighted_mean(losses, (n > 0) & (m > 0), sample_weight, normalizer)
        return weight.to(loss.device, loss.dtype) * loss

    def items(
        self,
        speech: Tensor,
        text: Tensor,
        speech_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
        text_ids: Tensor | None = None,
        ids: Ids | None = None,
    ) -> ItemLosses:
        """Loss of each item without the schedule's weight, iterations, and marginal error: `(B,)` each."""
        n, m = sides(speech, text, speech_lengths, text_lengths)
        if self.detach_text:
            text = text.detach()
        text, m, weights = self._without_duplicates(text, m, text_ids, speech.dtype)
        start: dict[str, Any] = {"warm_starts": self.warm_starts, "ids": ids}
        if self.form == "cost":
            objective = "plan_cost" if self.detach_plan else "transport"
            losses = item_losses(speech, text, n, m, weights, objective=objective, **start, **self.options)
        else:
            losses = self._soft_target(speech, text, n, m, weights, start)
        self.keep_last(losses.n_iter, losses.error, self.options["tol"])
        return losses

    def _without_duplicates(
        self, text: Tensor, m: Tensor, text_ids: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text `(B, M, D)` with each token once if `unique`, its lengths `(B,)`, and its weights `(B, M)`; None = uniform."""
        if not self.unique or text_ids is None:
            if self.token_weights == "count":
                raise ValueError('token_weights: "count" needs unique=True, and text_ids in the call')
            return text, m, None
        if not isinstance(text_ids, Tensor):
            raise TypeError(f"text_ids: expected a torch.Tensor, got {type(text_ids).__name__}")
        if text_ids.shape != text.shape[:2]:
            raise ValueError(f"text_ids: expected shape {tuple(text.shape[:2])}, got {tuple(text_ids.shape)}")
        index, m, counts = unique_tokens(text_ids, m)
        text = text.gather(1, index[..., None].expand_as(text))
        if self.token_weights == "uniform":
            return text, m, None
        # An empty item has no tokens to count. It gets ones, which nothing reads.
        return text, m, torch.where(counts.sum(1, keepdim=True) > 0, counts, 1).to(dtype)

    def _soft_target(
        self, speech: Tensor, text: Tensor, n: Tensor, m: Tensor, weights: Tensor | None, start: dict[str, Any]
    ) -> ItemLosses:
        """Cross-entropy between the plan and the softmax of the cosines over the tokens."""
        result = item_plans(speech, text, n, m, weights, **start, **self.options)
        plan = result.plan()
        if self.detach_plan:
            plan = plan.detach()
        inside_x, inside_y = inside(speech, n), inside(text, m)
        x, y = (unit(clean(t, mask).to(plan.dtype)) for t, mask in ((speech, inside_x), (text, inside_y)))
        # Not minus infinity: an item without text would have no other logit, and NaN as its gradient.
        logits = products(x, y).div(self.temperature).masked_fill(~inside_y[:, None, :], -1e30)
        log_p = F.log_softmax(logits, 2)
        terms = torch.where(inside_x[:, :, None] & inside_y[:, None, :], -plan * log_p, 0)
        return ItemLosses(terms.sum((1, 2)), result.n_iter, result.error)

    def current_weight(self) -> Tensor:
        """The weight at the present step: a scalar tensor, because a Python number would mean to wait for the device."""
        past = (self.step - self.start_step).double()
        ramp = (past >= 0).double() if self.warmup_steps == 0 else ((past + 1) / self.warmup_steps).clamp(0, 1)
        return self.weight * ramp

    def set_step(self, step: int) -> None:
        """Set the schedule to the trainer's global step."""
        self.step.fill_(whole_number("step", step))

    def extra_repr(self) -> str:
        names = (
            "weight",
            "form",
            "detach_plan",
            "unique",
            "token_weights",
            "temperature",
            "start_step",
            "warmup_steps",
        )
        shown = {name: getattr(self, name) for name in names} | self.options
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
