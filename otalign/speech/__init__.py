"""Methods of papers on spoken language models, on top of the solver: losses, scores and interventions."""

import importlib
from typing import Any

from . import recipes
from .inner import InnerAlignmentLoss
from .otreg import OTRegLoss, UniqueTokens, unique_tokens
from .path import (
    AlignmentPath,
    AlignmentPathScore,
    alignment_path,
    alignment_path_score,
    angle_project,
    intervene,
    length_normalize,
    sequence_similarity,
)
from .retrieval import RetrievalCorpus, RetrievalScores, retrieval_scores, select_layers

__all__ = [
    "AlignmentPath",
    "AlignmentPathScore",
    "InnerAlignmentLoss",
    "OTRegLoss",
    "RetrievalCorpus",
    "RetrievalScores",
    "UniqueTokens",
    "alignment_path",
    "alignment_path_score",
    "angle_project",
    "intervene",
    "length_normalize",
    "recipes",
    "retrieval_scores",
    "select_layers",
    "sequence_similarity",
    "unique_tokens",
]


def __getattr__(name: str) -> Any:
    """Import `metrics` and its classes at first use, because they need torchmetrics."""
    if name == "metrics" or name in ("AlignmentPathMetric", "RetrievalMetric"):
        metrics = importlib.import_module(".metrics", __name__)
        return metrics if name == "metrics" else getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
