"""AI-STA's loss: align speech and text in selected inner layers of a language model (arXiv 2503.10211)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..checks import flag
from ..convergence import KeepsLast
from ..functional import ItemLosses, item_losses
from ..layout import Lengths
from ..options import Unbalanced, checked_options
from ..prior import Prior
from ._states import Stack, States, finite, layer_numbers, stacked, weighted_mean


class InnerAlignmentLoss(KeepsLast, nn.Module):
    """Optimal transport between the hidden states of speech and text in selected layers (AI-STA, arXiv 2503.10211).

    Known from the abstract: an optimal transport discrepancy is minimised jointly with the task, in layers that cross-modal
    retrieval selects (`retrieval_scores`, `select_layers`). Cost, weights, `reg` and iterations are not published; ours are
    those of `sinkhorn_loss`. All layers form one batch, so there is a single solve.

    Args:
        layers: numbers of the layers, as indices into the states.
        layer_weights: weight of each layer in the sum, in the order of `layers` or by number; None = 1 / number of layers, so
            that the loss is the mean over the layers.
        detach_text: whether to stop the gradient at the text's states.
        reg, cost, objective, prior, unbalanced, max_iter, tol, accelerate, backend: as in `sinkhorn_loss`.

    Attributes:
        last: convergence of the last call, as `SinkhornLoss.last`: for each item the mean of its iterations over the layers
            and its largest marginal error.

    Shape:
        - speech_states: lists or dicts of `(B, N, D)`; text_states: of `(B, M, D)`; lengths: `(B,)`
        - sample_weight: `(B,)`, normalizer: scalar, both as in `OTRegLoss`
        - output: scalar, the mean over the items that are not empty

    Raises:
        ValueError, TypeError: for bad options, and in the call for bad states, naming the argument.

    Example:
        >>> criterion = otalign.speech.InnerAlignmentLoss(layers=[0, 1])
        >>> speech = [torch.randn(2, 30, 16, requires_grad=True) for _ in range(4)]
        >>> text = [torch.randn(2, 8, 16) for _ in range(4)]
        >>> criterion(speech, text, torch.tensor([30, 21]), torch.tensor([8, 5])).backward()
        >>> [layer.grad is not None for layer in speech]
        [True, True, False, False]
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        layer_weights: Sequence[float] | Mapping[int, float] | None = None,
        detach_text: bool = True,
        reg: float = 0.05,
        cost: str = "cosine",
        objective: str = "value",
        prior: Prior | None = None,
        unbalanced: Unbalanced = None,
        max_iter: int = 200,
        tol: float = 1e-3,
        accelerate: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.layers, self.detach_text = layer_numbers(layers), flag("detach_text", detach_text)
        if layer_weights is None:
            layer_weights = [1 / len(self.layers)] * len(self.layers)
        if isinstance(layer_weights, Mapping):
            if layer_weights.keys() != set(self.layers):
                raise ValueError(f"layer_weights: expected the layers {self.layers}, got {list(layer_weights)}")
            layer_weights = [layer_weights[layer] for layer in self.layers]
        if len(layer_weights) != len(self.layers):
            raise ValueError(f"layer_weights: expected {len(self.layers)} numbers, got {len(layer_weights)}")
        self.layer_weights = [finite("layer_weights", weight) for weight in layer_weights]
        self.options: dict[str, Any] = checked_options(
            reg=reg,
            cost=cost,
            objective=objective,
            prior=prior,
            unbalanced=unbalanced,
            max_iter=max_iter,
            tol=tol,
            accelerate=accelerate,
            backend=backend,
        )

    def forward(
        self,
        speech_states: States,
        text_states: States,
        speech_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        stack = stacked(speech_states, text_states, speech_lengths, text_lengths, self.layers)
        losses = self._items(stack).loss
        return weighted_mean(losses, stack.filled[: len(losses)], sample_weight, normalizer)

    def items(
        self,
        speech_states: States,
        text_states: States,
        speech_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
    ) -> ItemLosses:
        """The loss of every item, its mean iterations over the layers, and its largest marginal error: `(B,)`."""
        return self._items(stacked(speech_states, text_states, speech_lengths, text_lengths, self.layers))

    def _items(self, stack: Stack) -> ItemLosses:
        if self.detach_text:
            stack = stack._replace(y=stack.y.detach())
        losses, n_iter, error = (v.view(len(self.layers), -1) for v in item_losses(*stack, **self.options))
        weights = losses.new_tensor(self.layer_weights)
        found = ItemLosses((weights[:, None] * losses).sum(0), n_iter.double().mean(0), error.amax(0))
        self.keep_last(found.n_iter, found.error, self.options["tol"])
        return found

    def extra_repr(self) -> str:
        shown = {"layers": self.layers, "layer_weights": self.layer_weights} | self.options
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
