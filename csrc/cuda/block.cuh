// A thread block at work on an item: which thread has which rows and columns, and sums over warps and over the blocks
// of a cluster.
#pragma once

#include <cuda/intrinsics.h>

#include <cfloat>
#include <cmath>

#include "../absorb.h"
#include "arguments.h"

namespace otalign::cuda {

struct Sum {
  OTALIGN_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Largest {
  OTALIGN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Butterfly reduce-scatter of kCount values a lane, over the lanes whose numbers differ in the bits from `kBit` down to
// `kLast`. An even count is halved at each step: a lane gives away one half and keeps the other. An odd count is
// all-reduced: then several lanes hold the same values. Returns the index of the first value that the lane holds in the
// end.
template <int kCount, int kBit, int kLast, int N, class Combine>
OTALIGN_DEVICE int fold(float (&values)[N], int lane, Combine combine) {
  if constexpr (kBit < kLast || kBit == 0) {
    return 0;
  } else if constexpr (kCount % 2 == 0) {
    constexpr int half = kCount / 2;
    const bool upper = (lane & kBit) != 0;
    OTALIGN_UNROLL
    for (int k = 0; k < half; ++k) {
      const float given = upper ? values[k] : values[k + half];
      const float kept = upper ? values[k + half] : values[k];
      values[k] = combine(kept, intrinsics::swap(given, kBit));
    }
    return (upper ? half : 0) + fold<half, kBit / 2, kLast>(values, lane, combine);
  } else {
    OTALIGN_UNROLL
    for (int k = 0; k < kCount; ++k) values[k] = combine(values[k], intrinsics::swap(values[k], kBit));
    return fold<kCount, kBit / 2, kLast>(values, lane, combine);
  }
}

// How many values a lane holds after `fold`, and in which bits the numbers of lanes differ that hold the same values.
OTALIGN_ANYWHERE constexpr int folded(int count, int bit, int last) {
  for (; bit >= last && bit > 0; bit /= 2)
    if (count % 2 == 0) count /= 2;
  return count;
}
OTALIGN_ANYWHERE constexpr int folded_twice(int count, int bit, int last) {
  int same = 0;
  for (; bit >= last && bit > 0; bit /= 2) {
    if (count % 2 == 0)
      count /= 2;
    else
      same |= bit;
  }
  return same;
}

// The values of all lanes whose numbers differ below `kLanes`, combined; of N values at once.
template <int kLanes, int N, class Combine>
OTALIGN_DEVICE void over_lanes(float (&values)[N], Combine combine) {
  OTALIGN_UNROLL
  for (int bit = kLanes / 2; bit > 0; bit /= 2) {
    OTALIGN_UNROLL
    for (int k = 0; k < N; ++k) values[k] = combine(values[k], intrinsics::swap(values[k], bit));
  }
}
template <int kLanes, class Combine>
OTALIGN_DEVICE float over_lanes(float value, Combine combine) {
  OTALIGN_UNROLL
  for (int bit = kLanes / 2; bit > 0; bit /= 2) value = combine(value, intrinsics::swap(value, bit));
  return value;
}

OTALIGN_DEVICE float logarithm(float x) { return x == 0 ? -INFINITY : logf(x); }
OTALIGN_DEVICE float finite_top(float top) { return top == -INFINITY ? 0 : top; }
OTALIGN_DEVICE float4 load4(const float* at) { return *reinterpret_cast<const float4*>(at); }
template <class Combine>
OTALIGN_DEVICE float combined(float p, float q, Combine combine) {
  return combine(p, q);
}
template <class Combine>
OTALIGN_DEVICE float4 combined(float4 p, float4 q, Combine combine) {
  return {combine(p.x, q.x), combine(p.y, q.y), combine(p.z, q.z), combine(p.w, q.w)};
}
OTALIGN_DEVICE float part(float4 v, int k) { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }

// Where an item lies in the vectors of a side.
struct Segment {
  int64_t start;  // first row
  int length;     // points
  int64_t slot;   // rows up to the next item, which outputs have to fill
};

OTALIGN_DEVICE int64_t within(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

OTALIGN_DEVICE Segment segment(const CudaSide& side, int64_t item, int64_t items) {
  if (!side.starts) {
    const int64_t length = side.lengths ? within(side.lengths[item], 0, side.size) : side.size;
    return {item * side.size, static_cast<int>(length), side.size};
  }
  const int64_t first = within(side.starts[item], 0, side.rows);
  const int64_t next = within(side.starts[item + 1], first, side.rows);
  return {first, static_cast<int>(within(next - first, 0, side.size)),
          item == items - 1 ? side.rows - first : next - first};
}

// The mass of a point; weights (rows,), null = uniform.
OTALIGN_DEVICE float weight(const float* weights, int64_t row, int length) {
  return weights ? weights[row] : 1.0f / static_cast<float>(length);
}

// What a potential adds to the dual objective per unit of mass: itself if the marginal is strict, else
// -rho (exp(-f / rho) - 1).
OTALIGN_DEVICE float dual_term(float potential, float rho) {
  return rho == INFINITY ? potential : -rho * expm1f(-potential / rho);
}

// A finite replacement, over reg, for the infinite potential of a point without a finite cost to any mass: 0 if the
// marginal is strict; else one whose dual term is rho to the last digit. It is bounded, so that sums with it stay
// finite.
OTALIGN_DEVICE float unreached_potential(float rho, float inv_reg) {
  return rho == INFINITY ? 0 : fminf(40 * rho * inv_reg, 1e30f);
}
OTALIGN_DEVICE float or_unreached(float potential, float unreached) {
  return potential == INFINITY ? unreached : potential;
}

// P / (a b) at an exponent. It is bounded: where a b is too small for a float, the mass is zero all the same.
OTALIGN_DEVICE float density(float exponent) { return fminf(expf(exponent), FLT_MAX); }

// `given` as a float; NaN, and with it the item, if it is not positive and finite or has an infinite reciprocal.
OTALIGN_DEVICE float regularisation(double given) {
  const float reg = static_cast<float>(given);
  return reg >= FLT_MIN && reg < INFINITY ? reg : NAN;
}

// The four numbers of a row: in shared memory, or in scratch memory if its part of the matrix is there.
template <class Pitch>
struct RowNumbers {
  float* at;    // (4,) `pitch` apart
  Pitch pitch;  // floats
  OTALIGN_DEVICE float& operator()(int which) const { return at[which * pitch]; }
};

// The item that a block works on. It is in shared memory, since registers are for the matrix.
struct CurrentItem {
  int64_t item;
  Segment x, y;
  int64_t first;  // the block's first row, counted in the whole batch
  float reg, inv_reg;
  int slice, inv_slice;        // groups of columns that a block sums for all, and 2^16 / slice, rounded up
  float damping_x, damping_y;  // exponents of the two updates
  float missing;               // mass that a strict marginal demands of points without a finite cost to any mass
  int since;                   // iteration after which all passes were plain, on the same matrix
  int straight;                // SharedMemory::straight
  bool fresh;                  // whether u does not belong to v
};
static_assert(sizeof(CurrentItem) <= 4 * (kFixed - kCurrentItem));

template <class Tile>
class Block {
 public:
  static constexpr int C = Tile::kColumns;

  OTALIGN_DEVICE explicit Block(const Arguments& arguments)
      : p(arguments.problem),
        config(arguments.config),
        at(arguments.memory),
        shared(reinterpret_cast<float*>(intrinsics::shared_memory())),
        warp(intrinsics::thread() / 32),
        lane(intrinsics::thread() % 32),
        across(lane % Tile::kLanes),
        below(warp * Tile::kBelow + lane / Tile::kLanes) {
    if (config.cluster > 1) {
      if (intrinsics::thread() == 0)
        for (int k = 0; k < 4; ++k) intrinsics::open(mailbox(k));
      intrinsics::sync_block();
      intrinsics::sync_cluster();
    }
    intrinsics::wait_for_kernels_before();  // up to here nothing reads what they write
    if (config.ordered) put_in_order();
  }

  // Goes to the next item of the cluster; `round` is 0 before the first. Returns false after the last. If items are
  // ordered the longest come first, and clusters take them in turn, forwards in one round and backwards in the next.
  OTALIGN_DEVICE bool next_item(int& round) {
    const int cluster = intrinsics::block() / config.cluster;
    while (static_cast<int64_t>(round) * config.in_flight < p.items) {
      const int64_t place = static_cast<int64_t>(round) * config.in_flight + turn_in(round, cluster);
      ++round;
      if (place >= p.items) continue;
      intrinsics::sync_block();  // all threads have finished the item before
      enter(config.ordered ? order()[round - 1] : place);
      return true;
    }
    if (config.cluster > 1) intrinsics::sync_cluster();
    return false;
  }

  // Columns ----------------------------------------------------------------------------------------------------------

  OTALIGN_DEVICE int column(int c) const { return ((c / 4) * Tile::kLanes + across) * 4 + c % 4; }
  // (width,) a vector with one number for every column, in shared memory.
  OTALIGN_DEVICE float* columns(int which) const { return shared + Tile::kColumnsAt + which * Tile::kWidth; }
  OTALIGN_DEVICE void load_columns(const float* from, float (&to)[C]) const {
    OTALIGN_UNROLL
    for (int c = 0; c < C; c += 4) {
      const float4 four = load4(from + column(c));
      OTALIGN_UNROLL
      for (int k = 0; k < 4; ++k) to[c + k] = part(four, k);
    }
  }
  template <class F>
  OTALIGN_DEVICE void for_columns(F f) const {
    for (int j = intrinsics::thread(); j < Tile::kWidth; j += Tile::kThreads) f(j);
  }

  // Rows -------------------------------------------------------------------------------------------------------------
  // A row of the block is on the chip if its part of the matrix is in registers or shared memory. The other rows are in
  // scratch memory, which L2 caches.

  OTALIGN_DEVICE int on_chip() const { return Tile::kHeld + config.shared; }
  // Row r of the lanes `below`, in registers. Its numbers are placed so that the lanes of a warp access different
  // banks.
  OTALIGN_DEVICE RowNumbers<int> register_row(int r) const {
    return {shared + Tile::kRowsAt + below * Tile::kRows + r, Tile::kHeld};
  }
  OTALIGN_DEVICE RowNumbers<int> shared_row(int i) const {
    return {shared + at.shared_rows + i - Tile::kHeld, config.shared};
  }
  OTALIGN_DEVICE RowNumbers<int> on_chip_row(int i) const {
    if (i >= Tile::kHeld) return shared_row(i);
    return {shared + Tile::kRowsAt + i % Tile::kStep * Tile::kRows + i / Tile::kStep, Tile::kHeld};
  }
  OTALIGN_DEVICE RowNumbers<int64_t> off_chip_row(int i) const { return {p.scratch + current().first + i, p.x.rows}; }
  OTALIGN_DEVICE float& row(int which, int i) const {
    return i < on_chip() ? on_chip_row(i)(which) : off_chip_row(i)(which);
  }
  // (count, pitch) the block's rows of the costs.
  OTALIGN_DEVICE const float* costs() const { return p.costs + current().first * p.pitch; }
  // (count, pitch) the block's rows of the matrix in scratch memory, placed as the costs; only the last are used.
  OTALIGN_DEVICE float* off_chip_matrix() const {
    return p.scratch + (4 * p.x.rows + 31) / 32 * 32 + current().first * p.pitch;
  }
  // Calls f(i, whether there is such a row) for every row of this lane.
  template <class F>
  OTALIGN_DEVICE void for_rows(F f) const {
    OTALIGN_ROLLED
    for (int i = below; i - below < count; i += Tile::kStep) f(i, i < count);
  }

  // Calls f(i) for every kRowsAtOnce rows of this lane: i, i + kStep and so on, as far as they exist.
  static constexpr int kRowsAtOnce = Tile::kColumns > 16 ? 1 : 2;
  template <class F>
  OTALIGN_DEVICE void for_several_rows(F f) const {
    OTALIGN_ROLLED
    for (int i = below; i - below < count; i += kRowsAtOnce * Tile::kStep) f(i);
  }

  // The lane's columns of row i of `from` (count, pitch), times `factor`; zero where there is no such row or column.
  OTALIGN_DEVICE void load_costs(int i, bool mine, float (&cost)[C], const float* from, float factor) const {
    OTALIGN_UNROLL
    for (int c = 0; c < C; c += 4) {
      float4 four{};
      if (mine && column(c) < m) four = load4(from + i * p.pitch + column(c));
      OTALIGN_UNROLL
      for (int k = 0; k < 4; ++k) cost[c + k] = part(four, k) * factor;
    }
  }

  // Sums -------------------------------------------------------------------------------------------------------------

  // Puts the warp's sums of its columns, and four numbers besides, where `exchange` reads them.
  template <class Combine>
  OTALIGN_DEVICE void put_columns(float (&values)[C], Combine combine) {
    const int first = fold<C, 16, Tile::kLanes>(values, lane, combine);
    float* const mine = shared + Tile::kPartsAt + warp * Tile::kPitch;
    constexpr int left = folded(C, 16, Tile::kLanes);
    OTALIGN_UNROLL
    for (int k = 0; k < left; k += left % 4 == 0 ? 4 : left) {
      float* const to = mine + column(first + k);
      if constexpr (left % 4 == 0)
        intrinsics::store(float4{values[k], values[k + 1], values[k + 2], values[k + 3]}, to);
      else if constexpr (left == 2)
        intrinsics::store(float2{values[k], values[k + 1]}, to);
      else
        *to = values[k];
    }
    static_assert(left % 4 == 0 || left <= 2);
  }
  OTALIGN_DEVICE void put_numbers(float4 values) {
    OTALIGN_UNROLL
    for (int k = 0; k < 4; ++k) {
      const float sum = over_lanes<32>(part(values, k), Sum());
      if (lane == 0) shared[Tile::kPartsAt + warp * Tile::kPitch + Tile::kWidth + k] = sum;
    }
  }
  // Puts one number a lane, whose sum is number() then. Four lanes put sums of eight lanes each: that is faster than to
  // sum over all of them.
  OTALIGN_DEVICE void put_number(float value) {
    OTALIGN_UNROLL
    for (int bit = 16; bit > 2; bit /= 2) value += intrinsics::swap(value, bit);
    if (lane < 4) shared[Tile::kPartsAt + warp * Tile::kPitch + Tile::kWidth + lane] = value;
  }

  // Combines what the warps of all blocks of the cluster have put, in the order of warps and blocks, so that all blocks
  // get the same bits. Calls use(j, value) for the columns up to `width`, each by one thread. After the next
  // sync_block, numbers() are the sums of the four numbers; before it, no thread may put anything again.
  template <class Combine, class F>
  OTALIGN_DEVICE void exchange(int width, Combine combine, F use) {
    float totals[kTurns];
    combine_all<0>(width, totals, combine);
    hand_out(totals, [&](int, int j, float total) {
      if (j < width) use(j, total);
    });
  }
  // The same for the loops of iterations: straight code for every size of clusters. `straight` is that of the current
  // item, which the caller reads early. Calls use(k, j, value) in all threads, for the k-th column of the thread; there
  // is no such column if j is not below `width`.
  template <class Combine, class F>
  OTALIGN_DEVICE void exchange_often(int straight, int width, Combine combine, F use) {
    float totals[kTurns];
    if (straight == 4)  // the most usual size first: a jump through a table takes longer
      combine_all<4>(width, totals, combine);
    else
      switch (straight) {
        case 1:
          combine_all<1>(width, totals, combine);
          break;
        case 2:
          combine_all<2>(width, totals, combine);
          break;
        case 3:
          combine_all<3>(width, totals, combine);
          break;
        case 5:
          combine_all<5>(width, totals, combine);
          break;
        case 6:
          combine_all<6>(width, totals, combine);
          break;
        case 7:
          combine_all<7>(width, totals, combine);
          break;
        case 8:
          combine_all<8>(width, totals, combine);
          break;
        case 16:
          combine_all<16>(width, totals, combine);
          break;
        default:
          combine_all<0>(width, totals, combine);
      }
    hand_out(totals, use);
  }
  // The numbers of a column vector that belong to the thread's columns in exchange_often().
  static constexpr int kTurns = (Tile::kPitch + Tile::kThreads - 1) / Tile::kThreads;
  OTALIGN_DEVICE void load_of_exchange(const float* from, float (&to)[kTurns]) const {
    const int first = intrinsics::thread();
    OTALIGN_UNROLL
    for (int k = 0; k < kTurns; ++k) {
      const int j = first + k * Tile::kThreads;
      to[k] = from[j < Tile::kWidth ? j : 0];
    }
  }
  OTALIGN_DEVICE float4 numbers() const { return load4(shared + kNumbers); }
  OTALIGN_DEVICE float number() const {
    const float4 four = numbers();
    return (four.x + four.y) + (four.z + four.w);
  }

  // The sum over the threads of the block.
  OTALIGN_DEVICE float sum_block(float value) {
    float* const parts = shared + kSums;
    value = over_lanes<32>(value, Sum());
    if constexpr (Tile::kWarps == 1) {
      return value;
    } else {
      intrinsics::sync_block();
      if (lane == 0) parts[warp] = value;
      intrinsics::sync_block();
      value = parts[0];
      OTALIGN_UNROLL
      for (int w = 1; w < Tile::kWarps; ++w) value += parts[w];
      return value;
    }
  }

  // The sums over the threads of the block of N values, for the accelerated solver. Two buffers take turns, so that one
  // barrier suffices.
  template <int N>
  OTALIGN_DEVICE void sum_block(float (&values)[N], int buffer) const {
    put_products(values, buffer);
    OTALIGN_UNROLL
    for (int k = 0; k < N; ++k) values[k] = 0;
    OTALIGN_UNROLL
    for (int w = 0; w < Tile::kWarps; ++w) {
      OTALIGN_UNROLL
      for (int k = 0; k < N; ++k) values[k] += products(buffer, w)[k];
    }
  }
  // The same of 16 values, for the first warp alone: (16,) in shared memory.
  OTALIGN_DEVICE const float* sum_products(float (&values)[16], int buffer) const {
    put_products(values, buffer);
    float* const totals = products(2, 0);
    if (warp != 0) return totals;
    if (lane < 16) {
      float total = 0;
      OTALIGN_UNROLL
      for (int w = 0; w < Tile::kWarps; ++w) total += products(buffer, w)[lane];
      totals[lane] = total;
    }
    intrinsics::sync_warp();
    return totals;
  }

  OTALIGN_DEVICE const CurrentItem& current() const {
    return *reinterpret_cast<const CurrentItem*>(shared + kCurrentItem);
  }
  // For the one thread that changes it between barriers.
  OTALIGN_DEVICE CurrentItem& changing() const { return *reinterpret_cast<CurrentItem*>(shared + kCurrentItem); }
  // Goes on with another reg. All threads call it.
  OTALIGN_DEVICE void set_reg(float reg) const {
    intrinsics::sync_block();
    if (intrinsics::thread() == 0) {
      CurrentItem& item = changing();
      item.reg = reg;
      item.inv_reg = 1 / reg;
      item.damping_x = static_cast<float>(damping(reg, p.rho_x));
      item.damping_y = static_cast<float>(damping(reg, p.rho_y));
    }
    intrinsics::sync_block();
  }

  const CudaProblem& p;
  const LaunchConfig& config;
  const SharedMemory& at;
  float* const shared;      // (at.end,) the block's shared memory
  const int warp, lane;     // the thread's
  const int across, below;  // its place among the lanes across the columns, and among the rows of a step
  int count, m;             // rows of the item that this block has, and all of its columns

 private:
  static constexpr int kReceiver = Tile::kThreads - 1;  // the thread that opens mailboxes: one that seldom sends

  // (16,) what a warp has summed.
  OTALIGN_DEVICE float* products(int buffer, int w) const {
    return shared + at.products + (buffer * Tile::kWarps + w) * 16;
  }
  template <int N>
  OTALIGN_DEVICE void put_products(float (&values)[N], int buffer) const {
    const int first = fold<N, 16, 1>(values, lane, Sum());
    static_assert(folded(N, 16, 1) == 1);
    if ((lane & folded_twice(N, 16, 1)) == 0) products(buffer, warp)[first] = values[0];
    intrinsics::sync_block();
  }

  OTALIGN_DEVICE intrinsics::Mailbox* mailbox(int k) const {
    return reinterpret_cast<intrinsics::Mailbox*>(shared) + k;
  }
  OTALIGN_DEVICE uint16_t* order() const { return reinterpret_cast<uint16_t*>(shared + at.order + kOrdered); }

  OTALIGN_DEVICE int turn_in(int round, int cluster) const {
    return round % 2 ? config.in_flight - 1 - cluster : cluster;
  }

  OTALIGN_DEVICE void put_in_order() {
    float* const sizes = shared + at.order;  // (items,)
    const int items = static_cast<int>(p.items);
    for (int i = intrinsics::thread(); i < items; i += Tile::kThreads)
      sizes[i] = static_cast<float>(segment(p.x, i, items).length) * static_cast<float>(segment(p.y, i, items).length);
    intrinsics::sync_block();
    const int cluster = intrinsics::block() / config.cluster;
    for (int i = intrinsics::thread(); i < items; i += Tile::kThreads) {
      int place = 0;
      for (int j = 0; j < items; ++j) place += sizes[j] > sizes[i] || (sizes[j] == sizes[i] && j < i);
      const int round = place / config.in_flight;
      if (turn_in(round, cluster) == place % config.in_flight) order()[round] = static_cast<uint16_t>(i);
    }
    intrinsics::sync_block();
  }

  OTALIGN_DEVICE void enter(int64_t next) {
    const Segment x = segment(p.x, next, p.items), y = segment(p.y, next, p.items);
    const int share = (x.length + config.cluster - 1) / config.cluster;
    const int begin = intrinsics::rank() * share < x.length ? intrinsics::rank() * share : x.length;
    m = y.length;
    count = m == 0 ? 0 : x.length - begin < share ? x.length - begin : share;
    const float reg = regularisation(p.reg ? p.reg[next] : p.reg_of_all);
    const int slice = ((m + 3) / 4 + config.cluster) / config.cluster;
    const auto damping_of = [&](double rho) { return static_cast<float>(damping(reg, rho)); };
    if (intrinsics::thread() == 0)
      *reinterpret_cast<CurrentItem*>(shared + kCurrentItem) = {next,
                                                                x,
                                                                y,
                                                                x.start + begin,
                                                                reg,
                                                                1 / reg,
                                                                slice,
                                                                65536 / slice + 1,
                                                                damping_of(p.rho_x),
                                                                damping_of(p.rho_y),
                                                                0,
                                                                0,
                                                                at.straight,
                                                                true};
    intrinsics::sync_block();
  }

  // Vectors to be combined, each of as many numbers as a warp puts.
  struct Parts {
    int at;     // where the first starts in shared memory, in floats
    int pitch;  // floats from one to the next
    int count;
  };
  OTALIGN_DEVICE static Parts of_warps() { return {Tile::kPartsAt, Tile::kPitch, Tile::kWarps}; }
  OTALIGN_DEVICE static int place(int g, int groups) { return g < groups ? 4 * g : Tile::kWidth; }

  // Calls f(k) for k < count <= kMost, each by one thread.
  template <int kMost, class F>
  OTALIGN_DEVICE static void for_threads(int count, F f) {
    const int first = intrinsics::computed_anew(intrinsics::thread());
    if constexpr (kMost <= Tile::kThreads) {
      if (first < count) f(first);
    } else {
      OTALIGN_ROLLED
      for (int k = first; k < count; k += Tile::kThreads) f(k);
    }
  }

  // The numbers at `first` and at the same place of the other parts, combined in their order; `kCount` parts, or
  // `count` if it is zero. The combination of columns is the caller's, that of the four numbers their sum.
  template <int kCount, class Numbers, class Combine>
  OTALIGN_DEVICE static Numbers over(const float* first, int pitch, int count, bool columns, Combine combine) {
    Numbers total = *reinterpret_cast<const Numbers*>(first);
    const auto add = [&](const Numbers& next) {
      total = columns ? combined(total, next, combine) : combined(total, next, Sum());
    };
    if constexpr (kCount > 0) {
      Numbers next[kCount];
      OTALIGN_UNROLL
      for (int k = 1; k < kCount; ++k) next[k] = *reinterpret_cast<const Numbers*>(first + k * pitch);
      OTALIGN_UNROLL
      for (int k = 1; k < kCount; ++k) add(next[k]);
    } else {
      OTALIGN_UNROLL_BY(4)
      for (int k = 1; k < count; ++k) add(*reinterpret_cast<const Numbers*>(first + k * pitch));
    }
    return total;
  }
  // The same of the warps' numbers in group g; `groups` is the number of groups of columns.
  template <class Combine>
  OTALIGN_DEVICE float4 over_warps(int g, int groups, Combine combine) const {
    const float* const first = shared + Tile::kPartsAt + place(g, groups);
    return over<Tile::kWarps, float4>(first, Tile::kPitch, Tile::kWarps, g < groups, combine);
  }

  // Sends four numbers to all blocks of the cluster: kBlocks, or config.cluster if it is zero.
  template <int kBlocks>
  OTALIGN_DEVICE void send_to_all(float4 value, float* to, intrinsics::Mailbox* box) const {
    if constexpr (kBlocks > 0) {
      OTALIGN_UNROLL
      for (int k = 0; k < kBlocks; ++k) intrinsics::send(value, to, box, k);
    } else {
      OTALIGN_UNROLL_BY(4)
      for (int k = 0; k < config.cluster; ++k) intrinsics::send(value, to, box, k);
    }
  }

  // Where an exchange among kBlocks blocks has its numbers; known to the compiler if kBlocks is not zero.
  template <int kBlocks>
  OTALIGN_DEVICE bool scatter() const {
    return kBlocks ? scatters(Tile::kWidth, kBlocks) : config.scatter;
  }
  template <int kBlocks>
  OTALIGN_DEVICE int slice_pitch() const {
    constexpr int known = Tile::places_in(kBlocks ? kBlocks : 1).slice;
    return 4 * (kBlocks ? known : at.slice);
  }
  template <int kBlocks>
  OTALIGN_DEVICE int inbox_pitch() const {
    constexpr int known = Tile::places_in(kBlocks ? kBlocks : 1).inbox_pitch;
    return kBlocks ? known : at.inbox_pitch;
  }
  template <int kBlocks>
  OTALIGN_DEVICE int blocks() const {
    return kBlocks ? kBlocks : config.cluster;
  }

  // The thread's columns, and numbers behind them, combined over all warps of kBlocks blocks, or of config.cluster if
  // it is zero. Threads beyond the last number combine that one: a branch would take longer.
  template <int kBlocks, class Combine>
  OTALIGN_DEVICE void combine_all(int width, float (&totals)[kTurns], Combine combine) {
#ifndef OTALIGN_MUTATE_1
    intrinsics::sync_block();
#endif
    constexpr int kParts = kBlocks == 1 ? Tile::kWarps : scatters(Tile::kWidth, kBlocks) ? 1 : kBlocks;
    const Parts parts = blocks<kBlocks>() == 1 ? of_warps() : of_blocks<kBlocks>((width + 3) / 4, combine);
    const int first = intrinsics::computed_anew(intrinsics::thread());
    OTALIGN_UNROLL
    for (int k = 0; k < kTurns; ++k) {
      const int beyond = first + k * Tile::kThreads, j = beyond < Tile::kPitch ? beyond : Tile::kPitch - 1;
      totals[k] = over<kParts, float>(shared + parts.at + j, parts.pitch, parts.count, j < Tile::kWidth, combine);
    }
  }

  template <class F>
  OTALIGN_DEVICE void hand_out(const float (&totals)[kTurns], F use) const {
    const int first = intrinsics::computed_anew(intrinsics::thread());
    OTALIGN_UNROLL
    for (int k = 0; k < kTurns; ++k) {
      const int j = first + k * Tile::kThreads;
      if (j >= Tile::kWidth && j < Tile::kPitch) shared[kNumbers + j - Tile::kWidth] = totals[k];
      use(k, j, totals[k]);
    }
  }

  // The sums of all blocks. Each block sends all of its sums to all others; or, if these are many (`scatter`), combines
  // one slice of the columns for all and sends them that: then fewer numbers are sent, but in two steps. Two inboxes
  // take turns: a block that writes into an inbox again has received what the others sent in between, which they did
  // only after they had read that inbox.
  template <int kBlocks, class Combine>
  OTALIGN_DEVICE Parts of_blocks(int groups, Combine combine) {
#ifdef OTALIGN_MUTATE_4
    const int inbox = Tile::kInboxAt;
#else
    const int inbox = Tile::kInboxAt + epoch % 2 * inbox_pitch<kBlocks>();
#endif
    intrinsics::Mailbox* const box = mailbox(epoch % 2);
    const int parity = epoch / 2 % 2;
    ++epoch;
    if (scatter<kBlocks>()) return of_slices<kBlocks>(groups, inbox, box, parity, combine);
    if (intrinsics::thread() == kReceiver) intrinsics::expect(box, blocks<kBlocks>() * (groups + 1) * 16);
    for_threads<Tile::kWidth / 4 + 1>(groups + 1, [&](int g) {
      float* const to = shared + inbox + intrinsics::rank() * Tile::kPitch + place(g, groups);
      send_to_all<kBlocks>(over_warps(g, groups, combine), to, box);
    });
    intrinsics::wait(box, parity);
    return {inbox, Tile::kPitch, blocks<kBlocks>()};
  }
  template <int kBlocks, class Combine>
  OTALIGN_DEVICE Parts of_slices(int groups, int inbox, intrinsics::Mailbox* box, int parity, Combine combine) {
    intrinsics::Mailbox* const box_of_totals = box + 2;
    const int pitch = slice_pitch<kBlocks>(), totals = inbox + blocks<kBlocks>() * pitch;
    // An exchange of the four numbers alone has one group, which is the slice of the first block.
    const int slice = groups ? current().slice : 1, inv_slice = groups ? current().inv_slice : 65536;
    const int mine = intrinsics::rank() * slice;
    const int size = static_cast<int>(within(groups + 1 - mine, 0, slice));
    if (intrinsics::thread() == kReceiver) {
      intrinsics::expect(box, blocks<kBlocks>() * size * 16);
      intrinsics::expect(box_of_totals, (groups + 1) * 16);
    }
    for_threads<Tile::kWidth / 4 + 1>(groups + 1, [&](int g) {
      const int to = g * inv_slice >> 16;  // g / slice
      float* const there = shared + inbox + intrinsics::rank() * pitch + (g - to * slice) * 4;
      intrinsics::send(over_warps(g, groups, combine), there, box, to);
    });
    intrinsics::wait(box, parity);
    for_threads<Tile::kWidth / 4 + 1>(size, [&](int k) {
      // A slice starts with its first group; the group of the four numbers follows the others directly.
      const int g = mine + k;
      const float* const first = shared + inbox + k * 4;
      const float4 total = over<kBlocks, float4>(first, pitch, blocks<kBlocks>(), g < groups, combine);
      send_to_all<kBlocks>(total, shared + totals + place(g, groups), box_of_totals);
    });
    intrinsics::wait(box_of_totals, parity);
    return {totals, 0, 1};
  }

  uint32_t epoch = 0;  // exchanges among blocks so far
};

}  // namespace otalign::cuda
