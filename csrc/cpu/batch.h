// A batch as the forward and the backward pass see it: a checked problem, and its items one by one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../problem.h"
#include "isa.h"
#include "parallel.h"

namespace otalign::cpu {

inline size_t bytes(Scalar type) { return type == Scalar::f64 ? 8 : type == Scalar::f32 ? 4 : 2; }
template <class T>
constexpr Scalar scalar() {
  return sizeof(T) == 8 ? Scalar::f64 : Scalar::f32;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check(bool valid, const char* what) {
  if (!valid) throw std::invalid_argument(what);
}

// a * b of sizes; throws rather than overflow.
inline int64_t product(int64_t a, int64_t b) {
  check(a >= 0 && b >= 0, "sizes: expected numbers >= 0");
  check(b == 0 || a <= INT64_MAX / 64 / b, "sizes: too large");
  return a * b;
}

// Throws unless `data` has room for `count` numbers of `size` bytes each.
inline void need(const void* data, int64_t bytes, int64_t count, size_t size, const char* name) {
  const int64_t expected = product(count, static_cast<int64_t>(size));
  if (expected == 0 || (data && bytes >= expected)) return;
  throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) + " bytes of memory, got " +
                              (data ? std::to_string(bytes) : "none"));
}
template <class T>
void need(const Span<T>& memory, int64_t count, size_t size, const char* name) {
  need(memory.data, memory.bytes, count, size, name);
}
// The same for memory that may be missing.
template <class T>
void need_if_any(const Span<T>& memory, int64_t count, size_t size, const char* name) {
  if (memory) need(memory, count, size, name);
}

// Element `offset` of `base`; null if that is null.
template <class T>
T* at(void* base, int64_t offset) {
  return base ? static_cast<T*>(base) + offset : nullptr;
}
template <class T>
const T* at(const void* base, int64_t offset) {
  return base ? static_cast<const T*>(base) + offset : nullptr;
}
// The same for numbers of a type.
inline const char* bytes_at(const void* base, int64_t elements, Scalar type) {
  return at<char>(base, elements * static_cast<int64_t>(bytes(type)));
}
inline char* bytes_at(void* base, int64_t elements, Scalar type) {
  return at<char>(base, elements * static_cast<int64_t>(bytes(type)));
}

// Zeroes the padding behind item b in `out`, a tensor (rows of the side,) with `row` bytes a row.
inline void zero_padding(const Side& side, int64_t items, int64_t b, void* out, size_t row) {
  const int64_t begin = side.row(b) + side.lengths[b];
  const int64_t end = !side.starts ? (b + 1) * side.size : b + 1 == items ? side.rows : begin;
  if (out && end > begin) kernels<float>().clear(static_cast<char*>(out) + begin * row, (end - begin) * row);
}
// Without items there is no padding behind one: zeroes all of `out`.
inline void zero_all(const Side& side, int64_t items, void* out, size_t row) {
  if (out && items == 0 && side.rows > 0) std::memset(out, 0, side.rows * row);
}

// A problem whose lengths and offsets are checked. They are copied first, since the caller's memory may change at any
// time.
class CheckedProblem {
 public:
  explicit CheckedProblem(const Problem& problem) : p(problem) {
    check(p.items >= 0 && p.capacity >= 0, "sizes: expected numbers >= 0");
    own_side(p.x, kept_[0], kept_[1], {"x_lengths", "cu_seqlens_x", "max_seqlen_x"});
    own_side(p.y, kept_[2], kept_[3], {"y_lengths", "cu_seqlens_y", "max_seqlen_y"});
    offsets.reserve(p.items);
    for (int64_t b = 0; b < p.items; ++b) {
      check(n(b) < INT32_MAX && m(b) < INT32_MAX, "lengths: too large for the BLAS");
      offsets.push_back(total);
      total += plan_stride(n(b), m(b));
      check(total <= p.capacity, "capacity: too small for the plans of this batch");
    }
  }
  CheckedProblem(const CheckedProblem&) = delete;

  int64_t n(int64_t b) const { return p.x.lengths[b]; }
  int64_t m(int64_t b) const { return p.y.lengths[b]; }
  bool empty(int64_t b) const { return n(b) == 0 || m(b) == 0; }

  void check_plan(size_t number) const { need(p.plan, p.capacity, number, "plan"); }

  Problem p;
  std::vector<int64_t> offsets;  // (B,) first element of each item's plan
  int64_t total = 0;             // elements in all plans

 private:
  struct Names {
    const char *lengths, *offsets, *longest;
  };

