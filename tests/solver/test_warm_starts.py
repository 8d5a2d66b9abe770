"""`WarmStarts`: losses that start from the last visit of each utterance, against losses that start from zero."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import otalign
from otalign import SinkhornLoss, WarmStarts
from otalign.speech import OTRegLoss

from ..helpers.problems import close, draw, draw_weights, identical, leaf

LENGTHS = [17, 1, 0, 12], [9, 3, 4, 1]
IDS = ["a", "b", "c", "d"]
PLAIN: dict[str, Any] = {"cost": "sqeuclidean", "reg": 0.2, "tol": 1e-9, "max_iter": 5000, "accelerate": False}


def visited(batch=None, ids=IDS, **options):
    """A loss that has seen the batch once."""
    criterion = SinkhornLoss(**PLAIN | {"warm_starts": WarmStarts(), "reduction": "none"} | options)
    criterion(*(batch or draw(*LENGTHS)), ids=ids)
    return criterion


def moved(batch, by=1e-3):
    noise = draw(*LENGTHS, seed=5)
    return batch._replace(x=batch.x + by * noise.x, y=batch.y + by * noise.y)


@pytest.mark.parametrize("objective", ["value", "plan_cost", "transport"])
def test_losses_and_gradients_are_those_from_zero(backend, objective):
    """With grad_output != 1 and weights of zero, of a batch that has moved a little."""
    batch = draw(*LENGTHS)
    weights = {
        "a": draw_weights(batch.x_lengths, batch.x.shape[1]),
        "b": draw_weights(batch.y_lengths, batch.y.shape[1], zeros=True),
    }
    options = {"objective": objective, "reduction": "none", "backend": backend, **PLAIN}
    cold, warm = SinkhornLoss(**options), SinkhornLoss(**options, warm_starts=WarmStarts())
    first = warm(*batch, **weights, ids=IDS)
    identical(first, cold(*batch, **weights))
    found = []
    for criterion, more in ((cold, {}), (warm, {"ids": IDS})):
        leaves = moved(batch).requires_grad()
        loss = criterion(*leaves, **weights, **more)
        loss.backward(torch.tensor([2.0, -1.0, 3.0, 0.5]).to(loss))
        found.append((loss.detach(), leaves.x.grad, leaves.y.grad, criterion.last.n_iter))
    for warm_part, cold_part in zip(found[1][:3], found[0][:3], strict=True):
        close(warm_part, cold_part, 1e-6)
    assert found[1][3][0] < 0.8 * found[0][3][0]


def test_a_repeated_batch_takes_one_iteration(backend):
    criterion = visited(backend=backend)
    assert criterion.last.n_iter[0] > 5
    criterion(*draw(*LENGTHS), ids=IDS)
    assert criterion.last.n_iter.tolist() == [1, 1, 0, 1]


def test_accelerated_solves_start_there_too():
    batch = draw([40] * 3, [15] * 3, D=6)
    criterion = SinkhornLoss(reg=0.02, warm_starts=WarmStarts(), reduction="none")
    first = criterion(*batch, ids=[1, 2, 3])
    before = criterion.last.n_iter
    close(criterion(*batch, ids=[1, 2, 3]), first, 1e-3)
    assert (criterion.last.n_iter < before).all()


def test_padded_packed_and_jagged_share_entries():
    """Each layout starts from what another has left, in another order and with other padding."""
    batch = draw(*LENGTHS, poison=math.nan)
    criterion = visited(batch)
    jagged = [torch.nested.nested_tensor(list(side), layout=torch.jagged) for side in zip(*batch.items(), strict=True)]
    for arguments in (batch.packed(), {"x": jagged[0], "y": jagged[1]}, batch._asdict()):
        criterion(**arguments, ids=IDS)
        assert criterion.last.n_iter.tolist() == [1, 1, 0, 1]
    order = torch.tensor([3, 0])
    few = [batch.x[order, :20], torch.nn.functional.pad(batch.y[order], (0, 0, 0, 5), value=math.nan)]
    criterion(*few, batch.x_lengths[order], batch.y_lengths[order], ids=["d", "a"])
    assert criterion.last.n_iter.tolist() == [1, 1]
    strided = batch._replace(y=batch.y.mT.contiguous().mT)
    criterion(*strided, ids=IDS)
    assert criterion.last.n_iter.tolist() == [1, 1, 0, 1]


def test_entries_of_another_text_length_are_not_used():
    batch = draw(*LENGTHS)
    shorter = batch._replace(y_lengths=torch.tensor([8, 3, 4, 1]))
    criterion, cold = visited(batch), SinkhornLoss(**PLAIN, reduction="none")
    identical(criterion(*shorter, ids=IDS), cold(*shorter))
    assert torch.equal(criterion.last.n_iter[:1], cold.last.n_iter[:1])
    # The entry is now that of the shorter text, and so the first one is not used.
    criterion(*batch, ids=IDS)
    assert criterion.last.n_iter[0] > 5


def test_speech_of_another_length_starts_from_the_text():
    batch = draw([200, 1, 0, 12], LENGTHS[1])
    criterion = visited(batch)
    cold = SinkhornLoss(**PLAIN, reduction="none")
    shorter = batch._replace(x_lengths=torch.tensor([195, 1, 0, 12]))
    close(criterion(*shorter, ids=IDS), cold(*shorter), 1e-8)
    assert criterion.last.n_iter[0] < cold.last.n_iter[0]


def test_nan_leaves_nothing():
    """An item with NaN starts from zero at its next visit, and the others from their own."""
    batch = draw(*LENGTHS)
    broken = batch._replace(x=batch.x.clone())
    broken.x[0, 3] = math.nan
    criterion = visited(batch)
    assert criterion(*broken, ids=IDS)[0].isnan()
    cold = SinkhornLoss(**PLAIN, reduction="none")
    warm_loss, cold_loss = criterion(*batch, ids=IDS), cold(*batch)
    identical(warm_loss[0], cold_loss[0])
    assert criterion.last.n_iter.tolist() == [int(cold.last.n_iter[0]), 1, 0, 1]


def test_items_that_do_not_converge_go_on():
    batch = draw(*LENGTHS)
    criterion = SinkhornLoss(**PLAIN | {"max_iter": 3, "tol": 1e-9}, reduction="none", warm_starts=WarmStarts())
    with pytest.warns(otalign.ConvergenceWarning):
        criterion(*batch, ids=IDS)
    first = criterion.last.error
    criterion(*batch, ids=IDS)
    assert criterion.last.error[0] < first[0]
    # Together these are as good as all iterations at once.
    once = SinkhornLoss(**PLAIN | {"max_iter": 6, "tol": 1e-9}, reduction="none")
    once(*batch)
    close(criterion.last.error[:1], once.last.error[:1], 1e-6)


def test_a_much_smaller_reg_starts_from_zero_where_it_must():
    """Potentials beyond what the solver takes are left out, and do not raise an error."""
    batch = draw(*LENGTHS, dtype=torch.float32)
    criterion = visited(batch)
    criterion.options |= {"reg": 1e-9, "max_iter": 3}
    with pytest.warns(otalign.ConvergenceWarning):
        assert criterion(*batch, ids=IDS).isfinite().all()


def test_the_start_is_not_in_the_graph():
    batch = draw(*LENGTHS).requires_grad()
    criterion = visited(batch)
    assert not criterion.warm_starts.state_dict()["potentials"].requires_grad
    loss = criterion(*batch, ids=IDS)
    gradients = torch.autograd.grad(loss.sum(), [batch.x, batch.y])
    assert all(g[:2].isfinite().all() for g in gradients)
    del loss
    with torch.inference_mode():  # leaves entries that training can go on with
        criterion.warm_starts.clear()
        criterion(*batch, ids=IDS)
    criterion(*batch, ids=IDS).sum().backward()
    assert criterion.last.n_iter[0] == 1


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.float64)], ids=str)
def test_dtypes_mix(dtypes):
    """A start of one type serves another."""
    criterion = visited(draw(*LENGTHS, dtype=dtypes[0]), tol=1e-4)
    solved_in = torch.promote_types(dtypes[0], torch.float32)
    assert criterion.warm_starts.state_dict()["potentials"].dtype == solved_in
    criterion(*draw(*LENGTHS, dtype=dtypes[0]).to(dtypes[1]), ids=IDS)
    assert criterion.last.n_iter[0] <= 4


def test_relaxation_and_reg_per_item():
    batch = draw(*LENGTHS)
    options = {"unbalanced": (math.inf, torch.tensor([0.3, 2.0, 1.0, 0.3])), "reg": torch.tensor([0.2, 0.3, 0.2, 0.1])}
    criterion, cold = visited(batch, **options), SinkhornLoss(**PLAIN | options, reduction="none")
    close(criterion(*batch, ids=IDS), cold(*batch), 1e-7)
    assert criterion.last.n_iter[0] == 1
    criterion(**batch.packed(), ids=IDS)
    assert criterion.last.n_iter[0] == 1


# The store ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=12), st.integers(1, 7))
def test_least_recently_used_goes_first(calls, max_entries):
    """Against a dictionary: which entries are left, in which order, and whose potentials they are."""
    store, expected = WarmStarts(max_entries), {}
    criterion = SinkhornLoss(tol=0, max_iter=1, backend="reference", warm_starts=store)
    for number, ids in enumerate(calls):
        y_lengths = [1 + key % 3 for key in ids]
        batch = draw([2] * len(ids), y_lengths, D=2, seed=number)
        criterion(*batch, ids=ids)
        g = otalign.solve(*batch, tol=0, max_iter=1, backend="reference").potentials[1]
        for key in ids:
            if key in expected:
                expected[key] = expected.pop(key)
        for key, row, length in zip(ids, g, y_lengths, strict=True):
            expected.pop(key, None)
            expected[key] = row[:length]
            while len(expected) > max_entries:
                del expected[next(iter(expected))]
    state = store.state_dict()
    assert state["ids"] == list(expected)
    assert len(store) == len(expected) <= max_entries
    # Only potentials of first visits: the others began elsewhere, so that one iteration leads elsewhere.
    seen = [key for call in calls for key in call]
    for key, row, length in zip(state["ids"], state["potentials"], state["lengths"].tolist(), strict=True):
        assert length == 1 + key % 3
        assert not row[length:].any()
        if seen.count(key) == 1:
            close(row[:length], expected[key].float(), 1e-5)
    assert state["potentials"].shape[0] <= max_entries


def test_memory_is_bounded():
    store = WarmStarts(3)
    criterion = SinkhornLoss(tol=0, max_iter=1, warm_starts=store)
    for number in range(20):
        criterion(*draw([3, 3], [4, 2]), ids=[number, str(number)])
    assert store._potentials.shape == (3, 6)  # draw pads by two points
    assert len(store) == 3
    assert "19" in store
    assert 17 not in store


def test_items_without_an_id_and_twice_the_same():
    batch = draw([9, 9, 9], [5, 5, 5])
    criterion = visited(batch, ids=["a", None, "a"])
    assert list(criterion.warm_starts.state_dict()["ids"]) == ["a"]
    criterion(*batch, ids=["b", "c", "a"])  # "a" has kept the last item
    assert criterion.last.n_iter[2] == 1
    assert (criterion.last.n_iter[:2] > 3).all()
    before = criterion.warm_starts.state_dict()
    criterion(*batch)
    criterion(*batch, ids=[None] * 3)
    after = criterion.warm_starts.state_dict()
    assert after["ids"] == before["ids"]
    identical(after["potentials"], before["potentials"])
    assert criterion(batch.x[:0], batch.y[:0], ids=[]).shape == (0,)
    criterion(batch.x[:, :0], batch.y[:, :0], ids=["x", "y", "z"])
    criterion(batch.x[:, :0], batch.y[:, :0], ids=["x", "y", "z"])


@pytest.mark.parametrize(
    "ids", [(3, 1, 4, 5), numpy.array([3, 1, 4, 5]), torch.tensor([3, 1, 4, 5]), torch.tensor([3, 1, 4, 5]).int()]
)
def test_ids_of_all_kinds_are_the_same(ids):
    criterion = visited(ids=[numpy.int64(3), 1, 4, 5])
    criterion(*draw(*LENGTHS), ids=ids)
    assert criterion.last.n_iter.tolist() == [1, 1, 0, 1]
    assert criterion.warm_starts.state_dict()["ids"] == [3, 1, 4, 5]


def test_state_dict():
    """Through a file that may hold no code, into a smaller store, which keeps the entries used last."""
    criterion = visited(ids=["a", 7, ("b", 2), b"d"])
    file = io.BytesIO()
    torch.save(criterion.warm_starts.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = visited(warm_starts=WarmStarts(2))
    resumed.warm_starts.load_state_dict(state)
    assert resumed.warm_starts.state_dict()["ids"] == [("b", 2), b"d"]
    state["potentials"].zero_()  # the store has its own copy
    resumed(*draw(*LENGTHS), ids=["a", 7, ("b", 2), b"d"])
    assert resumed.last.n_iter[3] == 1
    assert resumed.last.n_iter[0] > 5
    with pytest.raises(ValueError, match="state: expected as many ids as rows"):
        resumed.warm_starts.load_state_dict(state | {"ids": ["a"]})
    assert not any("warm" in key for key in criterion.state_dict())


def test_copies_go_their_own_way():
    criterion = visited()
    other = copy.deepcopy(criterion)
    other.warm_starts.clear()
    assert len(criterion.warm_starts) == 4
    assert "a" in criterion.warm_starts


def test_a_store_on_a_named_device():
    criterion = visited(warm_starts=WarmStarts(device="cpu"))
    criterion(*draw(*LENGTHS), ids=IDS)
    assert criterion.last.n_iter[0] == 1
    assert criterion.warm_starts._potentials.device.type == "cpu"


# OTReg -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cost", "soft_target"])
def test_otreg(form):
    """Of texts with repeated words: the entries are as long as the texts without them."""
    x, y, n, m = draw(*LENGTHS, D=6)
    words = torch.randint(4, y.shape[:2], generator=torch.Generator().manual_seed(1))
    options = {"form": form, "reg": 0.1, "tol": 1e-8, "max_iter": 2000, "token_weights": "count"}
    warm, cold = OTRegLoss(**options, warm_starts=WarmStarts()), OTRegLoss(**options)
    for criterion, more in ((warm, {"ids": IDS}), (cold, {})):
        criterion(x, y, n, m, words, **more)
    kept = otalign.speech.unique_tokens(words, m).lengths
    assert warm.warm_starts.state_dict()["lengths"].tolist() == kept.tolist()
    found = []
    for criterion, more in ((warm, {"ids": IDS}), (cold, {})):
        speech = leaf(x + 1e-3)
        loss = criterion(speech, y, n, m, words, **more)
        loss.backward()
        found.append((loss, speech.grad[:2].nan_to_num()))
    close(found[0][0], found[1][0], 1e-6)
    close(found[0][1], found[1][1], 1e-5)
    assert warm.last.n_iter[0] < 0.8 * cold.last.n_iter[0]


# Errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["a", "b", "c"], ValueError, "ids: expected 4, one for each item, got 3"),
        ("abcd", TypeError, "ids: expected a list with the id of each item, or integers .*, got str"),
        (torch.zeros(4), ValueError, "ids: expected int32 or int64 of shape .*, got torch.float32"),
        (
            torch.zeros(4, 1).long(),
            ValueError,
            r"ids: expected int32 or int64 of shape .*, got torch.int64 of \(4, 1\)",
        ),
        ([1.0, 2, 3, 4], TypeError, "ids: expected strings, integers, .*, got float"),
        ([True, 2, 3, 4], TypeError, "ids: expected strings, integers, .*, got bool"),
        (list(torch.arange(4)), TypeError, "ids: expected strings, integers, .*, got Tensor"),
    ],
)
def test_wrong_ids(ids, error, message):
    criterion = visited()
    before = criterion.warm_starts.state_dict()
    with pytest.raises(error, match=message):
        criterion(*draw(*LENGTHS), ids=ids)
    identical(criterion.warm_starts.state_dict()["potentials"], before["potentials"])


def test_wrong_options():
    with pytest.raises(TypeError, match=r"warm_starts: expected an otalign.WarmStarts or None, got dict"):
        SinkhornLoss(warm_starts={})
    with pytest.raises(TypeError, match="warm_starts: expected"):
        OTRegLoss(warm_starts=True)
    with pytest.raises(ValueError, match="warm_starts: the divergence has a start of its own"):
        SinkhornLoss(objective="divergence", warm_starts=WarmStarts())
    with pytest.raises(ValueError, match="max_entries: expected at least 1, got 0"):
        WarmStarts(0)
    with pytest.raises(TypeError, match="max_entries: expected an int, got float"):
        WarmStarts(1.5)
    with pytest.raises(ValueError, match="ids: this loss keeps nothing by id"):
        SinkhornLoss()(*draw(*LENGTHS), ids=IDS)


def test_transforms_and_compilation_are_refused():
    criterion, batch = visited(), draw(*LENGTHS, poison=0)
    total = lambda x: criterion(x, *batch[1:], ids=IDS).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="ids: warm starts work in eager mode"):
        torch.func.grad(total)(batch.x)
    compiled = torch.compile(total, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="ids: warm starts work in eager mode"):
        compiled(batch.x)
    # Without ids, a loss that has a store is compiled as any other.
    plain = torch.compile(lambda x: criterion(x, *batch[1:]).sum(), backend="eager", fullgraph=True)
    close(plain(batch.x), criterion(*batch).sum(), 1e-9)
