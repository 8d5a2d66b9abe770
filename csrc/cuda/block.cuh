// A thread block at work on an item: who has which rows and columns, sums over warps and over the blocks of a cluster.
#pragma once

#include <cuda/intrinsics.h>

#include <cfloat>
#include <cmath>

#include "tiling.h"

namespace otalign::cuda {

struct Sum {
  OTALIGN_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Largest {
  OTALIGN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Combines kCount values of every lane over the lanes whose numbers differ in the bits from `kBit` down to `kLast`.
// Where it can, a lane gives away half of its values and keeps the other, so that it ends up with a few values over all
// lanes: of those, returns the index of the first. An odd number of values stays whole: then several lanes have the
// same.
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
      values[k] = combine(kept, port::swap(given, kBit));
    }
    return (upper ? half : 0) + fold<half, kBit / 2, kLast>(values, lane, combine);
  } else {
    OTALIGN_UNROLL
    for (int k = 0; k < kCount; ++k) values[k] = combine(values[k], port::swap(values[k], kBit));
    return fold<kCount, kBit / 2, kLast>(values, lane, combine);
  }
}

// How many values a lane has after that, and the bits of lanes that have the same.
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

// The value of all lanes whose numbers differ below `kLanes`.
template <int kLanes, class Combine>
OTALIGN_DEVICE float over_lanes(float value, Combine combine) {
  OTALIGN_UNROLL
  for (int bit = kLanes / 2; bit > 0; bit /= 2) value = combine(value, port::swap(value, bit));
  return value;
}

OTALIGN_DEVICE float logarithm(float x) { return x == 0 ? -INFINITY : logf(x); }
OTALIGN_DEVICE float finite_top(float top) { return top == -INFINITY ? 0 : top; }
OTALIGN_DEVICE float4 load4(const float* at) { return *reinterpret_cast<const float4*>(at); }
template <class Combine>
OTALIGN_DEVICE float4 combined(float4 p, float4 q, Combine combine) {
  return {combine(p.x, q.x), combine(p.y, q.y), combine(p.z, q.z), combine(p.w, q.w)};
}
OTALIGN_DEVICE float part(float4 v, int k) { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }

// Where an item lies: first row, length, and the rows up to the next item, which outputs have to fill.
struct Segment {
  int64_t start;
  int length;
  int64_t slot;
};

