"""Runs a benchmark: `python benchmarks NAME [options]`. README.md explains how to measure and how to commit results."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import NamedTuple


class Benchmark(NamedTuple):
    module: str  # has main(arguments) -> exit status
    answers: str


MEASUREMENTS = {
    "cpu": Benchmark(
        "cpu.compare", "How fast is a loss with gradients on a CPU, against POT, plain torch and the floor?"
    ),
    "small-reg": Benchmark(
        "cpu.small_reg", "How fast is a small reg on a CPU, against plain iterations and a Newton solver?"
    ),
    "passes": Benchmark("methods.passes", "How many passes does each engine take for small reg? Needs no GPU."),
    "memory": Benchmark("cpu.memory", "How much memory does one loss with gradients need on a CPU?"),
    "gpu": Benchmark("gpu.benchmark", "How fast is a loss on a GPU, against its peers and the floor?"),
    "stages": Benchmark("gpu.stages", "Where does the time of a loss on a GPU go, launch by launch?"),
    "forms": Benchmark("gpu.forms", "Which tile shape and cluster of the CUDA kernels is the fastest at shape A?"),
    "launch": Benchmark("codegen.launch_cost", "What does a call of the Triton backend cost the host? Needs no GPU."),
    "variants": Benchmark("codegen.variants", "Which Triton kernels are compiled, and do they spill? Needs no GPU."),
    "accesses": Benchmark(
        "codegen.accesses", "How wide do the Triton kernels of shapes A and B read memory? Needs no GPU."
    ),
    "machine-code": Benchmark("codegen.machine_code", "What has nvcc made of the CUDA kernels? Needs no GPU."),
    "critical-path": Benchmark(
        "codegen.critical_path", "How long does an iteration of the CUDA kernels take, by a model? Needs nvcc, no GPU."
    ),
    "capture": Benchmark("methods.capture", "How much slower is a training step with an attached loss?"),
    "warm-starts": Benchmark(
        "methods.warm_starts", "How many passes would warm starts save in the trainings of the demo and of the study?"
    ),
    "speech": Benchmark("methods.speech", "How fast is the alignment path score, against plain loops?"),
}
REPORTS = {
    "cpu-table": Benchmark("cpu.report", "The README's table, from results/cpu.csv."),
    "cpu-plot": Benchmark("cpu.plot", "docs/figures/cpu.png, from results/cpu.csv."),
    "small-reg-table": Benchmark(
        "cpu.small_reg_report", "The tables and the plot of small reg, from results/small_reg.csv."
    ),
    "gpu-table": Benchmark(
        "gpu.report", "The README's GPU table and its plot, from results/<device>/; adds a session."
    ),
    "variants-table": Benchmark(
        "codegen.variants_report", "The tables of docs/performance.md, from results/variants.csv."
    ),
}
SESSION = {
    "session": Benchmark(
        "gpu.session.run", "The whole session of `make gpu`; it runs the steps below, gpu, forms and stages."
    ),
    "build": Benchmark("gpu.session.build", "Is the package built with what this machine has?"),
    "first-look": Benchmark("gpu.session.first_look", "Does a backend end, is it right, and how long does it take?"),
    "sanitize": Benchmark("gpu.session.sanitize", "Does every kernel pass compute-sanitizer? Small cases for it."),
}
BENCHMARKS = MEASUREMENTS | REPORTS | SESSION


def overview() -> str:
    lines = [str(__doc__).splitlines()[0]]
    for title, group in (("Measure", MEASUREMENTS), ("Report", REPORTS), ("Steps of `make gpu`", SESSION)):
        lines += ["", f"{title}:", *(f"  {name:<15} {benchmark.answers}" for name, benchmark in group.items())]
    return "\n".join([*lines, "", "`python benchmarks NAME --help` lists the options of one."])


def main(arguments: list[str]) -> int:
    if __package__:
        # With -m, Python looks for otalign in the working directory first: the checkout's has no triton_kernels inside.
        raise SystemExit("expected `python benchmarks NAME`, got `python -m benchmarks`")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, *options = arguments
    if name not in BENCHMARKS:
        print(f"benchmark: expected one of {', '.join(BENCHMARKS)}, got {name!r}", file=sys.stderr)
        return 2
    return int(importlib.import_module(BENCHMARKS[name].module).main(options))


def stop(*_: object) -> None:
    """On SIGTERM, a benchmark ends as by an exception: its files are closed, and its own processes end."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main(sys.argv[1:]))
