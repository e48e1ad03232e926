// A register of floats from 16-bit elements and back: the conversions of common/half.h, lane by lane.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/half.h"
#include "common/host_device.h"
#include "cpu/vector.h"

namespace gradkernels::cpu {
namespace {

// HalfWords: as many 16-bit elements as a register of floats has lanes.
typedef uint16_t HalfWords __attribute__((vector_size(kRegisterBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kRegisterBytes)));
typedef Vec<float>::Register FloatRegister;

// These are templates, although each is used with one type: only in a template does `if constexpr` discard
// the intrinsics of other instruction sets.
template <typename X>
GK_INLINE Words widen_words(X x) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
  if constexpr (kRegisterBytes == 32) return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#endif
  return __builtin_convertvector(x, Words);
}

// Words below 2^16 as 16-bit words.
template <typename X>
GK_INLINE HalfWords narrow_words(X x) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) return reinterpret_cast<HalfWords>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
  if constexpr (kRegisterBytes == 32) {
    const __m256i words = reinterpret_cast<__m256i>(x);
    return reinterpret_cast<HalfWords>(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
#endif
  return __builtin_convertvector(x, HalfWords);
}

// 0, 1, 2, ...
GK_INLINE Words lane_numbers() {
  Words r;
  for (uint32_t i = 0; i < sizeof(r) / sizeof(uint32_t); ++i) r[i] = i;
  return r;
}

template <typename X>
GK_INLINE FloatRegister to_float(X x, BFloat16) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) {
    // Each 16-bit word is taken twice, and its first copy is zeroed.
    const __m512i wide = _mm512_castsi256_si512(reinterpret_cast<__m256i>(x));
    const Words twice = lane_numbers() * 0x10001u;
    return reinterpret_cast<FloatRegister>(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, reinterpret_cast<__m512i>(twice), wide));
  }
#endif
  return reinterpret_cast<FloatRegister>(widen_words(x) << 16);
}

// BFloat16(float) in each lane.
template <typename X>
GK_INLINE HalfWords from_float(X x, BFloat16) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) {
    const __m512i wide = reinterpret_cast<__m512i>(x);
    const __m512 value = reinterpret_cast<__m512>(x);
    const __mmask16 ordered = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    const __mmask16 odd = _mm512_mask_test_epi32_mask(ordered, wide, _mm512_set1_epi32(0x10000));
    __m512i rounded = _mm512_mask_add_epi32(_mm512_set1_epi32(0x7FC00000), ordered, wide, _mm512_set1_epi32(0x7FFF));
    rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
    const Words upper = lane_numbers() * 0x40004u + 0x30001u;
    return reinterpret_cast<HalfWords>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(upper), rounded)));
  }
#endif
  const Words wide = reinterpret_cast<Words>(x);
  const Words rounded = (wide + 0x7FFFu + (wide >> 16 & 1u)) >> 16;
  return narrow_words(x == x ? rounded : 0x7FC0u - Words{});
}

// One lane after the other, for processors without the instruction. Not inlined, because every load and store
// has one.
template <typename X>
GK_CALLED FloatRegister to_float_by_lanes(X x) {
  FloatRegister r;
  for (int i = 0; i < Vec<float>::kRegisterLanes; ++i) {
    Float16 lane;
    lane.bits = x[i];
    r[i] = static_cast<float>(lane);
  }
  return r;
}
template <typename X>
GK_CALLED HalfWords from_float_by_lanes(X x) {
  HalfWords r;
  for (int i = 0; i < Vec<float>::kRegisterLanes; ++i) r[i] = Float16(x[i]).bits;
  return r;
}

template <typename X>
GK_INLINE FloatRegister to_float(X x, Float16) {
#if defined(__x86_64__)
  const auto convert = [&](auto words) GK_INLINE_LAMBDA {
    if constexpr (sizeof(words) == 32) return _mm512_cvtph_ps(reinterpret_cast<__m256i>(words));
    if constexpr (sizeof(words) == 16) return _mm256_cvtph_ps(reinterpret_cast<__m128i>(words));
  };
  if constexpr (sizeof(X) >= 16) {
    const FloatRegister r = convert(x);
    return r;
  }
#endif
  return to_float_by_lanes(x);
}

template <typename X>
GK_INLINE HalfWords from_float(X x, Float16) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) {
    return reinterpret_cast<HalfWords>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  if constexpr (kRegisterBytes == 32) {
    return reinterpret_cast<HalfWords>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  return from_float_by_lanes(x);
}

}  // namespace
}  // namespace gradkernels::cpu
