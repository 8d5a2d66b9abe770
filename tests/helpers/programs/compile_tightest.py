"""Compiles the iterations that need most registers for the chips that are given. Prints the compiler's figures, as JSON."""

import json
import sys

from codegen import variants  # of the benchmarks
from codegen.variants import Problem

AMD = (Problem(N=128, M=128), Problem(N=256, M=64, relaxed=True, accelerate=True))
NVIDIA = (Problem(B=16, N=1000, M=64, relaxed=True, accelerate=True),)


def main() -> None:
    reports = []
    for name in sys.argv[1:]:
        arch = int(name) if name.isdigit() else name
        with variants.recording(arch) if isinstance(arch, int) else variants.recording(0, 1, 64) as found:
            for problem in NVIDIA if isinstance(arch, int) else AMD:
                problem.launch(gradients=False)
        iterations = [variant for variant in found if variant.kernel == "sinkhorn_kernel"]
        reports += variants.report(iterations, arch, processes=2)
    print(json.dumps([report._asdict() for report in reports]))


if __name__ == "__main__":
    main()
