"""Is every invalid input refused, with a message that names the argument, what was expected and what was given?"""

import math

import numpy
import pytest
import torch

import otalign
from otalign import Prior

from ..helpers.refusals import check, rejected

X, Y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
PACKED = torch.randn(6, 3)
LENGTHS = torch.tensor([5, 3])


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


def test_strided_nested_tensors():
    nested = torch.nested.nested_tensor([torch.randn(3, 3), torch.randn(2, 3)], layout=torch.strided)
    check(otalign.sinkhorn_loss, ValueError, ["x:", "torch.jagged", "strided"], {"x": nested, "y": Y})


def test_nested_tensors_have_their_own_lengths():
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
        rejected(TypeError, "accelerate:", "True or False", "str", accelerate="newton"),
        rejected(TypeError, "accelerate:", "True or False", "int", accelerate=1),
        rejected(TypeError, "prior:", "Prior", "str", prior="quadratic"),
    ],
)
def test_numbers(error, words, arguments):
    check(otalign.sinkhorn_loss, error, words, {"x": X, "y": Y} | arguments)


@pytest.mark.parametrize("argument", ["cost", "objective", "reduction", "backend"])
def test_unknown_words(argument):
    """The message lists the valid words."""
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
    """Its unit is that of the cost, which only the caller knows."""
    with pytest.raises(TypeError, match="reg"):
        otalign.solve_cost(torch.rand(1, 2, 2))


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_missing_backend_is_refused(name, monkeypatch):
    """An error gives the reason. Another backend is never used silently."""
    monkeypatch.setattr(otalign.backends, "reason_missing", lambda name, device: f"{name} is on holiday")
    check(otalign.sinkhorn_loss, RuntimeError, [repr(name), "on holiday"], {"x": X, "y": Y, "backend": name})


def test_the_cpu_backend_is_there():
    assert otalign.backends.available()["cpu"] is None


def test_the_cpu_backend_refuses_other_devices():
    x, y = X.to("meta"), Y.to("meta")
    check(otalign.sinkhorn_loss, ValueError, ["backend", "'cpu'", "meta"], {"x": x, "y": y, "backend": "cpu"})


def test_the_triton_backend_refuses_the_cpu(monkeypatch):
    """Only Triton's interpreter, which these tests use, takes tensors on the CPU."""
    monkeypatch.setattr(otalign.backends, "_interpreting", lambda: False)
    words = ["backend", "'triton'", "GPU", "TRITON_INTERPRET=1", "cpu"]
    check(otalign.sinkhorn_loss, ValueError, words, {"x": X, "y": Y, "backend": "triton"})


