"""Does torch.compile compile the public functions without graph breaks, forward and backward, and without recompiling?"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import otalign
from otalign import Prior

from ..helpers.problems import close, draw, draw_weights, leaf, same_on

OBJECTIVES = ["value", "plan_cost", "transport", "divergence"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(function, batch, *weights):
    leaves = batch.requires_grad()
    loss = function(*leaves, *weights)
    loss.sum().backward()
    return loss.detach(), leaves.x.grad, leaves.y.grad


def check(function, batch, *weights, backend="aot_eager", dynamic=None):
    """Assert that `function` gives the same results compiled and eager."""
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    expected = loss_and_gradients(function, batch, *weights)
    for ours, theirs in zip(loss_and_gradients(compiled, batch, *weights), expected, strict=True):
        close(ours, theirs, 1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_objectives(objective, dynamic):
    def loss(x, y, x_lengths, y_lengths):
        return otalign.sinkhorn_loss(x, y, x_lengths, y_lengths, objective=objective, backend="cpu")

    check(loss, draw(poison=0.0, dtype=torch.float32), dynamic=dynamic)


OPTIONS = {
    "sqeuclidean": {"cost": "sqeuclidean"},
    "euclidean": {"cost": "euclidean"},
    "prior": {"prior": Prior.quadratic(1.0)},
    "band": {"prior": Prior.band(2.0)},
    "unbalanced": {"unbalanced": (0.5, 2.0)},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "norm": {"a": "norm", "b": "norm"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    def loss(x, y, x_lengths, y_lengths):
        return otalign.sinkhorn_loss(x, y, x_lengths, y_lengths, backend="cpu", **options)

    check(loss, draw(poison=0.0, dtype=torch.float32))


def test_weights_and_reg_as_tensors():
    batch = draw(poison=0.0)
    a = draw_weights(batch.x_lengths, batch.x.shape[1]).nan_to_num(0)
    reg = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def loss(x, y, x_lengths, y_lengths, a, reg):
        return otalign.sinkhorn_loss(x, y, x_lengths, y_lengths, a, reg=reg, backend="cpu")

    check(loss, batch, a, reg)


@pytest.mark.slow
def test_inductor():
    """The default backend of torch.compile, around a layer and through the module."""
    batch = draw(poison=0.0, dtype=torch.float32)
    layer, criterion = torch.nn.Linear(5, 5), otalign.SinkhornLoss(prior=Prior.quadratic(1.0), backend="cpu")

    def loss(x, y, x_lengths, y_lengths):
        return criterion(layer(x).relu(), y, x_lengths, y_lengths)

    check(loss, batch, backend="inductor")


def test_packed():
    arguments = draw(poison=0.0, dtype=torch.float32).packed()

    def loss(x, y, cu_seqlens_x, cu_seqlens_y):
        return otalign.sinkhorn_loss(x, y, cu_seqlens_x=cu_seqlens_x, cu_seqlens_y=cu_seqlens_y, backend="cpu")

    eager, compiled = (arguments | {side: leaf(arguments[side]) for side in "xy"} for _ in range(2))
    loss(**eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(**compiled).backward()
    for side in "xy":
        close(compiled[side].grad, eager[side].grad, 1e-6)


def test_result():
    """Everything that a result computes on demand, in one graph with the solve."""
    batch = draw(poison=0.0)

    def outputs(*batch):
        result = otalign.solve(*batch, backend="cpu")
        return (
            *(result.value, result.value_linear, result.error, result.n_iter, result.converged, result.plan()),
            *(result.barycentric_x(), result.barycentric_y(), result.assign_y(), *result.potentials),
        )

    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*batch), outputs(*batch), strict=True):
        assert ours.dtype == theirs.dtype
        close(ours.double(), theirs.double(), 1e-12)


def test_given_cost():
    def outputs(C, x_lengths, y_lengths):
        result = otalign.solve_cost(C, x_lengths, y_lengths, reg=0.1, backend="cpu")
        return result.value.sum() + result.plan().square().sum()

    C, lengths = torch.rand(2, 5, 4), (torch.tensor([5, 3]), torch.tensor([2, 4]))
    eager, compiled = leaf(C), leaf(C)
    outputs(eager, *lengths).backward()
    torch.compile(outputs, fullgraph=True, backend="aot_eager")(compiled, *lengths).backward()
    close(compiled.grad, eager.grad, 1e-6)


def test_new_lengths_do_not_compile_again():
    """Lengths are data. A change of shapes compiles at most once more, with symbolic shapes."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(x, y, x_lengths, y_lengths):
        return otalign.sinkhorn_loss(x, y, x_lengths, y_lengths, backend="cpu")

    for lengths in ([7, 2, 5, 9], [9, 9, 1, 2], [3, 3, 3, 9]):
        loss_and_gradients(loss, draw(lengths, [4, 3, 6, 2], poison=0.0))
    assert counter.frame_count == 1
    for lengths in ([11, 2], [4, 13, 6], [5, 5, 5, 21, 2], [8, 3, 2, 2, 2, 30]):
        batch = draw(lengths, [n // 2 + 2 for n in lengths], poison=0.0)
        compiled = loss_and_gradients(loss, batch)
        eager = otalign.sinkhorn_loss(*batch, backend="cpu")
        close(compiled[0], eager, 1e-12)
    assert counter.frame_count <= 3


def test_invalid_options_are_refused_when_compiled():
    @torch.compile(backend="eager")
    def loss(x, y):
        return otalign.sinkhorn_loss(x, y, cost="what", backend="cpu")

    with pytest.raises(Exception, match="cost: expected one of"):
        loss(torch.rand(1, 3, 2), torch.rand(1, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast(backend, objective, dtype):
    """Autocast changes nothing: otalign computes the products itself, from the inputs in their own type."""
    same = same_on(backend)
    batch = draw(D=24, dtype=dtype)

    def loss(*batch):
        return otalign.sinkhorn_loss(*batch, objective=objective, backend=backend)

    def autocast_loss(*batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(*batch)

    expected = loss_and_gradients(loss, batch)
    for ours, theirs in zip(loss_and_gradients(autocast_loss, batch), expected, strict=True):
        same(ours, theirs)


def test_autocast_of_results(backend):
    same = same_on(backend)
    batch = draw(D=24, dtype=torch.float32)
    outputs = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = otalign.solve(*batch, backend=backend)
            outputs.append((result.value, result.plan(), result.barycentric_x(), result.barycentric_y()))
    for ours, theirs in zip(*outputs, strict=True):
        same(ours, theirs)


def test_autocast_under_compile():
    batch = draw(D=24, poison=0.0, dtype=torch.float32)
    layer = torch.nn.Linear(24, 24)

    def loss(x, y, x_lengths, y_lengths):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return otalign.sinkhorn_loss(layer(x), y, x_lengths, y_lengths, backend="cpu")

    check(loss, batch)


# What eager calls refuse on a CPU, compiled calls refuse when they run ---------------------------------------------------

POINTS = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
GOOD = {"a": torch.rand(2, 5) + 0.1, "reg": torch.tensor([0.1, 0.2]), "g": torch.zeros(2, 4)}


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"a": torch.tensor([[1.0, -1, 1, 1, 1], [1.0] * 5])}, "a: expected non-negative"),
        ({"a": torch.tensor([[1.0] * 5, [0.0] * 5])}, "a: expected some positive weight"),
        ({"reg": torch.tensor([0.1, -1.0])}, "reg: expected finite"),
        ({"reg": torch.tensor([0.1, 1e-42])}, "reg: expected finite"),
        ({"g": torch.full((2, 4), 1e30)}, "init: expected finite"),
    ],
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_values_are_refused_when_the_graph_runs(bad, words, backend):
    def value(a, reg, g):
        return otalign.solve(*POINTS, a=a, reg=reg, init=(torch.zeros(2, 5), g), backend="cpu").value

    compiled = torch.compile(value, fullgraph=True, backend=backend)
    close(compiled(**GOOD), value(**GOOD), 1e-6)
    with pytest.raises(ValueError, match=words):
        compiled(**GOOD | bad)
    with pytest.raises(ValueError, match=words.split(":")[0]):
        value(**GOOD | bad)


def test_gradients_with_respect_to_checked_weights():
    def loss(x, y, a):
        return otalign.sinkhorn_loss(x, y, a=a, backend="cpu")

    compiled, a, b = torch.compile(loss, fullgraph=True, backend="aot_eager"), leaf(GOOD["a"]), leaf(GOOD["a"])
    compiled(*POINTS, a).backward()
    loss(*POINTS, b).backward()
    close(a.grad, b.grad, 1e-6)
    assert b.grad.abs().max() > 0
