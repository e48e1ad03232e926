// The activations on the CPU: threads take runs of elements, or slabs of channels if each channel has a
// learnt parameter.
#include "ops/activation.h"

#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/slabs.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

// A multiple of 8, so that no two chunks share a byte of the mask. The same as at::internal::GRAIN_SIZE: less
// is not worth a thread.
constexpr int64_t kChunkElements = 32768;

// Calls function(offset, count) for each chunk.
template <typename Function>
void for_each_chunk(int64_t count, const Function& function) {
  parallel_for((count + kChunkElements - 1) / kChunkElements, 1, [&](int64_t chunk) {
    const int64_t offset = chunk * kChunkElements;
    function(offset, count - offset < kChunkElements ? count - offset : kChunkElements);
  });
}

math::RandomSlopes random_slopes(const SeededSlopes& slopes) { return {static_cast<uint64_t>(*slopes.seed), slopes.lower, slopes.upper}; }

}  // namespace

void activation_forward(DType dtype, math::Activation act, int64_t count, const void* x, void* y, uint8_t* mask) {
  const int64_t size = size_of(dtype);
  for_each_chunk(count, [&](int64_t offset, int64_t n) {
    kernels().activation_forward(dtype, act, n, static_cast<const char*>(x) + offset * size, static_cast<char*>(y) + offset * size,
                                 mask == nullptr ? nullptr : mask + offset / 8);
  });
}

void activation_backward(DType dtype, math::Activation act, Saved kind, int64_t count, const void* grad_y, const void* saved,
                         void* grad_x) {
  const int64_t size = size_of(dtype);
  for_each_chunk(count, [&](int64_t offset, int64_t n) {
    kernels().activation_backward(dtype, act, kind, n, static_cast<const char*>(grad_y) + offset * size,
                                  static_cast<const char*>(saved) + (kind == Saved::kMask ? offset / 8 : offset * size),
                                  static_cast<char*>(grad_x) + offset * size);
  });
}

void parametric_forward(const ParametricForward& p) {
  const Slabs slabs(p.shape, /*goes_twice=*/false);
  slabs.for_each([&](int64_t i) { kernels().parametric_forward(p, slabs[i]); });
}

void parametric_backward(const ParametricBackward& p) {
  const Slabs slabs(p.shape, /*goes_twice=*/false);
  std::vector<double> partial(slabs.parts() * p.shape.channels);
  slabs.for_each([&](int64_t i) {
    kernels().parametric_backward(p, slabs[i], partial.data() + slabs.part(i) * p.shape.channels + slabs[i].channel_begin);
  });
  if (p.grad_parameter == nullptr) return;
  dispatch(p.dtype, [&](auto zero) {
    for (int64_t c = 0; c < p.shape.channels; ++c) {
      math::Sum<double> sum{0.0, 0.0};
      for (int64_t part = 0; part < slabs.parts(); ++part) math::add(sum, partial[part * p.shape.channels + c]);
      static_cast<decltype(zero)*>(p.grad_parameter)[c] = static_cast<decltype(zero)>(sum.high + sum.low);
    }
  });
}

void rrelu_forward(DType dtype, SeededSlopes seeded, int64_t count, const void* x, void* y, uint8_t* mask) {
  const math::RandomSlopes slopes = random_slopes(seeded);
  const int64_t size = size_of(dtype);
  for_each_chunk(count, [&](int64_t offset, int64_t n) {
    kernels().rrelu_forward(dtype, slopes, offset, n, static_cast<const char*>(x) + offset * size, static_cast<char*>(y) + offset * size,
                            mask + offset / 8);
  });
}

void rrelu_backward(DType dtype, SeededSlopes seeded, int64_t count, const void* grad_y, const uint8_t* mask, void* grad_x) {
  const math::RandomSlopes slopes = random_slopes(seeded);
  const int64_t size = size_of(dtype);
  for_each_chunk(count, [&](int64_t offset, int64_t n) {
    kernels().rrelu_backward(dtype, slopes, offset, n, static_cast<const char*>(grad_y) + offset * size, mask + offset / 8,
                             static_cast<char*>(grad_x) + offset * size);
  });
}

}  // namespace gradkernels::cpu
