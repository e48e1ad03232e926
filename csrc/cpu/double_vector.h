// Vectors of any type in float64: the sum of the lanes, lanes widened to float64, and memory read and written
// as float64.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/host_device.h"
#include "cpu/vector.h"

namespace gradkernels::cpu {
namespace {

// The sum of all lanes in float64. The order of the additions depends only on the number of lanes.
template <typename T>
GK_INLINE double sum_of_lanes(Vec<T> x) {
  T lane[Vec<T>::kLanes];
  x.store(lane);
  double total[8];
  for (int i = 0; i < 8; ++i) total[i] = static_cast<double>(lane[i]);
  for (int offset = 8; offset < Vec<T>::kLanes; offset += 8) {
    for (int i = 0; i < 8; ++i) total[i] += static_cast<double>(lane[offset + i]);
  }
  return ((total[0] + total[4]) + (total[2] + total[6])) + ((total[1] + total[5]) + (total[3] + total[7]));
}

// Half a register of floats: as many as a register of doubles has lanes. Their conversions are intrinsics,
// because g++ 12 splits __builtin_convertvector into smaller conversions.
typedef float HalfRegister __attribute__((vector_size(kRegisterBytes / 2)));

template <typename Register>
GK_INLINE HalfRegister half_of(Register x, int half) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) return half == 0 ? _mm512_castps512_ps256(x) : _mm512_extractf32x8_ps(x, 1);
  if constexpr (kRegisterBytes == 32) return half == 0 ? _mm256_castps256_ps128(x) : _mm256_extractf128_ps(x, 1);
#endif
  HalfRegister r;
  __builtin_memcpy(&r, reinterpret_cast<const char*>(&x) + half * sizeof(r), sizeof(r));
  return r;
}

template <typename Half>
GK_INLINE Vec<double>::Register to_double(Half x) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) return _mm512_cvtps_pd(x);
  if constexpr (kRegisterBytes == 32) return _mm256_cvtps_pd(x);
#endif
  return __builtin_convertvector(x, Vec<double>::Register);
}

template <typename Register>
GK_INLINE HalfRegister to_float(Register x) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) return _mm512_cvtpd_ps(x);
  if constexpr (kRegisterBytes == 32) return _mm256_cvtpd_ps(x);
#endif
  return __builtin_convertvector(x, HalfRegister);
}

// Lanes [8 part, 8 part + 8) in float64. Vec<double> has eight lanes.
GK_INLINE Vec<double> widen(Vec<double> x, int) { return x; }
GK_INLINE Vec<double> widen(Vec<float> x, int part) {
  Vec<double> r;
  for (int i = 0; i < Vec<double>::kRegisters; ++i) {
    const int half = part * Vec<double>::kRegisters + i;
    r.part[i] = to_double(half_of(x.part[half / 2], half % 2));
  }
  return r;
}

// Loads and stores as many elements as Vec<double> has lanes, and converts them.
GK_INLINE Vec<double> load_double(const double* source) { return Vec<double>::load(source); }
template <typename Half>
GK_INLINE Vec<double> load_double(const Half* source) {
  double lane[Vec<double>::kLanes];
  for (int i = 0; i < Vec<double>::kLanes; ++i) lane[i] = static_cast<double>(source[i]);
  return Vec<double>::load(lane);
}
GK_INLINE Vec<double> load_double(const float* source) {
  Vec<double> r;
  for (int i = 0; i < Vec<double>::kRegisters; ++i) {
    HalfRegister floats;
    __builtin_memcpy(&floats, source + i * Vec<double>::kRegisterLanes, sizeof(floats));
    r.part[i] = to_double(floats);
  }
  return r;
}
GK_INLINE void store_double(double* target, Vec<double> value) { value.store(target); }
template <typename Half>
GK_INLINE void store_double(Half* target, Vec<double> value) {
  double lane[Vec<double>::kLanes];
  value.store(lane);
  for (int i = 0; i < Vec<double>::kLanes; ++i) target[i] = Half(lane[i]);
}
GK_INLINE void store_double(float* target, Vec<double> value) {
  for (int i = 0; i < Vec<double>::kRegisters; ++i) {
    const HalfRegister floats = to_float(value.part[i]);
    __builtin_memcpy(target + i * Vec<double>::kRegisterLanes, &floats, sizeof(floats));
  }
}

}  // namespace
}  // namespace gradkernels::cpu
