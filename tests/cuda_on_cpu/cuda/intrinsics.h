// csrc/cuda/intrinsics.h for a CPU: the threads of a cluster are fibers that take turns, or threads of the system.
//
// Fibers switch only where threads wait for each other. A warp runs as far ahead of the others as it can, until the
// random generator picks another one. A thread that reads a value before another has written it gets poison, and gets
// it again with the same seed. Threads of the system are for ThreadSanitizer, which reports a missing barrier as a
// race. So the waits here must order no more than their counterparts on a GPU. (std::barrier orders more, and hides
// races.)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#ifdef OTALIGN_SHIM_THREADS
#include <thread>
#else
#include <ucontext.h>
#endif

#define OTALIGN_DEVICE inline
#define OTALIGN_UNROLL
#define OTALIGN_UNROLL_BY(count)
#define OTALIGN_ROLLED
#define OTALIGN_IN_ORDER

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace otalign::cuda::intrinsics {

template <class Ready>
void wait_until(Ready ready);

class Barrier {
 public:
  void meet(int size) {
    const int now = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, now + 1, __ATOMIC_RELEASE);
    } else {
      wait_until([&] { return __atomic_load_n(&generation, __ATOMIC_ACQUIRE) != now; });
    }
  }

 private:
  int arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  float given[2][32];
};

struct BlockState {
  BlockState(int threads, int bytes)
      : threads(threads), warps(threads / 32), memory(static_cast<char*>(operator new(bytes, std::align_val_t(16)))) {
    std::memset(memory, 0xFF, bytes);  // NaN
  }
  BlockState(const BlockState&) = delete;
  ~BlockState() { operator delete(memory, std::align_val_t(16)); }

  int threads;
  std::vector<Warp> warps;
  Barrier barrier;
  int against[3] = {0, 0, 0};  // votes
  char* memory;                // (bytes,) shared memory
};

struct Cluster {
  std::vector<std::unique_ptr<BlockState>> blocks;
  Barrier barrier;
};

struct Thread {
  Cluster* cluster;
  BlockState* block;
  int number, block_number, rank;
  int swaps = 0, votes = 0;
  bool (*ready)(const void*) = nullptr;  // whether the condition that it waits for holds; null = it does not wait
  const void* awaited = nullptr;
};

#ifdef OTALIGN_SHIM_THREADS
inline thread_local Thread* self;
template <class Ready>
void wait_until(Ready ready) {
  while (!ready()) std::this_thread::yield();
}
#else
inline Thread* self;
void let_others();
template <class Ready>
void wait_until(Ready ready) {
  self->awaited = &ready;
  self->ready = [](const void* awaited) { return (*static_cast<const Ready*>(awaited))(); };
  let_others();
  self->ready = nullptr;
}
#endif

OTALIGN_DEVICE int thread() { return self->number; }
OTALIGN_DEVICE int block() { return self->block_number; }
OTALIGN_DEVICE int rank() { return self->rank; }
OTALIGN_DEVICE char* shared_memory() { return self->block->memory; }
OTALIGN_DEVICE int computed_anew(int number) { return number; }
OTALIGN_DEVICE void wait_for_kernels_before() {}
OTALIGN_DEVICE void sync_warp() { self->block->warps[self->number / 32].barrier.meet(32); }
OTALIGN_DEVICE void sync_block() { self->block->barrier.meet(self->block->threads); }
OTALIGN_DEVICE void sync_cluster() {
  self->cluster->barrier.meet(static_cast<int>(self->cluster->blocks.size()) * self->block->threads);
}

OTALIGN_DEVICE bool all_of_block(bool vote) {
  int* const against = self->block->against;
  const int turn = self->votes++ % 3;
  if (!vote) __atomic_add_fetch(&against[turn], 1, __ATOMIC_RELAXED);
  sync_block();
  if (self->number == 0) __atomic_store_n(&against[(turn + 2) % 3], 0, __ATOMIC_RELAXED);
  return __atomic_load_n(&against[turn], __ATOMIC_RELAXED) == 0;
}

OTALIGN_DEVICE float swap(float value, int mask) {
  Warp& warp = self->block->warps[self->number / 32];
  const int turn = self->swaps++ % 2, lane = self->number % 32;
  warp.given[turn][lane] = value;
  warp.barrier.meet(32);
  return warp.given[turn][lane ^ mask];
}

template <class Numbers>
OTALIGN_DEVICE void store(Numbers value, float* to) {
  *reinterpret_cast<Numbers*>(to) = value;
}

OTALIGN_DEVICE float reciprocal(float x) { return 1 / x; }

// The high 32 bits are the number of the phase. The low ones are the bytes still to arrive, and kOpen more until
// `expect`.
using Mailbox = uint64_t;
constexpr uint64_t kOpen = 1 << 24;

OTALIGN_DEVICE void count(Mailbox* box, int64_t bytes) {
  uint64_t seen = __atomic_load_n(box, __ATOMIC_RELAXED), next;
  do {
    next = seen + bytes;
    if (static_cast<uint32_t>(next) == 0) next += (uint64_t{1} << 32) + kOpen;
  } while (!__atomic_compare_exchange_n(box, &seen, next, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED));
}

