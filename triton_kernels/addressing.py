"""Where an item lies in memory, and how a kernel reads the numbers of its points.

Each side of a batch is stored in one of three ways, which its `addressing` names at run time:

    0, full:    item b has rows b * size .. b * size + size - 1; nothing is read from `offsets`
    1, lengths: as 0, but only the first offsets[b] rows of the slot hold points; `offsets` holds lengths (B,)
    2, packed:  item b has rows offsets[b] .. offsets[b + 1] - 1; `offsets` is (B + 1,)

So one compiled kernel reads all three. Matrices with one row for each point of x, such as the cost, are (rows of x, ld):
they follow the storage of x, so that packed batches stay packed. A row has `ld` numbers, a multiple of 32; kernels take
ld / 16 as `ld16`, so that the compiler knows that rows are aligned.
"""

import triton
import triton.language as tl

from .math import INFINITY


@triton.jit
def locate(tiles):
    """The item of this program, and which of the item's `tiles` is its own."""
    program = tl.program_id(0)
    return program // tiles, program % tiles


@triton.jit
def segment(offsets, addressing, size, rows, item, items):
    """First row of an item, its length in points, and the rows up to the next item: the slot, which outputs fill.

    The lengths are on the device, so that no kernel waits for the host; values out of range are clamped.
    """
    low = tl.load(offsets + item, mask=addressing > 0, other=0)
    high = tl.load(offsets + item + 1, mask=addressing == 2, other=0)
    packed = addressing == 2
    low = tl.minimum(tl.maximum(low, 0), tl.where(packed, rows, size))
    high = tl.minimum(tl.maximum(high, low), rows)
    start = tl.where(packed, low, item.to(tl.int64) * size)
    length = tl.where(packed, high - low, tl.where(addressing == 1, low, size))
    length = tl.minimum(length, size).to(tl.int32)
    slot = tl.where(packed, tl.where(item == items - 1, rows - start, high - low), size)
    return start, length, slot


@triton.jit
def first_point(points, addressing, start, item, item_stride, row_stride):
    """Address of an item's first point, for points (B, size, D) or, packed, (rows, D); strides in elements."""
    return points + tl.where(addressing == 2, start * row_stride, item.to(tl.int64) * item_stride)


@triton.jit
def up_to_four(columns):
    """`columns` of an item, rounded up to a multiple of four.

    Each row of a matrix (rows of x, ld) has zeros up to there. A mask that ends there keeps groups of four numbers whole, so
    that a thread reads them at once.
    """
    return (columns + 3) // 4 * 4


@triton.jit
def only_if(flag, mask):
    """`mask` if the number `flag` is not 0, else all false. (The interpreter cannot broadcast a boolean into a mask.)"""
    return mask.to(tl.int32) * flag != 0


@triton.jit
def load_weights(weights, given, rows, mask, length):
    """Weights of the points `rows`, uniform unless `given`; 0 outside the mask."""
    T: tl.constexpr = weights.dtype.element_ty
    uniform = tl.full([], 1, T) / tl.maximum(length, 1).to(T)
    loaded = tl.load(weights + rows, mask=only_if(given, mask), other=0)
    return tl.where(mask, tl.where(given != 0, loaded, uniform), 0)


@triton.jit
def load_reg(reg, reg_items, per_item, item, T: tl.constexpr):
    """The regularisation of an item: `reg`, or if `per_item` its entry of `reg_items`. Invalid values become NaN.

    Valid is a positive normal number: the reciprocal of a subnormal one is infinite. NaN makes the item's results NaN.
    """
    loaded = tl.load(reg_items + item, mask=per_item != 0, other=1)
    item_reg = tl.where(per_item != 0, loaded.to(T), tl.full([], reg, T))
    if T == tl.float64:
        least = 2.2250738585072014e-308
    else:
        least = 1.1754943508222875e-38
    return tl.where((item_reg >= least) & (item_reg < INFINITY), item_reg, float("nan"))


@triton.jit
def load_gradient(gradient, step, item, T: tl.constexpr):
    """The incoming gradient of an item's number, (B,) with stride `step`: 0 if all items share one, -1 if there is none."""
    return tl.load(gradient + item * tl.maximum(step, 0), mask=step >= 0, other=0).to(T)


@triton.jit
def fill_tail(out, rows, slot, span, values):
    """Store `values` in the rows of a slot behind its first `span` rows, `rows` of each further span.

    Only the slot of the last item of a packed batch is so long: it reaches to the end of the packed rows.
    """
    rows += span
    while tl.min(rows, 0) < slot:
        tl.store(out + rows, values, mask=rows < slot)
        rows += span