  void own(Span<const int64_t>& memory, std::vector<int64_t>& kept, const char* name) {
    need(memory, p.items, sizeof(int64_t), name);
    kept.assign(memory.data, memory.data + p.items);
    memory = {kept.data(), memory.bytes};
  }

  void own_side(Side& side, std::vector<int64_t>& lengths, std::vector<int64_t>& starts, Names names) {
    check(side.size >= 0 && side.rows >= 0, "sizes: expected numbers >= 0");
    const bool packed = side.starts;
    own(side.lengths, lengths, names.lengths);
    if (packed) own(side.starts, starts, names.offsets);
    if (!packed) check(product(p.items, side.size) <= side.rows, "sizes: expected items of the padded size");
    int64_t begin = 0;
    for (int64_t b = 0; b < p.items; ++b) {
      const int64_t length = lengths[b];
      if (!packed && (length < 0 || length > side.size))
        refuse(names.lengths, "values in [0, ", side.size, "]", length);
      if (!packed) continue;
      if (starts[b] != begin || length < 0 || length > side.rows - begin)
        refuse(names.offsets, "offsets that rise from 0 to at most ", side.rows, "", starts[b]);
      if (length > side.size) refuse(names.longest, "at least the length of the longest item, ", length, "", side.size);
      begin += length;
    }
  }

  [[noreturn]] static void refuse(const char* name, const char* expected, int64_t limit, const char* end, int64_t got) {
    throw std::invalid_argument(std::string(name) + ": expected " + expected + std::to_string(limit) + end + ", got " +
                                std::to_string(got));
  }

  std::vector<int64_t> kept_[4];
};

template <class T>
class Batch : public CheckedProblem {  // T is the type of the computation
 public:
  explicit Batch(const Problem& problem) : CheckedProblem(problem) {
    check_options();
    check_side(p.x, "x", "a");
    check_side(p.y, "y", "b");
    check_plan(sizeof(T));
    need(p.error, p.items, sizeof(T), "error");
    need_if_any(p.init, p.y.rows, sizeof(T), "init");
    if (p.cost == Cost::given) check_given();
    if (p.cost == Cost::euclidean) need(p.distance, p.capacity, sizeof(T), "distance");
    for (int64_t b = 0; b < p.items; ++b) {
      check(!p.symmetric || n(b) == m(b), "symmetric: expected equal lengths on both sides");
      if (empty(b)) continue;  // what it has on the other side is not read, so nothing has confirmed D
      most_n = std::max(most_n, n(b));
      most_m = std::max(most_m, m(b));
      scratch = std::max(scratch, kernels<T>().scratch(n(b), m(b)));
    }
  }

  double error(int64_t b) const { return static_cast<const T*>(p.error)[b]; }

  Item<T> item(int64_t b) const {
    const int64_t x = p.x.row(b), y = p.y.row(b);
    Item<T> it{};
    static_cast<Options&>(it) = p;
    it.n = n(b);
    it.m = m(b);
    it.K = at<T>(p.plan, offsets[b]);
    it.a = at<T>(p.x.weights, x);
    it.b = at<T>(p.y.weights, y);
    it.init = at<T>(p.init, y);
    it.reg = reg_[b];
    it.symmetric = p.symmetric;
    it.f = at<T>(p.x.potential, x);
    it.g = at<T>(p.y.potential, y);
    it.mass_x = at<T>(p.x.mass, x);
    it.mass_y = at<T>(p.y.mass, y);
    it.scale_x = at<T>(p.x.scale, x);
    it.scale_y = at<T>(p.y.scale, y);
    it.distance = at<T>(p.distance, offsets[b]);
    it.cost = p.cost;
    it.prior = p.prior;
    it.prior_parameters[0] = p.prior_parameters[0];
    it.prior_parameters[1] = p.prior_parameters[1];
    return it;
  }

  const char* points(const Side& side, int64_t b, int64_t row, int64_t column) const {
    return bytes_at(side.points, side.element(b) + row * side.row_stride + column, side.points_type);
  }
  bool converts(const Side& side) const { return side.points && side.points_type != scalar<T>(); }

