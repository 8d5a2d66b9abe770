"""Triton's interpreter for the tests: made quicker, and with programs that run together.

The interpreter replaces the functions of triton.language by its own whenever a kernel calls a function, which takes it
most of its time: here it does so once a launch. And it runs the programs of a launch one after the other, so that one
waiting for another would wait for ever: `together` runs them as threads that hand on a baton, in an order drawn at random.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def patch_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_patch_lang`, skipping modules that this launch has patched already."""
    patched: set[int] = set()

    class Scope:
        def __init__(self, scope: Any, added: set[int]) -> None:
            self.scope, self.added = scope, added

        def restore(self) -> None:
            patched.difference_update(self.added)
            self.scope.restore()

    def patch_lang(function: Any) -> Any:
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        added = languages - patched
        if not added:
            return None  # a call within a kernel, where nobody restores
        patched.update(added)
        return Scope(patch(function), added)

    return patch_lang


def make_quicker() -> None:
    interpreter._patch_lang = patch_once(interpreter._patch_lang)
