// Tasks over OpenMP threads, and memory for each thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "blas.h"
#include "isa.h"

namespace otalign::cpu {

constexpr double kThreadWork = 1 << 20;  // multiply-adds for which it pays to wake a thread
constexpr double kSolveWork = 64;        // multiply-adds for each number of an item's cost, as a guess

// Bytes of a cache line.
constexpr int64_t kLine = 64;
inline bool aligned(const void* memory) { return reinterpret_cast<uintptr_t>(memory) % kLine == 0; }

// Memory that starts at a cache line. It is not initialised.
class Buffer {
 public:
  explicit Buffer(size_t size = 0) : data_(size ? ::operator new(size, std::align_val_t(kLine)) : nullptr) {}
  template <class T>
  T* as(size_t offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_.get()) + offset);
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(kLine)); }
  };
  std::unique_ptr<void, Free> data_;
};

// Memory for each thread, in parts; the size of a part, in bytes, is the largest that any task needs.
class Scratch {
 public:
  Scratch(int threads, const std::vector<size_t>& parts) {
    size_t total = 0;
    for (size_t size : parts) {
      offsets_.push_back(total);
      total += (size + kLine - 1) / kLine * kLine;
    }
    for (int t = 0; t < threads; ++t) buffers_.emplace_back(total);
  }
  template <class T>
  T* get(int thread, int part) const {
    return buffers_[thread].as<T>(offsets_[part]);
  }

 private:
  std::vector<size_t> offsets_;
  std::vector<Buffer> buffers_;
};

// Runs tasks in parallel, in their order, until the caller's poll returns true. If a task throws, `run` throws the same
// exception after all tasks have ended: no exception may leave a parallel region.
class Team {
 public:
  Team(int threads, Poll poll) : threads_(std::max(1, threads)), poll_(poll) {}

  int threads() const { return threads_; }
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }

  // `work` is in multiply-adds. Little work does not pay for a second thread, which may have to be woken.
  template <class F>
  void run(int64_t tasks, double work, const F& task) {
    const double useful = std::min(static_cast<double>(tasks), work / kThreadWork);
    const int team = static_cast<int>(std::max(1.0, std::min<double>(threads_, useful)));
    std::atomic<int64_t> next{0};
    std::atomic<int> finished{0};
#pragma omp parallel num_threads(team)
    {
      const OneThread one;
#ifdef _OPENMP
      const int thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
      const int thread = 0, members = 1;
#endif
      Seat seat{this, thread == 0};
      for (int64_t k = next++; k < tasks && !should_stop(&seat); k = next++)
        attempt(task, k, thread, Poll{&poll_stop, &seat});
      finished.fetch_add(1, std::memory_order_release);
      if (seat.caller) wait_for(finished, members, seat);
    }
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  // A thread of the team; `caller` is the one that called `run`.
  struct Seat {
    Team* team;
    bool caller;
  };

  template <class F>
  void attempt(const F& task, int64_t k, int thread, Poll poll) noexcept {
    try {
      task(k, thread, poll);
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
      stop_.store(true, std::memory_order_relaxed);
    }
  }

  // Only the calling thread can call the poll, so it does not sleep in the barrier while others work. Each of its naps
  // is a small share of the time that it has waited, so that it delays the end by no more than that share.
  static void wait_for(const std::atomic<int>& finished, int members, Seat& seat) {
    const auto begin = std::chrono::steady_clock::now();
    while (finished.load(std::memory_order_acquire) < members) {
      should_stop(&seat);
      const auto waited = std::chrono::steady_clock::now() - begin;
      if (waited < std::chrono::milliseconds(1))
        std::this_thread::yield();
      else
        std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(waited / 128, std::chrono::milliseconds(10)));
    }
  }

  static bool poll_stop(void* seat) { return should_stop(static_cast<Seat*>(seat)); }
  static bool should_stop(Seat* seat) {
    Team& team = *seat->team;
    if (seat->caller && team.poll_.function && !team.stopped()) {
      const auto now = std::chrono::steady_clock::now();
      if (now - team.polled_ > std::chrono::milliseconds(20)) {
        team.polled_ = now;
        if (team.poll_()) team.stop_.store(true, std::memory_order_relaxed);
      }
    }
    return team.stopped();
  }

  const int threads_;
  const Poll poll_;
  std::atomic<bool> stop_{false}, failed_{false};
  std::exception_ptr failure_;
  std::chrono::steady_clock::time_point polled_ = std::chrono::steady_clock::now();
};

// Rows or columns [begin, end) of an item, as the pass defines them.
struct Task {
  int64_t item, begin, end;
  double work;  // for the order only
};

inline void longest_first(std::vector<Task>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
}

}  // namespace otalign::cpu
