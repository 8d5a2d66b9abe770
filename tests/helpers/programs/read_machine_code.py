"""Prints, as JSON, how the Triton kernels of shape A read memory in their code for Hopper, by type of points and kernel.

"ada" has the kernels of 16-bit points, for chips with little shared memory, that need most of it.
"""

import json
import re

import torch
from codegen import accesses, variants  # of the benchmarks

POINTS = "cost_kernel .*COST=cosine|points_gradient_kernel .*COST=cosine|barycentric"
COSTS = "sinkhorn|adjoint|plan_kernel|assign"
LARGE = "cost_kernel .*COST=cosine|points_gradient_kernel .*COST=cosine"
HOPPER, ADA = 90, 89


def kernels(dtype: torch.dtype, which: str, arch: int = HOPPER, size_y: int = 128) -> dict[str, dict[str, object]]:
    with variants.recording(arch) as found:
        variants.Problem(32, 750, size_y, 1024, dtype, dtype).launch()
    chosen = [variant for variant in found if re.search(which, f"{variant.kernel} {variant.label()}")]
    named = [(accesses.figures(variant, arch), variant) for variant in chosen]
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
    found["ada"] = kernels(torch.bfloat16, LARGE, ADA, 60)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
