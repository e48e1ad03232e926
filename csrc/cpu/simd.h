// Vec<T>: the vector of an instruction set, at least eight lanes wide so that a vector always fills whole bytes of a bit mask, with the
// operations that math/ is written in. The including file has switched the instruction set on and said so with kRegisterBytes: 64 is
// AVX-512 F, BW, DQ and VL, 32 is AVX2, FMA and F16C, 16 is what every processor has. (g++ before 13 does not define __AVX2__ after
// #pragma GCC target.) Everything has internal linkage and is forced inline: an instruction set's object must not hand a function to the
// rest of the library (tests/test_layout.py looks with nm).
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/half.h"
#include "common/host_device.h"
#include "math/exp.h"
#include "math/philox.h"

namespace gradkernels::cpu {
namespace {

template <typename T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <typename T>
struct RegisterOf {
  typedef T Value __attribute__((vector_size(kRegisterBytes)));
  typedef typename IntegerOf<T>::type Bits __attribute__((vector_size(kRegisterBytes)));
};

template <typename T>
struct Vec;
template <typename T>
uint32_t to_bits(typename Vec<T>::Mask mask);

template <typename T>
struct Vec {
  using Register = typename RegisterOf<T>::Value;
  using Bits = typename RegisterOf<T>::Bits;
  static constexpr int kRegisterLanes = kRegisterBytes / static_cast<int>(sizeof(T));
  static constexpr int kRegisters = kRegisterLanes < 8 ? 8 / kRegisterLanes : 1;
  static constexpr int kLanes = kRegisters * kRegisterLanes;

  struct Mask {
    Bits part[kRegisters];

    GK_INLINE Mask operator!() const {
      Mask r;
      for (int i = 0; i < kRegisters; ++i) r.part[i] = ~part[i];
      return r;
    }
    friend GK_INLINE Mask operator|(Mask a, Mask b) {
      Mask r;
      for (int i = 0; i < kRegisters; ++i) r.part[i] = a.part[i] | b.part[i];
      return r;
    }
    friend GK_INLINE Mask operator&(Mask a, Mask b) {
      Mask r;
      for (int i = 0; i < kRegisters; ++i) r.part[i] = a.part[i] & b.part[i];
      return r;
    }
    friend GK_INLINE bool any(Mask mask) { return to_bits<T>(mask) != 0; }
  };

  Register part[kRegisters];

  Vec() = default;
  GK_INLINE Vec(Register first) : part{first} {}
  // x - 0 is x for every x, which x + 0 is not for -0
  GK_INLINE Vec(T x) {
    for (int i = 0; i < kRegisters; ++i) part[i] = x - Register{};
  }

  // A register at a time: a copy of several goes in pieces of its own, which the processor cannot forward to the registers.
  GK_INLINE static Vec load(const T* source) {
    Vec r;
    for (int i = 0; i < kRegisters; ++i) __builtin_memcpy(&r.part[i], source + i * kRegisterLanes, sizeof(Register));
    return r;
  }
  GK_INLINE void store(T* target) const {
    for (int i = 0; i < kRegisters; ++i) __builtin_memcpy(target + i * kRegisterLanes, &part[i], sizeof(Register));
  }

  friend GK_INLINE Vec operator+(Vec a, Vec b) {
    Vec r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = a.part[i] + b.part[i];
    return r;
  }
  friend GK_INLINE Vec operator-(Vec a, Vec b) {
    Vec r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = a.part[i] - b.part[i];
    return r;
  }
  friend GK_INLINE Vec operator*(Vec a, Vec b) {
    Vec r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = a.part[i] * b.part[i];
    return r;
  }
  friend GK_INLINE Vec operator/(Vec a, Vec b) {
    Vec r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = a.part[i] / b.part[i];
    return r;
  }
  GK_INLINE Vec operator-() const {
    Vec r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = -part[i];
    return r;
  }
  friend GK_INLINE Mask operator<(Vec a, Vec b) {
    Mask r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = a.part[i] < b.part[i];
    return r;
  }
  friend GK_INLINE Mask operator>(Vec a, Vec b) { return b < a; }
  friend GK_INLINE Mask operator<=(Vec a, Vec b) {
    Mask r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = a.part[i] <= b.part[i];
    return r;
  }
  friend GK_INLINE Mask operator>=(Vec a, Vec b) { return b <= a; }
  friend GK_INLINE Mask operator==(Vec a, Vec b) {
    Mask r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = a.part[i] == b.part[i];
    return r;
  }
  friend GK_INLINE Mask operator!=(Vec a, Vec b) { return !(a == b); }
  friend GK_INLINE Vec select(Mask condition, Vec if_true, Vec if_false) {
    Vec r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = condition.part[i] ? if_true.part[i] : if_false.part[i];
    return r;
  }

