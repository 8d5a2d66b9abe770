#include "../kernels.cuh"

namespace otalign::cuda {

Kernels kernels_of_columns_128_256(int index) {
  const Kernels all[] = {kernels<4>(), kernels<5>(), kernels<6>()};
  return all[index];
}

}  // namespace otalign::cuda
