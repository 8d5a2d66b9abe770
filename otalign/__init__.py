"""otalign: optimal transport between batches of speech and text sequences, with exact gradients, as a loss."""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from . import integrations, layout, plot, speech
from .convergence import Convergence, ConvergenceWarning
from .functional import sinkhorn_loss, solve, solve_cost
from .integrations import attach
from .layout import debug
from .modules import SinkhornLoss
from .prior import Prior
from .result import OTResult
from .warm_starts import WarmStarts

try:
    __version__ = _version("otalign")
except _NotFound:  # run from a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "Convergence",
    "ConvergenceWarning",
    "OTResult",
    "Prior",
    "SinkhornLoss",
    "WarmStarts",
    "attach",
    "debug",
    "integrations",
    "layout",
    "plot",
    "sinkhorn_loss",
    "solve",
    "solve_cost",
    "speech",
]