  // A BLAS may round differently with the place in a cache line where a matrix starts, and with the stride of its rows.
  // The bits of an item have to be the same in every batch and layout, so both depend on the item's sizes alone: the
  // products read points, and write their gradients, at the start of a line and `product_stride` apart. Points that are
  // not placed like that are copied first; `may_copy` says whether a side may have any.
  int64_t product_stride(const Side& side, int64_t columns) const {
    return std::max<int64_t>(1, converts(side) ? columns : p.dim);
  }
  bool in_place(const Side& side, const void* points, int64_t row_stride) const {
    return !converts(side) && aligned(points) && row_stride == product_stride(side, 0);
  }
  bool may_copy(const Side& side, const void* points, int64_t item_stride, int64_t row_stride) const {
    const auto in_lines = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % kLine == 0; };
    return points && !(in_place(side, points, row_stride) && in_lines(row_stride) && in_lines(item_stride));
  }
  bool may_copy(const Side& side) const {
    return may_copy(side, side.points, side.starts ? 0 : side.item_stride, side.row_stride);
  }
  bool may_copy_gradient(const Side& side, const void* gradient) const { return may_copy(side, gradient, 0, p.dim); }

  int64_t most_n = 0, most_m = 0;
  size_t scratch = 0;

 private:
  void check_options() {
    need(p.reg, p.items, sizeof(double), "reg");
    reg_.assign(p.reg.data, p.reg.data + p.items);
    for (const double reg : reg_) check(reg > 0 && std::isfinite(reg), "reg: expected finite numbers > 0");
    check(p.dim >= 0 && p.dim < INT32_MAX, "D: too large for the BLAS");
  }

  // Checks the memory of a side's vectors, and of its points up to the last that the strides lead to.
  void check_side(Side& side, const char* name, const char* weights) {
    for (const Span<void>* vector : {&side.potential, &side.mass, &side.scale, &side.exponent})
      need(*vector, side.rows, sizeof(T), name);
    need_if_any(side.weights, side.rows, sizeof(T), weights);
    if (p.cost == Cost::given) return;
    const int64_t slots = side.starts ? 1 : p.items, rows = side.starts ? side.rows : side.size;
    if (slots == 0 || rows == 0 || p.dim == 0) {  // nothing is read, wherever the strides lead
      side.item_stride = side.row_stride = 0;
      return;
    }
    check(side.row_stride >= p.dim && side.item_stride >= 0, "strides: expected rows that do not overlap");
    check(side.row_stride < INT32_MAX, "strides: too large for the BLAS");
    const int64_t last = product(slots - 1, side.item_stride) + product(rows - 1, side.row_stride) + p.dim;
    need(side.points, last, bytes(side.points_type), name);
  }

  void check_given() {
    check(!p.x.starts && !p.y.starts, "C: expected a padded batch");
    int64_t last = 1;
    const int64_t sizes[] = {p.items, p.x.size, p.y.size};
    for (int k = 0; k < 3; ++k) {
      if (sizes[k] == 0) {
        for (int64_t& stride : p.given_strides) stride = 0;
        return;
      }
      check(p.given_strides[k] >= 0, "C: expected strides >= 0");
      last += product(sizes[k] - 1, p.given_strides[k]);
    }
    need(p.given, last, bytes(p.given_type), "C");
  }

  std::vector<double> reg_;
};

// Some rows and columns of an item's points as T.
template <class T>
struct PointsView {
  const T* data;   // (rows, columns), columns contiguous
  int64_t stride;  // elements from one row to the next
};
// An exponent from Side::exponent for scalbn; 0 if the caller has written something else there since the forward pass.
template <class T>
int power(T exponent) {
  return std::abs(exponent) < 5000 ? static_cast<int>(exponent) : 0;
}

// Each point over 2^exponent, in `store` (rows, stride); exponent is (rows,).
template <class T>
PointsView<T> over_powers(PointsView<T> points, int64_t rows, int64_t columns, const T* exponent, T* store,
                          int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < columns; ++d)
      store[i * stride + d] = std::scalbn(points.data[i * points.stride + d], -power(exponent[i]));
  return {store, stride};
}
template <class T>
bool any_power(const T* exponent, int64_t rows) {
  return std::any_of(exponent, exponent + rows, [](T e) { return e != 0; });
}

// Rows and columns of item b's points, placed as the products require: in place, or copied into `buffer`, which has
// room for `rows` rows of `product_stride` elements.
template <class T>
PointsView<T> read_points(const Batch<T>& batch, const Side& side, int64_t b, int64_t row, int64_t rows, int64_t column,
                          int64_t columns, T* buffer) {
  const int64_t stride = batch.product_stride(side, columns);
  const char* const points = batch.points(side, b, row, column);
  if (batch.in_place(side, points, side.row_stride)) return {reinterpret_cast<const T*>(points), stride};
  for (int64_t i = 0; i < rows; ++i)
    kernels<T>().read(side.points_type, batch.points(side, b, row + i, column), buffer + i * stride, columns);
  return {buffer, stride};
}

}  // namespace otalign::cpu
