"""Alignment losses in real trainers: hooks on the model, and callbacks for what trainers keep to themselves."""

from .capture import Attachment, attach
from .distributed import joined_mean_normalizer

__all__ = ["Attachment", "attach", "joined_mean_normalizer"]
