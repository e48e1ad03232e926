// The SIMD loop of RMSprop. It reads parameter, gradient and averages once and writes them once. Compiled
// once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/load_store.h"
#include "cpu/vector.h"
#include "math/optim.h"

namespace gradkernels::cpu {
namespace {

template <typename Register>
GK_INLINE Register sqrt_register(Register x) {
#if defined(__x86_64__)
  constexpr bool kFloat = sizeof(x[0]) == 4;
  if constexpr (kRegisterBytes == 64 && kFloat) return _mm512_sqrt_ps(x);
  if constexpr (kRegisterBytes == 64 && !kFloat) return _mm512_sqrt_pd(x);
  if constexpr (kRegisterBytes == 32 && kFloat) return _mm256_sqrt_ps(x);
  if constexpr (kRegisterBytes == 32 && !kFloat) return _mm256_sqrt_pd(x);
  if constexpr (kRegisterBytes == 16 && kFloat) return _mm_sqrt_ps(x);
  if constexpr (kRegisterBytes == 16 && !kFloat) return _mm_sqrt_pd(x);
#else
  for (int i = 0; i < static_cast<int>(sizeof(x) / sizeof(x[0])); ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

template <typename T>
GK_INLINE Vec<T> sqrt(Vec<T> x) {
  for (int i = 0; i < Vec<T>::kRegisters; ++i) x.part[i] = sqrt_register(x.part[i]);
  return x;
}

template <typename scalar_t, bool centered, bool has_momentum>
GK_INLINE void rmsprop_run(const RmspropRun& run, int64_t begin, int64_t count, const math::RmspropOptions& options) {
  using T = opmath_t<scalar_t>;
  using V = Vec<T>;
  const math::Rmsprop<V> rmsprop(options);
  scalar_t* param = static_cast<scalar_t*>(run.param) + begin;
  const scalar_t* grad = static_cast<const scalar_t*>(run.grad) + begin;
  scalar_t* square_avg = static_cast<scalar_t*>(run.square_avg) + begin;
  scalar_t* grad_avg = centered ? static_cast<scalar_t*>(run.grad_avg) + begin : nullptr;
  scalar_t* momentum_buffer = has_momentum ? static_cast<scalar_t*>(run.momentum_buffer) + begin : nullptr;
  for_each_vector<T>(0, count, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
    math::RmspropState<V> x{load(param + i, lanes), load(square_avg + i, lanes), V(T(0)), V(T(0))};
    if constexpr (centered) x.grad_avg = load(grad_avg + i, lanes);
    if constexpr (has_momentum) x.momentum_buffer = load(momentum_buffer + i, lanes);
    x = rmsprop.template step<centered, has_momentum>(x, load(grad + i, lanes));
    store(param + i, lanes, x.param);
    store(square_avg + i, lanes, x.square_avg);
    if constexpr (centered) store(grad_avg + i, lanes, x.grad_avg);
    if constexpr (has_momentum) store(momentum_buffer + i, lanes, x.momentum_buffer);
  });
}

void rmsprop_kernel(const RmspropRun& run, int64_t begin, int64_t count, const math::RmspropOptions& options) {
  dispatch(run.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const bool centered = run.grad_avg != nullptr;
    const bool has_momentum = run.momentum_buffer != nullptr;
    if (centered && has_momentum) return rmsprop_run<scalar_t, true, true>(run, begin, count, options);
    if (centered) return rmsprop_run<scalar_t, true, false>(run, begin, count, options);
    if (has_momentum) return rmsprop_run<scalar_t, false, true>(run, begin, count, options);
    return rmsprop_run<scalar_t, false, false>(run, begin, count, options);
  });
}

}  // namespace
}  // namespace gradkernels::cpu
