// A block's part of the matrix of an item, held on the chip for all iterations: in registers, then shared memory, then
// L2.
#pragma once

#include "block.cuh"

namespace otalign::cuda {

template <class L>
class Matrix {
  static constexpr int C = L::kColumns, R = L::kRows;

 public:
  // Fills it with entry(c, cost): of the lane's c-th column, and the cost times `factor`. Before each row comes
  // begin(i, mine, numbers), with the row's numbers if it is `mine`, that is, exists. Entries outside have to be zero.
  template <class Begin, class Entry>
  OTALIGN_DEVICE void build(const Block<L>& block, float factor, Begin begin, Entry entry) {
    OTALIGN_UNROLL
    for (int r = 0; r < R; ++r) {
      fill(block, r * L::kStep + block.below, held[r], factor, block.register_row(r), begin, entry);
      OTALIGN_IN_ORDER;
    }
    fill_memory(block, near_row(block, L::kHeld), L::kWidth, L::kHeld, block.near(), factor, Near(), begin, entry);
    if (block.count > block.near()) {
      float* const rows = far_row(block, block.near());
      fill_memory(block, rows, block.p.pitch, block.near(), block.count, factor, Far(), begin, entry);
    }
  }

  // One pass: every row is summed with `w`, which are the column vector kW; update(i, sum, mine, one, numbers) makes of
  // that sum the factor with which the row is added to `sums`, if it is `mine`, that is, exists; of the lanes that have
  // it only `one` may store something. `numbers` are those of near rows, or of others.
  template <class Update>
  OTALIGN_DEVICE void pass(const Block<L>& block, float (&sums)[C], Update update) {
    float w[C];
    block.load_columns(block.columns(0), w);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) sums[c] = 0;
    if constexpr (R > 0) pass_registers(block, w, sums, update);
    if (block.count > L::kHeld) {
      const int near = block.count < block.near() ? block.count : block.near();
      pass_memory(block, near_row(block, L::kHeld), L::kWidth, L::kHeld, near, w, sums, update, Near());
    }
    if (block.count > block.near()) {
      const float* const rows = far_row(block, block.near());
      pass_memory(block, rows, block.p.pitch, block.near(), block.count, w, sums, update, Far());
    }
  }

 private:
  // The numbers of a row in memory.
  struct Near {
    OTALIGN_DEVICE auto operator()(const Block<L>& block, int i) const { return block.near_row(i); }
  };
  struct Far {
    OTALIGN_DEVICE auto operator()(const Block<L>& block, int i) const { return block.far_row(i); }
  };

