"""Is every input that cannot be meant refused, in words that name the argument, what was expected and what came?"""

import math

import numpy
import pytest
import torch

import otalign
from otalign import Prior

X, Y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
PACKED = torch.randn(6, 3)
LENGTHS = torch.tensor([5, 3])


def rejected(error, *words, **arguments):
    """A parameter set: `sinkhorn_loss` of these arguments raises `error`, and the message holds the `words`."""
    return pytest.param(error, words, arguments, id=next(iter(arguments)) + ": " + words[-1])


def check(function, error, words, arguments):
    with pytest.raises(error) as caught:
        function(**arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        rejected(TypeError, "x:", "Tensor", "list", x=[[1.0]]),
        rejected(ValueError, "x:", "(B, N, D)", "(5, 3)", x=X[0]),
        rejected(ValueError, "x:", "(B, N, D)", "(1, 2, 5, 3)", x=X[None]),
        rejected(TypeError, "x:", "float32", "torch.int64", x=X.long()),
        rejected(TypeError, "x:", "float32", "torch.complex64", x=X.to(torch.complex64)),
        rejected(TypeError, "x:", "float32", "torch.float8_e4m3fn", x=X.to(torch.float8_e4m3fn)),
        rejected(ValueError, "y:", "D = 3", "got 4", y=torch.randn(2, 4, 4)),
        rejected(ValueError, "y:", "2 items", "got 3", y=torch.randn(3, 4, 3)),
        rejected(ValueError, "y:", "cpu", "meta", y=Y.to("meta")),
        rejected(TypeError, "y:", "Tensor", "NoneType", y=None),
    ],
)
def test_points(error, words, arguments):
    check(otalign.sinkhorn_loss, error, words, {"x": X, "y": Y} | arguments)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        rejected(TypeError, "x_lengths", "Tensor", "str", x_lengths="53"),
        rejected(ValueError, "x_lengths", "int32", "from_relative_lengths", x_lengths=[1.0, 0.6]),
        rejected(TypeError, "x_lengths", "integers", "bool", x_lengths=[True, False]),
        rejected(TypeError, "x_lengths", "integers", "<U1", x_lengths=["5", "3"]),
        rejected(ValueError, "x_lengths", "(2,)", "(3,)", x_lengths=(5, 3, 1)),
        rejected(ValueError, "x_lengths", "[0, 5]", "6", x_lengths=numpy.array([6, 3])),
        rejected(ValueError, "x_lengths", "(2,)", "(3,)", x_lengths=torch.tensor([5, 3, 1])),
        rejected(ValueError, "x_lengths", "(2,)", "(2, 1)", x_lengths=LENGTHS[:, None]),
        rejected(ValueError, "x_lengths", "[0, 5]", "6", x_lengths=torch.tensor([6, 3])),
        rejected(ValueError, "y_lengths", "[0, 4]", "-1", y_lengths=torch.tensor([-1, 3])),
        rejected(ValueError, "x_lengths", "int32", "from_relative_lengths", x_lengths=torch.tensor([1.0, 0.6])),
        rejected(ValueError, "y_lengths", "torch.float16", "from_relative_lengths", y_lengths=LENGTHS.half()),
        rejected(TypeError, "x_lengths", "int64", "torch.bool", x_lengths=torch.tensor([True, False])),
        rejected(TypeError, "x_lengths", "int64", "torch.int16", x_lengths=LENGTHS.short()),
    ],
)
def test_lengths(error, words, arguments):
    check(otalign.sinkhorn_loss, error, words, {"x": X, "y": Y} | arguments)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        rejected(ValueError, "cu_seqlens_x", "from 0", "[1, 3, 6]", cu_seqlens_x=torch.tensor([1, 3, 6])),
        rejected(ValueError, "cu_seqlens_x", "at most 6", "[0, 3, 7]", cu_seqlens_x=torch.tensor([0, 3, 7])),
        rejected(ValueError, "cu_seqlens_x", "rise", "[0, 4, 3]", cu_seqlens_x=torch.tensor([0, 4, 3])),
        rejected(ValueError, "cu_seqlens_x", "(B + 1,)", "(1, 3)", cu_seqlens_x=torch.tensor([[0, 3, 6]])),
        rejected(ValueError, "cu_seqlens_x", "(B + 1,)", "(0,)", cu_seqlens_x=torch.tensor([], dtype=torch.int64)),
        rejected(ValueError, "cu_seqlens_x", "int32", "torch.float32", cu_seqlens_x=torch.tensor([0.0, 3.0, 6.0])),
        rejected(ValueError, "cu_seqlens_x", "at most 6", "[0, 3, 7]", cu_seqlens_x=[0, 3, 7]),
        rejected(ValueError, "x_lengths", "not both", x_lengths=LENGTHS),
        rejected(ValueError, "packed", "(total, D)", "(2, 3, 3)", x=PACKED.view(2, 3, 3)),
        rejected(ValueError, "y:", "2 items", "got 3", y=torch.randn(3, 4, 3)),
        rejected(ValueError, "max_seqlen_x", "4 points", "got 3", max_seqlen_x=3),
        rejected(TypeError, "max_seqlen_x", "int", "float", max_seqlen_x=4.0),
        rejected(ValueError, "max_seqlen_y", "cu_seqlens_y is missing", max_seqlen_y=4),
    ],
)
def test_packed(error, words, arguments):
    packed = {"x": PACKED, "cu_seqlens_x": torch.tensor([0, 4, 6]), "y": Y}
    check(otalign.sinkhorn_loss, error, words, packed | arguments)


