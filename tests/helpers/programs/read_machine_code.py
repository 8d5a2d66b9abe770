"""Prints, as JSON, how the Triton kernels of shape A read memory in their code for Hopper, by type of points and kernel."""

import json
import re

import torch
from codegen import accesses, variants  # of the benchmarks

POINTS = "cost_kernel COST=cosine|points_gradient_kernel COST=cosine.*IMPLICIT=False|barycentric"
COSTS = "sinkhorn|adjoint|plan_kernel|assign"
HOPPER = 90


def kernels(dtype: torch.dtype, which: str) -> dict[str, dict[str, object]]:
    with variants.recording(HOPPER) as found:
        variants.Problem(32, 750, 128, 1024, dtype, dtype).launch()
    chosen = [variant for variant in found if re.search(which, f"{variant.kernel} {variant.label()}")]
    named = [(accesses.figures(variant, HOPPER), variant) for variant in chosen]
    return {
        f"{figures['kernel']} {figures['side']}".strip(): {
            **figures,
            **dict(variant.constants),
            **dict(variant.options),
        }
        for figures, variant in named
    }


def main() -> None:
    found = {"bf16": kernels(torch.bfloat16, POINTS), "fp32": kernels(torch.float32, f"{POINTS}|{COSTS}")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
