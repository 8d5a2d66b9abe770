"""Threads share the rows of a long item: are its results right, and the same for any number of threads and in any batch?"""

import math

import pytest
import torch

import otalign

from ..helpers.problems import draw, draw_cost, draw_weights, identical, leaf

pytestmark = pytest.mark.unpoisoned

# Two long items of unequal length whose rows do not fill vectors, one that is too short for sharing, and an empty one.
LENGTHS = [700, 60, 400, 0], [121, 33, 170, 5]
THREADS = (1, 2, 3, 5)

CASES = {
    "strict": {"reg": 0.05},
    "plain iterations": {"reg": 0.05, "accelerate": False},
    "a fixed number": {"reg": 0.05, "tol": 0, "max_iter": 20},
    "no convergence": {"reg": 0.05, "tol": 1e-9, "max_iter": 3},
    "levels of reg": {"reg": 5e-4, "tol": 1e-4, "max_iter": 1000},
    "one relaxed": {"reg": 0.05, "unbalanced": (1.0, None)},
    "both relaxed": {"reg": 0.05, "unbalanced": (1.0, 0.3)},
    "both relaxed, plain": {"reg": 0.01, "unbalanced": 0.2, "accelerate": False},
    "prior": {"reg": 0.05, "prior": otalign.Prior.quadratic(1.0)},
    "band": {"reg": 0.05, "prior": otalign.Prior.band(40)},
    "exact passes": {"reg": 1e-4, "tol": 0, "max_iter": 12, "accelerate": False},
    "relaxed exact passes": {"reg": 1e-4, "tol": 0, "max_iter": 12, "unbalanced": 0.01, "accelerate": False},
}


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def results(batch, *, objective="transport", **options):
    """Losses, both gradients, plans, numbers of iterations and errors."""
    leaves = leaf(batch.x), leaf(batch.y)
    loss = otalign.sinkhorn_loss(*leaves, *batch[2:], objective=objective, reduction="none", backend="cpu", **options)
    loss.sum().backward()
    result = otalign.solve(*batch, backend="cpu", **options)
    return loss.detach(), leaves[0].grad, leaves[1].grad, result.plan(), result.n_iter, result.error


def check_bits(batch, **options):
    torch.set_num_threads(1)
    expected = results(batch, **options)
    for threads in THREADS[1:]:
        torch.set_num_threads(threads)
        for ours, theirs in zip(results(batch, **options), expected, strict=True):
            identical(ours, theirs)
    return expected


@pytest.mark.filterwarnings("ignore::otalign.ConvergenceWarning")
@pytest.mark.parametrize("weights", [False, True], ids=["uniform", "weights of zero"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_any_number_of_threads_alone_and_in_a_batch(dtype, case, weights):
    batch = draw(*LENGTHS, D=16, dtype=dtype)
    options = dict(CASES[case])
    if weights:
        sides = zip("ab", batch[:2], batch[2:], strict=True)
        # Whole numbers have the same sum in any order, so that torch makes the same weights of them for an item alone.
        options |= {name: (64 * draw_weights(n, h.shape[1], zeros=True)).round().to(dtype) for name, h, n in sides}
    expected = check_bits(batch, **options)
    for index in (0, 2):
        x, y = list(batch.items())[index]
        n, m = len(x), len(y)
        own = {"a": options["a"][[index], :n], "b": options["b"][[index], :m]} if weights else {}
        alone = results(type(batch)(x[None], y[None], torch.tensor([n]), torch.tensor([m])), **(options | own))
        loss, dx, dy, plan, n_iter, error = (part[[index]] for part in expected)
        for ours, theirs in zip(alone, (loss, dx[:, :n], dy[:, :m], plan[:, :n, :m], n_iter, error), strict=True):
            identical(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_a_divergence(dtype):
    """Both sides of its problems of one side are the same points: their updates are averaged."""
    batch = draw([300, 40], [280, 20], D=16, dtype=dtype)
    for options in ({"reg": 0.05}, {"reg": 1e-3, "max_iter": 15, "tol": 0}):
        check_bits(batch, objective="divergence", **options)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_a_given_cost(dtype, strided):
    """The given cost of a long item is read by several threads, too; some of it is infinite."""
    C, n, m = draw_cost([700, 300, 60], [121, 260, 40], dtype=dtype)
    C[:, 5:50, 3] = math.inf
    C[0, 333, :] = math.inf
    if strided:
        C = C.mT.contiguous().mT
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        result = otalign.solve_cost(C, n, m, reg=0.1, unbalanced=1.0, backend="cpu")
        found.append((result.plan(), *result.potentials, result.value, result.n_iter))
    for others in found[1:]:
        for ours, theirs in zip(others, found[0], strict=True):
            identical(ours, theirs)


def test_nan_in_one_row_of_a_given_cost():
    """Whichever thread reads it: all of the item is NaN, and no other."""
    C, n, m = draw_cost([700, 300], [121, 260])
    C[0, 600, 7] = math.nan
    for threads in (1, 3):
        torch.set_num_threads(threads)
        value = otalign.solve_cost(C, n, m, reg=0.1, backend="cpu").value
        assert value.isnan().tolist() == [True, False]


@pytest.mark.filterwarnings("ignore::otalign.ConvergenceWarning")
@pytest.mark.parametrize(
    "case", ["strict", "plain iterations", "both relaxed", "band", "exact passes", "relaxed exact passes"]
)
def test_long_items_agree_with_the_reference(case):
    batch = draw([300, 20], [257, 10], D=8)
    options = CASES[case] | {"max_iter": 40, "tol": 0}  # without a tolerance both make the same iterations
    torch.set_num_threads(3)
    ours, theirs = (otalign.solve(*batch, backend=backend, **options) for backend in ("cpu", "reference"))
    torch.testing.assert_close(ours.plan(), theirs.plan(), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.value, theirs.value, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::otalign.ConvergenceWarning")
@pytest.mark.parametrize("where", [slice(0, 9), slice(150, 160), slice(291, 300)])
@pytest.mark.parametrize("unbalanced", [None, 5.0])
@pytest.mark.parametrize("accelerate", [False, True])
def test_a_few_rows_that_floats_cannot_hold(accelerate, unbalanced, where):
    """What one thread finds in its rows, the others have to heed."""
    C, _, _ = draw_cost([300], [257])
    C[:, where] *= 400
    C[:, where, ::7] -= 100
    torch.set_num_threads(2)
    options = {"reg": 0.5, "unbalanced": unbalanced, "tol": 1e-10, "max_iter": 500}
    ours = otalign.solve_cost(C, backend="cpu", accelerate=accelerate, **options)
    theirs = otalign.solve_cost(C, backend="reference", **options)
    assert ours.converged.all() and theirs.converged.all()
    torch.testing.assert_close(ours.plan(), theirs.plan(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.value, theirs.value, rtol=1e-7, atol=1e-7)
