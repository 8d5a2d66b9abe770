"""OTReg: pull the speech embeddings of a spoken language model towards those of its transcript (arXiv 2508.08131)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import flag, whole_number
from ..convergence import KeepsLast
from ..functional import ItemLosses, item_losses, solve
from ..layout import Lengths, expect_dense, padded_segments
from ..prior import Prior
from ..problem import Unbalanced, checked_options, one_of
from ._states import clean, device_of_buffers, finite, inside, positive, products, sides, unit, weighted_mean

FORMS = ("cost", "soft_target")
TOKEN_WEIGHTS = ("uniform", "count")


class UniqueTokens(NamedTuple):
    """First occurrences of the tokens of each item, in their order; what lies behind `lengths` is 0."""

    index: Tensor  # type: ignore[assignment]  # (B, M) int64, positions of first occurrences
    lengths: Tensor  # (B,) int64, how many there are
    counts: Tensor  # (B, M) int64, how often each token occurs


def unique_tokens(ids: Tensor, lengths: Lengths | None = None) -> UniqueTokens:
    """The different tokens of every item, without a loop and without waiting for the device.

    Args:
        ids: `(B, M)` integer token ids; those behind an item's length are not looked at.
        lengths: `(B,)` int32 or int64; None = full.

    Returns:
        `index` `(B, M)`, `lengths` `(B,)` and `counts` `(B, M)`, all int64.

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
    # Equal tokens next to each other, first occurrences first; padding at the end.
    order = ids.argsort(dim=1, stable=True)
    order = order.gather(1, (~valid).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    ordered, real = ids.gather(1, order), valid.gather(1, order)
    new = real.clone()
    new[:, 1:] &= (ordered[:, 1:] != ordered[:, :-1]) | ~real[:, :-1]
    run = (new.cumsum(1) - 1).clamp(min=0)  # which token of the ordered list
    occurrences = torch.zeros_like(order).scatter_add_(1, run, real.long())
    # Back at their places: whether a token is a first occurrence, and how often it occurs.
    first = torch.zeros_like(valid).scatter_(1, order, new)
    counts = torch.zeros_like(order).scatter_(1, order, torch.where(new, occurrences.gather(1, run), 0))
    index = (~first).to(torch.uint8).argsort(dim=1, stable=True)
    kept = torch.arange(size, device=ids.device) < first.sum(1, keepdim=True)
    return UniqueTokens(torch.where(kept, index, 0), first.sum(1), torch.where(kept, counts.gather(1, index), 0))


class OTRegLoss(KeepsLast, nn.Module):
    r"""OTReg's regulariser for spoken language models (Xu et al., arXiv 2508.08131).

    What is known from the paper: in each training iteration the transport plan between the speech embeddings (the adapter's
    output, as it enters the LLM) and the transcript's embeddings is solved for, and a loss made of that plan pulls the speech
    towards the text; it needs no labels and has no parameters. A digest of it adds that duplicate tokens are removed,
    that the cost is a similarity, and that training starts without the regulariser. Everything else is our choice, and
    configurable: the cosine cost, uniform marginals, `reg`, and the two forms of the loss.

    With the plan P and the cost C (which contains the prior, if there is one), the loss of an item is

    .. math:: \langle \mathrm{sg}(P), C \rangle \quad (\text{"cost"}), \qquad
              -\sum_{ij} \mathrm{sg}(P_{ij}) \log \mathrm{softmax}_j(\cos(x_i, y_j) / \tau) \quad (\text{"soft\_target"})

    times the weight that the schedule has reached. sg is the stop-gradient; `detach_plan=False` leaves it out, and gives the
    exact gradient through the implicit function theorem.

    Args:
        reg: entropic regularisation of the plan, in the unit of the cost.
        weight: what the loss is multiplied with, once warmed up.
        form: `"cost"` or `"soft_target"`.
        detach_plan: whether the plan is a constant to the gradient.
        unique: whether tokens that occur several times in an item count once. Which are the same is told by `text_ids` in the
            call; without them every token counts.
        token_weights: `"uniform"`, or `"count"` = by how often a token occurs, which needs `unique` and `text_ids`.
        temperature: of the softmax of `"soft_target"`.
        start_step: steps without the loss, as in the paper's first stage of plain fine-tuning.
        warmup_steps: steps over which the weight then rises linearly to `weight`.
        count_calls: whether each call in training mode is a step; if not, `set_step` tells them.
        detach_text: whether the text embeddings are a constant to the gradient.
        cost, prior, unbalanced, max_iter, tol, backend: as in `sinkhorn_loss`.

    The schedule's step is a buffer, and so part of the state dict.

    Attributes:
        last: how well the last call was solved, as `SinkhornLoss.last`.

    Where gradients are accumulated over batches of different sizes, or over processes, means of means are not the mean. In the
    call `sample_weight` gives each item a weight, such as its number of label tokens, and `normalizer` what their weighted
    sum is divided by, such as the number of label tokens in the whole step; without it, the weights' own sum.

    Shape:
        - speech: `(B, N, D)`, text: `(B, M, D)`, lengths: `(B,)`, text_ids: `(B, M)`, sample_weight: `(B,)`, normalizer: scalar
        - output: scalar, the mean over the items that are not empty; attached to `speech` even if all are

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
        backend: str = "auto",
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
            reg=reg, cost=cost, prior=prior, unbalanced=unbalanced, max_iter=max_iter, tol=tol, backend=backend
        )
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
    ) -> Tensor:
        n, m = sides(speech, text, speech_lengths, text_lengths)
        weight = self.current_weight()
        if self.training and self.count_calls:
            self.step += 1
        losses = self.items(speech, text, n, m, text_ids).loss
        loss = weighted_mean(losses, (n > 0) & (m > 0), sample_weight, normalizer)
        return weight.to(loss.device, loss.dtype) * loss

    def items(
        self,
        speech: Tensor,
        text: Tensor,
        speech_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
        text_ids: Tensor | None = None,
    ) -> ItemLosses:
        """The loss of every item without the schedule's weight, and the iterations and marginal error behind it: `(B,)`."""
        n, m = sides(speech, text, speech_lengths, text_lengths)
        if self.detach_text:
            text = text.detach()
        weights = None
        if self.unique and text_ids is not None:
            if not isinstance(text_ids, Tensor):
                raise TypeError(f"text_ids: expected a torch.Tensor, got {type(text_ids).__name__}")
            if text_ids.shape != text.shape[:2]:
                raise ValueError(f"text_ids: expected shape {tuple(text.shape[:2])}, got {tuple(text_ids.shape)}")
            index, m, counts = unique_tokens(text_ids, m)
            text = text.gather(1, index[..., None].expand_as(text))
            if self.token_weights == "count":
                # An empty item has no weight to give, and its points no meaning.
                weights = torch.where(counts.sum(1, keepdim=True) > 0, counts, 1).to(speech.dtype)
        elif self.token_weights == "count":
            raise ValueError('token_weights: "count" needs unique=True, and text_ids in the call')
        if self.form == "cost":
            objective = "plan_cost" if self.detach_plan else "transport"
            return self._kept(item_losses(speech, text, n, m, weights, objective=objective, **self.options))
        result = solve(speech, text, n, m, None, weights, **self.options)
        plan = result.plan()
        if self.detach_plan:
            plan = plan.detach()
        inside_x, inside_y = inside(speech, n), inside(text, m)
        x, y = (unit(clean(t, mask).to(plan.dtype)) for t, mask in ((speech, inside_x), (text, inside_y)))
        # (Not minus infinity, of which an item without text would have nothing else, and NaN for a gradient.)
        logits = products(x, y).div(self.temperature).masked_fill(~inside_y[:, None, :], -1e30)
        log_p = F.log_softmax(logits, 2)
        terms = torch.where(inside_x[:, :, None] & inside_y[:, None, :], -plan * log_p, 0)
        return self._kept(ItemLosses(terms.sum((1, 2)), result.n_iter, result.error))

    def _kept(self, losses: ItemLosses) -> ItemLosses:
        self.keep_last(losses.n_iter, losses.error, self.options["tol"])
        return losses

    def current_weight(self) -> Tensor:
        """The weight at the present step: a scalar tensor, so that nobody waits for the device."""
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
