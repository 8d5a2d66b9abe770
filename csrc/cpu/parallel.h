// Tasks over OpenMP threads, and memory for each thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "blas.h"
#include "fork.h"
#include "isa.h"

namespace otalign::cpu {

#ifndef OTALIGN_THREAD_WORK  // tests wake threads for less
#define OTALIGN_THREAD_WORK (1 << 20)
#endif
constexpr double kThreadWork = OTALIGN_THREAD_WORK;  // multiply-adds for which it pays to wake a thread
constexpr double kSolveWork = 64;                    // multiply-adds for each number of an item's cost, as a guess

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

// How a thread waits for others: for a while it spins, since a chunk takes microseconds; then it naps, because its core
// may be the only one of the thread that it waits for. Naps become longer until spinning has been enough once: on a
// core for two threads it never is, since the other thread makes no progress meanwhile.
class Wait {
 public:
  // To be called again and again; returns for how long to nap now, mostly zero.
  std::chrono::nanoseconds step() {
    const auto now = std::chrono::steady_clock::now();
    if (begin_ == Time{}) begin_ = now;
    if (now - begin_ < std::chrono::microseconds(20)) {
      pause();
      return {};
    }
    const auto nap = nap_;
    nap_ = std::min<std::chrono::nanoseconds>(2 * nap_, std::chrono::milliseconds(1));
    begin_ = Time{};
    napped_ = true;
    return nap;
  }
  // The wait is over.
  void end() {
    if (!napped_) nap_ = kNap;
    napped_ = false;
    begin_ = Time{};
  }

 private:
  using Time = std::chrono::steady_clock::time_point;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  static constexpr std::chrono::nanoseconds kNap = std::chrono::microseconds(50);
  Time begin_{};
  std::chrono::nanoseconds nap_ = kNap;
  bool napped_ = false;
};

// The chunks of an item: how many, and of how many numbers each.
struct Parts {
  int64_t count, numbers;
};

// An item that threads without one of their own can work on. Its leader, the thread that solves it, makes jobs of some
// chunks each; helpers join and work on them. The leader works on every chunk that no other thread has begun, so it
// never waits for a thread that does not run, except in the middle of a chunk.
//
// The chunks of a job are divided into ranges, one for each thread, so that a thread meets the rows of the last job in
// its cache again; a thread that is done with its range goes on with the others. The state of a range is one number
// with that of its job, so that a late thread cannot take a chunk of the next job for one of the last: while it holds a
// chunk of a job, the job is not over, and its fields stay.
class Shared {
 public:
  // The leader's side. There are no helpers before `open`, and none join after `close`. The leader calls the poll
  // between chunks; once that is true, no more chunks are begun.
  void open(Parts parts, Poll poll) {
    chunks_ = parts.count;
    numbers_ = parts.numbers;
    pace_ = Pace(poll);
    open_.store(true, std::memory_order_release);
  }
  void close() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      open_.store(false, std::memory_order_release);
    }
    closed_.notify_all();
  }
  Crew crew() { return {&run_job, this}; }

  // The helper's side. The chunks for each thread if one more joins; 0 if none is wanted.
  double wants() const {
    if (!open_.load(std::memory_order_acquire)) return 0;
    const int threads = helpers_.load(std::memory_order_relaxed) + 2;
    return threads <= chunks_ ? static_cast<double>(chunks_) / threads : 0.0;
  }
  // Works on the leader's jobs until there are no more. Calls `stops` from time to time: true = go.
  template <class F>
  void help(const F& stops) {
    const int seat = helpers_.fetch_add(1, std::memory_order_relaxed) + 1;
    uint32_t last = 0;
    Wait wait;
    while (open_.load(std::memory_order_acquire) && !stops()) {
      const uint32_t job = job_.load(std::memory_order_acquire);
      if (job == last) {
        const auto nap = wait.step();
        if (nap.count() == 0) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        closed_.wait_for(lock, nap, [&] { return !open_.load(std::memory_order_relaxed); });
        continue;
      }
      last = job;
      wait.end();
      work(job, seat);
    }
    helpers_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  static constexpr int kRanges = 16;

  // What is left of a range: chunks [next, end) of a job.
  struct Range {
    uint32_t job;
    uint16_t next, end;
  };
  struct alignas(kLine) Line {
    std::atomic<Range> left{Range{0, 0, 0}};
  };
  static_assert(sizeof(Range) == 8 && std::atomic<Range>::is_always_lock_free);

  static void run_job(void* self, int64_t count, Crew::Task task, void* context) {
    static_cast<Shared*>(self)->run_job(count, task, context);
  }

  void run_job(int64_t count, Crew::Task task, void* context) {
    const int64_t threads = 1 + helpers_.load(std::memory_order_relaxed);
    if (threads == 1) {
      for (int64_t chunk = 0; chunk < count && go_on(0); ++chunk) task(context, chunk);
      return;
    }
    const int64_t ranges = std::min<int64_t>({threads, count, kRanges});
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    task_ = task;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    ranges_.store(static_cast<int>(ranges), std::memory_order_relaxed);
    for (int64_t r = 0; r < ranges; ++r) {
      const auto begin = static_cast<uint16_t>(count * r / ranges),
                 end = static_cast<uint16_t>(count * (r + 1) / ranges);
      lines_[r].left.store({job, begin, end}, std::memory_order_release);
    }
    job_.store(job, std::memory_order_release);
    work(job, 0);
    for (Wait wait; done_.load(std::memory_order_acquire) < count;) std::this_thread::sleep_for(wait.step());
  }

  // Whether to work on one more chunk.
  bool go_on(int seat) {
    if (seat == 0 && pace_.stops(numbers_)) stopped_.store(true, std::memory_order_relaxed);
    return !stopped_.load(std::memory_order_relaxed);
  }

  void work(uint32_t job, int seat) {
    const int ranges = ranges_.load(std::memory_order_relaxed);
    for (int r = 0; r < ranges; ++r) {
      std::atomic<Range>& range = lines_[(seat + r) % ranges].left;
      Range left = range.load(std::memory_order_acquire);
      while (left.job == job && left.next < left.end) {
        const Range rest{job, static_cast<uint16_t>(left.next + 1), left.end};
        if (!range.compare_exchange_weak(left, rest, std::memory_order_acquire)) continue;
        if (go_on(seat)) task_(context_, left.next);
        done_.fetch_add(1, std::memory_order_release);
        left = range.load(std::memory_order_acquire);
      }
    }
  }

  int64_t chunks_ = 0, numbers_ = 0;
  Pace pace_{Poll{}};          // of the leader
  Crew::Task task_ = nullptr;  // of the job, like its context
  void* context_ = nullptr;
  alignas(kLine) std::atomic<bool> open_{false}, stopped_{false};
  std::atomic<int> helpers_{0}, ranges_{1};
  alignas(kLine) std::atomic<uint32_t> job_{0};
  alignas(kLine) std::atomic<int64_t> done_{0};
  Line lines_[kRanges];
  std::mutex mutex_;  // of `closed_`, which ends the naps of helpers
  std::condition_variable closed_;
};

