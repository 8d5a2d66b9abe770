"""Does one warning at the calling line report items that did not converge, and can a user read their errors?"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch

import otalign
from otalign import ConvergenceWarning, speech

from ..helpers.problems import identical, states

torch.manual_seed(0)
X, Y = torch.randn(3, 9, 4), torch.randn(3, 6, 4)
SPEECH, TEXT, N, M = states(2)
HARD = {"reg": 0.01, "max_iter": 3}


def warnings_of(function):
    """All warnings of a call, repeated ones too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]


def test_message_and_place(backend):
    (warning,) = warnings_of(lambda: otalign.sinkhorn_loss(X, Y, backend=backend, **HARD))
    assert warning.filename == __file__
    assert warning.lineno == inspect.currentframe().f_lineno - 2
    result = otalign.solve(X, Y, backend=backend, **HARD)
    count, worst = int((~result.converged).sum()), f"{float(result.error.max()):.3g}"
    for words in (f"{count} of 3 items", f"error {worst}", "max_iter=3", "tol=0.001", "Raise max_iter"):
        assert words in str(warning.message)


@pytest.mark.parametrize(
    "call",
    [
        lambda: otalign.solve(X, Y, **HARD),
        lambda: otalign.solve_cost(X @ Y.mT, **HARD),
        lambda: otalign.sinkhorn_loss(X, Y, objective="plan_cost", **HARD),
        lambda: otalign.SinkhornLoss(**HARD)(X, Y),
        lambda: speech.OTRegLoss(**HARD)(X, Y),
        lambda: speech.OTRegLoss(form="soft_target", **HARD)(X, Y),
        lambda: speech.InnerAlignmentLoss([0, 1], **HARD)(SPEECH, TEXT, N, M),
        lambda: speech.recipes.one_sided(X, Y, rho=1.0, tol=1e-6, **HARD),
        lambda: speech.recipes.arase_otalign(X, Y, kind="balanced", reg=0.001, max_iter=1),
        lambda: torch.nn.Sequential(Pair(otalign.SinkhornLoss(**HARD)))((X, Y)),
    ],
)
def test_every_public_function_warns_at_its_caller(call):
    (warning,) = warnings_of(call)
    assert warning.filename == __file__
    assert warning.lineno in range(*lines_of(call))


class Pair(torch.nn.Module):
    """A user's module around ours: the warning names a line of this module."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, pair):
        return self.loss(*pair)


def lines_of(call):
    first = call.__code__.co_firstlineno
    forward = Pair.forward.__code__.co_firstlineno
    return (forward, forward + 2) if "Sequential" in call.__code__.co_names else (first, first + 1)


def test_divergence_warns_of_its_three_solves():
    assert warnings_of(lambda: otalign.sinkhorn_loss(X, Y, objective="divergence", **HARD))


def test_one_warning_per_line_for_any_error():
    """Python's own filter compares texts, and these contain the error: it would show each of these warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for scale in (1.0, 2.0, 3.0):
            otalign.sinkhorn_loss(scale * X, Y, cost="sqeuclidean", **HARD)
        otalign.sinkhorn_loss(X, Y, **HARD)
    assert [warning.lineno for warning in caught] == [line_of_test(4), line_of_test(5)]


def line_of_test(offset):
    return test_one_warning_per_line_for_any_error.__code__.co_firstlineno + offset + 1


def test_warnings_can_be_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        with pytest.raises(ConvergenceWarning, match="did not converge"):
            otalign.sinkhorn_loss(X, Y, **HARD)


@pytest.mark.parametrize(
    "call",
    [
        lambda: otalign.sinkhorn_loss(X, Y, reg=1.0),
        lambda: otalign.sinkhorn_loss(X, Y, **HARD, tol=0),
        lambda: otalign.sinkhorn_loss(X[:0], Y[:0], **HARD),
        lambda: otalign.sinkhorn_loss(X, Y, [0, 0, 0], **HARD),
        lambda: otalign.sinkhorn_loss(X * float("nan"), Y, **HARD),
        lambda: otalign.sinkhorn_loss(X, Y, reg=1.0, max_iter=1, tol=2.0),
    ],
)
def test_no_warning_without_need(call):
    assert not warnings_of(call)


def test_no_warning_under_compile():
    compiled = torch.compile(lambda x, y: otalign.sinkhorn_loss(x, y, **HARD), fullgraph=True, backend="aot_eager")
    assert not warnings_of(lambda: compiled(X, Y))


def test_no_warning_for_fake_tensors():
    """Fake tensors have no values, so no errors either."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, y = mode.from_tensor(X), mode.from_tensor(Y)
        assert not warnings_of(lambda: otalign.sinkhorn_loss(x, y, **HARD))


# The error of the last call ------------------------------------------------------------------------------------------------------


def test_last(backend):
    criterion = otalign.SinkhornLoss(backend=backend, **HARD)
    assert criterion.last is None
    x = X.clone().requires_grad_()
    criterion(x, Y).backward()
    expected = otalign.solve(X, Y, backend=backend, **HARD)
    for found, of in zip(criterion.last, (expected.n_iter, expected.error, expected.converged), strict=True):
        identical(found, of)
        assert not found.requires_grad
    assert not criterion.state_dict()
    criterion(X[:1], Y[:1])
    assert criterion.last.error.shape == (1,)


@pytest.mark.parametrize("make", [
    lambda: (otalign.SinkhornLoss(**HARD), (X, Y)),
    lambda: (speech.OTRegLoss(**HARD), (X, Y)),
    lambda: (speech.OTRegLoss(form="soft_target", **HARD), (X, Y)),
    lambda: (speech.InnerAlignmentLoss([0, 1], **HARD), (SPEECH, TEXT, N, M)),
])  # fmt: skip
def test_last_travels_with_its_module(make):
    criterion, arguments = make()
    assert criterion.last is None
    criterion(*arguments)
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    others = copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), torch.load(file, weights_only=False)
    for other in others:
        for found, expected in zip(other.last, criterion.last, strict=True):
            identical(found, expected)
    assert "last" not in " ".join(criterion.state_dict())
    assert not criterion.last.converged.all()


def test_last_of_layers_is_the_worst():
    criterion = speech.InnerAlignmentLoss([0, 1], **HARD)
    criterion(SPEECH, TEXT, N, M)
    each = [otalign.solve(x, y, N, M, **HARD) for x, y in zip(SPEECH, TEXT, strict=True)]
    identical(criterion.last.error, torch.maximum(each[0].error, each[1].error))
    identical(criterion.last.n_iter, (each[0].n_iter + each[1].n_iter) / 2.0 + torch.zeros(5).double())


def test_last_stays_under_compile():
    criterion = otalign.SinkhornLoss(**HARD)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    compiled(X, Y)
    assert criterion.last is None
