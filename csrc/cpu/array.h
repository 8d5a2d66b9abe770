// Memory that an item may need beside the scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace otalign::OTALIGN_ISA {

// An array that grows. Without memory it stays as it is, and `ok` is false. (std::vector would be compiled for this
// instruction set under a name that the linker shares with all other code.)
template <class N>
class Array {
 public:
  Array() = default;
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  bool ok() const { return ok_; }
  int64_t size() const { return size_; }
  void clear() { size_ = 0; }
  void push(N value) {
    if (size_ == capacity_ && !reserve(2 * capacity_ + 64)) return;
    data_[size_++] = value;
  }
  // Makes room for `count` more, to be written by `put`.
  bool room(int64_t count) { return size_ + count <= capacity_ || reserve(2 * capacity_ + count + 64); }
  void put(N value) { data_[size_++] = value; }
  void zeros(int64_t size) {
    if (size > capacity_ && !reserve(size)) return;
    size_ = size;
    for (int64_t k = 0; k < size; ++k) data_[k] = N(0);
  }
  N& operator[](int64_t k) { return data_[k]; }
  const N& operator[](int64_t k) const { return data_[k]; }

 private:
  bool reserve(int64_t capacity) {
    void* const grown = std::realloc(data_, capacity * sizeof(N));
    if (!grown) return ok_ = false;
    data_ = static_cast<N*>(grown);
    capacity_ = capacity;
    return true;
  }

  N* data_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
  bool ok_ = true;
};

}  // namespace otalign::OTALIGN_ISA
