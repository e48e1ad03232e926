// The launchers of csrc/cuda/batch_norm_act.cu for ctypes: plain numbers and pointers.
#include "ops/group_norm_act.h"

#include <cstdlib>
#include <vector>

using namespace gradkernels;

namespace {

BatchNormForward forward_problem(int dtype, int parameter_dtype, ChannelShape shape, int64_t set_channels, int kind, double parameter,
                                 const void* x, const void* residual, const void* weight, const void* bias, double* mean, double* invstd,
                                 void* y, uint8_t* mask, int training, double momentum, double eps, void* running_mean, void* running_var,
                                 const int64_t* batches, int64_t* counted) {
  return {static_cast<DType>(dtype),
          static_cast<DType>(parameter_dtype),
          shape,
          set_channels,
          {static_cast<math::ActivationKind>(kind), parameter},
          training != 0,
          momentum,
          batches,
          eps,
          x,
          residual,
          weight,
          bias,
          running_mean,
          running_var,
          mean,
          invstd,
          y,
          mask,
          counted};
}

BatchNormBackward backward_problem(int dtype, int parameter_dtype, ChannelShape shape, int64_t set_channels, int kind, double parameter,
                                   const void* grad_y, const void* x, const void* residual, const uint8_t* mask, const void* weight,
                                   const void* bias, const double* mean, const double* invstd, int training, void* grad_x,
                                   void* grad_weight, void* grad_bias, void* grad_residual) {
  return {static_cast<DType>(dtype),
          static_cast<DType>(parameter_dtype),
          shape,
          set_channels,
          {static_cast<math::ActivationKind>(kind), parameter},
          training != 0,
          grad_y,
          x,
          residual,
          mask,
          weight,
          bias,
          mean,
          invstd,
          grad_x,
          grad_weight,
          grad_bias,
          grad_residual};
}

}  // namespace

extern "C" {

void batch_norm_act_forward(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind, double parameter,
                            const void* x, const void* residual, const void* weight, const void* bias, double* mean, double* invstd,
                            void* y, uint8_t* mask, int training, double momentum, double eps, void* running_mean, void* running_var,
                            const int64_t* batches, int64_t* counted) {
  cuda::batch_norm_act_forward(forward_problem(dtype, parameter_dtype, {rows, channels, inner}, 1, kind, parameter, x, residual, weight,
                                               bias, mean, invstd, y, mask, training, momentum, eps, running_mean, running_var, batches,
                                               counted));
}

void batch_norm_act_backward(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind, double parameter,
                             const void* grad_y, const void* x, const void* residual, const uint8_t* mask, const void* weight,
                             const void* bias, const double* mean, const double* invstd, int training, void* grad_x, void* grad_weight,
                             void* grad_bias, void* grad_residual) {
  cuda::batch_norm_act_backward(backward_problem(dtype, parameter_dtype, {rows, channels, inner}, 1, kind, parameter, grad_y, x, residual,
                                                 mask, weight, bias, mean, invstd, training, grad_x, grad_weight, grad_bias,
                                                 grad_residual));
}

void batch_norm_act_stats(int dtype, int64_t rows, int64_t channels, int64_t inner, const void* x, double* moments) {
  cuda::batch_norm_act_stats(forward_problem(dtype, dtype, {rows, channels, inner}, 1, 0, 0.0, x, nullptr, nullptr, nullptr, nullptr,
                                             nullptr, nullptr, nullptr, 1, 0.0, 0.0, nullptr, nullptr, nullptr, nullptr),
                             moments);
}

void batch_norm_act_gather_stats(int parameter_dtype, int64_t channels, int64_t ranks, const double* moments, double momentum, double eps,
                                 void* running_mean, void* running_var, const int64_t* batches, double* mean, double* invstd) {
  cuda::batch_norm_act_gather_stats(
      forward_problem(parameter_dtype, parameter_dtype, {0, channels, 0}, 1, 0, 0.0, nullptr, nullptr, nullptr, nullptr, mean, invstd,
                      nullptr, nullptr, 1, momentum, eps, running_mean, running_var, batches, nullptr),
      ranks, moments);
}

void batch_norm_act_elemt(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind, double parameter,
                          const void* x, const void* residual, const void* weight, const void* bias, double* mean, double* invstd, void* y,
                          uint8_t* mask) {
  cuda::batch_norm_act_elemt(forward_problem(dtype, parameter_dtype, {rows, channels, inner}, 1, kind, parameter, x, residual, weight, bias,
                                             mean, invstd, y, mask, 0, 0.0, 0.0, nullptr, nullptr, nullptr, nullptr));
}

void batch_norm_act_backward_reduce(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind,
                                    double parameter, const void* grad_y, const void* x, const void* residual, const uint8_t* mask,
                                    const void* weight, const void* bias, const double* mean, const double* invstd, void* grad_residual,
                                    double* sums) {
  cuda::batch_norm_act_backward_reduce(
      backward_problem(dtype, parameter_dtype, {rows, channels, inner}, 1, kind, parameter, grad_y, x, residual, mask, weight, bias, mean,
                       invstd, 1, nullptr, nullptr, nullptr, grad_residual),
      sums);
}

void batch_norm_act_backward_elemt(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind,
                                   double parameter, const void* grad_y, const void* x, const void* residual, const uint8_t* mask,
                                   const void* weight, const void* bias, const double* mean, const double* invstd, void* grad_x,
                                   const double* sums, const double* count) {
  cuda::batch_norm_act_backward_elemt(backward_problem(dtype, parameter_dtype, {rows, channels, inner}, 1, kind, parameter, grad_y, x,
                                                       residual, mask, weight, bias, mean, invstd, 1, grad_x, nullptr, nullptr, nullptr),
                                      sums, count);
}

void group_norm_act_forward(int dtype, int parameter_dtype, int64_t samples, int64_t rows, int64_t channels, int64_t inner,
                            int64_t set_channels, int kind, double parameter, const void* x, const void* residual, const void* weight,
                            const void* bias, double* mean, double* invstd, void* y, uint8_t* mask, double eps) {
  cuda::group_norm_act_forward(forward_problem(dtype, parameter_dtype, {rows, channels, inner, samples}, set_channels, kind, parameter, x,
                                               residual, weight, bias, mean, invstd, y, mask, 1, 0.0, eps, nullptr, nullptr, nullptr,
                                               nullptr));
}

void group_norm_act_elemt(int dtype, int parameter_dtype, int64_t samples, int64_t rows, int64_t channels, int64_t inner,
                          int64_t set_channels, int kind, double parameter, const void* x, const void* residual, const void* weight,
                          const void* bias, double* mean, double* invstd, void* y, uint8_t* mask) {
  cuda::group_norm_act_elemt(forward_problem(dtype, parameter_dtype, {rows, channels, inner, samples}, set_channels, kind, parameter, x,
                                             residual, weight, bias, mean, invstd, y, mask, 0, 0.0, 0.0, nullptr, nullptr, nullptr,
                                             nullptr));
}

void group_norm_act_backward(int dtype, int parameter_dtype, int64_t samples, int64_t rows, int64_t channels, int64_t inner,
                             int64_t set_channels, int kind, double parameter, const void* grad_y, const void* x, const void* residual,
                             const uint8_t* mask, const void* weight, const void* bias, const double* mean, const double* invstd,
                             void* grad_x, void* grad_weight, void* grad_bias, void* grad_residual) {
  cuda::group_norm_act_backward(backward_problem(dtype, parameter_dtype, {rows, channels, inner, samples}, set_channels, kind, parameter,
                                                 grad_y, x, residual, mask, weight, bias, mean, invstd, 1, grad_x, grad_weight, grad_bias,
                                                 grad_residual));
}

}  // extern "C"

