// A block's part of the matrix of an item, kept for all iterations: the first rows in registers, the next in shared
// memory, the others in scratch memory, which L2 caches.
#pragma once

#include "block.cuh"

namespace otalign::cuda {

template <class Tile>
class Matrix {
  static constexpr int C = Tile::kColumns, R = Tile::kRows;

 public:
  // Fills the matrix with entry(c, cost), c the lane's c-th column and cost that of the entry times `factor`. Each row
  // begins with begin(i, mine, numbers): the row exists if it is `mine`, and has these numbers. `entry` has to return
  // zero for rows and columns that do not exist.
  template <class Begin, class Entry>
  OTALIGN_DEVICE void build(const Block<Tile>& block, float factor, Begin begin, Entry entry) {
    OTALIGN_UNROLL
    for (int r = 0; r < R; ++r) {
      fill(block, r * Tile::kStep + block.below, held[r], factor, block.register_row(r), begin, entry);
      OTALIGN_IN_ORDER;
    }
    fill_memory(block, shared_row(block, Tile::kHeld), Tile::kWidth, Tile::kHeld, block.on_chip(), factor, OnChip(),
                begin, entry);
    if (block.count > block.on_chip()) {
      float* const rows = scratch_row(block, block.on_chip());
      fill_memory(block, rows, block.p.pitch, block.on_chip(), block.count, factor, OffChip(), begin, entry);
    }
  }

  // One pass over the matrix: sums = K^T t with t_i = update(i, (K w)_i, mine, one, numbers), where w is the column
  // vector of index 0. A row has these numbers if it is `mine`. Rows in registers are, even those that the block lacks:
  // their entries are zero. Of the lanes that hold the row only one has `one` set, and only that one may store
  // something. If `kSquare`, sums = (K * K)^T t instead, by entries.
  //
  // What the columns do not wait for is done later, by one lane of a row: store(t_i as update returned it, numbers).
  template <bool kSquare = false, class Update, class Store>
  OTALIGN_DEVICE void pass(const Block<Tile>& block, float (&sums)[C], Update update, Store store) {
    float w[C];
    block.load_columns(block.columns(0), w);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) sums[c] = 0;
    if constexpr (R > 0) pass_registers<kSquare>(block, w, sums, update, store);
    if (block.count > Tile::kHeld) {
      const int on_chip = block.count < block.on_chip() ? block.count : block.on_chip();
      pass_memory<kSquare>(block, shared_row(block, Tile::kHeld), Tile::kWidth, Tile::kHeld, on_chip, w, sums, update,
                           store, OnChip());
      if (block.count > block.on_chip()) {
        const float* const rows = scratch_row(block, block.on_chip());
        pass_memory<kSquare>(block, rows, block.p.pitch, block.on_chip(), block.count, w, sums, update, store,
                             OffChip());
      }
    }
  }
  template <bool kSquare = false, class Update>
  OTALIGN_DEVICE void pass(const Block<Tile>& block, float (&sums)[C], Update update) {
    pass<kSquare>(block, sums, update, [](float, auto) {});
  }

 private:
  // The numbers of a row in memory.
  struct OnChip {
    OTALIGN_DEVICE auto operator()(const Block<Tile>& block, int i) const { return block.shared_row(i); }
  };
  struct OffChip {
    OTALIGN_DEVICE auto operator()(const Block<Tile>& block, int i) const { return block.off_chip_row(i); }
  };

  template <class Rows, class Begin, class Entry>
  OTALIGN_DEVICE static void fill(const Block<Tile>& block, int i, float (&row)[C], float factor, Rows numbers,
                                  Begin& begin, Entry& entry) {
    const bool mine = i < block.count;
    float cost[C];
    block.load_costs(i, mine, cost, block.costs(), factor);
    begin(i, mine, numbers);
    OTALIGN_UNROLL
    for (int c = 0; c < C; ++c) row[c] = entry(c, cost[c]);
  }

  // Rows from `from` to `to`, as far as they exist, in memory: `rows` (to - from, pitch).
  template <class Rows, class Begin, class Entry>
  OTALIGN_DEVICE static void fill_memory(const Block<Tile>& block, float* rows, int64_t pitch, int from, int to,
                                         float factor, Rows numbers, Begin& begin, Entry& entry) {
    if (to > block.count) to = block.count;
    OTALIGN_ROLLED
    for (int i = from + block.below; i < to; i += Tile::kStep) {
      float row[C];
      fill(block, i, row, factor, numbers(block, i), begin, entry);
      OTALIGN_UNROLL
      for (int c = 0; c < C; c += 4)
        if (block.column(c) < block.m)
          *reinterpret_cast<float4*>(rows + (i - from) * pitch + block.column(c)) = {row[c], row[c + 1], row[c + 2],
                                                                                     row[c + 3]};
    }
  }

