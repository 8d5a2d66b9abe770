// What one item needs of the hardware: a table of functions for each instruction set, chosen once at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace otalign {

// One item: n by m, its options, and where its results go. `K` holds the cost with any prior on entry to `solve`, the
// plan on return; it is followed by kPlanGap zeros. a and b may be null (uniform). Where one of the two points has no
// mass, the plan is kept as minus what it would be with a weight of one there: zero to all who ask for mass, and the
// derivative by that weight.
template <class T>
struct Item {
  int64_t n, m;
  T* K;
  const T* a;
  const T* b;
  const T* init;
  double reg, rho_x, rho_y;
  int64_t max_iter;
  double tol;
  bool symmetric;  // both sides are the same points: f = g, by averaged updates
  T* f;
  T* g;
  T* mass_x;
  T* mass_y;
  const T* scale_x;
  const T* scale_y;
  const T* distance;  // n by m, for the Euclidean cost
  Cost cost;
  PriorKind prior;
  double prior_parameters[2];
  double value, linear, error;
  int32_t n_iter;
};

// Numbers to allocate for a vector of n that is read in whole hardware vectors.
constexpr int64_t padded(int64_t n) { return (n + 31) / 16 * 16; }

// The reverse pass of one item. `lift_x`, `lift_y` solve the implicit system; the gradient by the cost is
//   H_ij = P_ij (w + l - (l C_ij + G_ij - lift_x_i - lift_y_j) / reg)
// for incoming gradients w of the value, l of the linear value and G of the plan.
template <class T>
struct Reverse {
  double value, linear;
  bool implicit() const { return linear != 0 || plan; }
  const T* plan;  // G, n by m, or null
  T* term_x;      // (n): C_ij = term_x_i + term_y_j - reg log P_ij
  T* term_y;      // (padded m)
  T* lift_x;      // (n)
  T* lift_y;      // (padded m)
  T* diagonal_x;  // (n): what multiplies a point itself in its gradient
  T* diagonal_y;  // (m)
  T* a;           // gradients by the weights, or null
  T* b;
};

// Called now and then during long work; true = stop.
struct Poll {
  bool (*function)(void*);
  void* context;
  bool operator()() const { return function && function(context); }
};

// Asks a poll after every so many numbers of work that asking costs nothing.
class Pace {
 public:
  explicit Pace(Poll poll) : poll_(poll) {}
  // Whether to stop, after work on `numbers` more.
  bool stops(int64_t numbers) {
    done_ += numbers;
    if (done_ < kNumbers) return stopped_;
    done_ = 0;
    return stopped_ = stopped_ || poll_();
  }

 private:
  static constexpr int64_t kNumbers = 1 << 17;
  const Poll poll_;
  int64_t done_ = 0;
  bool stopped_ = false;
};

template <class T>
struct Kernels {
  // Bytes of scratch that solve and reverse need.
  size_t (*scratch)(int64_t n, int64_t m);

  // `count` numbers of any type to T and back.
  void (*read)(Scalar type, const void* from, T* to, int64_t count);
  void (*write)(Scalar type, const T* from, void* to, int64_t count);

  // Sum of the squares of each of `rows` rows of x (stride in elements).
  void (*squares)(const T* x, int64_t rows, int64_t dim, int64_t stride, T* out);

  // Products x y^T in rows [begin, end) of K become costs, prior included; false if anything is not finite.
  // x, y (rows of `dim`, strides in elements) are read where the product has lost its digits.
  bool (*cost)(Item<T>& item, int64_t begin, int64_t end, const T* x, int64_t x_stride, const T* y, int64_t y_stride,
               int64_t dim, T* distance);

  void (*solve)(Item<T>& item, void* scratch, Poll poll);
  void (*fail)(Item<T>& item);  // everything NaN

  void (*reverse)(const Item<T>& item, Reverse<T>& reverse, void* scratch, Poll poll);
  // Rows [begin, end) of the matrix A for which the gradients are A y + diag x and A^T x + diag y; with a given cost,
  // of the gradient itself. out is (end - begin, m).
  void (*panel)(const Item<T>& item, const Reverse<T>& reverse, int64_t begin, int64_t end, T* out);

  // out_i = diagonal_i * x_i, a matrix of rows by dim.
  void (*scale_rows)(const T* x, int64_t x_stride, const T* diagonal, int64_t rows, int64_t dim, T* out,
                     int64_t out_stride);

  // Zeroes memory that is not read soon, past the caches where it is much.
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
