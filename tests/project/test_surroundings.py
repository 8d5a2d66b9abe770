"""Do results for tensors on the CPU stay the same under other defaults of torch for device and dtype?"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import otalign
from otalign import Prior, layout, speech
from otalign.speech import recipes

from ..helpers.problems import draw, draw_weights, identical, leaf, offsets, states

BATCH = draw((7, 1, 5, 0), (4, 3, 6, 2), dtype=torch.float32)
ARGUMENTS = BATCH.x, BATCH.y, BATCH.x_lengths, BATCH.y_lengths
WEIGHTS = draw_weights(BATCH.x_lengths, BATCH.x.shape[1]).float()
WEIGHTS[3] = 1
REG = torch.tensor([0.1, 0.2, 0.3, 0.4])


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors(part)]
    return []


def loss_and_gradients(backend: str, **options: Any) -> list[Tensor]:
    x, y, a = leaf(BATCH.x), leaf(BATCH.y), leaf(WEIGHTS)
    losses = otalign.sinkhorn_loss(x, y, *ARGUMENTS[2:], a, reduction="none", backend=backend, **options)
    losses[:3].sum().backward()
    return [losses, x.grad, y.grad, a.grad]


def everything(backend: str) -> Any:
    result = otalign.solve(*ARGUMENTS, prior=Prior.band(2.0), unbalanced=(None, 0.3), backend=backend)
    return (
        result.value, result.value_linear, result.potentials, result.n_iter, result.error, result.converged,
        result.plan(), result.barycentric_x(), result.barycentric_y(), result.assign_y(),
        result.apply(torch.ones(BATCH.y.shape[:2], device="cpu", dtype=torch.float32)), result.marginal_y(),
    )  # fmt: skip


def packed(backend: str) -> Any:
    packed = BATCH.packed()
    result = otalign.solve(**packed, a="norm", backend=backend)
    return result.value, result.plan(), result.barycentric_x(), result.assign_y()


CORE = {
    "transport": lambda backend: loss_and_gradients(backend, objective="transport", prior=Prior.quadratic(1.0)),
    "reg per item": lambda backend: loss_and_gradients(backend, reg=REG),
    "a result": everything,
    "packed": packed,
    "cost": lambda backend: otalign.solve_cost(BATCH.x.nan_to_num(), reg=0.1, backend=backend).value,
}

SPEECH, TEXT, N, M = states(2)
HELPED = SPEECH[0].nan_to_num()
MASK = torch.arange(HELPED.shape[1]) < N[:, None]
OTHERS = {
    "large": lambda: otalign.sinkhorn_loss(LARGE, LARGE[:, :300], backend="cpu"),
    "lists": lambda: otalign.sinkhorn_loss(BATCH.x, BATCH.y, BATCH.x_lengths.tolist(), BATCH.y_lengths.tolist()),
    "module": lambda: otalign.SinkhornLoss(objective="plan_cost")(*ARGUMENTS),
    "OTReg": lambda: speech.OTRegLoss(weight=0.5, warmup_steps=4)(SPEECH[0], TEXT[0], N, M, IDS),
    "OTReg, soft": lambda: speech.OTRegLoss(form="soft_target")(SPEECH[0], TEXT[0], N, M),
    "inner": lambda: speech.InnerAlignmentLoss([0, 1])(SPEECH, TEXT, N, M),
    "path": lambda: speech.alignment_path_score(SPEECH, TEXT, N, M),
    "path, euclidean": lambda: speech.alignment_path(SPEECH, TEXT, N, M, metric="euclidean"),
    "sequence": lambda: speech.sequence_similarity(SPEECH, TEXT, N, M),
    "retrieval": lambda: speech.retrieval_scores(SPEECH, TEXT, N, M),
    "nothing retrieved": lambda: speech.RetrievalCorpus().compute(),
    "tokens": lambda: speech.unique_tokens(IDS, M),
    "intervene": lambda: speech.intervene(HELPED, TEXT[0].nan_to_num(), N, M),
    "siamese": lambda: recipes.siamese_pt(SPEECH[0], TEXT[0], N, M, schedule="released"),
    "zeroswot": lambda: recipes.zeroswot(SPEECH, TEXT, N, M, layers=[0, 1], tol=1e-2),
    "cmot": lambda: recipes.cmot(SPEECH[0], TEXT[0], N, M, window=2),
    "mixup": lambda: recipes.mixup(
        HELPED, TEXT[0].nan_to_num(), PLAN, p=0.5, generator=torch.Generator("cpu").manual_seed(1)
    ),
    "opw": lambda: recipes.opw(SPEECH[0], TEXT[0], N, M),
    "ipot": lambda: recipes.ipot(SPEECH[0], TEXT[0], N, M, steps=5),
    "words": lambda: [
        recipes.arase_otalign(SPEECH[0], TEXT[0], N, M, kind=kind, max_iter=50, kappa=0.1)
        for kind in recipes.OTALIGN_KINDS
    ],
    "one sided": lambda: recipes.one_sided(SPEECH[0], TEXT[0], N, M),
    "mask": lambda: layout.from_mask(HELPED, MASK),
    "no mask": lambda: layout.from_padding_mask(HELPED, None),
    "relative": lambda: layout.from_relative_lengths(HELPED, N / HELPED.shape[1]),
    "time major": lambda: layout.from_time_major(HELPED.transpose(0, 1), N),
    "spans": lambda: layout.from_spans(HELPED[:1], [[(0, 2), (3, 5)]]),
    "to padded": lambda: layout.to_padded(
        torch.cat([row[:n] for row, n in zip(HELPED, N.tolist(), strict=True)]), offsets(N)
    ),
    "prior": lambda: [
        prior.matrix(5, 3, device="cpu")
        for prior in (Prior.band(1.0), Prior.absolute(1.0), Prior.order_preserving(1.0, 1.0), Prior.quadratic(1.0))
    ],
    "normalizer": lambda: otalign.integrations.joined_mean_normalizer(MASK),
}
LARGE = torch.randn(1, 400, 8)
IDS = torch.randint(5, (5, TEXT[0].shape[1]))
PLAN = torch.rand(5, HELPED.shape[1], TEXT[0].shape[1])


@pytest.mark.parametrize("defaults", [default_device, default_dtype])
@pytest.mark.parametrize("name", CORE)
def test_solver(name, defaults, backend):
    expected = tensors(CORE[name](backend))
    with defaults():
        found = tensors(CORE[name](backend))
    compare(found, expected)


@pytest.mark.parametrize("defaults", [default_device, default_dtype])
@pytest.mark.parametrize("name", OTHERS)
def test_other_public_functions(name, defaults):
    expected = tensors(OTHERS[name]())
    with defaults():
        found = tensors(OTHERS[name]())
    compare(found, expected)


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device.type == "cpu"
        assert ours.dtype == theirs.dtype
        identical(ours, theirs)


def test_metrics_keep_their_counts():
    """torchmetrics moves them to the default device, where they would have no values."""
    metrics = pytest.importorskip("otalign.speech.metrics")
    expected = metrics.AlignmentPathMetric(layers=2)
    expected.update(SPEECH, TEXT, N, M)
    with default_dtype():
        found = metrics.AlignmentPathMetric(layers=2)
        found.update(SPEECH, TEXT, N, M)
    compare(tensors(found.compute()), tensors(expected.compute()))
