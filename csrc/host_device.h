// A function with this prefix is compiled for the CPU and, by nvcc, for the GPU as well.
#pragma once

#ifdef __CUDACC__
#define OTALIGN_ANYWHERE __host__ __device__ inline
#else
#define OTALIGN_ANYWHERE inline
#endif
