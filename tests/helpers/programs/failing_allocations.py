"""`failing_allocations.py LIBRARY SPARING NAME THREADS FIRST PROCESS`: each allocation of a call fails in turn.

NAME is a call of fault_problems, which PROCESS makes: this one, the "parent", or a "child" that it forks. LIBRARY is what tests/faults/failing_allocations.c was compiled to, and is preloaded. SPARING says whose allocations do not
fail: "torch" for torch, OpenMP and the loader, or "OpenMP" for these two.

Before each attempt, from number FIRST on, prints the number. After it: whose code allocated, whether the next call gave the
right bits, and what became of this one. At the end prints "all", and how many allocations of the spared libraries there were.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch
from fault_problems import Call, problems

# Libraries that have all they want. Without memory OpenMP and the loader end the process, and torch often does.
SPARED = {"torch": ("libtorch", "libc10", "libgomp", "ld-linux"), "OpenMP": ("libgomp", "ld-linux")}


def attempt(library: ctypes.CDLL, call: Call, expected: bytes, number: int) -> str:
    found, error = b"", None
    library.failing_arm(number)
    try:
        library.failing_resume()
        found = call()
    except BaseException as raised:
        error = raised
    finally:
        library.failing_pause()
    if error is None:
        return "right" if found == expected else "wrong"
    refused = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "bad_alloc"))
    )
    return type(error).__name__ if refused else f"other: {error!r}"


def main(path: str, sparing: str, name: str, threads: int, first: int, process: str) -> None:
    library = ctypes.CDLL(path)
    library.failing_spared.restype = ctypes.c_long
    library.failing_culprit.restype = ctypes.c_char_p
    library.failing_arm.argtypes = [ctypes.c_long]
    torch.set_num_threads(threads)
    call = problems()[name]
    expected = call()
    call()
    for part in SPARED[sparing]:
        library.failing_spare(part.encode())
    if process == "child" and os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    number = first
    while True:
        print(number, end=" ", flush=True)
        outcome = attempt(library, call, expected, number)
        culprit = library.failing_culprit()
        if culprit is None:
            print("all", library.failing_spared(), outcome)
            return
        library.failing_arm(0)
        after = "right" if call() == expected else "wrong"
        print(Path(culprit.decode()).name.split(".")[0], after, outcome, flush=True)
        number += 1


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
