"""Compiles the kernels for points whose items are more than 2^31 numbers apart. Prints their 64-bit arguments, as JSON."""

import json
import math

import torch
from codegen import variants  # of the benchmarks
from otalign.triton_kernels import launch
from otalign.triton_kernels.batch import Batch, Side

STRIDE = 2**31 + 64


def main() -> None:
    shape, strides = (2, 40, 16), (STRIDE, 16, 1)
    points = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device=variants.META)
    side = Side(points, None, None, False, 40, 80)
    batch = Batch(
        side, side, items=2, reg=0.1, reg_items=None, cost="cosine", prior="none", prior_parameters=(),
        rho=(math.inf, math.inf), dtype=torch.float32, device=variants.META,
    )  # fmt: skip
    with variants.recording() as found:
        saved = launch.solve(batch, None, None, {"max_iter": 5, "tol": 0.0, "accelerate": False}).saved
        value = torch.empty(2, device=variants.META)
        launch.gradients(batch, saved, value, None, None, {"x": points, "y": points})
        launch.barycentric(batch, saved, by_y=False)
    wide = {}
    for variant in found:
        names = [name for name, kind in variant.signature if kind == "i64"]
        if names:
            variants.compile_variant(variant, 90)
            wide[variant.kernel] = sorted(names)
    print(json.dumps(wide))


if __name__ == "__main__":
    main()
