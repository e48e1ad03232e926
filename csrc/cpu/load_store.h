// Elements in memory as a vector of the type they are computed in, and back: whole vectors, the first lanes
// of one, and stores past the caches.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/half.h"
#include "common/host_device.h"
#include "cpu/half_vector.h"
#include "cpu/vector.h"

namespace gradkernels::cpu {
namespace {

// ---- Whole vectors
template <typename T>
GK_INLINE Vec<T> load(const T* source) {
  return Vec<T>::load(source);
}
template <typename T>
GK_INLINE void store(T* target, Vec<T> value) {
  value.store(target);
}

template <typename Half>
GK_INLINE Vec<float> load_half(const Half* source) {
  Vec<float> r;
  for (int i = 0; i < Vec<float>::kRegisters; ++i) {
    HalfWords words;
    __builtin_memcpy(&words, source + i * Vec<float>::kRegisterLanes, sizeof(words));
    r.part[i] = to_float(words, Half());
  }
  return r;
}
GK_INLINE Vec<float> load(const BFloat16* source) { return load_half(source); }
GK_INLINE Vec<float> load(const Float16* source) { return load_half(source); }

template <typename Half>
GK_INLINE void store_half(Half* target, Vec<float> value) {
  for (int i = 0; i < Vec<float>::kRegisters; ++i) {
    const HalfWords words = from_float(value.part[i], Half());
    __builtin_memcpy(target + i * Vec<float>::kRegisterLanes, &words, sizeof(words));
  }
}
GK_INLINE void store(BFloat16* target, Vec<float> value) { store_half(target, value); }
GK_INLINE void store(Float16* target, Vec<float> value) { store_half(target, value); }

template <typename scalar_t>
GK_INLINE Vec<opmath_t<scalar_t>> load(const scalar_t* source, AllLanes, Vec<opmath_t<scalar_t>> = Vec<opmath_t<scalar_t>>(0)) {
  return load(source);
}
template <typename scalar_t>
GK_INLINE void store(scalar_t* target, AllLanes, Vec<opmath_t<scalar_t>> value) {
  store(target, value);
}

// ---- The first lanes of a vector

// One element after the other, for processors without AVX-512. Not inlined, because every loop ends with one.
template <typename T>
GK_CALLED Vec<opmath_t<T>> load_elements(const T* source, int count, Vec<opmath_t<T>> fill) {
  T lane[Vec<opmath_t<T>>::kLanes];
  store(lane, fill);
  for (int i = 0; i < count; ++i) lane[i] = source[i];
  return load(lane);
}
template <typename T>
GK_CALLED void store_elements(T* target, int count, Vec<opmath_t<T>> value) {
  T lane[Vec<opmath_t<T>>::kLanes];
  store(lane, value);
  for (int i = 0; i < count; ++i) target[i] = lane[i];
}

// The other lanes come from `fill`, whose values T must be able to represent. Memory after `count` elements
// is not touched.
template <typename T>
GK_INLINE Vec<opmath_t<T>> load(const T* source, SomeLanes lanes, Vec<opmath_t<T>> fill = Vec<opmath_t<T>>(0)) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) {
    const uint32_t mask = (1u << lanes.count) - 1u;
    if constexpr (sizeof(T) == 2) {
      const auto words = reinterpret_cast<HalfWords>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), source));
      fill.part[0] = _mm512_mask_mov_ps(fill.part[0], static_cast<__mmask16>(mask), to_float(words, T()));
    }
    if constexpr (sizeof(T) == 4) fill.part[0] = _mm512_mask_loadu_ps(fill.part[0], static_cast<__mmask16>(mask), source);
    if constexpr (sizeof(T) == 8) fill.part[0] = _mm512_mask_loadu_pd(fill.part[0], static_cast<__mmask8>(mask), source);
    return fill;
  }
#endif
  return load_elements(source, lanes.count, fill);
}

template <typename T>
GK_INLINE void store(T* target, SomeLanes lanes, Vec<opmath_t<T>> value) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) {
    const uint32_t mask = (1u << lanes.count) - 1u;
    if constexpr (sizeof(T) == 2) {
      _mm256_mask_storeu_epi16(target, static_cast<__mmask16>(mask), reinterpret_cast<__m256i>(from_float(value.part[0], T())));
    }
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(target, static_cast<__mmask16>(mask), value.part[0]);
    if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(target, static_cast<__mmask8>(mask), value.part[0]);
    return;
  }
#endif
  store_elements(target, lanes.count, value);
}

// ---- Stores past the caches

// An ordinary store first reads the target's cache line. For an output that is too large to stay in the
// cache, this is a third of the traffic, which `stream` avoids. Other cores see the stored values after
// stream_fence. The target must be aligned to the bytes that a register of opmath becomes in memory.
template <typename T>
GK_INLINE void stream(T* target, Vec<opmath_t<T>> value) {
#if defined(__x86_64__)
  using V = Vec<opmath_t<T>>;
  for (int i = 0; i < V::kRegisters; ++i) {
    T* to = target + i * V::kRegisterLanes;
    if constexpr (sizeof(T) == 2) {
      const HalfWords words = from_float(value.part[i], T());
      if constexpr (kRegisterBytes == 64) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(words));
      if constexpr (kRegisterBytes == 32) _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(words));
      if constexpr (kRegisterBytes == 16) _mm_stream_si64(reinterpret_cast<long long*>(to), reinterpret_cast<long long>(words));
    }
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) _mm512_stream_ps(to, value.part[i]);
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 8) _mm512_stream_pd(to, value.part[i]);
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 4) _mm256_stream_ps(to, value.part[i]);
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 8) _mm256_stream_pd(to, value.part[i]);
    if constexpr (kRegisterBytes == 16 && sizeof(T) == 4) _mm_stream_ps(to, value.part[i]);
    if constexpr (kRegisterBytes == 16 && sizeof(T) == 8) _mm_stream_pd(to, value.part[i]);
  }
#else
  store(target, value);
#endif
}

GK_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// stream, if `past_caches`; otherwise store.
template <typename T>
GK_INLINE void store(T* target, AllLanes, Vec<opmath_t<T>> value, bool past_caches) {
  if (past_caches) {
    stream(target, value);
  } else {
    store(target, value);
  }
}
// An ordinary store to a part of a cache line would wait for the line to be read, and the stores after it
// would wait too. Single elements can be stored past the caches if they have 32 or 64 bits.
template <typename T>
GK_INLINE void store(T* target, SomeLanes lanes, Vec<opmath_t<T>> value, bool past_caches) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) > 2) {
    if (past_caches) {
      typename IntegerOf<T>::type lane[Vec<T>::kLanes];
      __builtin_memcpy(lane, value.part, sizeof(lane));
      for (int i = 0; i < lanes.count; ++i) {
        if constexpr (sizeof(T) == 4) _mm_stream_si32(reinterpret_cast<int*>(target + i), lane[i]);
        if constexpr (sizeof(T) == 8) _mm_stream_si64(reinterpret_cast<long long*>(target + i), lane[i]);
      }
      return;
    }
  }
#endif
  store(target, lanes, value);
}

}  // namespace
}  // namespace gradkernels::cpu
