"""Errors that are reported in one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """A mistake in the arguments or files: one line on stderr and exit status 2."""


@contextmanager
def as_input_error(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Turn exceptions of these kinds into an `InputError`; `about` comes first in its message, such as a file name."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{about}: {first_line(error)}" if about else first_line(error)) from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type if the message is empty."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
