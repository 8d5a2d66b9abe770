"""Triton's interpreter as it comes with each version of Triton and NumPy."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from otalign.triton_kernels.interpreter import StrictArray, accept_scalars
from triton.runtime import interpreter

from ..helpers.processes import run_program


@triton.jit
def count_kernel(out, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(out, total)


@pytest.fixture
def oldest(monkeypatch):
    """The conversion of Triton 3.6, with a NumPy that refuses it. Other Triton converts in a way that every NumPy takes."""
    newest = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        newest(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.view(StrictArray)))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)


def index_of(values) -> int:
    """The integer that the interpreter makes of a tensor with these values."""
    tensor = type("Tensor", (), {"handle": SimpleNamespace(data=np.array(values))})
    interpreter._patch_lang_tensor(tensor, SimpleNamespace(set_attr=setattr))
    return operator.index(tensor())


def test_kernels_count_to_a_scalar(oldest):
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Exception, match="only 0-dimensional arrays"):
        count_kernel[(1,)](out, 5)
    accept_scalars()
    count_kernel[(1,)](out, 5)
    assert out.item() == 10


@pytest.mark.parametrize("value", [7, [7], [[7]]], ids=["0d", "1d", "2d"])
def test_one_element_is_an_integer(oldest, value):
    accept_scalars()
    assert index_of(value) == 7


def test_several_elements_are_no_integer(oldest):
    accept_scalars()
    with pytest.raises(TypeError):
        index_of([1, 2])


def test_only_what_is_broken_is_changed(oldest):
    broken = interpreter._patch_lang_tensor
    accept_scalars()
    mended = interpreter._patch_lang_tensor
    assert mended is not broken
    accept_scalars()
    assert interpreter._patch_lang_tensor is mended


@pytest.mark.slow
def test_a_solve_mends_the_interpreter():
    """A user only sets TRITON_INTERPRET."""
    assert float(run_program("oldest_interpreter", TRITON_INTERPRET="1")) == pytest.approx(1, abs=1e-3)