  // Without the instruction a fused rounding would be a library call per lane: two roundings then, in both directions alike.
  friend GK_INLINE Vec fma(Vec a, Vec b, Vec c) {
    Vec r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = fma_register(a.part[i], b.part[i], c.part[i]);
    return r;
  }

  friend GK_INLINE Vec scale_by_exp2(Vec x, Vec n) {
#if defined(__x86_64__)
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) return {_mm512_scalef_ps(x.part[0], n.part[0])};
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 8) return {_mm512_scalef_pd(x.part[0], n.part[0])};
#endif
    return has_far_exponent(n) ? math::scale_by_halves(x, n) : x * exp2_of_integer(n);
  }

  friend GK_INLINE Vec scale_normal_by_exp2(Vec x, Vec n) {
    using C = math::ExpConstants<T>;
    // Unsigned: where n is nan or far, the sum wraps.
    typedef typename C::bits_t UnsignedBits __attribute__((vector_size(kRegisterBytes)));
    const Vec rounded = n + Vec(C::kRound);
    for (int i = 0; i < kRegisters; ++i) {
      const UnsignedBits exponent = reinterpret_cast<UnsignedBits>(rounded.part[i]) << C::kMantissaBits;
      x.part[i] = reinterpret_cast<Register>(reinterpret_cast<UnsignedBits>(x.part[i]) + exponent);
    }
    return x;
  }

  // Of nan too: an addition to its bits may make a number of it.
  friend GK_INLINE bool has_far_exponent(Vec n) {
    const Vec bound(T(math::kFarExponent));
#if defined(__x86_64__)
    // Compilers take the comparison through a vector of its lanes.
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) return _mm512_cmp_ps_mask(n.part[0], bound.part[0], _CMP_NGE_UQ) != 0;
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 8) return _mm512_cmp_pd_mask(n.part[0], bound.part[0], _CMP_NGE_UQ) != 0;
#endif
    return any(!(n >= bound));
  }

  friend GK_INLINE Mask is_near_exponent(Vec n) { return n >= Vec(T(math::kFarExponent)); }

  friend GK_INLINE Vec approximate_inverse(Vec x) {
#if defined(__x86_64__)
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) return {_mm512_rcp14_ps(x.part[0])};
#endif
    return Vec(T(1)) / x;
  }

  friend GK_INLINE Vec negative_magnitude(Vec x) {
    Vec r;
    const Bits sign = reinterpret_cast<Bits>(-Register{});
    for (int i = 0; i < kRegisters; ++i) r.part[i] = reinterpret_cast<Register>(reinterpret_cast<Bits>(x.part[i]) | sign);
    return r;
  }

  // The processor's maximum is its second operand where one is nan.
  friend GK_INLINE Vec at_least(Vec bound, Vec x) {
#if defined(__x86_64__)
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) return {_mm512_max_ps(bound.part[0], x.part[0])};
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 8) return {_mm512_max_pd(bound.part[0], x.part[0])};
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 4) return {_mm256_max_ps(bound.part[0], x.part[0])};
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 8) {
      for (int i = 0; i < kRegisters; ++i) x.part[i] = _mm256_max_pd(bound.part[i], x.part[i]);
      return x;
    }
#endif
    return select(bound > x, bound, x);
  }

  friend GK_INLINE Vec exp2_of_integer(Vec n) {
    using C = math::ExpConstants<T>;
    // Unsigned: where n is nan or far, the sum wraps.
    typedef typename C::bits_t UnsignedBits __attribute__((vector_size(kRegisterBytes)));
    Vec r;
    for (int i = 0; i < kRegisters; ++i) {
      const UnsignedBits bits = reinterpret_cast<UnsignedBits>(n.part[i] + C::kRound);
      r.part[i] = reinterpret_cast<Register>((bits << C::kMantissaBits) + C::kOneBits);
    }
    return r;
  }

 private:
  static GK_INLINE Register fma_register(Register a, Register b, Register c) {
#if defined(__x86_64__)
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) return _mm512_fmadd_ps(a, b, c);
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 8) return _mm512_fmadd_pd(a, b, c);
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 4) return _mm256_fmadd_ps(a, b, c);
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 8) return _mm256_fmadd_pd(a, b, c);
#endif
    return a * b + c;
  }
};

