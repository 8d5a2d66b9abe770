"""Alignment losses in real trainers: hooks on the model, and callbacks for what trainers keep to themselves."""

from .capture import Attachment, attach

__all__ = ["Attachment", "attach"]
