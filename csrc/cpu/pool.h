// Memory for the large results, which is kept and reused instead of returned to the system.
//
// The C library returns every allocation above 32 MiB to the system at once. Without the pool each training step would
// fault in its gradients page by page, which takes longer than computing them.
#pragma once

#include <cstddef>
#include <utility>

namespace otalign {

// At least `size` bytes, aligned to a page; the contents are arbitrary. The destructor returns them to the pool.
class PooledMemory {
 public:
  explicit PooledMemory(size_t size);
  ~PooledMemory();
  PooledMemory(const PooledMemory&) = delete;
  PooledMemory(PooledMemory&& other) noexcept
      : size_(other.size_), capacity_(other.capacity_), data_(std::exchange(other.data_, nullptr)) {}
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  size_t size_, capacity_;
  void* data_;
};

// The most bytes that the pool keeps: OTALIGN_POOL_MB, 512 unless set; 0 switches it off.
size_t pool_limit();
// The bytes that it keeps now.
size_t pool_idle();

}  // namespace otalign
