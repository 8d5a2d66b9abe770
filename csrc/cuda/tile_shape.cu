// The kernels of one tile shape. CMakeLists.txt compiles this file once for each of kTileShapes, with its index as
// OTALIGN_TILE_SHAPE: so all are compiled in parallel, and each is a module of its own, which the driver loads, or
// compiles from PTX, when a kernel of this shape is first used.
#include "adjoint.cuh"
#include "launch.h"
#include "sinkhorn.cuh"

namespace otalign::cuda {

// Solves a batch. Grid: config.in_flight clusters of config.cluster blocks, which take the items in turn.
template <class Tile, Kind kKind>
__global__ void __launch_bounds__(Tile::kThreads) sinkhorn_kernel(const __grid_constant__ Arguments arguments) {
  Sinkhorn<Tile, kKind>(arguments).run();
}

// Solves the implicit system of a batch; the same grid.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) adjoint_kernel(const __grid_constant__ Arguments arguments) {
  Adjoint<Tile>(arguments).run();
}

template <int shape>
Kernels kernels() {
  using Tile = Tiling<shape>;
  return {{reinterpret_cast<const void*>(&sinkhorn_kernel<Tile, kStrict>),
           reinterpret_cast<const void*>(&sinkhorn_kernel<Tile, kRelaxed>),
           reinterpret_cast<const void*>(&sinkhorn_kernel<Tile, kAccelerated>),
           reinterpret_cast<const void*>(&adjoint_kernel<Tile>)}};
}

template Kernels kernels<OTALIGN_TILE_SHAPE>();

}  // namespace otalign::cuda
