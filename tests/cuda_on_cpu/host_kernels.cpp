// The kernels of one tile shape, OTALIGN_TILE_SHAPE, compiled for the CPU over cuda/intrinsics.h of this folder, as a
// library that Python loads with ctypes.
#include "cuda/adjoint.cuh"
#include "cuda/sinkhorn.cuh"

using namespace otalign;
using namespace otalign::cuda;

extern "C" void host_run(const CudaProblem* problem, const Adjoints* adjoints, const LaunchConfig* config, int kind,
                         unsigned seed) {
  using Tile = Tiling<OTALIGN_TILE_SHAPE>;
  const Arguments arguments{*problem, adjoints ? *adjoints : Adjoints{}, *config, shared_memory(Tile::shape(), *config),
                            static_cast<float>(problem->tol)};
  intrinsics::launch(config->in_flight, config->cluster, Tile::kThreads, config->bytes, seed, [&] {
    if (kind == kStrict) Sinkhorn<Tile, kStrict>(arguments).run();
    if (kind == kRelaxed) Sinkhorn<Tile, kRelaxed>(arguments).run();
    if (kind == kAccelerated) Sinkhorn<Tile, kAccelerated>(arguments).run();
    if (kind == kAdjoint) Adjoint<Tile>(arguments).run();
  });
}
