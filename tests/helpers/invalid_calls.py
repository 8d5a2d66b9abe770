"""Calls otalign's operators with inconsistent arguments: an error is right, a crash is not.

`python -m tests.helpers.invalid_calls cpu 300 0` makes 300 such calls on the backend "cpu" with the seed 0, and prints how many
raised an error.
"""

import random
import sys

import torch

from .operators import RUNS, calls_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool)


def invalid_value(argument, draw):
    """Another value for an argument, of a kind that a caller could pass."""
    if isinstance(argument, torch.Tensor):
        return invalid_tensor(argument, draw)
    if isinstance(argument, bool):
        return not argument
    if argument in (20, 200):  # max_iter: more than 1000 would only take longer
        return draw.choice([-1, 0, 1, 1000])
    if isinstance(argument, int):
        return draw.choice([-1, 0, 1, argument + 1, argument - 1, 3 * argument, 1000, 2**20, 2**62])
    if isinstance(argument, float):
        return draw.choice([-1.0, 0.0, 1e300, float("nan"), float("inf")])
    if isinstance(argument, str):
        return draw.choice(["given", "dot", "euclidean", "cosine", "band", "none", "triton", "what?"])
    if isinstance(argument, torch.dtype):
        return draw.choice(DTYPES)
    if isinstance(argument, list) and argument and isinstance(argument[0], bool):
        return draw.choice([[True] * 5, [False] * 5, [True] * 4, [not want for want in argument]])
    return draw.choice([None, argument])


def invalid_tensor(tensor, draw):
    tensor = tensor.detach()
    if not tensor.is_floating_point() and draw.random() < 0.5:
        value = draw.choice([-1, 1, 7, 50, 100_000, 2**31, 2**40, 2**62, -(2**62)])
        return tensor + value if draw.random() < 0.5 else torch.full_like(tensor, value)
    how = draw.randrange(9)
    if how == 0:
        return None
    if how == 1:
        return tensor.to(draw.choice(DTYPES))
    if how == 2:
        return tensor.new_empty(draw.choice([(0,), (1,), (3, 2), ()]))
    if tensor.dim() == 0:
        return tensor.expand(4)
    if how == 3:
        return tensor[: len(tensor) // 2]
    if how == 4:
        return torch.cat([tensor, tensor])
    if how == 5:
        return tensor[..., ::2] if tensor.shape[-1] > 1 else tensor[:0]
    if how == 6:
        return tensor[:1].expand(tensor.shape) if len(tensor) else tensor
    if how == 7:
        return tensor.transpose(0, -1)
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def main(backend, count, seed):
    draw, refused = random.Random(seed), 0
    torch.manual_seed(seed)
    calls = [call for run in RUNS for call in calls_of(lambda: run(backend))]  # noqa: B023
    for _ in range(count):
        operator, arguments, _ = draw.choice(calls)
        arguments = [argument.detach() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        for place in draw.sample(range(len(arguments)), draw.choice([1, 1, 1, 2, 3])):
            arguments[place] = invalid_value(arguments[place], draw)
        try:
            operator(*arguments)
        except Exception as error:
            refused += 1
            if isinstance(error, (AssertionError, KeyError, IndexError)):
                raise
    print(refused)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