def test_nested_of_the_old_layout():
    nested = torch.nested.nested_tensor([torch.randn(3, 3), torch.randn(2, 3)], layout=torch.strided)
    check(otalign.sinkhorn_loss, ValueError, ["x:", "torch.jagged", "strided"], {"x": nested, "y": Y})


def test_nested_brings_its_lengths():
    nested = torch.nested.nested_tensor([torch.randn(3, 3), torch.randn(2, 3)], layout=torch.jagged)
    arguments = {"x": nested, "y": Y, "x_lengths": torch.tensor([3, 2])}
    check(otalign.sinkhorn_loss, ValueError, ["x:", "its own lengths"], arguments)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        rejected(ValueError, "a:", "(2, 5)", "(2, 4)", a=torch.ones(2, 4)),
        rejected(ValueError, "a:", "non-negative", "-1", a=torch.tensor([[1.0, -1, 1, 1, 1], [1.0] * 5])),
        rejected(ValueError, "b:", "some positive weight", "only zeros", b=torch.tensor([[1.0] * 4, [0.0] * 4])),
        rejected(TypeError, "a:", "tensor", "list", a=[[1.0] * 5] * 2),
        rejected(TypeError, "a:", "float", "torch.bool", a=torch.ones(2, 5, dtype=torch.bool)),
        rejected(ValueError, "a:", "norm", "'uniform'", a="uniform"),
        rejected(ValueError, "b:", "cpu", "meta", b=torch.ones(2, 4, device="meta")),
    ],
)
def test_weights(error, words, arguments):
    check(otalign.sinkhorn_loss, error, words, {"x": X, "y": Y} | arguments)


def test_norm_weights_of_an_item_of_zeros():
    x = X.clone()
    x[1] = 0
    check(otalign.sinkhorn_loss, ValueError, ["a:", "only zeros"], {"x": x, "y": Y, "a": "norm"})


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        *(
            rejected(ValueError, "reg:", "> 0", str(value), reg=value)
            for value in (-0.1, 0.0, math.nan, math.inf, 0, -math.inf)
        ),
        rejected(ValueError, "reg:", "> 0", "-1", reg=torch.tensor([0.1, -1.0])),
        rejected(ValueError, "reg:", "> 0", "nan", reg=torch.tensor([0.1, math.nan])),
        rejected(ValueError, "reg:", "(2,)", "(3,)", reg=torch.ones(3)),
        rejected(TypeError, "reg:", "number", "str", reg="0.1"),
        rejected(TypeError, "reg:", "number", "NoneType", reg=None),
        rejected(TypeError, "reg:", "number", "bool", reg=True),
        rejected(TypeError, "reg:", "float", "torch.bool", reg=torch.tensor([True, True])),
        rejected(ValueError, "unbalanced:", "> 0", "0.0", unbalanced=0.0),
        rejected(ValueError, "unbalanced:", "> 0", "-1", unbalanced=(1.0, -1.0)),
        rejected(ValueError, "unbalanced:", "> 0", "nan", unbalanced=math.nan),
        rejected(ValueError, "unbalanced:", "(rho_x, rho_y)", "3 numbers", unbalanced=(1.0, 1.0, 1.0)),
        rejected(TypeError, "unbalanced:", "number", "str", unbalanced="1"),
        rejected(ValueError, "max_iter:", "at least 1", "got 0", max_iter=0),
        rejected(TypeError, "max_iter:", "int", "float", max_iter=10.0),
        rejected(TypeError, "max_iter:", "int", "bool", max_iter=True),
        rejected(ValueError, "tol:", ">= 0", "-0.001", tol=-1e-3),
        rejected(ValueError, "tol:", "finite", "nan", tol=math.nan),
        rejected(TypeError, "tol:", "number", "NoneType", tol=None),
        rejected(TypeError, "prior:", "Prior", "str", prior="quadratic"),
    ],
)
def test_numbers(error, words, arguments):
    check(otalign.sinkhorn_loss, error, words, {"x": X, "y": Y} | arguments)


