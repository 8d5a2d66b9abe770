"""What the demo's alignment needs: train it again with one setting changed at a time, and print a Markdown table.

``python examples/demo/ablate.py [--seeds 3] [words of a row's name ...]``; about half a minute a row and seed.
"""

import argparse
import math
from dataclasses import replace

import torch
from aligner import Settings
from demo import plan_figures, run, split
from speech import load

ROWS = {
    "the demo": {},
    "no contrast: attraction only": {"contrast": False},
    "no shuffled transcripts": {"shuffles": 0},
    "no prior in training": {"prior": 0.0},
    "no prior in reading": {"read_prior": 0.0},
    "no prior at all": {"prior": 0.0, "read_prior": 0.0},
    "prior in training 1": {"prior": 1.0},
    "prior in training 20": {"prior": 20.0},
    "strict marginals": {"relax": math.inf},
    "relax 0.03": {"relax": 0.03},
    "relax 3": {"relax": 3.0},
    "reg 0.02": {"reg": 0.02},
    "reg 0.2": {"reg": 0.2},
    "objective plan_cost": {"objective": "plan_cost"},
    "objective transport": {"objective": "transport"},
    "objective divergence": {"objective": "divergence"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="rows whose name holds one of these; all if none is given")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    utterances = load()
    _, held_out = split(utterances)
    print("| setting | mean error, ms | within 100 ms |\n|---|---|---|", flush=True)
    for name, changes in ROWS.items():
        if args.names and not any(part in name for part in args.names):
            continue
        settings = [replace(Settings(), seed=seed, **changes) for seed in range(args.seeds)]
        figures = [plan_figures(run(each, utterances)[1], held_out) for each in settings]
        errors, shares = zip(*figures, strict=True)
        print(
            f"| {name} | {', '.join(f'{error:.0f}' for error in errors)} "
            f"| {', '.join(f'{share:.0%}' for share in shares)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
