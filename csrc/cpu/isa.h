// All work on one item, as a table of functions that is compiled for each instruction set. One table is chosen at run
// time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace otalign {

// One item: its sizes, its options, and where its results go. Vectors and matrices are contiguous. `K` holds the cost
// with any prior on entry to `solve`, the plan on return; kPlanGap zeros follow it.
//
// The plan's entries: Negative = zero mass; its magnitude is dP/dweight. Clamp at 0 to read the plan. Such entries are
// those where one of the two points has weight zero.
template <class T>
struct Item : Options {
  int64_t n, m;
  T* K;               // (n, m)
  const T* a;         // (n,) mass, sums to 1; null = uniform
  const T* b;         // (m,) mass, sums to 1; null = uniform
  const T* init;      // (m,) g to start from, in the unit of the cost; null = zero
  double reg;         // in the unit of the cost
  bool symmetric;     // both sides are the same points: f = g, by averaged updates
  T* f;               // (n,) out, in the unit of the cost
  T* g;               // (m,) out
  T* mass_x;          // (n,) out: mass of the plan in each row, divided by the weight
  T* mass_y;          // (m,) out
  const T* scale_x;   // (n,) see Side::scale
  const T* scale_y;   // (m,)
  const T* distance;  // (n, m) for the Euclidean cost, else null
  Cost cost;
  PriorKind prior;
  double prior_parameters[2];
  double value, linear, error;
  int32_t n_iter;
  bool starved;  // out: there was no memory for what this item needs beside the scratch memory
};

// Elements to allocate for a vector of n that is read in whole hardware vectors.
constexpr int64_t padded(int64_t n) { return (n + 31) / 16 * 16; }

// The reverse pass of one item. `adjoint_x`, `adjoint_y` solve the implicit system; the gradient by the cost is
//   H_ij = P_ij (w + l - (l C_ij + G_ij - adjoint_x_i - adjoint_y_j) / reg)
// for incoming gradients w of the value, l of the linear value and G of the plan.
template <class T>
struct Reverse {
  double value, linear;  // w, l
  bool implicit() const { return linear != 0 || plan; }
  const T* plan;  // (n, m) G; null = zero
  T* term_x;      // (n,) C_ij = term_x_i + term_y_j - reg log P_ij
  T* term_y;      // (padded(m),)
  T* adjoint_x;   // (n,) in the unit of G; null unless implicit
  T* adjoint_y;   // (padded(m),) in the unit of G; null unless implicit
  T* diagonal_x;  // (n,) factor of a point itself in its gradient
  T* diagonal_y;  // (m,)
  T* a;           // (n,) out: gradient by the weights; null = not wanted
  T* b;           // (m,) out
};

// Called from time to time during long work; true = stop.
struct Poll {
  bool (*function)(void*);
  void* context;
  bool operator()() const { return function && function(context); }
};

// The rows of a long item are cut into chunks, which several threads can work on. A sum over rows is made chunk by
// chunk, and the sums of the chunks are added in their order, by however many threads. So the chunks may depend on the
// item's sizes alone.
struct Chunks {
  int64_t rows, count;  // rows of a chunk (the last may have fewer); how many there are
};
constexpr int64_t kMostChunks = 64;
constexpr Chunks chunks_of(int64_t n, int64_t m) {
  constexpr int64_t kEntries = 1 << 14,
                    kRows = 64;      // of a chunk, at least: an iteration of it takes a microsecond or two
  constexpr int64_t kMultiple = 16;  // whole hardware vectors, and whole cache lines
  int64_t pieces = 1;
  while (2 * pieces <= kMostChunks && 2 * pieces * kRows <= n && 2 * pieces * kEntries <= n * m) pieces *= 2;
  if (pieces <= 2) return {n, 1};
  const int64_t rows = (n + pieces * kMultiple - 1) / (pieces * kMultiple) * kMultiple;
  return {rows, (n + rows - 1) / rows};
}

// Threads that work on the chunks of an item. They run task(context, chunk) once for each chunk in [0, count), at the
// same time and in any order; everything written before can be read in a task, and everything written there afterwards.
struct Crew {
  using Task = void (*)(void* context, int64_t chunk);
  void (*function)(void*, int64_t count, Task task, void* context);  // null: the calling thread alone
  void* self;
  void run(int64_t count, Task task, void* context) const {
    if (function) return function(self, count, task, context);
    for (int64_t chunk = 0; chunk < count; ++chunk) task(context, chunk);
  }
};

// Calls a poll once for so many numbers of work that the call costs next to nothing.
class Pace {
 public:
  explicit Pace(Poll poll) : poll_(poll) {}
  // Whether to stop. Call it after work on `numbers` more numbers.
  bool stops(int64_t numbers) {
    done_ += numbers;
    if (done_ < kNumbers) return stopped_;
    done_ = 0;
    return stopped_ = stopped_ || poll_();
  }

 private:
  static constexpr int64_t kNumbers = 1 << 17;
  Poll poll_;
  int64_t done_ = 0;
  bool stopped_ = false;
};

template <class T>
struct Kernels {
  // Bytes of scratch memory that solve and reverse need.
  size_t (*scratch)(int64_t n, int64_t m);

  // Converts `count` contiguous numbers of any type to T, and back.
  void (*read)(Scalar type, const void* from, T* to, int64_t count);
  void (*write)(Scalar type, const T* from, void* to, int64_t count);

  // out_i = sum of the squares of row i. x is (rows, dim), `stride` elements from row to row; out is (rows,).
  void (*squares)(const T* x, int64_t rows, int64_t dim, int64_t stride, T* out);

  // Turns the products x y^T in rows [begin, end) of K into costs, prior included; returns false if any number is not
  // finite. x (end - begin, dim) and y (m, dim), strides in elements, are read where the product has lost its digits.
  // distance is (n, m), out, for the Euclidean cost.
  bool (*cost)(Item<T>& item, int64_t begin, int64_t end, const T* x, int64_t x_stride, const T* y, int64_t y_stride,
               int64_t dim, T* distance);

  // Only the calling thread calls the poll. The crew gets work for chunks_of(item.n, item.m).
  void (*solve)(Item<T>& item, void* scratch, Poll poll, Crew crew);
  void (*fail)(Item<T>& item, Poll poll);  // sets all results to NaN

  void (*reverse)(const Item<T>& item, Reverse<T>& reverse, void* scratch, Poll poll);
  // Rows [begin, end) of the matrix A such that the gradients by points are A y + diag x and A^T x + diag y; with a
  // given cost, of the gradient by the cost. out is (end - begin, m), contiguous.
  void (*panel)(const Item<T>& item, const Reverse<T>& reverse, int64_t begin, int64_t end, T* out);

  // out_i = diagonal_i * x_i. x and out are (rows, dim), strides in elements; diagonal is (rows,).
  void (*scale_rows)(const T* x, int64_t x_stride, const T* diagonal, int64_t rows, int64_t dim, T* out,
                     int64_t out_stride);

  // Zeroes memory that is not read soon. Large memory is written past the caches.
  void (*clear)(void* memory, size_t bytes);
};

struct Isa {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
};

// The best instruction set that was compiled in and that this processor has.
const Isa& isa();

template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return *isa().f32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return *isa().f64;
}

}  // namespace otalign
