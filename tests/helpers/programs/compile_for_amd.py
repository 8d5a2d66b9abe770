"""Compiles the iterations that need most registers for the AMD chips that are given. Prints the compiler's figures, as JSON."""

import json
import sys

from codegen import variants  # of the benchmarks


def main() -> None:
    with variants.recording(0, 1, 64) as found:
        for relaxed in (False, True):
            variants.Problem(N=128, M=128, relaxed=relaxed).launch(gradients=False)
    iterations = [variant for variant in found if variant.kernel == "sinkhorn_kernel"]
    reports = [variants.compile_variant(variant, arch) for arch in sys.argv[1:] for variant in iterations]
    print(json.dumps([report._asdict() for report in reports]))


if __name__ == "__main__":
    main()
