"""Names that the examples in docstrings use."""

import pytest
import torch

import otalign


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(otalign=otalign, torch=torch)