// How many lanes of a vector are meant: all, which the type says, or `count` of them, 0 < count < lanes.
struct AllLanes {
  static constexpr bool kAll = true;
};
struct SomeLanes {
  static constexpr bool kAll = false;
  int count;
};

// As many 16-bit elements as a register of floats has lanes.
typedef uint16_t HalfWords __attribute__((vector_size(kRegisterBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kRegisterBytes)));
typedef Vec<float>::Register FloatRegister;

// Templates, though for one type each: in a template the branches for other instruction sets are left out.
template <typename X>
GK_INLINE Words widen_words(X x) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
  if constexpr (kRegisterBytes == 32) return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#endif
  return __builtin_convertvector(x, Words);
}

// The lower halves.
template <typename X>
GK_INLINE HalfWords narrow_words(X x) {
#if defined(__x86_64__)
  if constexpr (kRegisterBytes == 64) return reinterpret_cast<HalfWords>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
  if constexpr (kRegisterBytes == 32) {
    const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(x & 0xFFFFu), reinterpret_cast<__m256i>(x & 0xFFFFu));
    return reinterpret_cast<HalfWords>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
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
    // Each word twice, and zero for the first of them.
    const __m512i wide = _mm512_castsi256_si512(reinterpret_cast<__m256i>(x));
    const Words twice = lane_numbers() * 0x10001u;
    return reinterpret_cast<FloatRegister>(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, reinterpret_cast<__m512i>(twice), wide));
  }
#endif
  return reinterpret_cast<FloatRegister>(widen_words(x) << 16);
}

// BFloat16(float), lane by lane.
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

// Without the instruction, lane by lane: called, not inlined, since it stands at every load and store.
template <typename X>
__attribute__((noinline)) FloatRegister to_float_by_lanes(X x) {
  FloatRegister r;
  for (int i = 0; i < Vec<float>::kRegisterLanes; ++i) {
    Float16 lane;
    lane.bits = x[i];
    r[i] = static_cast<float>(lane);
  }
  return r;
}
template <typename X>
__attribute__((noinline)) HalfWords from_float_by_lanes(X x) {
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

// Elements in memory as a vector of what they are computed in, and back.
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

// Element by element, but with AVX-512: called, not inlined, since it stands behind every loop.
template <typename T>
__attribute__((noinline)) Vec<opmath_t<T>> load_elements(const T* source, int count, Vec<opmath_t<T>> fill) {
  T lane[Vec<opmath_t<T>>::kLanes];
  store(lane, fill);
  for (int i = 0; i < count; ++i) lane[i] = source[i];
  return load(lane);
}
template <typename T>
__attribute__((noinline)) void store_elements(T* target, int count, Vec<opmath_t<T>> value) {
  T lane[Vec<opmath_t<T>>::kLanes];
  store(lane, value);
  for (int i = 0; i < count; ++i) target[i] = lane[i];
}

// The other lanes from `fill`, which has to be a number that T has; memory past the count is not touched.
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

// Past the caches: without reading the target's line first, which for an output too large to stay in cache is a third of the traffic. Other
// cores see it after stream_fence. The target is aligned to what a register of opmath leaves in memory.
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

// As store, past the caches where `past_caches` says so.
template <typename T>
GK_INLINE void store(T* target, AllLanes, Vec<opmath_t<T>> value, bool past_caches) {
  if (past_caches) {
    stream(target, value);
  } else {
    store(target, value);
  }
}
// A part of a line stored through the caches would have to be read first, and hold up all stores after it. There is an instruction for no
// less than 32 bits.
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

// One bit a lane, the first lane in the lowest bit.
template <typename T>
GK_INLINE uint32_t to_bits(typename Vec<T>::Mask mask) {
  using V = Vec<T>;
  uint32_t bits = 0;
  for (int i = 0; i < V::kRegisters; ++i) {
    uint32_t part = 0;
#if defined(__x86_64__)
    const auto lanes = mask.part[i];
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) part = _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 8) part = _mm512_movepi64_mask(reinterpret_cast<__m512i>(lanes));
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 4) part = _mm256_movemask_ps(reinterpret_cast<__m256>(lanes));
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 8) part = _mm256_movemask_pd(reinterpret_cast<__m256d>(lanes));
    if constexpr (kRegisterBytes == 16 && sizeof(T) == 4) part = _mm_movemask_ps(reinterpret_cast<__m128>(lanes));
    if constexpr (kRegisterBytes == 16 && sizeof(T) == 8) part = _mm_movemask_pd(reinterpret_cast<__m128d>(lanes));
