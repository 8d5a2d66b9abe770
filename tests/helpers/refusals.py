"""Calls that must raise an error, and the words that its message must contain."""

import pytest


def rejected(error, *words, **arguments):
    """A parameter set: `sinkhorn_loss` of these arguments raises `error`, and the message contains the `words`."""
    return pytest.param(error, words, arguments, id=next(iter(arguments)) + ": " + words[-1])


def check(function, error, words, arguments):
    with pytest.raises(error) as caught:
        function(**arguments)
    for word in words:
        assert word in str(caught.value)