def test_nothing_is_computed_before_the_check(monkeypatch):
    """An invalid last argument is refused before any kernel runs."""

    def launched(name):
        raise AssertionError(f"{name} was launched")

    monkeypatch.setattr(otalign.functional.backends, "solver", launched)
    for arguments in ({"objective": "what"}, {"reduction": "what"}, {"cost": "what"}, {"reg": -1.0}, {"tol": -1.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            otalign.sinkhorn_loss(X, Y, prior=Prior.band(1), **arguments)


# What is refused when a module is created, not at its first call ------------------------------------------------------

OPTIONS = [
    rejected(ValueError, "reg:", "> 0", "-1", reg=-1),
    rejected(ValueError, "reg:", "> 0", "nan", reg=torch.tensor([0.1, math.nan])),
    rejected(TypeError, "reg:", "number", "str", reg="0.1"),
    rejected(ValueError, "cost:", "sqeuclidean", "'x'", cost="x"),
    rejected(TypeError, "prior:", "Prior", "str", prior="band"),
    rejected(ValueError, "unbalanced:", "> 0", "0.0", unbalanced=0.0),
    rejected(ValueError, "unbalanced:", "(rho_x, rho_y)", "3 numbers", unbalanced=(1.0, 1.0, 1.0)),
    rejected(ValueError, "max_iter:", "at least 1", "0", max_iter=0),
    rejected(TypeError, "max_iter:", "int", "float", max_iter=1.5),
    rejected(ValueError, "tol:", ">= 0", "-1", tol=-1),
    rejected(TypeError, "accelerate:", "True or False", "NoneType", accelerate=None),
    rejected(ValueError, "backend:", "triton", "'gpu'", backend="gpu"),
]


@pytest.mark.parametrize("make", [otalign.SinkhornLoss, otalign.speech.OTRegLoss, otalign.speech.InnerAlignmentLoss])
@pytest.mark.parametrize("error, words, arguments", OPTIONS)
def test_modules_refuse_when_created(make, error, words, arguments):
    layers = {"layers": [0]} if make is otalign.speech.InnerAlignmentLoss else {}
    check(make, error, words, layers | arguments)


@pytest.mark.parametrize(
    "make, error, words, arguments",
    [
        (otalign.SinkhornLoss, ValueError, ["objective:", "transport", "'loss'"], {"objective": "loss"}),
        (otalign.SinkhornLoss, ValueError, ["reduction:", "none", "'max'"], {"reduction": "max"}),
        (otalign.speech.InnerAlignmentLoss, TypeError, ["layers:", "int", "str"], {"layers": ["0"]}),
        (otalign.speech.InnerAlignmentLoss, ValueError, ["layers:", "at least one", "0"], {"layers": 0}),
        (
            otalign.speech.InnerAlignmentLoss,
            TypeError,
            ["layer_weights:", "number", "str"],
            {"layers": [0], "layer_weights": ["a"]},
        ),
        (otalign.speech.OTRegLoss, TypeError, ["weight:", "number", "str"], {"weight": "a"}),
        (otalign.speech.OTRegLoss, ValueError, ["weight:", "finite", "nan"], {"weight": math.nan}),
        (otalign.speech.OTRegLoss, TypeError, ["warmup_steps:", "int", "float"], {"warmup_steps": 1.5}),
        (otalign.speech.OTRegLoss, TypeError, ["start_step:", "int", "bool"], {"start_step": True}),
        (otalign.speech.OTRegLoss, ValueError, ["warmup_steps:", ">= 0", "-1"], {"warmup_steps": -1}),
        (otalign.speech.OTRegLoss, ValueError, ["temperature:", "> 0", "0.0"], {"temperature": 0}),
        (otalign.speech.OTRegLoss, TypeError, ["temperature:", "number", "str"], {"temperature": "0.1"}),
        (otalign.speech.OTRegLoss, TypeError, ["unique:", "True or False", "str"], {"unique": "no"}),
        (otalign.speech.OTRegLoss, TypeError, ["detach_text:", "True or False", "int"], {"detach_text": 1}),
        (
            otalign.speech.OTRegLoss,
            ValueError,
            ["token_weights:", "unique=True"],
            {"unique": False, "token_weights": "count"},
        ),
        (otalign.speech.RetrievalCorpus, ValueError, ["chunk:", "at least 1", "0"], {"chunk": 0}),
        (Prior, ValueError, ["kind:", "quadratic", "'x'"], {"kind": "x", "parameters": ()}),
        (Prior, ValueError, ["parameters:", "1 numbers", "()"], {"kind": "band", "parameters": ()}),
        (Prior, ValueError, ["parameters:", "2 numbers"], {"kind": "order_preserving", "parameters": (1.0,)}),
        (Prior, ValueError, ["delta", "positive"], {"kind": "order_preserving", "parameters": (1.0, 0.0)}),
        (Prior, TypeError, ["weight", "number", "str"], {"kind": "quadratic", "parameters": ("1",)}),
    ],
)
def test_other_arguments_refused_when_created(make, error, words, arguments):
    check(make, error, words, arguments)


RECIPES = otalign.speech.recipes


@pytest.mark.parametrize(
    "recipe, error, words, arguments",
    [
        ("siamese_pt", ValueError, ["blur:", "> 0", "0"], {"blur": 0}),
        ("siamese_pt", TypeError, ["position_weight:", "number", "str"], {"position_weight": "1"}),
        ("siamese_pt", ValueError, ["scaling:", "between 0 and 1", "1.5"], {"scaling": 1.5}),
        ("cmot", ValueError, ["window:", ">= 0", "-1"], {"window": -1}),
        ("opw", ValueError, ["reg:", "> 0", "-1"], {"reg": -1}),
        ("opw", TypeError, ["max_iter:", "int", "float"], {"max_iter": 2.5}),
        ("ipot", TypeError, ["steps:", "int", "float"], {"steps": 1.5}),
        ("ipot", ValueError, ["beta:", "> 0", "0"], {"beta": 0}),
        ("arase_otalign", ValueError, ["reg:", "> 0", "-1"], {"reg": -1, "kind": "partial"}),
        ("arase_otalign", ValueError, ["tau:", "> 0", "0"], {"tau": 0}),
        ("arase_otalign", ValueError, ["tau:", "[0, 1]", "2"], {"tau": 2, "kind": "partial"}),
        ("arase_otalign", TypeError, ["max_iter:", "int", "float"], {"max_iter": 2.5, "kind": "partial"}),
        ("one_sided", ValueError, ["unbalanced:", "> 0", "-1"], {"rho": -1}),
        ("mixup", ValueError, ["p:", "[0, 1]", "2"], {"p": 2, "plan": torch.rand(2, 5, 4)}),
    ],
)
def test_recipes(recipe, error, words, arguments):
    plan = {"plan": arguments.pop("plan")} if "plan" in arguments else {}
    with pytest.raises(error) as caught:
        getattr(RECIPES, recipe)(X, Y, **plan, **arguments)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (ValueError, ["sample_weight:", ">= 0", "-1"], {"sample_weight": torch.tensor([1.0, -1.0])}),
        (ValueError, ["sample_weight:", ">= 0", "nan"], {"sample_weight": torch.tensor([1.0, math.nan])}),
        (ValueError, ["normalizer:", "> 0", "0.0"], {"normalizer": 0.0}),
        (ValueError, ["normalizer:", "> 0", "0.0"], {"normalizer": torch.tensor(0.0)}),
        (ValueError, ["normalizer:", "> 0", "-2"], {"normalizer": -2}),
        (TypeError, ["normalizer:", "number", "str"], {"normalizer": "2"}),
        (ValueError, ["normalizer:", "a number", "(2,)"], {"normalizer": torch.ones(2)}),
    ],
)
def test_weights_of_items(error, words, arguments):
    check(otalign.speech.OTRegLoss(), error, words, {"speech": X, "text": Y} | arguments)
    states = {"speech_states": X, "text_states": Y}
    check(otalign.speech.InnerAlignmentLoss([0]), error, words, states | arguments)


