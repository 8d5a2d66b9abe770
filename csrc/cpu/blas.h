// The only connection to a BLAS: pointers to its Fortran gemm, which Python finds in the library that torch has loaded.
#pragma once

#include <cstdint>

namespace otalign {

// Null pointers select the built-in product, which works everywhere and is slow. The last three keep the library to one
// thread, and are null if it has no such function: `limit` sets the number of threads for calls from this thread and
// returns the number before, as in MKL; `threads` and `set_threads` act on the whole process, as in OpenBLAS. Do not
// call this while anything computes.
void use_blas(const char* name, void* sgemm, void* dgemm, void* limit, void* threads, void* set_threads);
const char* blas_name();
// The most multiply-adds of one product, since no product can be interrupted.
double most_work();

// C (m, n) = A (m, k) B (n, k)^T. All matrices are row-major; lda, ldb, ldc are elements from one row to the next.
template <class T>
void gemm_nt(int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc);
// C (m, n) += A (m, k) B (k, n).
template <class T>
void gemm_nn_add(int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc);
// C (m, n) += A (k, m)^T B (k, n).
template <class T>
void gemm_tn_add(int64_t m, int64_t n, int64_t k, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc);

// While an object of this class exists, the library computes calls from this thread in this thread, since the items
// already run in parallel. A library that has one number of threads for the whole process keeps it at one while any
// such object exists.
class OneThread {
 public:
  OneThread();
  ~OneThread();
  OneThread(const OneThread&) = delete;

 private:
  int before = 0;
};

}  // namespace otalign
