"""What is told in one line rather than by a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Something that whoever called can put right: one line on stderr and exit status 2."""


@contextmanager
def as_input_error(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Turns exceptions of these kinds into an `InputError` about a file, say."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{about}: {first_line(error)}" if about else first_line(error)) from error


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its type if it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