# Numbers ---------------------------------------------------------------------------------------------------------------


def test_numpy_numbers(backend):
    """NumPy numbers, and tensors without dimensions, are valid numbers."""
    numpys = {
        "reg": numpy.float32(0.125), "max_iter": numpy.int64(7), "tol": numpy.float64(1e-3),
        "unbalanced": (numpy.float32(0.5), None), "prior": Prior.quadratic(numpy.float32(0.5)),
    }  # fmt: skip
    plain = {
        "reg": 0.125, "max_iter": 7, "tol": 1e-3, "unbalanced": (0.5, math.inf), "prior": Prior.quadratic(0.5)
    }  # fmt: skip
    expected = otalign.sinkhorn_loss(X, Y, backend=backend, **plain)
    assert torch.equal(otalign.sinkhorn_loss(X, Y, backend=backend, **numpys), expected)
    assert torch.equal(otalign.SinkhornLoss(backend=backend, **numpys)(X, Y), expected)
    numpys["unbalanced"] = (torch.tensor(0.5), None)
    assert torch.equal(otalign.sinkhorn_loss(X, Y, backend=backend, **numpys), expected)


def test_none_means_a_strict_side(backend):
    for given, meant in (((None, 0.3), (math.inf, 0.3)), ((0.3, None), (0.3, math.inf)), ((None, None), None)):
        found = otalign.sinkhorn_loss(X, Y, unbalanced=given, backend=backend)
        assert torch.equal(found, otalign.sinkhorn_loss(X, Y, unbalanced=meant, backend=backend))


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        rejected(TypeError, "reg:", "number", "bool", reg=numpy.bool_(True)),
        rejected(TypeError, "max_iter:", "int", "bool", max_iter=numpy.bool_(True)),
        rejected(TypeError, "max_iter:", "int", "float32", max_iter=numpy.float32(5)),
        rejected(ValueError, "max_iter:", "2147483647", str(2**70), max_iter=2**70),
        rejected(ValueError, "max_iter:", "2147483647", str(2**31), max_iter=2**31),
        rejected(ValueError, "reg:", "float64", "got 1", reg=10**400),
        rejected(ValueError, "reg:", "smallest normal float32", "1e-39", reg=1e-39),
        rejected(ValueError, "reg:", "smallest normal float32", "e-41", reg=torch.tensor([0.1, 1e-40]).double()),
        rejected(ValueError, "unbalanced:", "(2,)", "(3,)", unbalanced=torch.tensor([0.1, 0.2, 0.3])),
        rejected(ValueError, "unbalanced:", "(2,)", "(2, 1)", unbalanced=(None, torch.tensor([[0.1], [0.2]]))),
        rejected(ValueError, "unbalanced:", "> 0", "-0.5", unbalanced=(None, torch.tensor([0.1, -0.5]))),
        rejected(TypeError, "unbalanced:", "float", "torch.bool", unbalanced=torch.tensor([True, True])),
        rejected(ValueError, "unbalanced:", "> 0", "-1", unbalanced=torch.tensor(-1.0)),
        rejected(TypeError, "unbalanced:", "number", "bool", unbalanced=(None, numpy.bool_(True))),
    ],
)
def test_numbers_of_other_types_and_sizes(error, words, arguments):
    check(otalign.sinkhorn_loss, error, words, {"x": X, "y": Y} | arguments)


