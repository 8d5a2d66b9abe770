"""How well each item of a batch was solved, and the warning about items that did not converge."""

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
    """A mixin of loss modules: `last`, how well the last call was solved."""

    _last: tuple[Tensor, Tensor, float] | None = None

    @property
    def last(self) -> Convergence | None:
        """`n_iter`, `error` and `converged` of each item in the last call; None before the first one."""
        if self._last is None:
            return None
        n_iter, error, tol = self._last
        return Convergence(n_iter, error, error <= tol)

    def keep_last(self, n_iter: Tensor, error: Tensor, tol: float) -> None:
        """Store how well a call was solved. Calls under torch.compile or torch.func store nothing."""
        if not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(error):
            self.__dict__["_last"] = n_iter, error.detach(), tol  # without the search of nn.Module for parameters


def warn_unconverged(error: Tensor, tol: float, max_iter: int) -> None:
    """Warn once for each line of the user's code whose items do not converge.

    Errors are read where that costs nothing: not under torch.compile, and on a GPU only within otalign.debug(). Items that
    are NaN do not count: their loss shows it.

    Args:
        error: `(B,)`, the error of each item.
        tol: the error that needs no warning; 0 = never warn, since all iterations were wanted.
        max_iter: the limit of iterations, for the message.
    """
    if not tol or torch.compiler.is_compiling() or not _readable(error):
        return
    above = [e for e in error.tolist() if e > tol]
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

    Python's filters recognise a repeated warning by its text, but the numbers in this text change. So a second warning at
    the same line repeats the text of the first.
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
    """The innermost frame outside this library and torch; the outermost frame if there is none."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_LIBRARIES) and frame.f_back is not None:
        frame = frame.f_back
    return frame