  // (width,) row i of the matrix in shared memory.
  OTALIGN_DEVICE static float* shared_row(const Block<Tile>& block, int i) {
#ifdef OTALIGN_MUTATE_5
    return block.shared + block.at.kernel + (i - Tile::kHeld + 1) * Tile::kWidth;
#else
    return block.shared + block.at.kernel + (i - Tile::kHeld) * Tile::kWidth;
#endif
  }
  // (pitch,) row i of the matrix in scratch memory.
  OTALIGN_DEVICE static float* scratch_row(const Block<Tile>& block, int i) {
    return block.off_chip_matrix() + i * block.p.pitch;
  }

  template <bool kSquare, class Update, class Store>
  OTALIGN_DEVICE void pass_registers(const Block<Tile>& block, const float (&w)[C], float (&sums)[C], Update update,
                                     Store store) {
    float dots[R];
    OTALIGN_UNROLL
    for (int r = 0; r < R; r += 4) {
      OTALIGN_UNROLL
      for (int k = 0; k < 4; ++k) dots[r + k] = 0;
      if (r > 0 && r * Tile::kStep >= block.count) continue;  // a short item has no such rows
      OTALIGN_UNROLL
      for (int k = 0; k < 4; ++k) {
        OTALIGN_UNROLL
        for (int c = 0; c < C; ++c) dots[r + k] += held[r + k][c] * w[c];
      }
    }
    const int first = fold<R, Tile::kLanes / 2, 1>(dots, block.lane, Sum());
    constexpr int left = folded(R, Tile::kLanes / 2, 1), same = folded_twice(R, Tile::kLanes / 2, 1);
    float* const factors = block.shared + Tile::kFactorsAt + block.below * R;  // (R,) of the lane's rows
    const bool one = (block.lane & same) == 0;
    decltype(update(0, 0.0f, true, true, block.register_row(0))) updated[left];
    OTALIGN_UNROLL
    for (int k = 0; k < left; ++k) {
      const int i = (first + k) * Tile::kStep + block.below;
      updated[k] = update(i, dots[k], true, one, block.register_row(first + k));
      if (one) factors[first + k] = updated[k];
    }
#ifndef OTALIGN_MUTATE_2
    intrinsics::sync_warp();
#endif
    OTALIGN_UNROLL
    for (int r = 0; r < R; r += 4) {
      if (r > 0 && r * Tile::kStep >= block.count) continue;
      const float4 four = load4(factors + r);
      OTALIGN_UNROLL
      for (int k = 0; k < 4; ++k) {
        OTALIGN_UNROLL
        for (int c = 0; c < C; ++c) sums[c] += (kSquare ? held[r + k][c] : 1) * held[r + k][c] * part(four, k);
      }
    }
    OTALIGN_UNROLL
    for (int k = 0; k < left; ++k)
      if (one) store(updated[k], block.register_row(first + k));
  }

  // Rows from `from` to `to` in memory, `rows` (to - from, pitch); a lane reads kAtOnce of its rows at once.
  template <bool kSquare, class Update, class Store, class Rows>
  OTALIGN_DEVICE static void pass_memory(const Block<Tile>& block, const float* rows, int64_t pitch, int from, int to,
                                         const float (&w)[C], float (&sums)[C], Update update, Store store,
                                         Rows numbers) {
    constexpr int N = Tile::kAtOnce;
    OTALIGN_ROLLED
    for (int i = from + block.below; i - block.below < to; i += N * Tile::kStep) {
      float row[N][C];
      OTALIGN_UNROLL
      for (int k = 0; k < N; ++k) {
        const bool mine = i + k * Tile::kStep < to;
        const float* const at = rows + (i + k * Tile::kStep - from) * pitch;
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
      for (int k = 0; k < N; ++k) dots[k] = over_lanes<Tile::kLanes>(dots[k], Sum());
      OTALIGN_UNROLL
      for (int k = 0; k < N; ++k) {
        const int at = i + k * Tile::kStep;
        const bool mine = at < to, one = block.across == 0;
        const auto updated = update(at, dots[k], mine, one, numbers(block, at));
        if (mine && one) store(updated, numbers(block, at));
        const float factor = updated;
        OTALIGN_UNROLL
        for (int c = 0; c < C; ++c) sums[c] += (kSquare ? row[k][c] : 1) * row[k][c] * factor;
      }
    }
  }

  float held[R > 0 ? R : 1][C];  // the thread's entries in registers
};

}  // namespace otalign::cuda
