"""`large_sizes.py CASE`: calls with more than 2^31 numbers in memory.

Prints as JSON how many numbers, and the largest error in units of its tolerance against a computation in float64, part by
part, or 0 or 1 for equal or other bits.
"""

import json
import sys

import torch

import otalign

ROWS = 256  # of a part


def one_item() -> tuple[int, float]:
    """The value and the gradients of one item against its potentials, and these against a sweep of the reference."""
    n, m, reg = 65_537, 32_769, 0.5
    x, y = torch.rand(1, n, 4, requires_grad=True), torch.rand(1, m, 4, requires_grad=True)
    result = otalign.solve(x, y, cost="sqeuclidean", reg=reg, tol=0, max_iter=2, backend="cpu")
    dx, dy = torch.autograd.grad(result.value.sum(), (x, y))
    f, g = (potential[0].detach().double() for potential in result.potentials)
    points, others = x.detach()[0].double(), y.detach()[0].double()
    rows, columns, linear = [], torch.zeros(m, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    true_x, true_y = torch.empty_like(points), torch.zeros_like(others)
    for begin in range(0, n, ROWS):
        part = points[begin : begin + ROWS]
        C = torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist").square_()
        P = ((f[begin : begin + ROWS, None] + g - C) / reg).exp_() / (n * m)
        rows.append(P.sum(1))
        columns += P.sum(0)
        linear += (P * C).sum()
        true_x[begin : begin + ROWS] = 2 * (part * P.sum(1, keepdim=True) - P @ others)
        true_y -= 2 * (P.T @ part)
    true_y += 2 * others * columns[:, None]
    row_sums = torch.cat(rows)
    value = f.mean() + g.mean() + reg * (1 - row_sums.sum())
    errors = [
        (result.value[0].double() - value) / value,
        (result.value_linear[0].double() - linear) / linear,
        (dx[0].double() - true_x).abs().max() / true_x.abs().max(),
        (dy[0].double() - true_y).abs().max() / true_y.abs().max(),
        # After a sweep the marginals of one side are exact, and two sweeps of smooth costs bring the other close.
        min((n * row_sums - 1).abs().max(), (m * columns - 1).abs().max()),
        (row_sums.sum() - 1).abs(),
    ]
    return n * m, max(abs(float(error)) for error in errors) / 1e-4


def many_items() -> tuple[int, float]:
    """The first and the last items of a batch against the same items alone."""
    items, n, m = 2200, 1000, 1000
    x, y = torch.randn(items, n, 3, requires_grad=True), torch.randn(items, m, 3, requires_grad=True)

    def solve(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        value = otalign.solve(x, y, reg=0.3, tol=0, max_iter=2, backend="cpu").value_linear
        return [value.detach(), *torch.autograd.grad(value.sum(), (x, y))]

    found = solve(x, y)
    same = True
    for place in (slice(0, 2), slice(2140, 2155), slice(items - 2, items)):
        alone = solve(*(t.detach()[place].requires_grad_() for t in (x, y)))
        same = same and all(torch.equal(a[place], b) for a, b in zip(found, alone, strict=True))
    return items * n * m, float(not same)


def dense_plans() -> tuple[int, float]:
    """Small plans in a large padding, and the gradient through them."""
    items, size, n = 3, 27_000, 40
    C = torch.rand(items, n, n, requires_grad=True)
    lengths = torch.full((items,), n)
    padded = torch.nn.functional.pad(C, (0, 1, 0, 1))  # its own padding is small
    small = otalign.solve_cost(padded, lengths, lengths, reg=0.1, backend="cpu")
    expected = small.plan()[:, :n, :n]
    plan = torch.ops.otalign.pack(expected.contiguous(), lengths, lengths, items * (n * n + 16))
    dense = torch.ops.otalign.unpack(plan, lengths, lengths, size, size)
    same = torch.equal(dense[:, :n, :n], expected)
    for item in dense:
        same = same and item.count_nonzero() == n * n
    again = torch.ops.otalign.pack(dense, lengths, lengths, plan.numel())
    return dense.numel(), float(not (same and torch.equal(plan, again)))


CASES = {
    "one item": one_item,
    "many items": many_items,
    "dense plans": dense_plans,
}


def main(case: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad() if case == "dense plans" else torch.enable_grad():
        elements, worst = CASES[case]()
    print(json.dumps({"case": case, "elements": elements, "worst": worst}))


if __name__ == "__main__":
    main(sys.argv[1])
