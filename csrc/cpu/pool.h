// Memory for the large results: blocks that are handed out again instead of going back to the system.
//
// The C library returns every allocation above 32 MiB to the system at once, so that a training step would fault its
// gradients in page by page each time, which takes longer than computing them.
#pragma once

#include <cstddef>

namespace otalign {

// A block of at least `size` bytes, aligned to a page; its contents are arbitrary. Goes back to the pool at the end.
class Block {
 public:
  explicit Block(size_t size);
  ~Block();
  Block(const Block&) = delete;
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  size_t size_, capacity_;
  void* data_;
};

// Bytes that may lie idle in the pool: OTALIGN_POOL_MB, 512 unless set; 0 switches it off.
size_t pool_limit();
size_t pool_idle();

}  // namespace otalign
