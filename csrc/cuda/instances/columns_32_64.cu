#include "../kernels.cuh"

namespace otalign::cuda {

Kernels kernels_of_columns_32_64(int index) {
  const Kernels all[] = {kernels<0>(), kernels<1>(), kernels<2>(), kernels<3>()};
  return all[index];
}

}  // namespace otalign::cuda