@pytest.mark.parametrize("argument", ["cost", "objective", "reduction", "backend"])
def test_unknown_words(argument):
    """The message lists the words that are known."""
    known = {"cost": "sqeuclidean", "objective": "transport", "reduction": "none", "backend": "triton"}[argument]
    check(otalign.sinkhorn_loss, ValueError, [f"{argument}:", known, "'what'"], {"x": X, "y": Y, argument: "what"})
    check(otalign.sinkhorn_loss, TypeError, [f"{argument}:", known, "int"], {"x": X, "y": Y, argument: 2})


def test_modules_refuse_unknown_keywords():
    with pytest.raises(TypeError, match="blur"):
        otalign.SinkhornLoss(blur=0.1)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        rejected(TypeError, "C:", "Tensor", "list", C=[[0.0]]),
        rejected(ValueError, "C:", "(B, N, M)", "(4, 3)", C=torch.rand(4, 3)),
        rejected(TypeError, "C:", "float32", "torch.int64", C=torch.ones(2, 4, 3, dtype=torch.int64)),
        rejected(ValueError, "x_lengths", "[0, 4]", "5", x_lengths=torch.tensor([5, 1])),
        rejected(ValueError, "y_lengths", "int32", "from_relative_lengths", y_lengths=torch.tensor([1.0, 0.5])),
        rejected(ValueError, "a:", "norm", "embeddings", a="norm"),
        rejected(ValueError, "b:", "(2, 3)", "(2, 4)", b=torch.ones(2, 4)),
        rejected(TypeError, "init:", "pair", "Tensor", init=torch.zeros(2, 4)),
        rejected(TypeError, "init:", "tensor f", "NoneType", init=(None, torch.zeros(2, 3))),
        rejected(ValueError, "init:", "(2, 3)", "(2, 4)", init=(torch.zeros(2, 4), torch.zeros(2, 4))),
        rejected(ValueError, "init:", "cpu", "meta", init=(torch.zeros(2, 4), torch.zeros(2, 3, device="meta"))),
        rejected(ValueError, "backend:", "cpu", "'what'", backend="what"),
    ],
)
def test_given_cost(error, words, arguments):
    check(otalign.solve_cost, error, words, {"C": torch.rand(2, 4, 3), "reg": 0.1} | arguments)


def test_reg_of_a_given_cost_has_no_default():
    """Its unit is the cost's, and that is the caller's."""
    with pytest.raises(TypeError, match="reg"):
        otalign.solve_cost(torch.rand(1, 2, 2))


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_backend_that_is_not_there(name, monkeypatch):
    """An error with the reason; never another backend in silence."""
    monkeypatch.setattr(otalign.backends, "reason_missing", lambda name: f"{name} is on holiday")
    check(otalign.sinkhorn_loss, RuntimeError, [repr(name), "on holiday"], {"x": X, "y": Y, "backend": name})


def test_the_cpu_backend_is_there():
    assert otalign.backends.available()["cpu"] is None


def test_the_cpu_backend_refuses_other_devices():
    x, y = X.to("meta"), Y.to("meta")
    check(otalign.sinkhorn_loss, ValueError, ["backend", "'cpu'", "meta"], {"x": x, "y": y, "backend": "cpu"})


def test_the_triton_backend_refuses_the_cpu(monkeypatch):
    """Unless Triton interprets, as it does in these tests."""
    monkeypatch.setattr(otalign.backends, "_interpreting", lambda: False)
    words = ["backend", "'triton'", "GPU", "TRITON_INTERPRET=1", "cpu"]
    check(otalign.sinkhorn_loss, ValueError, words, {"x": X, "y": Y, "backend": "triton"})


def test_nothing_is_computed_before_the_check(monkeypatch):
    """A bad word at the end is refused before any kernel has run."""

    def launched(name):
        raise AssertionError(f"{name} was launched")

    monkeypatch.setattr(otalign.functional.backends, "launcher", launched)
    for arguments in ({"objective": "what"}, {"reduction": "what"}, {"cost": "what"}, {"reg": -1.0}, {"tol": -1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            otalign.sinkhorn_loss(X, Y, prior=Prior.band(1), **arguments)
