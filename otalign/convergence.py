"""What is said of how well a batch was solved, and the warning where that was not well enough."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import debugging, mapped

_LIBRARIES = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


class ConvergenceWarning(UserWarning):
    """Some item reached `max_iter` with an error above `tol`."""


class Convergence(NamedTuple):
    """How well each item of a loss's last call was solved: `(B,)` each, detached."""

    n_iter: Tensor  # int32
    error: Tensor
    converged: Tensor  # bool


class KeepsLast:
    """Of a loss module: `last`, how well its last call was solved."""

    _last: tuple[Tensor, Tensor, float] | None = None

    @property
    def last(self) -> Convergence | None:
        """`n_iter`, `error` and `converged` of each item in the last call; None before the first one."""
        if self._last is None:
            return None
        n_iter, error, tol = self._last
        return Convergence(n_iter, error, error <= tol)

    def keep_last(self, n_iter: Tensor, error: Tensor, tol: float) -> None:
        """Keep this of a call, unless torch.compile or torch.func traces it."""
        if not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(error):
            self.__dict__["_last"] = n_iter, error.detach(), tol  # without the search of nn.Module for parameters


def warn_unconverged(error: Tensor, tol: float, max_iter: int) -> None:
    """Warn once for each line of the user's that solves items which do not converge.

    Only of errors that may be looked at: not under torch.compile, and on a GPU only with otalign.debug(). Items that are
    NaN do not count: their loss tells.

    Args:
        error: `(B,)`, that was reached.
        tol: that was asked for; 0 asks for all iterations, and there is nothing to warn of.
        max_iter: iterations that were allowed.
    """
    if not tol or torch.compiler.is_compiling() or not _readable(error):
        return
    above = [reached for reached in error.tolist() if reached > tol]
    if above:
        _warn(
            f"{len(above)} of {error.numel()} items did not converge: error {max(above):.3g} after max_iter={max_iter} iterations, "
            f"tol={tol:g}. Raise max_iter or reg, relax marginals that no plan can have with unbalanced=, "
            "or raise tol if this error will do."
        )


def _readable(error: Tensor) -> bool:
    if mapped(error):
        return False
    plain = type(error) is Tensor and torch._C._len_torch_dispatch_stack() == 0
    return plain and (error.device.type == "cpu" or debugging())


def _warn(message: str) -> None:
    """Warn at the line that called into this library.

    Python keeps warnings apart by their text, and here it has numbers in it. So a line that has been warned of is
    given the text that it had then, for Python's filters to know it by.
    """
    frame = _caller()
    names, line = frame.f_globals, frame.f_lineno
    registry = names.setdefault("__warningregistry__", {})
    known = [key[0] for key in list(registry) if isinstance(key, tuple) and key[1:] == (ConvergenceWarning, line)]
    warnings.warn_explicit(
        known[0] if known else message,
        ConvergenceWarning,
        frame.f_code.co_filename,
        line,
        module=names.get("__name__"),
        registry=registry,
    )


def _caller() -> FrameType:
    """The innermost frame that is neither this library's nor torch's; the outermost if there is none."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_LIBRARIES) and frame.f_back is not None:
        frame = frame.f_back
    return frame