OTALIGN_DEVICE void open(Mailbox* box) { __atomic_store_n(box, kOpen, __ATOMIC_RELAXED); }
OTALIGN_DEVICE void expect(Mailbox* box, int bytes) { count(box, bytes - static_cast<int64_t>(kOpen)); }
OTALIGN_DEVICE void wait(Mailbox* box, int parity) {
  wait_until([&] { return static_cast<int>(__atomic_load_n(box, __ATOMIC_ACQUIRE) >> 32 & 1) != parity; });
}

OTALIGN_DEVICE void send(float4 value, float* to, Mailbox* box, int rank) {
  char* const there = self->cluster->blocks[rank]->memory;
  char* const here = self->block->memory;
  *reinterpret_cast<float4*>(there + (reinterpret_cast<char*>(to) - here)) = value;
  count(reinterpret_cast<Mailbox*>(there + (reinterpret_cast<char*>(box) - here)), -static_cast<int64_t>(sizeof value));
}

// Runs kernel() in every thread of a cluster.
#ifdef OTALIGN_SHIM_THREADS

inline void run(std::vector<Thread>& threads, const std::function<void()>& kernel, unsigned) {
  std::vector<std::thread> running;
  for (Thread& thread : threads)
    running.emplace_back([&] {
      self = &thread;
      kernel();
    });
  for (std::thread& thread : running) thread.join();
}

#else

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Scheduler {
  std::vector<Fiber> fibers;
  std::vector<Thread>* threads;
  std::vector<bool> ended;
  const std::function<void()>* kernel;
  size_t current = 0;
  std::minstd_rand random;
  ucontext_t home;
};
inline Scheduler* scheduler;

inline void go_on(ucontext_t* from, size_t next) {
  scheduler->current = next;
  self = &(*scheduler->threads)[next];
  swapcontext(from, &scheduler->fibers[next].context);
}

// The next thread of `count` from `first` on, after `last`, that waits for nothing; `count` if there is none.
inline size_t next_ready(size_t first, size_t count, size_t last) {
  for (size_t k = 1; k <= count; ++k) {
    const size_t i = (last + k) % count;
    const Thread& thread = (*scheduler->threads)[first + i];
    if (!scheduler->ended[first + i] && (!thread.ready || thread.ready(thread.awaited))) return i;
  }
  return count;
}

// The fiber to continue with: one of the same warp, or sometimes of any warp; -1 if all have ended.
inline int64_t next_fiber() {
  Scheduler& s = *scheduler;
  const size_t all = s.fibers.size(), warp = s.current / 32 * 32;
  if (s.random() % 256) {
    const size_t i = next_ready(warp, 32, s.current - warp);
    if (i < 32) return static_cast<int64_t>(warp + i);
  }
  const size_t i = next_ready(0, all, s.random() % all);
  if (i < all) return static_cast<int64_t>(i);
  if (std::find(s.ended.begin(), s.ended.end(), false) == s.ended.end()) return -1;
  std::fputs("the threads of a cluster wait for each other for ever\n", stderr);
  std::abort();
}

inline void let_others() { go_on(&scheduler->fibers[scheduler->current].context, next_fiber()); }

inline void fiber() {
  (*scheduler->kernel)();
  Scheduler& s = *scheduler;
  ucontext_t* const mine = &s.fibers[s.current].context;
  s.ended[s.current] = true;
  const int64_t next = next_fiber();
  if (next < 0) setcontext(&s.home);
  go_on(mine, next);
}

inline void prepare(Fiber& f) {
  constexpr size_t kStack = 1 << 17;
  f.stack.reset(new char[kStack]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  makecontext(&f.context, fiber, 0);
}

inline void run(std::vector<Thread>& threads, const std::function<void()>& kernel, unsigned seed) {
  Scheduler s;
  s.fibers.resize(threads.size());
  s.ended.resize(threads.size());
  s.threads = &threads;
  s.kernel = &kernel;
  s.random.seed(seed);
  scheduler = &s;
  for (Fiber& f : s.fibers) prepare(f);
  go_on(&s.home, next_fiber());
}

#endif

// A launch: `clusters` clusters, one after the other, of `cluster` blocks each.
inline void launch(int clusters, int cluster, int threads, int bytes, unsigned seed,
                   const std::function<void()>& kernel) {
  for (int c = 0; c < clusters; ++c) {
    Cluster state;
    std::vector<Thread> all;
    for (int rank = 0; rank < cluster; ++rank) {
      state.blocks.push_back(std::make_unique<BlockState>(threads, bytes));
      for (int t = 0; t < threads; ++t) all.push_back({&state, state.blocks.back().get(), t, c * cluster + rank, rank});
    }
    run(all, kernel, seed + static_cast<unsigned>(c));
  }
}

}  // namespace otalign::cuda::intrinsics
