"""Prints how many variants of the kernels 200 batches of random sizes have compiled, batch by batch, as JSON."""

import json
import random

from codegen import variants  # of the benchmarks


def main() -> None:
    random.seed(0)
    counts = []
    with variants.recording() as found:
        for _ in range(200):
            items, size_x, size_y = random.randint(1, 64), random.randint(1, 1500), random.randint(1, 256)
            variants.Problem(items, size_x, size_y, 2048).launch()
            counts.append(len(found))
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
