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

// One element after the other, for processors without AVX2. Not inlined, because every loop ends with one.
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

template <typename T>
GK_INLINE typename Vec<T>::Mask first_lanes(int count) {
  static constexpr typename IntegerOf<T>::type window[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  typename Vec<T>::Mask mask;
  for (int i = 0; i < Vec<T>::kRegisters; ++i) {
    __builtin_memcpy(&mask.part[i], window + 16 - count + i * Vec<T>::kRegisterLanes, sizeof(mask.part[i]));
  }
  return mask;
}

// x in the used lanes, 0 in the others.
template <typename T>
GK_INLINE Vec<T> used_lanes(AllLanes, Vec<T> x) {
  return x;
}
template <typename T>
GK_INLINE Vec<T> used_lanes(SomeLanes lanes, Vec<T> x) {
  return select(first_lanes<T>(lanes.count), x, Vec<T>(T(0)));
}

// AVX2 loads the first lanes of 32 and 64 bits by a mask. Stores by a mask take some processors 20 times as long as
// others, and 16 bits have no masks: these are pieces of 4, 2 and 1 elements.
#if defined(__x86_64__)
template <typename T>
GK_INLINE Vec<opmath_t<T>> load_pieces(const T* source, int count, Vec<opmath_t<T>> fill) {
  const auto mask = first_lanes<opmath_t<T>>(count);
  Vec<opmath_t<T>> loaded;
  if constexpr (sizeof(T) == 2) {
    uint64_t first = 0, second = 0;
    if (count >= 4) {
      __builtin_memcpy(&first, source, 8);
      __builtin_memcpy(&second, source + count - 4, 8);
      second = second >> 8 * (8 - count) >> 8 * (8 - count);
    } else {
      if ((count & 1) != 0) first = source[count - 1].bits;
      if ((count & 2) != 0) {
        uint32_t two;
        __builtin_memcpy(&two, source, 4);
        first = first << 32 | two;
      }
    }
    const __m128i words = _mm_set_epi64x(static_cast<int64_t>(second), static_cast<int64_t>(first));
    loaded.part[0] = to_float(reinterpret_cast<HalfWords>(words), T());
  }
  if constexpr (sizeof(T) == 4) loaded.part[0] = _mm256_maskload_ps(source, reinterpret_cast<__m256i>(mask.part[0]));
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < 2; ++i) loaded.part[i] = _mm256_maskload_pd(source + 4 * i, reinterpret_cast<__m256i>(mask.part[i]));
  }
  return select(mask, loaded, fill);
}

template <typename T>
GK_INLINE void store_pieces(T* target, int count, Vec<opmath_t<T>> value) {
  const bool has_four = (count & 4) != 0, has_two = (count & 2) != 0;
  T* const after_four = target + (count & 4);
  T* const after_two = target + (count & 6);
  if constexpr (sizeof(T) == 2) {
    __m128i rest = reinterpret_cast<__m128i>(from_float(value.part[0], T()));
    if (has_four) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(target), rest);
      rest = _mm_unpackhi_epi64(rest, rest);
    }
    uint64_t words = static_cast<uint64_t>(_mm_cvtsi128_si64(rest));
    if (has_two) {
      __builtin_memcpy(after_four, &words, 4);
      words >>= 32;
    }
    if ((count & 1) != 0) __builtin_memcpy(after_two, &words, 2);
  }
  if constexpr (sizeof(T) == 4) {
    __m128 rest = _mm256_castps256_ps128(value.part[0]);
    if (has_four) {
      _mm_storeu_ps(target, rest);
      rest = _mm256_extractf128_ps(value.part[0], 1);
    }
    if (has_two) {
      _mm_storel_pi(reinterpret_cast<__m64*>(after_four), rest);
      rest = _mm_movehl_ps(rest, rest);
    }
    if ((count & 1) != 0) _mm_store_ss(after_two, rest);
  }
  if constexpr (sizeof(T) == 8) {
    __m256d half = value.part[0];
    if (has_four) {
      _mm256_storeu_pd(target, half);
      half = value.part[1];
    }
    __m128d rest = _mm256_castpd256_pd128(half);
    if (has_two) {
      _mm_storeu_pd(after_four, rest);
      rest = _mm256_extractf128_pd(half, 1);
    }
    if ((count & 1) != 0) _mm_store_sd(after_two, rest);
  }
}
#endif

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
  if constexpr (kRegisterBytes == 32) return load_pieces(source, lanes.count, fill);
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
  if constexpr (kRegisterBytes == 32) return store_pieces(target, lanes.count, value);
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
