// The launchers of csrc/cuda/activation.cu for ctypes: plain numbers and pointers.
#include "ops/activation.h"

#include <vector>

using namespace gradkernels;

extern "C" {

void activation_forward(int dtype, int kind, double parameter, int64_t count, const void* x, void* y, uint8_t* mask) {
  cuda::activation_forward(static_cast<DType>(dtype), {static_cast<math::ActivationKind>(kind), parameter}, count, x, y, mask);
}

void activation_backward(int dtype, int kind, double parameter, int saved_kind, int64_t count, const void* grad_y, const void* saved,
                         void* grad_x) {
  cuda::activation_backward(static_cast<DType>(dtype), {static_cast<math::ActivationKind>(kind), parameter}, static_cast<Saved>(saved_kind),
                            count, grad_y, saved, grad_x);
}

void rrelu_forward(int dtype, const int64_t* seed, double lower, double upper, int64_t count, const void* x, void* y, uint8_t* mask) {
  cuda::rrelu_forward(static_cast<DType>(dtype), {seed, lower, upper}, count, x, y, mask);
}

void rrelu_backward(int dtype, const int64_t* seed, double lower, double upper, int64_t count, const void* grad_y, const uint8_t* mask,
                    void* grad_x) {
  cuda::rrelu_backward(static_cast<DType>(dtype), {seed, lower, upper}, count, grad_y, mask, grad_x);
}

void parametric_forward(int dtype, int64_t rows, int64_t channels, int64_t inner, int act, const void* x, const void* parameter, void* y) {
  cuda::parametric_forward({static_cast<DType>(dtype), {rows, channels, inner}, static_cast<Parametric>(act), x, parameter, y});
}

void parametric_backward(int dtype, int64_t rows, int64_t channels, int64_t inner, int act, const void* grad_y, const void* x,
                         const void* parameter, void* grad_x, void* grad_parameter) {
  cuda::parametric_backward(
      {static_cast<DType>(dtype), {rows, channels, inner}, static_cast<Parametric>(act), grad_y, x, parameter, grad_x, grad_parameter});
}

}  // extern "C"

#if defined(SIMT_RACES)
// Run by tests/simt_library.py under ThreadSanitizer: kernels whose threads communicate, on several blocks.
int main() {
  constexpr int64_t kCount = 38400;
  std::vector<float> x(kCount), grad_y(kCount), out(kCount), parameter(64), grad_parameter(64);
  std::vector<uint8_t> mask(kCount / 8 + 1);
  for (int64_t i = 0; i < kCount; ++i) {
    x[i] = static_cast<float>(i % 17) - 8.0f;
    grad_y[i] = static_cast<float>(i % 5);
  }
  activation_forward(0, 3, 0.1, 3000, x.data(), out.data(), mask.data());
  const int64_t seed = 7;
  rrelu_forward(0, &seed, 0.1, 0.3, 3000, x.data(), out.data(), mask.data());
  const int64_t shapes[][3] = {{1, 1, 16500}, {3, 2, 49}, {600, 64, 1}};
  for (const auto& shape : shapes) {
    parametric_backward(0, shape[0], shape[1], shape[2], 0, grad_y.data(), x.data(), parameter.data(), out.data(), grad_parameter.data());
  }
  return 0;
}
#endif