  template <class Rows, class Begin, class Entry>
  OTALIGN_DEVICE static void fill(const Block<L>& block, int i, float (&row)[C], float factor, Rows numbers,
                                  Begin& begin, Entry& entry) {
    const bool mine = i < block.count;
    float cost[C];
    block.load_costs(i, mine, cost, block.costs(), factor);
    begin(i, mine, numbers);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) row[c] = entry(c, cost[c]);
  }

  // Rows from `from` to `to`, if there are so many, in memory.
  template <class Rows, class Begin, class Entry>
  OTALIGN_DEVICE static void fill_memory(const Block<L>& block, float* rows, int64_t pitch, int from, int to,
                                         float factor, Rows numbers, Begin& begin, Entry& entry) {
    if (to > block.count) to = block.count;
    OTALIGN_ROLLED
    for (int i = from + block.below; i < to; i += L::kStep) {
      float row[C];
      fill(block, i, row, factor, numbers(block, i), begin, entry);
      OTALIGN_UNROLL
      for (int c = 0; c < C; c += 4)
        if (block.column(c) < block.m)
          *reinterpret_cast<float4*>(rows + (i - from) * pitch + block.column(c)) = {row[c], row[c + 1], row[c + 2],
                                                                                     row[c + 3]};
    }
  }

  OTALIGN_DEVICE static float* near_row(const Block<L>& block, int i) {
    return block.shared + block.at.kernel + (i - L::kHeld) * L::kWidth;
  }
  OTALIGN_DEVICE static float* far_row(const Block<L>& block, int i) { return block.far_matrix() + i * block.p.pitch; }

  template <class Update>
  OTALIGN_DEVICE void pass_registers(const Block<L>& block, const float (&w)[C], float (&sums)[C], Update update) {
    float dots[R];
    OTALIGN_UNROLL
    for (int r = 0; r < R; r += 4) {
      OTALIGN_UNROLL
      for (int k = 0; k < 4; ++k) dots[r + k] = 0;
      if (r * L::kStep >= block.count) continue;  // of short items, rows that none has
      OTALIGN_UNROLL
      for (int k = 0; k < 4; ++k) {
        OTALIGN_UNROLL
        for (int c = 0; c < C; ++c) dots[r + k] += held[r + k][c] * w[c];
      }
    }
    const int first = fold<R, L::kLanes / 2, 1>(dots, block.lane, Sum());
    constexpr int left = folded(R, L::kLanes / 2, 1), same = folded_twice(R, L::kLanes / 2, 1);
    float* const factors = block.shared + block.at.factors + block.below * R;
    OTALIGN_UNROLL
    for (int k = 0; k < left; ++k) {
      const int i = (first + k) * L::kStep + block.below;
      const bool one = (block.lane & same) == 0;
      const float factor = update(i, dots[k], i < block.count, one, block.register_row(first + k));
      if (one) factors[first + k] = factor;
    }
    port::sync_warp();
    OTALIGN_UNROLL
    for (int r = 0; r < R; r += 4) {
      if (r * L::kStep >= block.count) continue;
      const float4 four = load4(factors + r);
      OTALIGN_UNROLL
      for (int k = 0; k < 4; ++k) {
        OTALIGN_UNROLL
        for (int c = 0; c < C; ++c) sums[c] += held[r + k][c] * part(four, k);
      }
    }
  }

  // Rows from `from` to `to` in memory, some of a lane's at once.
  template <class Update, class Rows>
  OTALIGN_DEVICE static void pass_memory(const Block<L>& block, const float* rows, int64_t pitch, int from, int to,
                                         const float (&w)[C], float (&sums)[C], Update update, Rows numbers) {
    constexpr int N = L::kAtOnce;
    OTALIGN_ROLLED
    for (int i = from + block.below; i - block.below < to; i += N * L::kStep) {
      float row[N][C];
      OTALIGN_UNROLL
      for (int k = 0; k < N; ++k) {
        const bool mine = i + k * L::kStep < to;
        const float* const at = rows + (i + k * L::kStep - from) * pitch;
        OTALIGN_UNROLL
        for (int c = 0; c < C; c += 4) {
          float4 four{};
          if (mine && block.column(c) < block.m) four = load4(at + block.column(c));
          OTALIGN_UNROLL
          for (int q = 0; q < 4; ++q) row[k][c + q] = part(four, q);
        }
      }
      float dots[N];
      OTALIGN_UNROLL
      for (int k = 0; k < N; ++k) {
        dots[k] = 0;
        OTALIGN_UNROLL
        for (int c = 0; c < C; ++c) dots[k] += row[k][c] * w[c];
      }
      OTALIGN_UNROLL
      for (int k = 0; k < N; ++k) dots[k] = over_lanes<L::kLanes>(dots[k], Sum());
      OTALIGN_UNROLL
      for (int k = 0; k < N; ++k) {
        const int at = i + k * L::kStep;
        const float factor = update(at, dots[k], at < to, block.across == 0, numbers(block, at));
        OTALIGN_UNROLL
        for (int c = 0; c < C; ++c) sums[c] += row[k][c] * factor;
      }
    }
  }

  float held[R > 0 ? R : 1][C];
};

}  // namespace otalign::cuda