#if defined(SIMT_RACES)
// Run by tests/simt_library.py under ThreadSanitizer: kernels whose threads communicate, on several blocks.
int main() {
  constexpr int64_t kCount = 33000;
  std::vector<float> x(kCount), grad_y(kCount), y(kCount), grad_x(kCount), weight(64, 1.5f), grad_weight(64);
  std::vector<double> mean(64), invstd(64);
  for (int64_t i = 0; i < kCount; ++i) {
    x[i] = static_cast<float>(i * 7 % 17) - 8.0f;
    grad_y[i] = static_cast<float>(i % 5);
  }
  const int64_t shapes[][3] = {{3, 1, 11000}, {4, 8, 49}, {500, 64, 1}};
  for (const auto& shape : shapes) {
    batch_norm_act_forward(0, 0, shape[0], shape[1], shape[2], 5, 1.0, x.data(), nullptr, weight.data(), nullptr, mean.data(),
                           invstd.data(), y.data(), nullptr, 1, 0.1, 1e-5, nullptr, nullptr, nullptr, nullptr);
    batch_norm_act_backward(0, 0, shape[0], shape[1], shape[2], 5, 1.0, grad_y.data(), x.data(), nullptr, nullptr, weight.data(), nullptr,
                            mean.data(), invstd.data(), 1, grad_x.data(), grad_weight.data(), nullptr, nullptr);
  }
  group_norm_act_forward(0, 0, 2, 250, 64, 1, 4, 5, 1.0, x.data(), nullptr, weight.data(), nullptr, mean.data(), invstd.data(), y.data(),
                         nullptr, 1e-5);
  group_norm_act_backward(0, 0, 2, 250, 64, 1, 4, 5, 1.0, grad_y.data(), x.data(), nullptr, nullptr, weight.data(), nullptr, mean.data(),
                          invstd.data(), grad_x.data(), grad_weight.data(), nullptr, nullptr);
  return 0;
}
#endif
