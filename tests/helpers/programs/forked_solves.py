"""`forked_solves.py TIMES [CASE...]`: children that are forked at bad moments make all calls of fault_problems.

Prints as JSON for each case the exit codes of the children, 0 if its bits are its parent's and -14 (SIGALRM) if it hangs,
and whether the parent's next calls give the same bits.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from fault_problems import problems

PATIENCE = 30  # seconds; a child takes less than one
CALLS = problems()


def all_bits() -> dict[str, bytes]:
    return {name: call() for name, call in CALLS.items()}


def fork(child: Callable[[], bool]) -> int:
    """The exit code of a child that runs this."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        code = 2
        try:
            code = 0 if child() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def one_thread(expected: dict[str, bytes]) -> int:
    torch.set_num_threads(1)
    return fork(lambda: all_bits() == expected)


def two_threads(expected: dict[str, bytes]) -> int:
    return fork(lambda: all_bits() == expected)


def more_threads_in_the_child(expected: dict[str, bytes]) -> int:
    def child() -> bool:
        torch.set_num_threads(4)
        return all_bits() == expected

    return fork(child)


def after_threads_of_torch(expected: dict[str, bytes]) -> int:
    """The child's first call with two threads comes after torch has used its own, in the same thread."""
    torch.rand(2000, 2000).exp().sum()
    return fork(lambda: all_bits() == expected)


def grandchild(expected: dict[str, bytes]) -> int:
    return fork(lambda: all_bits() == expected and fork(lambda: all_bits() == expected) == 0)


def from_another_thread(expected: dict[str, bytes]) -> int:
    codes = []

    def work() -> None:
        same = all_bits() == expected
        codes.append(fork(lambda: all_bits() == expected) if same else 3)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return codes[0]


def in_threads_of_the_child(expected: dict[str, bytes]) -> int:
    def child() -> bool:
        found: list[dict[str, bytes]] = []
        threads = [threading.Thread(target=lambda: found.append(all_bits())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found == [expected] * 3

    return fork(child)


@contextlib.contextmanager
def solving_threads() -> Iterator[None]:
    """Two threads solve, so that their locks may be held when this one forks.

    They live longer than all children: a thread that has used MKL takes a lock of MKL's as it ends, which no one can
    release in a child that is forked at that moment.
    """
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            for name in ("two threads' work", "one long item", "dense plans"):
                CALLS[name]()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


CASES: dict[str, Callable[[dict[str, bytes]], int]] = {
    "one thread": one_thread,
    "two threads": two_threads,
    "more threads in the child": more_threads_in_the_child,
    "after threads of torch": after_threads_of_torch,
    "a grandchild": grandchild,
    "from another thread": from_another_thread,
    "in threads of the child": in_threads_of_the_child,
    "while others solve": two_threads,
}


def main(times: int, cases: list[str]) -> None:
    expected = all_bits()
    found = {}
    for case in cases or CASES:
        torch.set_num_threads(2)
        with solving_threads() if case == "while others solve" else contextlib.nullcontext():
            codes = [CASES[case](expected) for _ in range(times)]
        found[case] = {"codes": codes, "parent": all_bits() == expected}
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
