#include "pool.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "fork.h"

namespace otalign {
namespace {

constexpr size_t kPage = 4096;

struct Idle {
  void* data;
  size_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::vector<Idle> blocks;  // oldest first
  size_t bytes = 0;
};

// Never destroyed: allocations may outlive everything else at exit.
Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

// Another thread may be holding the lock while this one forks; the child would wait for it forever.
const int watches_forks =
    on_fork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });

void give_back(void* data) { ::operator delete(data, std::align_val_t(kPage)); }

}  // namespace

size_t pool_limit() {
  static const size_t limit = [] {
    const char* megabytes = std::getenv("OTALIGN_POOL_MB");
    return (megabytes ? std::strtoull(megabytes, nullptr, 10) : 512) << 20;
  }();
  return limit;
}

size_t pool_idle() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().bytes;
}

PooledMemory::PooledMemory(size_t size) : size_(size), capacity_((size + kPage - 1) / kPage * kPage) {
  if (size > SIZE_MAX / 2) throw std::bad_alloc();
  {
    // The smallest allocation that is large enough, if at most a quarter more than needed.
    const std::lock_guard<std::mutex> lock(pool().mutex);
    auto& blocks = pool().blocks;
    auto best = blocks.end();
    for (auto it = blocks.begin(); it != blocks.end(); ++it)
      if (it->capacity >= capacity_ && it->capacity - capacity_ <= capacity_ / 4 &&
          (best == blocks.end() || it->capacity < best->capacity))
        best = it;
    if (best != blocks.end()) {
      data_ = best->data;
      capacity_ = best->capacity;
      pool().bytes -= best->capacity;
      blocks.erase(best);
      return;
    }
  }
  data_ = ::operator new(capacity_, std::align_val_t(kPage));
}

PooledMemory::~PooledMemory() {
  if (!data_) return;
  if (capacity_ > pool_limit()) {
    give_back(data_);
    return;
  }
  const std::lock_guard<std::mutex> lock(pool().mutex);
  auto& blocks = pool().blocks;
  while (pool().bytes + capacity_ > pool_limit()) {
    give_back(blocks.front().data);
    pool().bytes -= blocks.front().capacity;
    blocks.erase(blocks.begin());
  }
  try {
    blocks.push_back({data_, capacity_});
    pool().bytes += capacity_;
  } catch (const std::bad_alloc&) {  // the list cannot grow
    give_back(data_);
  }
}

}  // namespace otalign
