#include "blas.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <string>
#include <thread>

#include "fork.h"

namespace otalign {
namespace {

// Fortran's gemm: transa, transb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc; column-major.
template <class T>
using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*,
                      const T*, const int*, const T*, T*, const int*);
using Limit = int (*)(int);
using Threads = int (*)();
using SetThreads = void (*)(int);

struct Library {
  std::string name = "built-in";
  Gemm<float> sgemm = nullptr;
  Gemm<double> dgemm = nullptr;
  Limit limit = nullptr;
  Threads threads = nullptr;
  SetThreads set_threads = nullptr;
} library;

// For a library with one number of threads for the whole process: how many OneThread objects there are, and the number
// that the process has set.
std::mutex mutex;
int limited = 0, before_all = 0;

// The number may have been set by others meanwhile.
void limit_process() {
  const int threads = library.threads();
  if (limited > 0 && threads == 1) return;
  before_all = threads;
  library.set_threads(1);
}
void release_process() {
  if (library.threads() == 1) library.set_threads(before_all);
}

// A BLAS has locks of its own, which a child would find as they are, so no product is in progress while a thread forks.
std::atomic<int> products{0};
std::atomic<bool> forking{false};
std::mutex fork_mutex;

class Product {
 public:
  Product() {
    for (products.fetch_add(1); forking.load(); products.fetch_add(1)) {
      products.fetch_sub(1);
      const std::lock_guard<std::mutex> until_forked(fork_mutex);
    }
  }
  ~Product() { products.fetch_sub(1); }
  Product(const Product&) = delete;
};

void before_fork() {
  fork_mutex.lock();
  forking = true;
  while (products.load() > 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
  mutex.lock();
}
void after_fork() {
  mutex.unlock();
  forking = false;
  fork_mutex.unlock();
}
// A child has none of the threads that compute in its parent.
void after_fork_in_child() {
  if (limited > 0) release_process();
  limited = 0;
  after_fork();
}
const int watches_forks = on_fork(before_fork, after_fork, after_fork_in_child);

template <class T>
Gemm<T> pointer();
template <>
Gemm<float> pointer() {
  return library.sgemm;
}
template <>
Gemm<double> pointer() {
  return library.dgemm;
}

// Row-major C = op(A) op(B) + beta C is column-major C^T = op(B)^T op(A)^T + beta C^T.
template <class T>
void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B,
          int64_t ldb, T beta, T* C, int64_t ldc) {
  if (const Gemm<T> call = pointer<T>()) {
    const Product product;
    const int rows = static_cast<int>(n), columns = static_cast<int>(m), depth = static_cast<int>(k);
    const int a = static_cast<int>(lda), b = static_cast<int>(ldb), c = static_cast<int>(ldc);
    const T one = 1;
    call(b_transposed ? "T" : "N", a_transposed ? "T" : "N", &rows, &columns, &depth, &one, B, &b, A, &a, &beta, C, &c);
    return;
  }
  for (int64_t i = 0; i < m; ++i) {
    T* row = C + i * ldc;
    for (int64_t j = 0; j < n; ++j) row[j] = beta == 0 ? T(0) : row[j];
    for (int64_t p = 0; p < k; ++p) {
      const T factor = a_transposed ? A[p * lda + i] : A[i * lda + p];
      for (int64_t j = 0; j < n; ++j) row[j] += factor * (b_transposed ? B[j * ldb + p] : B[p * ldb + j]);
    }
  }
}

}  // namespace

void use_blas(const char* name, void* sgemm, void* dgemm, void* limit, void* threads, void* set_threads) {
  library = {name,
             reinterpret_cast<Gemm<float>>(sgemm),
             reinterpret_cast<Gemm<double>>(dgemm),
             reinterpret_cast<Limit>(limit),
             reinterpret_cast<Threads>(threads),
             reinterpret_cast<SetThreads>(set_threads)};
}

double most_work() { return library.sgemm ? 2.0 * (1ll << 30) : 1 << 26; }

const char* blas_name() { return library.name.c_str(); }

template <class T>
void gemm_nt(int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc) {
  gemm<T>(false, true, m, n, k, A, lda, B, ldb, 0, C, ldc);
}
template <class T>
void gemm_nn_add(int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc) {
  gemm<T>(false, false, m, n, k, A, lda, B, ldb, 1, C, ldc);
}
template <class T>
void gemm_tn_add(int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc) {
  gemm<T>(true, false, m, n, k, A, lda, B, ldb, 1, C, ldc);
}

#define OTALIGN_INSTANTIATE(T)                                                                             \
  template void gemm_nt(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t);     \
  template void gemm_nn_add(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t); \
  template void gemm_tn_add(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t);
OTALIGN_INSTANTIATE(float)
OTALIGN_INSTANTIATE(double)

OneThread::OneThread() {
  if (library.limit) {
    before = library.limit(1);
  } else if (library.set_threads) {
    const std::lock_guard<std::mutex> lock(mutex);
    limit_process();
    ++limited;
  }
}
OneThread::~OneThread() {
  if (library.limit) {
    library.limit(before);
  } else if (library.set_threads) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (--limited == 0) release_process();
  }
}

}  // namespace otalign
