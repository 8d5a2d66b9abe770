"""Alignment losses in real trainers: hooks on the model, and callbacks for what trainers keep to themselves."""

from ..distributed import joined_mean_normalizer
from .attach import Attachment, attach

__all__ = ["Attachment", "attach", "joined_mean_normalizer"]
