"""Do the helpers of otalign.layout pack points by the masks, lengths and spans of other toolkits?"""

import pytest
import torch

import otalign
from otalign import layout

from ..helpers.problems import close, identical, leaf

H = torch.arange(24.0).view(2, 4, 3)
LENGTHS = torch.tensor([3, 2])
PACKED = torch.cat([H[0, :3], H[1, :2]])
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def packed_as(result, values, offsets):
    identical(result[0], values)
    assert result[1].tolist() == offsets


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.int32])
def test_masks(dtype):
    packed_as(layout.from_mask(H, MASK.to(dtype)), PACKED, [0, 3, 5])
    packed_as(layout.from_padding_mask(H, (~MASK).to(dtype)), PACKED, [0, 3, 5])


def test_masks_need_not_be_contiguous():
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    packed_as(layout.from_mask(H, mask), torch.stack([H[0, 0], H[0, 2], H[1, 3]]), [0, 2, 3])


def test_empty_rows():
    packed_as(layout.from_mask(H, torch.zeros(2, 4, dtype=torch.bool)), H[:0, 0], [0, 0, 0])
    packed_as(layout.from_relative_lengths(H, torch.tensor([0.0, 0.5])), H[1, :2], [0, 0, 2])


def test_relative_lengths():
    packed_as(layout.from_relative_lengths(H, torch.tensor([0.75, 0.5])), PACKED, [0, 3, 5])
    packed_as(layout.from_relative_lengths(H, torch.tensor([1.0, 1.0])), H.flatten(0, 1), [0, 4, 8])


def test_relative_lengths_survive_float32():
    """A length of k out of N frames, stored as k / N in float32, is k again."""
    for size in (7, 100, 750, 1499, 3000):
        lengths = torch.arange(0, size + 1, max(1, size // 40))
        h = torch.zeros(len(lengths), size, 1)
        _, offsets = layout.from_relative_lengths(h, lengths.float() / size)
        assert offsets.diff().tolist() == lengths.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_time_major(dtype):
    packed_as(layout.from_time_major(H.transpose(0, 1), LENGTHS.to(dtype)), PACKED, [0, 3, 5])


def test_spans():
    spans = [[(0, 2), (1, 4)], [(3, 4)]]
    packed_as(layout.from_spans(H, spans), torch.cat([H[0, 0:2], H[0, 1:4], H[1, 3:4]]), [0, 2, 5, 6])
    packed_as(layout.from_spans(H, [[], [(2, 2)]]), H[:0, 0], [0, 0])


@pytest.mark.parametrize(
    "pack",
    [
        lambda h: layout.from_mask(h, MASK),
        lambda h: layout.from_padding_mask(h, ~MASK),
        lambda h: layout.from_relative_lengths(h, torch.tensor([0.75, 0.5])),
        lambda h: layout.from_time_major(h.transpose(0, 1), LENGTHS),
        lambda h: layout.from_spans(h, [[(0, 3)], [(0, 2)]]),
    ],
)
def test_packed_points_go_into_the_loss(pack, backend):
    """The loss, and the gradients by the states, are the same as with lengths."""
    h, same, y = leaf(H.sin().double()), leaf(H.sin().double()), torch.randn(2, 3, 3).double()
    values, cu_seqlens = pack(h)
    loss = otalign.sinkhorn_loss(values, y, cu_seqlens_x=cu_seqlens, backend=backend)
    expected = otalign.sinkhorn_loss(same, y, LENGTHS, backend=backend)
    close(loss, expected, 1e-12)
    loss.backward()
    expected.backward()
    close(h.grad, same.grad, 1e-12)


@pytest.mark.parametrize("helper", [layout.from_mask, layout.from_padding_mask])
def test_float_masks_are_refused(helper):
    """A float mask may mean 1 and 0, or 0 and -inf. These cannot be distinguished, so both are refused."""
    with pytest.raises(TypeError, match=r"mask: .*torch\.float32"):
        helper(H, MASK.float())
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 4\), got \(2, 3\)"):
        helper(H, MASK[:, :3])
    with pytest.raises(TypeError, match=r"mask: expected a torch\.Tensor, got list"):
        helper(H, MASK.tolist())
    with pytest.raises(ValueError, match="h: expected 3 dimensions"):
        helper(H[0], MASK)


def test_bad_relative_lengths():
    with pytest.raises(TypeError, match=r"rel: .*torch\.int64"):
        layout.from_relative_lengths(H, LENGTHS)
    with pytest.raises(ValueError, match=r"rel: expected shares in \[0, 1\]"):
        layout.from_relative_lengths(H, torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"rel: expected shares in \[0, 1\]"):
        layout.from_relative_lengths(H, torch.tensor([0.5, torch.nan]))
    with pytest.raises(ValueError, match=r"rel: expected shape \(2,\)"):
        layout.from_relative_lengths(H, torch.tensor([0.5]))


def test_bad_time_major_lengths():
    with pytest.raises(ValueError, match=r"lengths: expected values in \[0, 4\]"):
        layout.from_time_major(H.transpose(0, 1), torch.tensor([5, 2]))
    with pytest.raises(ValueError, match="from_relative_lengths"):
        layout.from_time_major(H.transpose(0, 1), torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("pairs", [(0, 3), [(0.0, 3.0)], [(0, 1, 2)], [None]], ids=str)
def test_spans_that_are_no_pairs(pairs):
    with pytest.raises(TypeError, match=r"spans: expected \(start, end\) pairs of integers"):
        layout.from_spans(H, [pairs, []])


def test_bad_spans():
    with pytest.raises(ValueError, match="spans: expected one list for each of 2 rows, got 1"):
        layout.from_spans(H, [[(0, 2)]])
    for span in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ValueError, match="spans: expected 0 <= start <= end <= 4"):
            layout.from_spans(H, [[span], []])


def test_to_padded_undoes_packing():
    """From any mask, with padding on the left or holes too, the points come first and zeros follow. Gradients flow back."""
    h = torch.randn(3, 5, 2, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    padded, lengths = layout.to_padded(*layout.from_mask(h, mask))
    assert lengths.tolist() == [3, 0, 5]
    assert padded[0, :3].equal(h[0, [1, 2, 4]])
    assert not padded[0, 3:].any() and not padded[1].any()
    padded.sum().backward()
    assert h.grad.equal(mask[..., None].expand_as(h).float())
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    assert layout.to_padded(nested.values(), nested.offsets())[1].tolist() == [2, 3]
    with pytest.raises(ValueError, match="values: expected shape"):
        layout.to_padded(h, torch.tensor([0, 3]))
