// The kernels of a tile shape. See arguments.h for the shapes of what they read and write.
#pragma once

#include "adjoint.cuh"
#include "launch.h"
#include "sinkhorn.cuh"

namespace otalign::cuda {

// Solves a batch. Grid: config.in_flight clusters of config.cluster blocks, which take the items in turn.
template <class Tile, bool kRelaxed>
__global__ void __launch_bounds__(Tile::kThreads) sinkhorn_kernel(const __grid_constant__ Arguments arguments) {
  Sinkhorn<Tile, kRelaxed>(arguments).run();
}

// Solves the implicit system of a batch; the same grid.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) adjoint_kernel(const __grid_constant__ Arguments arguments) {
  Adjoint<Tile>(arguments).run();
}

template <int N>
Kernels kernels() {
  using Tile = Tiling<N>;
  return {{reinterpret_cast<const void*>(&sinkhorn_kernel<Tile, false>),
           reinterpret_cast<const void*>(&sinkhorn_kernel<Tile, true>),
           reinterpret_cast<const void*>(&adjoint_kernel<Tile>)}};
}

}  // namespace otalign::cuda
