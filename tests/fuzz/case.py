"""A case of the fuzzer: what is drawn, and the tensors that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from otalign import Prior

from . import oracle

TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
POINTS = ("normal", "duplicates", "collinear", "constant", "zeros", "same", "denormal", "one extreme")
VIEWS = ("plain", "sliced", "transposed", "gaps", "repeated")
LAYOUTS = ("padded", "packed", "jagged")
WEIGHTS = (None, "random", "zeros", "wide", "integers", "norm")
PRIORS = ("none", "quadratic", "absolute", "order_preserving", "band")
STARTS = (None, "zeros", "random", "potentials")
PROPERTIES = ("none", "permutation", "swap", "offset", "scale", "split", "absent", "alone")
FUNCTIONALS = ("value", "linear", "plan", "all", "image x", "image y", "apply")


@dataclass(frozen=True)
class Case:
    """One batch, and how it is solved. Its numbers follow from `seed`; whatever else it takes from these fields."""

    seed: int = 0
    x_lengths: tuple[int, ...] = (3,)
    y_lengths: tuple[int, ...] = (2,)
    dim: int = 2
    cost: str = "sqeuclidean"  # "given" = a matrix
    x_type: str = "float32"
    y_type: str = "float32"
    x_layout: str = "padded"
    y_layout: str = "padded"
    x_view: str = "plain"
    y_view: str = "plain"
    padding: int = 0  # rows beyond the longest item
    poison: float = math.nan  # what the padding holds
    lengths_type: str = "int64"
    points: str = "normal"
    scale: float = 0.0  # log10 of the size of the points, or of a given cost
    offset: float = 0.0  # what all points, or costs, have in common, in sizes
    forbidden: float = 0.0  # share of pairs at infinite cost, if the cost is given
    bad: float | None = None  # NaN or infinity inside the last item
    a: str | None = None
    b: str | None = None
    prior: str = "none"
    prior_size: float = 0.0  # log10 of its weight in typical costs
    reg: float = -1.0  # log10 of reg in typical costs
    reg_spread: float = 0.0  # of its log10 between items; 0 = one number
    rho_x: float | None = None  # log10 of the relaxation in reg; None = strict
    rho_y: float | None = None
    rho_items: bool = False  # a relaxation for each item
    max_iter: int = 200
    tol: float = 1e-3
    accelerate: bool = True
    start: str | None = None
    functional: str = "value"
    objective: str = "value"
    reduction: str = "none"
    property: str = "none"


def cases(small: bool = False, types: tuple[str, ...] = tuple(TYPES)) -> st.SearchStrategy[Case]:
    """Every case; `small` ones are quick also in an interpreter."""
    longest = 5 if small else 12
    length = st.one_of(st.integers(1, longest), st.sampled_from((2, 1, 0) if small else (2, 1, 0, 17, 33)))
    lengths = st.lists(st.tuples(length, length), min_size=0, max_size=2 if small else 4)
    relaxed = st.one_of(st.none(), st.none(), st.floats(-2, 4))
    bad = st.sampled_from((None,) * 12 + (math.nan, math.inf, -math.inf))
    return st.builds(
        lambda lengths, **fields: Case(
            x_lengths=tuple(n for n, _ in lengths), y_lengths=tuple(m for _, m in lengths), **fields
        ),
        lengths,
        seed=st.integers(0, 2**20),
        dim=st.sampled_from((2, 1, 3, 0, 5, 16) if small else (2, 1, 3, 0, 5, 8, 16, 17, 33)),
        cost=st.sampled_from(("sqeuclidean", "given", "cosine", "euclidean", "dot", "given")),
        x_type=st.sampled_from(types),
        y_type=st.sampled_from(types),
        x_layout=st.sampled_from(LAYOUTS),
        y_layout=st.sampled_from(LAYOUTS),
        x_view=st.sampled_from(VIEWS),
        y_view=st.sampled_from(VIEWS),
        padding=st.integers(0, 3),
        poison=st.sampled_from((math.nan, 0.0, math.inf, -math.inf, 1e30)),
        lengths_type=st.sampled_from(("int64", "int32", "list", "none")),
        points=st.sampled_from(POINTS[:1] * 4 + POINTS),
        scale=st.one_of(st.just(0.0), st.just(0.0), st.floats(-20, 18)),
        offset=st.sampled_from((0.0, 0.0, 0.0, 1.0, 100.0, -1e4)),
        forbidden=st.sampled_from((0.0, 0.0, 0.0, 0.3, 0.9)),
        bad=bad,
        a=st.sampled_from(WEIGHTS),
        b=st.sampled_from(WEIGHTS),
        prior=st.sampled_from(PRIORS[:1] * 4 + PRIORS),
        prior_size=st.floats(-2, 2),
        reg=st.one_of(st.floats(-2, 1), st.floats(-4, 4)),
        reg_spread=st.sampled_from((0.0, 0.0, 0.5, 2.0)),
        rho_x=relaxed,
        rho_y=relaxed,
        rho_items=st.booleans(),
        max_iter=st.sampled_from((3, 1, 20) if small else (200, 1, 2, 7, 20, 50, 1000, 0)),
        tol=st.sampled_from((1e-3, 0.0, 1e-6, 0.1, 1e-10)),
        accelerate=st.booleans(),
        start=st.sampled_from(STARTS[:1] * 3 + STARTS),
        functional=st.sampled_from(FUNCTIONALS),
        objective=st.sampled_from(("value", "plan_cost", "transport", "divergence")),
        reduction=st.sampled_from(("none", "mean", "sum")),
        property=st.sampled_from(PROPERTIES),
    )


class Item(NamedTuple):
    """The numbers of an item in float64, as the tensors have them."""

    x: np.ndarray | None  # (n, D); None = the cost is given
    y: np.ndarray | None
    C: np.ndarray  # (n, m), without the prior
    prior: np.ndarray
    weights: tuple[np.ndarray | None, np.ndarray | None]  # as they were given
    a: np.ndarray  # normalised, in the type of the computation
    b: np.ndarray
    reg: float
    rho: tuple[float, float]


class Call:
    """The arguments of a case, and its items."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.random = np.random.default_rng(case.seed)
        self.given = case.cost == "given"
        self.lengths = case.x_lengths, case.y_lengths
        self.layouts = ("padded",) * 2 if self.given else (case.x_layout, case.y_layout)
        both = (case.x_type,) if self.given else (case.x_type, case.y_type)
        self.type = torch.float64 if "float64" in both else torch.float32
        self.bad = case.bad is not None and bool(case.x_lengths) and self.lengths[0][-1] * self.lengths[1][-1] > 0
        if self.given:
            self.C: Tensor | None = self._given()
            self.points: tuple[Tensor | None, Tensor | None] = None, None
        else:
            self.C = None
            x = self._side(0)
            self.points = x, self._side(1, same=x)
        self.weights = self._weights(0), self._weights(1)
        self.reg = self._reg()
        self.rho = self._rho(case.rho_x), self._rho(case.rho_y)

    # Tensors ---------------------------------------------------------------------------------------------------------

    def _numbers(self, *shape: int) -> np.ndarray:
        """Points (rows, D), or costs."""
        case, kind = self.case, self.case.points
        values = self.random.standard_normal(shape)
        if kind == "duplicates" and shape[0] > 1:
            values = values[self.random.integers(0, max(1, shape[0] // 2), shape[0])]
        elif kind == "collinear":
            values = self.random.standard_normal((*shape[:-1], 1)) * np.ones(shape[-1])
        elif kind == "constant":
            values = np.broadcast_to(values.reshape(-1)[:1], shape) if values.size else values
        elif kind == "zeros":
            values = values * self.random.integers(0, 2, (*shape[:-1], 1))
        elif kind == "denormal":
            values = values * np.where(self.random.random(shape) < 0.5, 1e-40, 1)
        elif kind == "one extreme" and values.size:
            values[self.random.integers(0, shape[0])] *= 10.0 ** self.random.integers(-30, 15)
        return (values + case.offset) * 10.0**case.scale

    def _side(self, side: int, same: Tensor | None = None) -> Tensor:
        """The points of a side, as a tensor with the strides of its view; packed values if packed or jagged."""
        case, lengths, layout = self.case, self.lengths[side], self.layouts[side]
        type_, view = TYPES[(case.x_type, case.y_type)[side]], (case.x_view, case.y_view)[side]
        items, size = len(lengths), max(lengths, default=0) + case.padding
        repeated = view == "repeated" and layout == "padded" and items > 0
        values = [self._numbers(n, case.dim) for n in lengths]
        if repeated:
            values = [values[int(np.argmax(lengths))][:n] for n in lengths]
        if self.bad and not repeated and case.dim > 0 and self.random.integers(0, 2) == side:
            values[-1][self.random.integers(0, len(values[-1])), self.random.integers(0, case.dim)] = case.bad
        if layout == "padded":
            rows = np.full((items, size, case.dim), case.poison)
            for b, n in enumerate(lengths):
                rows[b, :n] = values[b]
        else:
            spare = case.padding if layout == "packed" else 0
            rows = np.concatenate([*values, np.full((spare, case.dim), case.poison)])
        with np.errstate(over="ignore"):
            dense = torch.from_numpy(np.ascontiguousarray(rows)).to(type_).to(self.device)
        if repeated:
            return dense[int(np.argmax(lengths))][None].expand(items, -1, -1)
        return viewed(dense, view)

    def _given(self) -> Tensor:
        case, size = self.case, [max(lengths, default=0) + self.case.padding for lengths in self.lengths]
        costs = np.full((len(case.x_lengths), *size), case.poison)
        for b, (n, m) in enumerate(zip(*self.lengths, strict=True)):
            costs[b, :n, :m] = self._numbers(n, m)
            forbidden = self.random.random((n, m)) < case.forbidden
            costs[b, :n, :m][forbidden] = math.inf
        if self.bad:
            n, m = (lengths[-1] for lengths in self.lengths)
            costs[-1, self.random.integers(0, n), self.random.integers(0, m)] = case.bad
        return viewed(torch.from_numpy(costs).to(TYPES[case.x_type]).to(self.device), case.x_view)

    def _weights(self, side: int) -> Tensor | str | None:
        kind = (self.case.a, self.case.b)[side]
        if kind is None or (kind == "norm" and self.given):
            return None
        if kind == "norm":
            return kind
        lengths = self.lengths[side]
        values = []
        for n in lengths:
            drawn = self.random.random(n) + 0.1
            if kind == "zeros":
                drawn *= self.random.integers(0, 2, n)
            elif kind == "wide":
                drawn *= 10.0 ** self.random.choice([0, -3, -10, -30, -60, 5], n)
            elif kind == "integers":
                drawn = self.random.integers(0, 4, n).astype(float)
            if n and not drawn.any():
                drawn[0] = 1
            values.append(drawn)
        if self.layouts[side] == "padded":
            rows = np.full((len(lengths), max(lengths, default=0) + self.case.padding), self.case.poison)
            for b, n in enumerate(lengths):
                rows[b, :n] = values[b]
        else:
            spare = self.case.padding if self.layouts[side] == "packed" else 0
            rows = np.concatenate([*values, np.full(spare, self.case.poison)])
        if kind == "integers" and math.isfinite(self.case.poison) and self.case.poison < 1e9:
            return torch.from_numpy(rows).long().to(self.device)
        return torch.from_numpy(rows).to(torch.float32 if kind == "random" else torch.float64).to(self.device)

    # Numbers ---------------------------------------------------------------------------------------------------------

    def rows(self, side: int, tensor: Tensor, b: int) -> Tensor:
        """The rows of an item in a tensor that has the layout of a side."""
        n = self.lengths[side][b]
        if self.layouts[side] == "padded":
            return tensor[b, :n]
        start = sum(self.lengths[side][:b])
        return tensor[start : start + n]

    def raw_cost(self, b: int) -> np.ndarray:
        n, m = (lengths[b] for lengths in self.lengths)
        if self.C is not None:
            return self.C[b, :n, :m].cpu().double().numpy()
        x, y = (self.rows(side, self.points[side], b).cpu().double().numpy() for side in (0, 1))  # type: ignore[arg-type]
        return oracle.cost(x, y, self.case.cost)

    @cached_property
    def typical(self) -> float:
        """The spread of the costs, which reg, relaxations and priors are multiples of."""
        costs = [c[np.isfinite(c)].ravel() for c in map(self.raw_cost, range(len(self.lengths[0])))]
        joined = np.concatenate([*costs, np.zeros(0)])
        spread = float(np.median(np.abs(joined - np.median(joined)))) if joined.size else 0.0
        return min(max(spread if spread > 0 else 1.0, 1e-33), 1e33)

    def _reg(self) -> float | Tensor:
        case, least = self.case, torch.finfo(self.type).tiny
        logs = case.reg + case.reg_spread * self.random.uniform(-1, 1, len(case.x_lengths))
        values = np.clip(self.typical * 10.0**logs, least * 1.001, 1e37)
        if case.reg_spread == 0:
            return float(np.clip(self.typical * 10.0**case.reg, least * 1.001, 1e37))
        return torch.from_numpy(values)

    def regs(self) -> list[float]:
        return self.reg.tolist() if isinstance(self.reg, Tensor) else [self.reg] * len(self.case.x_lengths)

    def _rho(self, log: float | None) -> float | Tensor | None:
        if log is None:
            return None
        first = min(self.regs(), default=1.0) * 10.0**log
        if self.case.rho_items:
            return torch.tensor([first * (1 + b) for b in range(len(self.case.x_lengths))], dtype=torch.float64)
        return first

    def rhos(self, side: int) -> list[float]:
        rho = self.rho[side]
        if isinstance(rho, Tensor):
            return rho.tolist()
        return [math.inf if rho is None else rho] * len(self.case.x_lengths)

    def prior(self) -> Prior | None:
        kind, size = self.case.prior, self.typical * 10.0**self.case.prior_size
        if kind == "none":
            return None
        if kind == "band":
            return Prior.band(0.3 + 3 * abs(self.case.prior_size))
        if kind == "order_preserving":
            return Prior.order_preserving(size, 0.5 + abs(self.case.prior_size))
        return Prior(kind, (size,))

    def items(self) -> list[Item]:
        return [self._item(b) for b in range(len(self.case.x_lengths))]

    def _item(self, b: int) -> Item:
        n, m = (lengths[b] for lengths in self.lengths)
        points = [
            None if p is None else self.rows(side, p, b).cpu().double().numpy() for side, p in enumerate(self.points)
        ]
        reg, term, prior = self.regs()[b], np.zeros((n, m)), self.prior()
        if prior is not None and n and m:
            term = oracle.prior(prior.kind, prior.parameters, n, m, reg)
        given = [w.cpu().double().numpy() if isinstance(w, Tensor) else None for w in self._rows_of_weights(b)]
        a, b_ = (self._normalised(side, given[side], points[side], (n, m)[side]) for side in (0, 1))
        rho = (self.rhos(0)[b], self.rhos(1)[b])
        return Item(points[0], points[1], self.raw_cost(b), term, (given[0], given[1]), a, b_, reg, rho)

    def _rows_of_weights(self, b: int) -> list[Any]:
        return [self.rows(side, w, b) if isinstance(w, Tensor) else None for side, w in enumerate(self.weights)]

    def _normalised(self, side: int, given: np.ndarray | None, points: np.ndarray | None, n: int) -> np.ndarray:
        if given is None:
            given = np.ones(n) if self.weights[side] is None else oracle.norms(points)  # type: ignore[arg-type]
        largest = given.max(initial=0)
        if not largest > 0:
            return given * math.nan if n else given
        shares = given / largest
        return (shares / shares.sum()).astype("float64" if self.type == torch.float64 else "float32").astype(float)

    # The call --------------------------------------------------------------------------------------------------------

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that take gradients, by argument."""
        named = {"C": self.C, "x": self.points[0], "y": self.points[1], "a": self.weights[0], "b": self.weights[1]}
        return {
            name: t.detach().requires_grad_()
            for name, t in named.items()
            if isinstance(t, Tensor) and t.is_floating_point()
        }

    def arguments(self, leaves: dict[str, Tensor], backend: str) -> dict[str, Any]:
        """Keywords of `solve`, or of `solve_cost`, with `leaves` in their places."""
        case = self.case
        arguments: dict[str, Any] = {
            "a": leaves.get("a", self.weights[0]),
            "b": leaves.get("b", self.weights[1]),
            "prior": self.prior(),
            "reg": self.reg,
            "unbalanced": None if self.rho == (None, None) else self.rho,
            "max_iter": case.max_iter,
            "tol": case.tol,
            "accelerate": case.accelerate,
            "backend": backend,
        }
        if self.given:
            arguments |= {"C": leaves["C"]}
        else:
            arguments |= {"cost": case.cost}
        for side, name in enumerate("xy"):
            lengths, layout = self.lengths[side], self.layouts[side]
            offsets = [0, *np.cumsum(lengths).tolist()]
            if not self.given and layout == "jagged" and lengths:
                arguments[name] = torch.nested.nested_tensor_from_jagged(
                    leaves[name], torch.tensor(offsets, device=self.device)
                )
                continue
            if not self.given:
                arguments[name] = leaves[name]
            if layout == "padded":
                full = case.lengths_type == "none" and case.padding == 0 and len(set(lengths)) <= 1
                arguments[f"{name}_lengths"] = None if full else self.integers(lengths)
            else:
                arguments[f"cu_seqlens_{name}"] = self.integers(offsets)
        return arguments

    def integers(self, numbers: Any) -> Any:
        kind = self.case.lengths_type
        if kind == "list":
            return list(numbers)
        return torch.tensor(numbers, dtype=torch.int32 if kind == "int32" else torch.int64)


def viewed(dense: Tensor, view: str) -> Tensor:
    """The same numbers with other strides."""
    if view == "sliced":
        wide = dense.new_full((*dense.shape[:-1], dense.shape[-1] + 3), math.nan)
        wide[..., 1:-2] = dense
        return wide[..., 1:-2]
    if view == "transposed":
        return dense.mT.contiguous().mT
    if view == "gaps":
        wide = dense.new_full((*dense.shape[:-2], 2 * dense.shape[-2], dense.shape[-1]), math.nan)
        wide[..., ::2, :] = dense
        return wide[..., ::2, :]
    return dense
