// What becomes of the engine in a child of fork: it has one thread, and every lock as it was.
#pragma once

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace otalign {

// Makes fork call `before` in the parent, and then `in_parent` and `in_child`. Returns an error number, or 0.
inline int on_fork(void (*before)(), void (*in_parent)(), void (*in_child)()) {
#if defined(__unix__) || defined(__APPLE__)
  return pthread_atfork(before, in_parent, in_child);
#else
  return 0;
#endif
}

inline std::atomic<bool> is_child{false};
inline const int watches_forks_of_openmp = on_fork(nullptr, nullptr, [] { is_child.store(true); });

// Whether this process, or one before it, was forked after the engine was loaded. The threads of OpenMP are gone then,
// and libgomp would wait for them forever.
inline bool forked() { return is_child.load(std::memory_order_relaxed); }

}  // namespace otalign