#else
    for (int lane = 0; lane < V::kRegisterLanes; ++lane) part |= (mask.part[i][lane] != 0 ? 1u : 0u) << lane;
#endif
    bits |= part << (i * V::kRegisterLanes);
  }
  return bits;
}

template <typename T>
GK_INLINE typename Vec<T>::Mask from_bits(uint32_t bits) {
  using V = Vec<T>;
  using Integer = typename IntegerOf<T>::type;
  typename V::Bits lane_bit;
  for (int lane = 0; lane < V::kRegisterLanes; ++lane) lane_bit[lane] = Integer(1) << lane;
  typename V::Mask mask;
  for (int i = 0; i < V::kRegisters; ++i) {
    const typename V::Bits part = static_cast<Integer>(bits >> (i * V::kRegisterLanes)) - typename V::Bits{};
    mask.part[i] = (part & lane_bit) != 0;
  }
  return mask;
}

// A vector's bits in memory: lanes / 8 bytes, the lowest first.
template <typename T>
GK_INLINE void store_bits(uint8_t* target, AllLanes, typename Vec<T>::Mask mask) {
  const uint32_t bits = to_bits<T>(mask);
  target[0] = static_cast<uint8_t>(bits);
  if constexpr (Vec<T>::kLanes == 16) target[1] = static_cast<uint8_t>(bits >> 8);
}
template <typename T>
GK_INLINE typename Vec<T>::Mask load_bits(const uint8_t* source, AllLanes) {
  uint32_t bits = source[0];
  if constexpr (Vec<T>::kLanes == 16) bits |= static_cast<uint32_t>(source[1]) << 8;
  return from_bits<T>(bits);
}

// Those of some lanes fill whole bytes, the spare bits zero.
template <typename T>
GK_INLINE void store_bits(uint8_t* target, SomeLanes lanes, typename Vec<T>::Mask mask) {
  const uint32_t bits = to_bits<T>(mask) & ((1u << lanes.count) - 1u);
  target[0] = static_cast<uint8_t>(bits);
  if (lanes.count > 8) target[1] = static_cast<uint8_t>(bits >> 8);
}
template <typename T>
GK_INLINE typename Vec<T>::Mask load_bits(const uint8_t* source, SomeLanes lanes) {
  uint32_t bits = source[0];
  if (lanes.count > 8) bits |= static_cast<uint32_t>(source[1]) << 8;
  return from_bits<T>(bits);
}

// The sum of all lanes in float64, in an order that the number of lanes alone decides.
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

// Half a register of floats, as many as a register of doubles holds, and their conversions: g++ 12 takes __builtin_convertvector apart.
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

// Lanes [8 part, 8 part + 8) in float64, of which a vector has eight.
GK_INLINE Vec<double> widen(Vec<double> x, int) { return x; }
GK_INLINE Vec<double> widen(Vec<float> x, int part) {
  Vec<double> r;
  for (int i = 0; i < Vec<double>::kRegisters; ++i) {
    const int half = part * Vec<double>::kRegisters + i;
    r.part[i] = to_double(half_of(x.part[half / 2], half % 2));
  }
  return r;
}

// As many elements as Vec<double> has lanes, converted.
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

// A register of 64-bit words: what math::philox computes in.
struct LongWords {
  typedef uint64_t Register __attribute__((vector_size(kRegisterBytes)));
  static constexpr int kLanes = kRegisterBytes / 8;

  Register value;

  GK_INLINE LongWords(Register words) : value(words) {}
  GK_INLINE LongWords(uint64_t word) : value(word - Register{}) {}

  friend GK_INLINE LongWords operator^(LongWords a, LongWords b) { return a.value ^ b.value; }
  friend GK_INLINE LongWords upper(LongWords a) { return a.value >> 32; }
  friend GK_INLINE LongWords multiply_lower(LongWords a, uint32_t b) { return product(a.value, LongWords(uint64_t{b}).value); }

