"""`memory_limits.py NAME THREADS`: a large call under RLIMIT_AS, from more than it needs to nothing.

The limit is halved down to what Python and torch need for themselves. Then the last range in which the outcome changes is
divided. Prints as JSON the megabytes left and what became of the call, each time, and whether the calls without a limit
gave the right bits.
"""

import json
import resource
import sys
from collections.abc import Callable

import torch
from fault_problems import Call, given, loss, planned, points, problems

MOST, LEAST = 2**32, 2**21  # bytes left
DIVISIONS = 8


def calls() -> dict[str, Callable[[], Call]]:
    extreme = {"max_iter": 3, "tol": 0}
    return {
        "long items": lambda: loss(*points((2, 2500, 64), (2, 2000, 64)), max_iter=3, tol=0),
        "long items, by transport": lambda: loss(
            *points((2, 1500, 64), (2, 1200, 64)), max_iter=20, tol=0, reg=0.5, objective="transport"
        ),
        "extreme points": lambda: loss(*(1e-25 * t for t in points((4, 300, 20_000), (4, 300, 20_000))), **extreme),
        "euclidean, float64": lambda: loss(
            *points((1, 2000, 32), (1, 2000, 32), dtype=torch.float64), cost="euclidean", max_iter=3, tol=0
        ),
        "divergence": lambda: loss(*points((1, 1500, 32), (1, 1200, 32)), objective="divergence", max_iter=3, tol=0),
        "given cost": lambda: given(points((1, 3000, 2500))[0].abs_(), reg=0.1, max_iter=3, tol=0),
        "Newton": lambda: given(
            points((1, 1500, 1400))[0].abs_(), reg=0.003, tol=1e-5, max_iter=400, accelerate=True
        ),
        "dense plans": lambda: planned(*points((1, 2500, 32), (1, 2000, 32)), max_iter=3, tol=0),
    }  # fmt: skip


def virtual() -> int:
    """Bytes of the process that count for the limit."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def attempt(call: Call, expected: bytes, left: int) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual() + left, hard))
    try:
        return "right" if call() == expected else "wrong"
    except (MemoryError, RuntimeError) as error:
        refused = isinstance(error, MemoryError) or any(w in str(error) for w in ("can't allocate memory", "bad_alloc"))
        return type(error).__name__ if refused else f"other: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    call, small = calls()[name](), problems()["cosine, float32"]
    expected, right = call(), small()
    call()
    found: list[tuple[int, str]] = []
    after = True

    def outcome(left: int) -> str:
        nonlocal after
        found.append((left >> 20, attempt(call, expected, left)))
        after = after and small() == right
        return found[-1][1]

    left = enough = MOST
    while left >= LEAST:
        if outcome(left) == "right":
            enough = left
        left //= 2
    too_little = enough // 2
    for _ in range(DIVISIONS):
        middle = (enough + too_little) // 2
        if outcome(middle) == "right":
            enough = middle
        else:
            too_little = middle
    print(json.dumps({"call": name, "threads": threads, "outcomes": found, "after": after and call() == expected}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
