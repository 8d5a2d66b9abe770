"""`interrupted_anywhere.py NAME MOMENTS THREADS` makes one of the `CALLS` again and again, and gets SIGINT in the middle.

The signal comes at MOMENTS moments spread over the duration of the call. Prints as JSON how many calls it ended, the
longest time from the signal to the exception, whether the engine works after each, and how much memory was lost.
"""

import gc
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

MESSAGE = struct.Struct("dd")  # when the signal was sent: on the clock, and in processor time of the program
OPTIONS: dict[str, Any] = {"backend": "cpu"}


class Sender:
    """A process that sends this one SIGINT. A thread would wait for the interpreter's lock, and hide how long it is held."""

    def __init__(self) -> None:
        to_child, self.write = os.pipe()
        self.read, from_child = os.pipe()
        program = os.getpid()
        self.pid = os.fork()
        if self.pid:
            os.close(to_child)
            os.close(from_child)
            return
        os.close(self.write)
        os.close(self.read)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        processor = (~program << 3) | 2  # Linux's clock of another process's processor time
        while message := os.read(to_child, 8):
            time.sleep(max(0.0, struct.unpack("d", message)[0] - time.monotonic()))
            sent = MESSAGE.pack(time.monotonic(), time.clock_gettime(processor))
            os.kill(program, signal.SIGINT)
            os.write(from_child, sent)
        os._exit(0)

    def order(self, when: float) -> None:
        os.write(self.write, struct.pack("d", when))

    def sent(self) -> tuple[float, float]:
        return MESSAGE.unpack(os.read(self.read, MESSAGE.size))

    def end(self) -> None:
        os.close(self.write)
        os.waitpid(self.pid, 0)


class Interrupted(NamedTuple):
    """Seconds from the signal to the exception: on the clock, and of this process on any processor."""

    wall: float
    processor: float


def interrupt(sender: Sender, call: Callable[[], Any], after: float) -> Interrupted | None:
    """None if the call was over before the signal came."""
    finished, at = False, (0.0, 0.0)
    try:
        sender.order(time.monotonic() + after)
        call()
        finished = True
        time.sleep(60)
    except KeyboardInterrupt:
        at = time.monotonic(), time.process_time()
    sent = sender.sent()
    return None if finished else Interrupted(at[0] - sent[0], at[1] - sent[1])


