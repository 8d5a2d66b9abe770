"""Alignment losses in trainers: hooks on the model, and callbacks that pass on the global step and log the metrics."""

from ..distributed import joined_mean_normalizer
from .attach import Attachment, attach

__all__ = ["Attachment", "attach", "joined_mean_normalizer"]
