// The launcher of csrc/cuda/optim.cu for ctypes: plain numbers, and arrays with one element per parameter.
#include "ops/optim.h"

#include <vector>

using namespace gradkernels;

extern "C" {

// data: five pointers for each parameter, in the order of RmspropRun.
void rmsprop(int64_t count, const int64_t* dtypes, const int64_t* counts, void* const* data, double lr, double alpha, double eps,
             double weight_decay, double momentum, double grad_coefficient) {
  std::vector<RmspropRun> runs;
  for (int64_t i = 0; i < count; ++i, data += 5) {
    runs.push_back({static_cast<DType>(dtypes[i]), counts[i], data[0], data[1], data[2], data[3], data[4]});
  }
  cuda::rmsprop(runs.data(), count, {lr, alpha, eps, weight_decay, momentum, grad_coefficient});
}

}  // extern "C"