OTALIGN_DEVICE int64_t within(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

OTALIGN_DEVICE Segment segment(const Side& side, int64_t item, int64_t items) {
  if (!side.starts) {
    const int64_t length = side.lengths ? within(side.lengths[item], 0, side.size) : side.size;
    return {item * side.size, static_cast<int>(length), side.size};
  }
  const int64_t first = within(side.starts[item], 0, side.rows);
  const int64_t next = within(side.starts[item + 1], first, side.rows);
  return {first, static_cast<int>(within(next - first, 0, side.size)),
          item == items - 1 ? side.rows - first : next - first};
}

OTALIGN_DEVICE float weight(const void* weights, int64_t row, int length) {
  return weights ? static_cast<const float*>(weights)[row] : 1.0f / static_cast<float>(length);
}

// What a potential adds to the dual by unit of mass: itself, or -rho (exp(-f / rho) - 1) if the marginal is relaxed.
OTALIGN_DEVICE float worth(float potential, float rho) {
  return rho == INFINITY ? potential : -rho * expm1f(-potential / rho);
}

// What stands, over reg, for the infinite potential of a point that nothing reaches: 0, or if the marginal is relaxed
// what is worth rho to the last digit. (Bounded, so that it can be added to others.)
OTALIGN_DEVICE float unreached_potential(float rho, float per_reg) {
  return rho == INFINITY ? 0 : fminf(40 * rho * per_reg, 1e30f);
}
OTALIGN_DEVICE float or_unreached(float potential, float unreached) {
  return potential == INFINITY ? unreached : potential;
}

// P / (a b) at an exponent. (Bounded: where a b is too small for a float, there is no mass either.)
OTALIGN_DEVICE float density(float exponent) { return fminf(expf(exponent), FLT_MAX); }

// A number that is no regularisation, or whose reciprocal is infinite, is NaN, and so is the item.
OTALIGN_DEVICE float regularisation(double given) {
  const float epsilon = static_cast<float>(given);
  return epsilon >= FLT_MIN && epsilon < INFINITY ? epsilon : NAN;
}

// The four numbers of a row: in shared memory, or in L2 if its part of the matrix is there.
template <class Pitch>
struct RowNumbers {
  float* at;
  Pitch pitch;
  OTALIGN_DEVICE float& operator()(int which) const { return at[which * pitch]; }
};

// What a block knows of its item; in shared memory, since registers are for the matrix.
struct Item {
  int64_t item;
  Segment x, y;
  int64_t first;  // the block's first row, of all rows
  float epsilon, per_reg;
  int slice, per_slice;  // groups of columns that a block sums for all, and 2^16 over that, rounded up
  float keep_x, keep_y;  // damping of the two updates
  float missing;         // the weight of points that have to give or take it, but that nothing reaches
};
static_assert(sizeof(Item) <= 4 * (kFixed - kItem));

template <class L>
class Block {
 public:
  static constexpr int C = L::kColumns;

  OTALIGN_DEVICE explicit Block(const Arguments& arguments)
      : p(arguments.problem),
        choice(arguments.choice),
        at(arguments.memory),
        shared(reinterpret_cast<float*>(port::shared_memory())),
        warp(port::thread() / 32),
        lane(port::thread() % 32),
        across(lane % L::kLanes),
        below(warp * L::kBelow + lane / L::kLanes) {
    if (choice.cluster > 1) {
      if (port::thread() == 0)
        for (int k = 0; k < 4; ++k) port::open(mailbox(k));
      port::sync_block();
      port::sync_cluster();
    }
    if (choice.ordered) put_in_order();
  }

  // Calls solve() for every item of the cluster. Where they are put in order the longest come first, and clusters take
  // them in turns from both ends.
  template <class F>
  OTALIGN_DEVICE void for_items(F solve) {
    const int cluster = port::block() / choice.cluster;
    for (int64_t round = 0; round * choice.in_flight < p.items; ++round) {
      const int64_t place = round * choice.in_flight + turn_in(round, cluster);
      if (place >= p.items) continue;
      port::sync_block();  // all have done with the item before
      enter(choice.ordered ? order()[round] : place);
      solve();
    }
    if (choice.cluster > 1) port::sync_cluster();
  }

  // Columns ----------------------------------------------------------------------------------------------------------

  OTALIGN_DEVICE int column(int c) const { return ((c / 4) * L::kLanes + across) * 4 + c % 4; }
  // Vectors with one number for every column.
  OTALIGN_DEVICE float* columns(int which) const { return shared + at.columns + which * L::kWidth; }
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
    for (int j = port::thread(); j < L::kWidth; j += L::kThreads) f(j);
  }

  // Rows -------------------------------------------------------------------------------------------------------------
  // A row of the block is near if its part of the matrix is in registers or shared memory.

  OTALIGN_DEVICE int near() const { return L::kHeld + choice.shared; }
  // Row r of the lanes `below`, in registers: its numbers lie so that the lanes of a warp look into different banks.
  OTALIGN_DEVICE RowNumbers<int> register_row(int r) const { return {shared + at.rows + below * L::kRows + r, near()}; }
  OTALIGN_DEVICE RowNumbers<int> near_row(int i) const {
    const int place = i < L::kHeld ? i % L::kStep * L::kRows + i / L::kStep : i;
    return {shared + at.rows + place, near()};
  }
  OTALIGN_DEVICE RowNumbers<int64_t> far_row(int i) const {
    return {static_cast<float*>(p.scratch) + current().first + i, p.x.rows};
  }
  OTALIGN_DEVICE float& row(int which, int i) const { return i < near() ? near_row(i)(which) : far_row(i)(which); }
  OTALIGN_DEVICE const float* costs() const { return static_cast<const float*>(p.given) + current().first * p.pitch; }
  OTALIGN_DEVICE float* far_matrix() const {  // rows as those of the costs
    return static_cast<float*>(p.scratch) + (4 * p.x.rows + 31) / 32 * 32 + current().first * p.pitch;
  }
  // Calls f(i, whether there is such a row) for every row of this lane.
  template <class F>
  OTALIGN_DEVICE void for_rows(F f) const {
    OTALIGN_ROLLED
    for (int i = below; i - below < count; i += L::kStep) f(i, i < count);
  }

  // A row of costs, or of a matrix like them, times `factor`; zero where there are none.
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

  // What every warp has for its columns and, besides, four numbers: to be exchanged.
  template <class Combine>
  OTALIGN_DEVICE void put_columns(float (&values)[C], Combine combine) {
    const int first = fold<C, 16, L::kLanes>(values, lane, combine);
    float* const mine = shared + at.parts + warp * L::kPitch;
    constexpr int left = folded(C, 16, L::kLanes);
    OTALIGN_UNROLL
    for (int k = 0; k < left; k += left % 4 == 0 ? 4 : left) {
      float* const to = mine + column(first + k);
      if constexpr (left % 4 == 0)
        port::store(float4{values[k], values[k + 1], values[k + 2], values[k + 3]}, to);
      else if constexpr (left == 2)
        port::store(float2{values[k], values[k + 1]}, to);
      else
        *to = values[k];
    }
    static_assert(left % 4 == 0 || left <= 2);
  }
  OTALIGN_DEVICE void put_numbers(float4 values) {
    OTALIGN_UNROLL
    for (int k = 0; k < 4; ++k) {
      const float sum = over_lanes<32>(part(values, k), Sum());
      if (lane == 0) shared[at.parts + warp * L::kPitch + L::kWidth + k] = sum;
    }
  }
  OTALIGN_DEVICE void put_number(float value) {
    value = over_lanes<32>(value, Sum());
    if (lane < 4) shared[at.parts + warp * L::kPitch + L::kWidth + lane] = lane ? 0 : value;
  }

  // Combines what the warps of all blocks of the cluster have put, in the order of their numbers, so that all blocks
  // have the same bits. Calls use(j, four) for four columns from j on, each by one thread. After the next sync_block,
  // before which nobody may put anything again, numbers() are the sums of the four numbers.
  template <class Combine, class F>
  OTALIGN_DEVICE void exchange(int width, Combine combine, F use) {
    port::sync_block();
    const int groups = (width + 3) / 4;  // and the last, the numbers
    const Parts parts = choice.cluster == 1 ? of_warps() : of_blocks(groups, combine);
    OTALIGN_ROLLED
    for (int g = port::thread(); g <= groups; g += L::kThreads) {
      const float4 total = over<4>(parts, g, groups, combine);
      if (g < groups)
        use(4 * g, total);
      else
        *reinterpret_cast<float4*>(shared + kNumbers) = total;
    }
  }
  OTALIGN_DEVICE float4 numbers() const { return load4(shared + kNumbers); }

  // The sum over the threads of the block.
  OTALIGN_DEVICE float sum_block(float value) {
    float* const parts = shared + kSums;
    value = over_lanes<32>(value, Sum());
    if constexpr (L::kWarps == 1) {
      return value;
    } else {
      port::sync_block();
      if (lane == 0) parts[warp] = value;
      port::sync_block();
      value = parts[0];
      OTALIGN_UNROLL
      for (int w = 1; w < L::kWarps; ++w) value += parts[w];
      return value;
    }
  }

  OTALIGN_DEVICE const Item& current() const { return *reinterpret_cast<const Item*>(shared + kItem); }
  OTALIGN_DEVICE float& missing() const { return reinterpret_cast<Item*>(shared + kItem)->missing; }

  const Problem& p;
  const Choice& choice;
  const Memory& at;
  float* const shared;
  const int warp, lane, across, below;
  int count, m;  // rows of the item that this block has, and all of its columns

 private:
  OTALIGN_DEVICE port::Mailbox* mailbox(int k) const { return reinterpret_cast<port::Mailbox*>(shared) + k; }
  OTALIGN_DEVICE uint16_t* order() const { return reinterpret_cast<uint16_t*>(shared + at.order + kOrdered); }

  OTALIGN_DEVICE int turn_in(int64_t round, int cluster) const {
    return round % 2 ? choice.in_flight - 1 - cluster : cluster;
  }

  OTALIGN_DEVICE void put_in_order() {
    float* const sizes = shared + at.order;
    const int items = static_cast<int>(p.items);
    for (int i = port::thread(); i < items; i += L::kThreads)
      sizes[i] = static_cast<float>(segment(p.x, i, items).length) * static_cast<float>(segment(p.y, i, items).length);
    port::sync_block();
    const int cluster = port::block() / choice.cluster;
    for (int i = port::thread(); i < items; i += L::kThreads) {
      int place = 0;
      for (int j = 0; j < items; ++j) place += sizes[j] > sizes[i] || (sizes[j] == sizes[i] && j < i);
      const int round = place / choice.in_flight;
      if (turn_in(round, cluster) == place % choice.in_flight) order()[round] = static_cast<uint16_t>(i);
    }
    port::sync_block();
  }

  OTALIGN_DEVICE void enter(int64_t next) {
    const Segment x = segment(p.x, next, p.items), y = segment(p.y, next, p.items);
    const int share = (x.length + choice.cluster - 1) / choice.cluster;
    const int begin = port::rank() * share < x.length ? port::rank() * share : x.length;
    m = y.length;
    count = m == 0 ? 0 : x.length - begin < share ? x.length - begin : share;
    const float epsilon = regularisation(p.reg ? p.reg[next] : p.reg_of_all);
    const int slice = ((m + 3) / 4 + choice.cluster) / choice.cluster;
    const auto keep = [&](double rho) { return static_cast<float>(damping(epsilon, rho)); };
    if (port::thread() == 0)
      *reinterpret_cast<Item*>(shared + kItem) = {
          next, x, y, x.start + begin, epsilon, 1 / epsilon, slice, 65536 / slice + 1, keep(p.rho_x), keep(p.rho_y), 0};
    port::sync_block();
  }

  // Vectors of as many numbers as a warp puts, to be combined.
  struct Parts {
    int at, pitch, count;  // in shared memory
  };
  OTALIGN_DEVICE Parts of_warps() const { return {at.parts, L::kPitch, L::kWarps}; }
  OTALIGN_DEVICE static int place(int g, int groups) { return g < groups ? 4 * g : L::kWidth; }
  template <int kUnroll, class Combine>
  OTALIGN_DEVICE float4 over(const Parts& parts, int g, int groups, Combine combine) const {
    const float* const first = shared + parts.at + place(g, groups);
    float4 total = load4(first);
    OTALIGN_UNROLL_BY(kUnroll)
    for (int k = 1; k < parts.count; ++k) {
      const float4 next = load4(first + k * parts.pitch);
      total = g < groups ? combined(total, next, combine) : combined(total, next, Sum());
    }
    return total;
  }

  // What the blocks have. Each tells the others all of its numbers; or, if these are many, sums a slice for all and
  // tells them that: then fewer numbers are on their way, which is twice as long. Two inboxes take turns: who writes
  // into one again has seen, by what came in between, that it has been read.
  template <class Combine>
  OTALIGN_DEVICE Parts of_blocks(int groups, Combine combine) {
    const int inbox = at.inbox + epoch % 2 * at.inbox_pitch;
    port::Mailbox* const box = mailbox(epoch % 2);
    const int parity = epoch / 2 % 2;
    ++epoch;
    if (choice.scatter) return of_slices(groups, inbox, box, parity, combine);
    if (port::thread() == 0) port::expect(box, choice.cluster * (groups + 1) * 16);
    OTALIGN_ROLLED
    for (int g = port::thread(); g <= groups; g += L::kThreads) {
      const float4 total = over<L::kWarps>(of_warps(), g, groups, combine);
      float* const to = shared + inbox + port::rank() * L::kPitch + place(g, groups);
      OTALIGN_UNROLL_BY(4)
      for (int k = 0; k < choice.cluster; ++k) port::send(total, to, box, k);
    }
    port::wait(box, parity);
    return {inbox, L::kPitch, choice.cluster};
  }
  template <class Combine>
  OTALIGN_DEVICE Parts of_slices(int groups, int inbox, port::Mailbox* box, int parity, Combine combine) {
    port::Mailbox* const box_of_totals = box + 2;
    const int totals = inbox + choice.cluster * at.slice * 4;
    // (The exchange of numbers alone has another slice: all of it is one block's.)
    const int slice = groups ? current().slice : 1, per_slice = groups ? current().per_slice : 65536;
    const int mine = port::rank() * slice;
    const int size = static_cast<int>(within(groups + 1 - mine, 0, slice));
    if (port::thread() == 0) {
      port::expect(box, choice.cluster * size * 16);
      port::expect(box_of_totals, (groups + 1) * 16);
    }
    OTALIGN_ROLLED
    for (int g = port::thread(); g <= groups; g += L::kThreads) {
      const int to = g * per_slice >> 16;
      float* const there = shared + inbox + (port::rank() * at.slice + g - to * slice) * 4;
      port::send(over<L::kWarps>(of_warps(), g, groups, combine), there, box, to);
    }
    port::wait(box, parity);
    OTALIGN_ROLLED
    for (int g = mine + port::thread(); g < mine + size; g += L::kThreads) {
      // Slices lie from their first group on, the numbers not apart.
      const int at_first = inbox + (g - mine) * 4 - place(g, groups);
      const float4 total = over<4>({at_first, at.slice * 4, choice.cluster}, g, groups, combine);
      OTALIGN_UNROLL_BY(4)
      for (int k = 0; k < choice.cluster; ++k) port::send(total, shared + totals + place(g, groups), box_of_totals, k);
    }
    port::wait(box_of_totals, parity);
    return {totals, 0, 1};
  }

  int epoch = 0;
};

}  // namespace otalign::cuda
