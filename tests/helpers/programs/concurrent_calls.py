"""`concurrent_calls.py THREADS TIMES [meanwhile]`: 16 Python threads make the calls of fault_problems at the same time.

With `meanwhile`, all of them and one more thread set torch's number of threads between their calls. Prints as JSON how
many calls there were, how many gave other bits than alone, and the numbers of threads of torch and of MKL before the last
number was set, and after.
"""

import json
import re
import sys
import threading
import time
from typing import Any

import torch
from fault_problems import problems

PYTHON_THREADS = 16


def of_mkl() -> int:
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1]) if found else 0


def main(threads: int, times: int, meanwhile: bool) -> None:
    torch.set_num_threads(threads)
    calls = [problems(seed) for seed in range(PYTHON_THREADS)]
    expected = [{name: call() for name, call in mine.items()} for mine in calls]
    made, others, errors = [0] * PYTHON_THREADS, [0] * PYTHON_THREADS, []
    stop = threading.Event()

    def work(index: int) -> None:
        torch.set_num_threads(threads)
        names = list(calls[index])
        try:
            for step in range(times * len(names)):
                if meanwhile:
                    torch.set_num_threads(1 + (step + index) % 4)
                name = names[(step + index) % len(names)]
                others[index] += calls[index][name]() != expected[index][name]
                made[index] += 1
        except Exception as error:
            errors.append(repr(error))

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            torch.set_num_threads(1 + number % 4)
            time.sleep(0.0002)

    pool = [threading.Thread(target=work, args=(index,)) for index in range(PYTHON_THREADS)]
    changer = threading.Thread(target=change)
    for thread in [*pool, *[changer] * meanwhile]:
        thread.start()
    for thread in pool:
        thread.join()
    stop.set()
    if meanwhile:
        changer.join()
    torch.set_num_threads(3)
    found: dict[str, Any] = {"calls": sum(made), "other bits": sum(others), "errors": errors[:3]}
    found["threads set"] = torch.get_num_threads(), of_mkl()
    for index in range(4):
        for call in calls[index].values():
            call()
    found["threads after"] = torch.get_num_threads(), of_mkl()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), "meanwhile" in sys.argv)