// Calls work(thread, members) on `most` threads at the same time, or on fewer if the system has no more. Thread 0 is
// the calling one, for which `members` is right. For one thread nothing of OpenMP runs, since it may allocate memory,
// and ends the process if there is none.
template <class F>
void on_threads(int most, const F& work) {
#ifdef _OPENMP
  if (most > 1 && !forked()) {
#pragma omp parallel num_threads(most)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
  std::vector<std::thread> others;
  try {
    others.reserve(most - 1);
    while (static_cast<int>(others.size()) + 1 < most)
      others.emplace_back([&work, most, thread = static_cast<int>(others.size()) + 1] { work(thread, most); });
  } catch (const std::exception&) {  // no memory or too many threads: those that have started are enough
  }
  work(0, 1 + static_cast<int>(others.size()));
  for (std::thread& other : others) other.join();
#else
  work(0, 1);
#endif
}

// Runs tasks in parallel, in their order, until the caller's poll returns true. If a task throws, `run` throws the same
// exception after all tasks have ended: no exception may leave a parallel region.
class Team {
 public:
  Team(int threads, Poll poll) : threads_(std::max(1, threads)), poll_(poll) {}

  int threads() const { return threads_; }
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }
  // Tells whether the team is to stop, on any thread.
  Poll stopping() {
    return {[](void* self) { return static_cast<const Team*>(self)->stopped(); }, this};
  }

  // Calls task(k, thread, poll) for each k. `work` is in multiply-adds. Little work does not pay for a second thread,
  // which may have to be woken.
  template <class F>
  void run(int64_t tasks, double work, const F& task) {
    const auto one = [](int64_t) { return Parts{1, 0}; };
    share(tasks, work, one, [&](int64_t k, int thread, Poll poll, Crew) { task(k, thread, poll); });
  }

  // Calls task(k, thread, poll, crew) for each k, which has the chunks of parts(k). Threads that find no more tasks
  // help with those that have several.
  template <class C, class F>
  void share(int64_t tasks, double work, const C& parts, const F& task) {
    int64_t pieces = 0, large = 0;
    for (int64_t k = 0; k < tasks; ++k) {
      const int64_t count = parts(k).count;
      pieces += count;
      large += count > 1;
    }
    const double useful = std::min(static_cast<double>(pieces), work / kThreadWork);
    const int team = static_cast<int>(std::max(1.0, std::min<double>(threads_, useful)));
    const bool shares = large > 0;
    const std::unique_ptr<Shared[]> shared(shares ? new Shared[team] : nullptr);  // by thread
    std::atomic<int64_t> next{0}, unopened{shares ? large : 0};
    std::atomic<int> finished{0};
    on_threads(team, [&](int thread, int members) {
      const OneThread one;
      Seat seat{this, thread == 0};
      for (int64_t k = next++; k < tasks && !should_stop(&seat); k = next++) {
        const Parts chunks = parts(k);
        Shared* const own = shares && chunks.count > 1 ? &shared[thread] : nullptr;
        if (own) {
          own->open(chunks, Poll{&poll_stop, &seat});
          unopened.fetch_sub(1, std::memory_order_release);
        }
        attempt([&](Poll poll) { task(k, thread, poll, own ? own->crew() : Crew{}); }, Poll{&poll_stop, &seat});
        if (own) own->close();
      }
      for (Wait wait; shares && !should_stop(&seat);) {
        const bool all_open = unopened.load(std::memory_order_acquire) == 0;
        Shared* const neediest = choose(shared.get(), team);
        if (neediest)
          neediest->help([&] { return should_stop(&seat); });
        else if (all_open)
          break;
        else
          std::this_thread::sleep_for(wait.step());
      }
      finished.fetch_add(1, std::memory_order_release);
      if (seat.caller) wait_for(finished, members, seat);
    });
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  // A thread of the team; `caller` is the one that called `run`.
  struct Seat {
    Team* team;
    bool caller;
  };

  template <class F>
  void attempt(const F& task, Poll poll) noexcept {
    try {
      task(poll);
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
      stop_.store(true, std::memory_order_relaxed);
    }
  }

  // Where a helper saves most; null if none is wanted.
  static Shared* choose(Shared* shared, int count) {
    Shared* best = nullptr;
    double most = 0;
    for (int k = 0; k < count; ++k) {
      const double wants = shared[k].wants();
      if (wants <= most) continue;
      most = wants;
      best = &shared[k];
    }
    return best;
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