def resident() -> float:
    """Megabytes."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def calls() -> dict[str, Callable[[], Callable[[], Any]]]:
    import torch

    import otalign

    def solve_cost(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], Any]:
        C = torch.rand(shape, dtype=dtype)
        return lambda: otalign.solve_cost(C, **options, **OPTIONS).value

    def two_items(bad: int) -> Callable[[], Any]:
        """A long item, and one that is done at once: its cost is NaN."""
        C = torch.rand(2, 1500, 1500)
        C[bad, 0, 0] = torch.nan
        lengths = torch.tensor([1500, 1499])
        return lambda: otalign.solve_cost(C, lengths, reg=0.01, tol=0, max_iter=3000, **OPTIONS).n_iter

    def unsolvable(size: int) -> Callable[[], Any]:
        C = torch.rand(1, size, size)
        C[0, -1, -1] = torch.nan
        return lambda: otalign.solve_cost(C, reg=0.1, **OPTIONS).n_iter

    def loss(shape: tuple[int, int, int], offset: float = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        x, y = (offset + torch.randn(shape, dtype=dtype) for _ in "xy")
        return lambda: otalign.sinkhorn_loss(x, y, **options, **OPTIONS)

    def backward(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], Any]:
        x, y = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in "xy")
        value = otalign.sinkhorn_loss(x, y, **options, **OPTIONS)
        return lambda: torch.stack([g.double().sum() for g in torch.autograd.grad(value, (x, y), retain_graph=True)])

    def step(shape: tuple[int, int, int], **options: Any) -> Callable[[], Any]:
        x, y = (torch.randn(shape, requires_grad=True) for _ in "xy")

        def forward_and_backward() -> Any:
            value = otalign.sinkhorn_loss(x, y, **options, **OPTIONS)
            return torch.stack([g.sum() for g in torch.autograd.grad(value, (x, y))])

        return forward_and_backward

    def gradient_by_cost(shape: tuple[int, ...]) -> Callable[[], Any]:
        C = torch.rand(shape, requires_grad=True)
        value = otalign.solve_cost(C, reg=0.1, tol=0, max_iter=5, **OPTIONS).value_linear.sum()
        return lambda: torch.autograd.grad(value, C, retain_graph=True)[0].sum()

    def plan(shape: tuple[int, ...], back: bool) -> Callable[[], Any]:
        # Torch sums the gradient of what it has expanded, and does not look for signals meanwhile.
        C = torch.rand(shape, requires_grad=True) if back else torch.rand(shape[1:]).expand(shape)
        result = otalign.solve_cost(C, reg=0.5, tol=0, max_iter=1, **OPTIONS)
        plan, weights = result.plan(), torch.ones(()).expand(shape)
        if not back:
            return lambda: result.plan().view(-1)[::1001].sum()
        return lambda: torch.autograd.grad(plan, C, weights, retain_graph=True)[0].sum()

    def strided() -> Callable[[], Any]:
        x, y = (torch.randn(2, 1500, 2 * 12_000).bfloat16()[..., :12_000] for _ in "xy")
        return lambda: otalign.sinkhorn_loss(x, y, max_iter=1, **OPTIONS)

    long = {"tol": 0, "max_iter": 3000}
    return {
        "one long item": lambda: solve_cost((1, 2000, 2000), reg=0.02, **long),
        "one long item, float64": lambda: solve_cost((1, 2000, 1500), torch.float64, reg=0.02, **long),
        "one long item in the log domain": lambda: solve_cost((1, 1500, 1500), reg=1e-5, tol=0, max_iter=600),
        "one huge item": lambda: solve_cost((1, 20_000, 20_000), reg=0.1, tol=0, max_iter=3),
        "one huge item in the log domain": lambda: solve_cost((1, 12_000, 12_000), reg=1e-5, tol=0, max_iter=3),
        "one huge item without a solution": lambda: unsolvable(20_000),
        "the other thread has the only long item": lambda: two_items(bad=0),
        "the other thread has the only long item, the first": lambda: two_items(bad=1),
        "many items": lambda: solve_cost((400, 60, 60), reg=0.01, tol=0, max_iter=5000),
        "many small items": lambda: solve_cost((40_000, 6, 5), reg=0.05, tol=0, max_iter=400),
        "acceleration": lambda: solve_cost((1, 2500, 2000), reg=2e-4, max_iter=4000, accelerate=True, tol=1e-6),
        "acceleration of many items": lambda: solve_cost((200, 200, 180), reg=2e-4, max_iter=4000, tol=1e-6, accelerate=True),
        "products": lambda: loss((1, 3000, 12_000), max_iter=1, tol=0),
        "products, small": lambda: loss((1, 600, 12_000), max_iter=1, tol=0),
        "products, float64": lambda: loss((1, 2000, 12_000), dtype=torch.float64, max_iter=1, tol=0),
        "products of strided bfloat16": strided,
        "euclidean": lambda: loss((4, 1500, 512), cost="euclidean", tol=0, max_iter=300),
        "euclidean, points far from the origin": lambda: loss((1, 2000, 2000), 1e3, cost="euclidean", max_iter=1, tol=0),
        "euclidean, points very far": lambda: loss((1, 1000, 600), 1e18, cost="euclidean", max_iter=1, tol=0),
        "gradients by points": lambda: backward((1, 2000, 6000), max_iter=1),
        "gradients by points, small": lambda: backward((1, 600, 6000), max_iter=1),
        "gradients by points, float64": lambda: backward((1, 1500, 6000), torch.float64, max_iter=1),
        "gradients by many points": lambda: backward((300, 300, 512), max_iter=1),
        "the implicit system": lambda: backward((1, 1200, 8), objective="transport", reg=0.002, max_iter=30),
        "gradient by a cost": lambda: gradient_by_cost((100, 1500, 1500)),
        "divergence, there and back": lambda: step((8, 400, 64), objective="divergence", tol=0, max_iter=3000),
        "transport, there and back": lambda: step((8, 400, 64), objective="transport", reg=0.02, tol=0, max_iter=3000),
        "unpacked plans": lambda: plan((300, 1500, 1500), back=False),
        "packed gradients of plans": lambda: plan((80, 1500, 1500), back=True),
    }  # fmt: skip


def main(name: str, moments: int, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they start in the background
    sender = Sender()
    import torch

    import otalign

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    small = torch.randn(3, 70, 16, requires_grad=True)

    def check() -> torch.Tensor:
        value = otalign.sinkhorn_loss(small, small[:, :50] + 1, objective="transport", **OPTIONS)
        return torch.cat([value.view(1), torch.autograd.grad(value, small)[0].flatten()]).detach()

    right = check()
    call = calls()[name]()
    expected = call()
    durations = []
    for _ in range(2):
        begin = time.monotonic()
        call()
        durations.append(time.monotonic() - begin)
    duration = min(durations)
    found, works, sizes = [], True, []
    for moment in range(moments):
        found.append(interrupt(sender, call, moment * duration / moments))
        works = works and torch.equal(check(), right)
        sizes.append(resident())
    again = call()
    sender.end()
    stopped = [one for one in found if one is not None]
    print(
        json.dumps(
            {
                "call": name,
                "threads": threads,
                "seconds": round(duration, 2),
                "moments": moments,
                "interrupted": len(stopped),
                "wall": round(max((one.wall for one in stopped), default=0), 3),
                # A process that is not running cannot answer.
                "bound": round(max((min(one) for one in stopped), default=0), 3),
                "works": works,
                "same": torch.equal(again, expected),
                "grown": round(max(sizes[-3:]) - max(sizes[: max(1, moments // 2)])),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
