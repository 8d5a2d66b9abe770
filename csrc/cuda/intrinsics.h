// All that the kernels use of the hardware. Tests put a header of the same name in its place, which runs them on a CPU.
//
// A cluster is a group of thread blocks that run at the same time and can write into each other's shared memory. It
// needs compute capability 9.0; before that, every block is a cluster of its own.
#pragma once

#include <cstdint>

#define OTALIGN_DEVICE __device__ __forceinline__
#define OTALIGN_PRAGMA(text) _Pragma(#text)
#define OTALIGN_UNROLL OTALIGN_PRAGMA(unroll)
#define OTALIGN_UNROLL_BY(count) OTALIGN_PRAGMA(unroll count)
#define OTALIGN_ROLLED OTALIGN_UNROLL_BY(1)
// The compiler may not move memory accesses across it. Without it, the compiler would hold all costs of a matrix at
// once.
#define OTALIGN_IN_ORDER asm volatile("" ::: "memory")

namespace otalign::cuda::intrinsics {

OTALIGN_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
OTALIGN_DEVICE int block() { return static_cast<int>(blockIdx.x); }

// The number of this block in its cluster.
OTALIGN_DEVICE int rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

OTALIGN_DEVICE uint32_t address(const void* in_shared_memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(in_shared_memory));
}

// The block's dynamic shared memory, aligned to 16 bytes. Its address passes through an instruction that the compiler
// does not know: or else it would make it anew wherever it is used, from the number of the block in its cluster, which
// is slow to read.
OTALIGN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  uint32_t at = address(memory);
  asm volatile("" : "+r"(at));
  return static_cast<char*>(__cvta_shared_to_generic(at));
}

// The same number. The compiler computes what depends on it where it is used, and keeps none of that in registers.
OTALIGN_DEVICE int computed_anew(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Returns when the kernels before this one in its stream have ended, and what they wrote can be read. On chips with
// clusters, launch.cu lets a kernel begin before that. Until then, no thread may read or write global memory.
OTALIGN_DEVICE void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

OTALIGN_DEVICE void sync_warp() { __syncwarp(); }
OTALIGN_DEVICE void sync_block() { __syncthreads(); }
OTALIGN_DEVICE bool all_of_block(bool vote) { return __syncthreads_and(vote); }
OTALIGN_DEVICE float swap(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

OTALIGN_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Stores adjacent numbers in shared memory with one instruction; from plain code the compiler stores them one by one.
// `to` is aligned to the size of `value`.
OTALIGN_DEVICE void store(float4 value, float* to) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address(to)), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
}
OTALIGN_DEVICE void store(float2 value, float* to) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address(to)), "f"(value.x), "f"(value.y) : "memory");
}

// A mailbox is an mbarrier in shared memory that counts the bytes which arrive for it. Its phases follow each other.
// One thread calls `expect` to open a phase; `wait` returns when all bytes of the phase with this parity have arrived.
using Mailbox = uint64_t;

OTALIGN_DEVICE void open(Mailbox* box) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(box)) : "memory");
#endif
}

// A barrier of all threads of the cluster. After it, mailboxes are open, and blocks may write to each other, or end.
OTALIGN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

OTALIGN_DEVICE void expect(Mailbox* box, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(box)), "r"(bytes) : "memory");
#endif
}

// The default scope of acquire suffices, since the data is in shared memory; a wider one would invalidate the L1 cache.
OTALIGN_DEVICE void wait(Mailbox* box, int parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(address(box)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// Writes 16 bytes to the address of `to` in the shared memory of block `rank` of the cluster, and reports them to its
// mailbox.
OTALIGN_DEVICE void send(float4 value, float* to, Mailbox* box, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t there, tell;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(tell) : "r"(address(box)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(tell)
      : "memory");
#endif
}

}  // namespace otalign::cuda::intrinsics
