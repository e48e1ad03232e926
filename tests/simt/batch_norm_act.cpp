// The launchers of csrc/cuda/batch_norm_act.cu for ctypes: plain numbers and pointers.
#include "ops/batch_norm_act.h"

#include <cstdlib>
#include <vector>

using namespace gradkernels;

namespace {

BatchNormForward forward_problem(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind, double parameter,
                                 const void* x, const void* residual, const void* weight, const void* bias, double* mean, double* invstd,
                                 void* y, uint8_t* mask) {
  BatchNormForward p{};
  p.dtype = static_cast<DType>(dtype);
  p.parameter_dtype = static_cast<DType>(parameter_dtype);
  p.shape = {rows, channels, inner};
  p.act = {static_cast<math::ActivationKind>(kind), parameter};
  p.x = x;
  p.residual = residual;
  p.weight = weight;
  p.bias = bias;
  p.mean = mean;
  p.invstd = invstd;
  p.y = y;
  p.mask = mask;
  return p;
}

BatchNormBackward backward_problem(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind,
                                   double parameter, const void* grad_y, const void* x, const void* residual, const uint8_t* mask,
                                   const void* weight, const void* bias, const double* mean, const double* invstd) {
  return {static_cast<DType>(dtype),
          static_cast<DType>(parameter_dtype),
          {rows, channels, inner},
          {static_cast<math::ActivationKind>(kind), parameter},
          true,
          grad_y,
          x,
          residual,
          mask,
          weight,
          bias,
          mean,
          invstd,
          nullptr,
          nullptr,
          nullptr,
          nullptr};
}

}  // namespace

extern "C" {

void batch_norm_act_forward(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind, double parameter,
                            const void* x, const void* residual, const void* weight, const void* bias, double* mean, double* invstd,
                            void* y, uint8_t* mask, int training, double momentum, double eps, void* running_mean, void* running_var,
                            const int64_t* batches) {
  BatchNormForward p =
      forward_problem(dtype, parameter_dtype, rows, channels, inner, kind, parameter, x, residual, weight, bias, mean, invstd, y, mask);
  p.training = training != 0;
  p.momentum = momentum;
  p.eps = eps;
  p.running_mean = running_mean;
  p.running_var = running_var;
  p.batches = batches;
  cuda::batch_norm_act_forward(p);
}

void batch_norm_act_backward(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind, double parameter,
                             const void* grad_y, const void* x, const void* residual, const uint8_t* mask, const void* weight,
                             const void* bias, const double* mean, const double* invstd, int training, void* grad_x, void* grad_weight,
                             void* grad_bias, void* grad_residual) {
  BatchNormBackward p = backward_problem(dtype, parameter_dtype, rows, channels, inner, kind, parameter, grad_y, x, residual, mask, weight,
                                         bias, mean, invstd);
  p.training = training != 0;
  p.grad_x = grad_x;
  p.grad_weight = grad_weight;
  p.grad_bias = grad_bias;
  p.grad_residual = grad_residual;
  cuda::batch_norm_act_backward(p);
}

void batch_norm_act_stats(int dtype, int64_t rows, int64_t channels, int64_t inner, const void* x, double* moments) {
  cuda::batch_norm_act_stats(
      forward_problem(dtype, dtype, rows, channels, inner, 0, 0.0, x, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr),
      moments);
}

void batch_norm_act_gather_stats(int parameter_dtype, int64_t channels, int64_t ranks, const double* moments, double momentum, double eps,
                                 void* running_mean, void* running_var, const int64_t* batches, double* mean, double* invstd) {
  BatchNormForward p{};
  p.parameter_dtype = static_cast<DType>(parameter_dtype);
  p.shape = {0, channels, 0};
  p.momentum = momentum;
  p.eps = eps;
  p.running_mean = running_mean;
  p.running_var = running_var;
  p.batches = batches;
  p.mean = mean;
  p.invstd = invstd;
  cuda::batch_norm_act_gather_stats(p, ranks, moments);
}

void batch_norm_act_elemt(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind, double parameter,
                          const void* x, const void* residual, const void* weight, const void* bias, double* mean, double* invstd, void* y,
                          uint8_t* mask) {
  cuda::batch_norm_act_elemt(
      forward_problem(dtype, parameter_dtype, rows, channels, inner, kind, parameter, x, residual, weight, bias, mean, invstd, y, mask));
}

void batch_norm_act_backward_reduce(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind,
                                    double parameter, const void* grad_y, const void* x, const void* residual, const uint8_t* mask,
                                    const void* weight, const void* bias, const double* mean, const double* invstd, void* grad_residual,
                                    double* sums) {
  BatchNormBackward p = backward_problem(dtype, parameter_dtype, rows, channels, inner, kind, parameter, grad_y, x, residual, mask, weight,
                                         bias, mean, invstd);
  p.grad_residual = grad_residual;
  cuda::batch_norm_act_backward_reduce(p, sums);
}

void batch_norm_act_backward_elemt(int dtype, int parameter_dtype, int64_t rows, int64_t channels, int64_t inner, int kind,
                                   double parameter, const void* grad_y, const void* x, const void* residual, const uint8_t* mask,
                                   const void* weight, const void* bias, const double* mean, const double* invstd, void* grad_x,
                                   const double* sums, const double* count) {
  BatchNormBackward p = backward_problem(dtype, parameter_dtype, rows, channels, inner, kind, parameter, grad_y, x, residual, mask, weight,
                                         bias, mean, invstd);
  p.grad_x = grad_x;
  cuda::batch_norm_act_backward_elemt(p, sums, count);
}

}  // extern "C"

#if defined(SIMT_RACES)
// What tests/simt_library.py runs under ThreadSanitizer: every kernel in which threads meet, over more than one block, with and without a
// cluster: shared memory that holds no slab is what decides.
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
                           invstd.data(), y.data(), nullptr, 1, 0.1, 1e-5, nullptr, nullptr, nullptr);
    batch_norm_act_backward(0, 0, shape[0], shape[1], shape[2], 5, 1.0, grad_y.data(), x.data(), nullptr, nullptr, weight.data(), nullptr,
                            mean.data(), invstd.data(), 1, grad_x.data(), grad_weight.data(), nullptr, nullptr);
  }
  return 0;
}
#endif
