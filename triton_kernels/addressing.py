"""Where an item lies in memory, and the numbers of its points.

Every side of a batch has a *layout*: items lie in slots of `size` rows, full or with `lengths` (B,), or one behind the
other at `offsets` (B + 1,). One kernel reads all three; `mode` says which, at run time. Matrices with one row for each
point of x, such as the cost, are (rows of x, ld): they follow the layout of x, so that packed batches stay packed.
"""

import triton
import triton.language as tl

from .math import INFINITY


@triton.jit
def locate(tiles):
    """The item of this program, and which of the item's `tiles` it has."""
    program = tl.program_id(0)
    return program // tiles, program % tiles


@triton.jit
def segment(lengths, mode, size, rows, item, items):
    """First row of an item, its length, and the rows up to the next item: its slot, which outputs have to fill."""
    low = tl.load(lengths + item, mask=mode > 0, other=0)
    high = tl.load(lengths + item + 1, mask=mode == 2, other=0)
    packed = mode == 2
    low = tl.minimum(tl.maximum(low, 0), tl.where(packed, rows, size))
    high = tl.minimum(tl.maximum(high, low), rows)
    start = tl.where(packed, low, item.to(tl.int64) * size)
    length = tl.where(packed, high - low, tl.where(mode == 1, low, size))
    length = tl.minimum(length, size).to(tl.int32)
    slot = tl.where(packed, tl.where(item == items - 1, rows - start, high - low), size)
    return start, length, slot


@triton.jit
def only_if(flag, mask):
    """`mask`, or nothing unless `flag`, a number. (The interpreter cannot broadcast a truth value into a mask.)"""
    return mask.to(tl.int32) * flag != 0


@triton.jit
def load_weights(weights, given, rows, inside, length):
    """Weights of the points `rows`, uniform unless `given`; 0 outside."""
    T: tl.constexpr = weights.dtype.element_ty
    uniform = tl.full([], 1, T) / tl.maximum(length, 1).to(T)
    loaded = tl.load(weights + rows, mask=only_if(given, inside), other=0)
    return tl.where(inside, tl.where(given != 0, loaded, uniform), 0)


@triton.jit
def load_reg(reg, reg_items, per_item, item, T: tl.constexpr):
    """The regularisation of an item, from the number or the vector; NaN, and so is the item, where it is none.

    Below the smallest normal number its reciprocal is infinite.
    """
    loaded = tl.load(reg_items + item, mask=per_item != 0, other=1)
    epsilon = tl.where(per_item != 0, loaded.to(T), tl.full([], reg, T))
    if T == tl.float64:
        least = 2.2250738585072014e-308
    else:
        least = 1.1754943508222875e-38
    return tl.where((epsilon >= least) & (epsilon < INFINITY), epsilon, float("nan"))


@triton.jit
def load_gradient(gradient, step, item, T: tl.constexpr):
    """The gradient by a number of the item; step is -1 where there is none, and 0 where all items have the same."""
    return tl.load(gradient + item * tl.maximum(step, 0), mask=step >= 0, other=0).to(T)
