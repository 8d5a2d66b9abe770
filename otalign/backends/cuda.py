"""The compiled CUDA kernels iterate; the Triton kernels do the rest: costs, gradients, plans, projections.

The iteration of symmetric problems, the self terms of a divergence, differs: the Triton kernels solve these.
"""

from __future__ import annotations

import torch

from ..problem import Problem, Solution
from . import triton

LONGEST_Y = 1024  # the widest tile shape of csrc/cuda/tiling.h


def solve(problem: Problem) -> Solution:
    """Solve a batch with the CUDA kernels."""
    if problem.dtype != torch.float32:
        raise ValueError("backend: 'cuda' computes in float32, but the points are float64; 'triton' takes them")
    if problem.y.segments.size > LONGEST_Y:
        raise ValueError(
            f"y: backend 'cuda' takes items of up to {LONGEST_Y} points, got {problem.y.segments.size}; exchange x and y, "
            "or use 'triton'"
        )
    return triton.solve(problem, iterations="cuda")
