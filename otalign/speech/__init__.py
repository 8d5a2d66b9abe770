"""What papers on spoken language models do with alignment, on top of the solver: losses, scores and interventions."""

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