def test_float64_takes_a_smaller_reg():
    """At the limit, where reg is 300 orders of magnitude below the costs, the plan is an assignment."""
    C = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    assert float(otalign.solve_cost(C, reg=1e-39).value) == pytest.approx(0, abs=1e-30)
    check(otalign.solve_cost, ValueError, ["reg:", "smallest normal float64"], {"C": C, "reg": 1e-309})


def start(g, f=0.0):
    return {"init": (torch.full((2, 5), f), torch.zeros(2, 4).index_fill(1, torch.tensor(1), g))}


@pytest.mark.parametrize("g", [math.nan, math.inf, -math.inf, 1e30, -6e3])
def test_invalid_starts(backend, g):
    """Beyond 1e5 reg, a potential in float32 has too few digits."""
    words = ["init:", "finite", "100000"]
    arguments = {"x": X, "y": Y, "reg": 0.05, "backend": backend}
    check(otalign.solve, ValueError, words, arguments | start(g))
    check(otalign.solve, ValueError, words, arguments | start(0.0, f=math.nan))
    per_item = {"reg": torch.tensor([1e5, 0.05])}
    check(otalign.solve, ValueError, words, arguments | per_item | start(g))
    lengths = {"y_lengths": torch.tensor([1, 1])}  # the padding is not read
    assert otalign.solve(**arguments, **lengths, **start(g)).converged.all()


def test_starts_of_packed_items():
    init = torch.zeros(5), torch.tensor([0.0, 4e4, 0.0, math.nan])
    packed = {"x": X.reshape(10, 3)[:5], "cu_seqlens_x": [0, 3, 5], "y": Y.reshape(8, 3)[:4], "cu_seqlens_y": [0, 2, 3]}
    reg = torch.tensor([0.5, 0.1])
    assert otalign.solve(**packed, reg=reg, init=init).converged.all()  # the last row belongs to no item
    check(otalign.solve, ValueError, ["init:"], packed | {"reg": reg / 2, "init": init})


def test_float64_starts_further_out():
    x, y = X.double(), Y.double()
    init = torch.zeros(2, 5).double(), torch.full((2, 4), 1e6).double()
    assert otalign.solve(x, y, init=init).value.isfinite().all()
    check(otalign.solve, ValueError, ["init:", "1e+13"], {"x": x, "y": y, "init": (init[0], 1e7 * init[1])})


# Tensors without numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        rejected(ValueError, "x_lengths:", "meta", x_lengths=LENGTHS.to("meta")),
        rejected(TypeError, "x:", "dense", "sparse_coo", x=X.to_sparse()),
        rejected(TypeError, "y:", "dense", "sparse_csr", y=Y.to_sparse_csr()),
        rejected(TypeError, "a:", "dense", "sparse_coo", a=X[..., 0].abs().to_sparse()),
        rejected(TypeError, "x_lengths:", "dense", "sparse_coo", x_lengths=LENGTHS.to_sparse()),
        rejected(TypeError, "reg:", "dense", "sparse_coo", reg=torch.tensor([0.1, 0.2]).to_sparse()),
    ],
)
def test_tensors_without_rows(error, words, arguments):
    check(otalign.sinkhorn_loss, error, words, {"x": X, "y": Y} | arguments)


def test_other_tensors_without_rows():
    check(
        otalign.solve_cost, TypeError, ["C:", "dense", "sparse_coo"], {"C": torch.rand(1, 2, 2).to_sparse(), "reg": 1.0}
    )
    packed = {"x": PACKED, "y": PACKED, "cu_seqlens_y": [0, 6], "cu_seqlens_x": torch.tensor([0, 6], device="meta")}
    check(otalign.sinkhorn_loss, ValueError, ["cu_seqlens_x:", "meta"], packed)
    check(
        otalign.layout.from_mask, TypeError, ["mask:", "dense"], {"h": X, "mask": torch.ones(2, 5).bool().to_sparse()}
    )
    jagged = torch.nested.nested_tensor([X[0], X[1, :3]], layout=torch.jagged)
    check(otalign.speech.OTRegLoss(), ValueError, ["speech:", "to_padded"], {"speech": jagged, "text": Y})
    check(
        otalign.speech.alignment_path, ValueError, ["speech_states[0]:", "to_padded"],
        {"speech_states": [jagged], "text_states": [Y]},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_points_without_numbers(name):
    arguments = {"x": X.to("meta"), "y": Y.to("meta"), "backend": name}
    check(otalign.sinkhorn_loss, ValueError, ["meta"], arguments)
