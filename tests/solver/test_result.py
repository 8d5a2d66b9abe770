"""Methods of a result: sums under its plan without storing the plan, and the same after saving and loading."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import otalign
from otalign import Prior

from ..helpers.problems import close, draw, draw_weights, identical, leaf
from ..helpers.refusals import check, rejected

BATCH = draw((7, 1, 5, 0), (4, 3, 6, 2), dtype=torch.float32)
OPTIONS = {"prior": Prior.quadratic(1.0), "unbalanced": (None, 0.5), "reg": 0.1}
ARGUMENTS = BATCH.x, BATCH.y, BATCH.x_lengths, BATCH.y_lengths
VALUES_X = draw(BATCH.x_lengths.tolist(), [1] * 4, D=3, dtype=torch.float32, seed=5).x
VALUES_Y = draw(BATCH.y_lengths.tolist(), [1] * 4, D=3, dtype=torch.float32, seed=6).x
A = draw_weights(BATCH.x_lengths, BATCH.x.shape[1], zeros=True).float()
A[3] = 1


def solve(backend, **options):
    return otalign.solve(*ARGUMENTS, A, **OPTIONS, backend=backend, **options)


def test_apply_is_the_product_with_the_plan(backend):
    result = solve(backend)
    plan = result.plan()
    close(result.apply(VALUES_Y), plan @ VALUES_Y.nan_to_num(), 1e-6)
    close(result.apply(VALUES_X, to="y"), plan.mT @ VALUES_X.nan_to_num(), 1e-6)
    close(result.apply(VALUES_Y[..., 0]), (plan @ VALUES_Y.nan_to_num())[..., 0], 1e-6)
    close(result.marginal_x(), plan.sum(2), 1e-6)
    close(result.marginal_y(), plan.sum(1), 1e-6)


def test_apply_to_a_given_cost(backend):
    C = torch.cdist(BATCH.x.nan_to_num(), BATCH.y.nan_to_num())
    result = otalign.solve_cost(C, *ARGUMENTS[2:], A, **OPTIONS, backend=backend)
    close(result.apply(VALUES_Y), result.plan() @ VALUES_Y.nan_to_num(), 1e-6)
    close(result.apply(VALUES_X.double(), to="y"), result.plan().mT @ VALUES_X.nan_to_num(), 1e-6)
    close(result.marginal_x(), result.plan().sum(2), 1e-6)


def pack(values, lengths):
    return torch.cat([row[:n] for row, n in zip(values, lengths.tolist(), strict=True)])


def test_apply_packed(backend):
    padded = otalign.solve(*ARGUMENTS, **OPTIONS, backend=backend)
    packed = otalign.solve(**BATCH.packed(), **OPTIONS, backend=backend)
    values_x, values_y = pack(VALUES_X, BATCH.x_lengths), pack(VALUES_Y, BATCH.y_lengths)
    close(packed.apply(values_y), pack(padded.apply(VALUES_Y), BATCH.x_lengths), 1e-5)
    close(packed.apply(values_x, to="y"), pack(padded.apply(VALUES_X, to="y"), BATCH.y_lengths), 1e-5)
    close(packed.apply(values_x[:, 1], to="y"), pack(padded.apply(VALUES_X, to="y"), BATCH.y_lengths)[:, 1], 1e-5)
    close(packed.marginal_x(), pack(padded.marginal_x(), BATCH.x_lengths), 1e-5)
    close(packed.marginal_y(), pack(padded.marginal_y(), BATCH.y_lengths), 1e-5)


@pytest.mark.parametrize("to", ["x", "y"])
def test_gradients_of_apply(backend, to):
    """The gradients by the points, through the plan, and by the values are those of the product with the plan."""
    values = VALUES_Y if to == "x" else VALUES_X
    found, expected = [], []
    for gradients in (found, expected):
        x, own = leaf(BATCH.x), leaf(values.nan_to_num())
        result = otalign.solve(x, *ARGUMENTS[1:], A, **OPTIONS, backend=backend)
        if gradients is found:
            image = result.apply(own, to=to)
        else:
            image = (result.plan() if to == "x" else result.plan().mT) @ own
        image.square().sum().backward()
        gradients += [x.grad, own.grad]
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, 1e-5)


def test_gradient_of_a_marginal(backend):
    """Strict marginals are constant. Relaxed ones have the gradient of finite differences."""
    batch = draw((4,), (3,), seed=3)
    x, y = batch.x[:, :4], batch.y[:, :3]
    options = {"reg": 0.5, "unbalanced": (None, 0.7), "tol": 1e-12, "max_iter": 10_000, "backend": backend}
    weights = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    moved = leaf(x)
    (otalign.solve(moved, y, **options).marginal_y() * weights).sum().backward()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    ends = [(otalign.solve(x + s * 1e-5 * direction, y, **options).marginal_y() * weights).sum() for s in (1, -1)]
    slope = (ends[0] - ends[1]) / 2e-5
    assert abs(float(slope)) > 1e-4
    close((moved.grad * direction).sum(), slope, 1e-6)
    strict = leaf(x)
    otalign.solve(strict, y, **options).marginal_x().square().sum().backward()
    close(strict.grad, torch.zeros_like(x), 1e-8)


def test_apply_on_a_gpu_stores_no_plan(monkeypatch):
    """Without gradients, the GPU kernel for barycentric images averages the values instead of the points."""
    result = otalign.solve(*ARGUMENTS, A, **OPTIONS, backend="triton")
    expected = result.plan() @ VALUES_Y.nan_to_num()

    def built(self):
        raise AssertionError("the plan was built")

    monkeypatch.setattr(otalign.OTResult, "plan", built)
    close(result.apply(VALUES_Y), expected, 1e-6)
    with pytest.raises(AssertionError, match="was built"):
        result.apply(VALUES_Y.nan_to_num().requires_grad_())


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        rejected(ValueError, "values:", "(4, 8)", "(4, 9, 3)", values=VALUES_X),
        rejected(ValueError, "values:", "(4, 8)", "(4, 8, 3, 1)", values=VALUES_Y[..., None]),
        rejected(TypeError, "values:", "float", "torch.bool", values=VALUES_Y.bool()),
        rejected(TypeError, "values:", "Tensor", "list", values=[[1.0]]),
        rejected(ValueError, "values:", "cpu", "meta", values=VALUES_Y.to("meta")),
        rejected(ValueError, "to:", "'x'", "'z'", values=VALUES_Y, to="z"),
    ],
)
def test_invalid_values_are_refused(error, words, arguments):
    check(solve("cpu").apply, error, words, arguments)


def saved_and_loaded(result):
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "torch.save": saved_and_loaded,
    "pickle": lambda result: pickle.loads(pickle.dumps(result)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_result_is_unchanged_after_saving(backend, way, packed):
    """A loaded result is detached, and still computes its plan, which not every way of saving stores."""
    if packed:
        arguments = BATCH.packed()
        arguments["x"] = leaf(arguments["x"])
        result = otalign.solve(**arguments, **OPTIONS, backend=backend)
    else:
        result = otalign.solve(leaf(BATCH.x), *ARGUMENTS[1:], leaf(A), **OPTIONS, backend=backend)
    other = way(result)
    assert type(other) is otalign.OTResult
    for name in ("value", "value_linear", "n_iter", "error", "converged"):
        identical(getattr(other, name), getattr(result, name))
        assert not getattr(other, name).requires_grad
    for ours, theirs in zip(other.potentials, result.potentials, strict=True):
        identical(ours, theirs)
    for method in ("plan", "barycentric_x", "barycentric_y", "assign_y", "marginal_x", "marginal_y"):
        found = getattr(other, method)()
        assert not found.requires_grad
        close(found, getattr(result, method)(), 1e-6)
    assert result.value.requires_grad  # saving does not change the result
    result.plan().square().sum().backward()


def test_a_given_costs_result_is_saved(backend):
    C = torch.rand(2, 5, 4, requires_grad=True)
    result = otalign.solve_cost(
        C, reg=torch.tensor([0.1, 0.2]), init=(torch.zeros(2, 5), torch.zeros(2, 4)), backend=backend
    )
    close(saved_and_loaded(result).plan(), result.plan(), 1e-6)
    with pytest.raises(RuntimeError, match="need the points"):
        saved_and_loaded(result).barycentric_x()


# A relaxation for each item -------------------------------------------------------------------------------------------

RHO = torch.tensor([0.2, 1.5, float("inf"), 0.2])
OWN = {"both": RHO, "x": (RHO, None), "y": (None, RHO), "each": (RHO, RHO.flip(0)), "one": (0.7, RHO)}


def alone(unbalanced, item):
    pick = [u if u is None or isinstance(u, float) else float(u[item]) for u in unbalanced]
    return (pick[0], pick[1])


@pytest.mark.parametrize("unbalanced", OWN.values(), ids=OWN)
@pytest.mark.parametrize("objective", ["value", "transport", "plan_cost", "divergence"])
def test_loss_with_a_relaxation_for_each_item(backend, unbalanced, objective):
    """Loss and gradients equal those of the single items."""
    options = {
        "objective": objective,
        "reduction": "none",
        "backend": backend,
        "reg": torch.tensor([0.1, 0.2, 0.3, 0.4]),
    }
    x, a = leaf(BATCH.x), leaf(A)
    found = otalign.sinkhorn_loss(x, *ARGUMENTS[1:], a, unbalanced=unbalanced, **options)
    found.sum().backward()
    pair = unbalanced if isinstance(unbalanced, tuple) else (unbalanced, unbalanced)
    for item in range(4):
        own_x, own_a, one = leaf(BATCH.x[item : item + 1]), leaf(A[item : item + 1]), slice(item, item + 1)
        rest = BATCH.y[one], BATCH.x_lengths[one], BATCH.y_lengths[one]
        expected = otalign.sinkhorn_loss(
            own_x, *rest, own_a, unbalanced=alone(pair, item), **options | {"reg": options["reg"][one]}
        )
        expected.sum().backward()
        close(found[one], expected, 1e-6)
        close(x.grad[one], own_x.grad, 1e-6)
        if objective != "plan_cost":
            close(a.grad[one], own_a.grad, 1e-6)


def test_result_with_a_relaxation_for_each_item(backend):
    padded = otalign.solve(*ARGUMENTS, unbalanced=(None, RHO), backend=backend)
    packed = saved_and_loaded(otalign.solve(**BATCH.packed(), unbalanced=(None, RHO), backend=backend))
    for item in range(4):
        one = slice(item, item + 1)
        arguments = (t[one] for t in ARGUMENTS)
        expected = otalign.solve(*arguments, unbalanced=(None, float(RHO[item])), backend=backend)
        close(padded.plan()[one], expected.plan(), 1e-6)
        close(padded.potentials[1][one], expected.potentials[1], 1e-6)
        identical(padded.n_iter[one], expected.n_iter)
    close(packed.barycentric_x(), pack(padded.barycentric_x(), BATCH.x_lengths), 1e-5)
    close(packed.potentials[0], pack(padded.potentials[0], BATCH.x_lengths), 1e-5)
    identical(packed.assign_y(), pack(padded.assign_y(), BATCH.y_lengths))
    again = otalign.solve(*ARGUMENTS, unbalanced=(None, RHO), init=padded.potentials, backend=backend)
    assert bool((again.n_iter <= 2).all())
    cost = otalign.solve_cost(
        1 - BATCH.x.nan_to_num() @ BATCH.y.nan_to_num().mT, reg=0.1, unbalanced=RHO, backend=backend
    )
    assert cost.plan().shape == (4, 9, 8)


def test_a_relaxation_for_each_of_no_items(backend):
    assert otalign.sinkhorn_loss(BATCH.x[:0], BATCH.y[:0], unbalanced=RHO[:0], backend=backend) == 0


def test_a_relaxation_for_each_item_of_a_module():
    criterion = otalign.SinkhornLoss(unbalanced=(None, RHO))
    identical(criterion(*ARGUMENTS), otalign.sinkhorn_loss(*ARGUMENTS, unbalanced=(None, RHO)))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="unbalanced: expected numbers"):
        compiled(*ARGUMENTS)
