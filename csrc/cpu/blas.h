// The one seam to a matrix library: a Fortran gemm at a pointer that Python found in the BLAS which torch has loaded.
#pragma once

#include <cstdint>

namespace otalign {

// Null pointers select the built-in product, which is right everywhere and fast nowhere. What keeps the library to one
// thread is null where there is no such function: `limit` sets the number of threads for calls from this thread and
// returns the number before, as MKL's does; `threads` and `set_threads` are of the whole process, as OpenBLAS's are.
// Not while anything computes.
void use_blas(const char* name, void* sgemm, void* dgemm, void* limit, void* threads, void* set_threads);
const char* blas_name();

// C (m, n) = A (m, k) B (n, k)^T. All matrices are row-major; ld* are elements from row to row.
template <class T>
void gemm_nt(int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc);
// C (m, n) += A (m, k) B (k, n).
template <class T>
void gemm_nn_add(int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc);
// C (m, n) += A (k, m)^T B (k, n).
template <class T>
void gemm_tn_add(int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc);

// While it lives, the library computes calls from this thread in this thread: the items are what runs in parallel. A
// library whose number of threads is of the whole process has one while any of these lives.
class OneThread {
 public:
  OneThread();
  ~OneThread();
  OneThread(const OneThread&) = delete;

 private:
  int before = 0;
};

}  // namespace otalign
