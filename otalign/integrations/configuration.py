"""Facts in a model's configuration: the placeholder of audio, the special tokens, the scale of the embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .hooks import Batch, Missing

AUDIO_TOKENS = ("audio_token_id", "audio_token_index", "speech_token_id", "speech_token_index")


@dataclass(frozen=True)
class Placeholder:
    """Maps a batch to the mask of its speech, `(B, S)`: the positions of a placeholder token that are attended to."""

    token: int  # id of the placeholder

    def __call__(self, batch: Batch) -> Tensor:
        if batch.get("input_ids") is None:
            raise Missing("input_ids; speech_mask_fn= does without")
        mask, attention = batch["input_ids"] == self.token, batch.get("attention_mask")
        if not isinstance(attention, Tensor) or attention.dim() != 2:
            return mask
        return mask & attention[:, -mask.shape[1] :].bool()  # a cache's mask comes before it


def expect_unwrapped(model: nn.Module) -> None:
    """Raise an error for wrappers, whose hooks do not see the forward pass of the model inside."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: it is compiled, and hooks on it see nothing; attach first, then torch.compile")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model: attach to the model inside DistributedDataParallel, which is its .module")
    if isinstance(model, nn.DataParallel):
        raise ValueError("model: DataParallel runs copies of a model that share its hooks; use DistributedDataParallel")


def audio_token(model: nn.Module) -> int:
    """The id of the placeholder of audio in `input_ids`; a ValueError if the configuration has none."""
    for config in _configurations(model):
        if getattr(config, "num_codebooks", None) is not None:
            break  # such a model sums the streams of a codec at each position; none of its positions is speech alone
        for name in AUDIO_TOKENS:
            if isinstance(token := getattr(config, name, None), int):
                return token
    raise ValueError(
        f"model: {type(model).__name__} has no placeholder of audio in its configuration. Give audio_token_id or speech_mask_fn; "
        "models that add up the streams of a codec (Moshi, CSM) have no span of speech to align"
    )


def first_token(model: nn.Module) -> int | None:
    """The beginning-of-text token; None if there is none."""
    tokens = (getattr(config, "bos_token_id", None) for config in _configurations(model))
    return next((token for token in tokens if isinstance(token, int)), None)


def special_tokens(model: nn.Module) -> frozenset[int]:
    """The beginning, end and padding tokens."""
    found: set[int] = set()
    for config in (*_configurations(model), getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(config, name, None)
            found |= {token} if isinstance(token, int) else set(token or ())
    return frozenset(found)


def embedding_scale(model: nn.Module) -> float:
    """The factor by which the language model multiplies the entries of its embedding table (Granite); 1 for most models."""
    scales = (getattr(config, "embedding_multiplier", None) for config in _configurations(model))
    return next((scale for scale in scales if scale is not None), 1.0)


def _configurations(model: nn.Module) -> Iterator[Any]:
    """The model's configuration and the configurations nested in it."""
    config = getattr(model, "config", None)
    parts = (getattr(config, f"{name}_config", None) for name in ("thinker", "text", "audio", "llm"))
    yield from (part for part in (config, *parts) if part is not None)
