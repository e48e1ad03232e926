// RMSprop's operator: it describes parameters, gradients and state as runs of elements and calls the kernel.
// Parameters that may share memory are updated one after the other, in the order of the list.
#include "ops/optim.h"

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <vector>

#include "common/check.h"
#include "common/device.h"
#include "common/library.h"
#include "ops/tensor_list.h"

namespace gradkernels {
namespace {

// A list is empty, or has a dense tensor for each parameter, with the parameter's dtype and strides.
void check_rmsprop(at::TensorList params, std::initializer_list<at::TensorList> lists) {
  check_tensors(params);
  for (const at::TensorList& list : lists) {
    if (list.empty()) continue;
    TORCH_CHECK(list.size() == params.size(), "rmsprop_: got ", params.size(), " parameters, but a list of ", list.size(), " tensors");
    for (size_t i = 0; i < params.size(); ++i) {
      TORCH_CHECK(same_dtype_and_device(list[i], params[i]) && list[i].sizes() == params[i].sizes() &&
                      list[i].strides() == params[i].strides() && params[i].is_non_overlapping_and_dense(),
                  "rmsprop_: parameter ", i,
                  ", its gradient and its state must be dense and have the same dtype, device, shape and strides");
    }
  }
}

void rmsprop_(at::TensorList params, at::TensorList grads, at::TensorList square_avgs, at::TensorList grad_avgs,
              at::TensorList momentum_buffers, double lr, double alpha, double eps, double weight_decay, double momentum,
              double grad_coefficient) {
  check_rmsprop(params, {grads, square_avgs, grad_avgs, momentum_buffers});
  TORCH_CHECK(grads.size() == params.size() && square_avgs.size() == params.size(),
              "rmsprop_: every parameter needs a gradient and a square_avg");
  const math::RmspropOptions options{lr, alpha, eps, weight_decay, momentum, grad_coefficient};
  std::vector<RmspropRun> runs;
  runs.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    runs.push_back({dtype_of(params[i]), params[i].numel(), params[i].data_ptr(), grads[i].data_ptr(), square_avgs[i].data_ptr(),
                    grad_avgs.empty() ? nullptr : grad_avgs[i].data_ptr(),
                    momentum_buffers.empty() ? nullptr : momentum_buffers[i].data_ptr()});
  }
  if (params.empty()) return;
  const auto launch = GK_LAUNCHER(params.front(), rmsprop);
  if (disjoint(params)) {
    launch(runs.data(), static_cast<int64_t>(runs.size()), options);
  } else {
    for (const RmspropRun& run : runs) launch(&run, 1, options);
  }
}

// For tracing: only checks.
void rmsprop_meta(at::TensorList params, at::TensorList grads, at::TensorList square_avgs, at::TensorList grad_avgs,
                  at::TensorList momentum_buffers, double, double, double, double, double, double) {
  check_rmsprop(params, {grads, square_avgs, grad_avgs, momentum_buffers});
}

}  // namespace

GK_LIBRARY_IMPL(CPU, m) { m.impl("rmsprop_", on_device<rmsprop_>); }
#if defined(GK_WITH_CUDA)
GK_LIBRARY_IMPL(CUDA, m) { m.impl("rmsprop_", on_device<rmsprop_>); }
#endif

GK_LIBRARY_IMPL(Meta, m) { m.impl("rmsprop_", rmsprop_meta); }

}  // namespace gradkernels