 private:
  template <typename X>
  static GK_INLINE X product(X a, X b) {
#if defined(__x86_64__)
    if constexpr (sizeof(X) == 64) return reinterpret_cast<X>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
    if constexpr (sizeof(X) == 32) return reinterpret_cast<X>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
    if constexpr (sizeof(X) == 16) return reinterpret_cast<X>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
  }
};

// The numbers, uniform in [0, 1), of the blocks of four from `block` on, as many blocks as LongWords has lanes.
struct UniformNumbers {
  static constexpr int kCount = 4 * LongWords::kLanes;

  float number[kCount];

  GK_INLINE UniformNumbers(uint64_t seed, uint64_t block) {
    // The lower half of the blocks in the even lanes, which is the order that interleaving leaves.
    LongWords::Register blocks;
    for (int i = 0; i < LongWords::kLanes; ++i) blocks[i] = block + static_cast<uint64_t>(i / 2 + i % 2 * (LongWords::kLanes / 2));
    const math::PhiloxBlock<LongWords> random = math::philox(seed, LongWords(blocks));
    const LongWords::Register first = pair(random.word[0], random.word[1]), second = pair(random.word[2], random.word[3]);
    store_uniform(number, interleave_even(first, second));
    store_uniform(number + kCount / 2, interleave_odd(first, second));
  }

  // A vector of them from the i-th on.
  template <typename T>
  GK_INLINE Vec<T> at(int64_t i) const {
    if constexpr (sizeof(T) == sizeof(double)) {
      return load_double(number + i);
    } else {
      return load(number + i);
    }
  }

 private:
  static GK_INLINE LongWords::Register pair(LongWords low, LongWords high) { return (low.value & 0xFFFFFFFFu) | (high.value << 32); }

  // a[0], b[0], a[2], b[2], ... and a[1], b[1], a[3], b[3], ...
  template <typename X>
  static GK_INLINE X interleave_even(X a, X b) {
#if defined(__x86_64__)
    if constexpr (sizeof(X) == 64)
      return reinterpret_cast<X>(_mm512_unpacklo_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
    if constexpr (sizeof(X) == 32)
      return reinterpret_cast<X>(_mm256_unpacklo_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
    if constexpr (sizeof(X) == 16)
      return reinterpret_cast<X>(_mm_unpacklo_epi64(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
    for (int i = 0; i < LongWords::kLanes; i += 2) a[i + 1] = b[i];
    return a;
  }
  template <typename X>
  static GK_INLINE X interleave_odd(X a, X b) {
#if defined(__x86_64__)
    if constexpr (sizeof(X) == 64)
      return reinterpret_cast<X>(_mm512_unpackhi_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
    if constexpr (sizeof(X) == 32)
      return reinterpret_cast<X>(_mm256_unpackhi_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
    if constexpr (sizeof(X) == 16)
      return reinterpret_cast<X>(_mm_unpackhi_epi64(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
    for (int i = 0; i < LongWords::kLanes; i += 2) b[i] = a[i + 1];
    return b;
  }

  // math::uniform_of each 32 bits.
  static GK_INLINE void store_uniform(float* target, LongWords::Register words) {
    const Vec<float>::Bits bits = reinterpret_cast<Vec<float>::Bits>(reinterpret_cast<Words>(words) >> 8);
    const FloatRegister uniform = __builtin_convertvector(bits, FloatRegister) * 0x1p-24f;
    __builtin_memcpy(target, &uniform, sizeof(uniform));
  }
};

// Calls function(offset, lanes) for each vector of [begin, end): with AllLanes, and SomeLanes for what is left at the end.
template <typename T, typename Function>
GK_INLINE void for_each_vector(int64_t begin, int64_t end, const Function& function) {
  int64_t i = begin;
  for (; i + Vec<T>::kLanes <= end; i += Vec<T>::kLanes) function(i, AllLanes());
  if (i < end) function(i, SomeLanes{static_cast<int>(end - i)});
}

}  // namespace
}  // namespace gradkernels::cpu

namespace gradkernels::math {

template <typename T>
struct ScalarOf<cpu::Vec<T>> {
  using type = T;
};

}  // namespace gradkernels::math
