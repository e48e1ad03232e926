// Vec<T>: a vector of an instruction set, with the operations that math/ is written in. It has at least eight
// lanes, so that the mask of a vector fills whole bytes.
//
// The including file has enabled the instruction set and has defined kRegisterBytes: 64 for AVX-512 F, BW, DQ
// and VL, 32 for AVX2, FMA and F16C, 16 for every processor. (g++ before 13 does not define __AVX2__ after
// #pragma GCC target.) Every function has internal linkage and is forced inline: the object of an instruction
// set must not export a function that the linker could use elsewhere (tests/test_layout.py checks it with
// nm).
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/host_device.h"
#include "math/exp.h"

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
  // x - 0 is x for every x. x + 0 is not: -0 + 0 is +0.
  GK_INLINE Vec(T x) {
    for (int i = 0; i < kRegisters; ++i) part[i] = x - Register{};
  }

  // One register at a time. The compiler copies several registers in pieces of another size, and the
  // processor cannot forward a store of such pieces to a load of a register.
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

  // Without the instruction, a fused multiply-add would be a library call for each lane. The product is
  // rounded then, in forward and backward alike.
  friend GK_INLINE Vec fma(Vec a, Vec b, Vec c) {
    Vec r;
    for (int i = 0; i < kRegisters; ++i) r.part[i] = fma_register(a.part[i], b.part[i], c.part[i]);
    return r;
  }

#if defined(__x86_64__)
  friend GK_INLINE Vec scale_by_exp2(Vec x, Vec rounded) {
    const Vec n = rounded - Vec(math::ExpConstants<T>::kRound);
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) return {_mm512_scalef_ps(x.part[0], n.part[0])};
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 8) return {_mm512_scalef_pd(x.part[0], n.part[0])};
    return x * exp2_of_rounded(rounded);
  }
#endif

  friend GK_INLINE Vec add_exponent(Vec x, Vec rounded) {
    using C = math::ExpConstants<T>;
    // Unsigned, because the sum may wrap.
    typedef typename C::bits_t UnsignedBits __attribute__((vector_size(kRegisterBytes)));
    for (int i = 0; i < kRegisters; ++i) {
      const UnsignedBits exponent = reinterpret_cast<UnsignedBits>(rounded.part[i]) << C::kMantissaBits;
      x.part[i] = reinterpret_cast<Register>(reinterpret_cast<UnsignedBits>(x.part[i]) + exponent);
    }
    return x;
  }

  friend GK_INLINE bool all_near(Vec x) {
    const Vec bound = math::constant<Vec, math::ExpConstants<T>::kNear>();
#if defined(__x86_64__)
    // An intrinsic, because compilers turn the comparison into a vector before they test it.
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 4) {
      return _mm256_movemask_ps(_mm256_cmp_ps(x.part[0], bound.part[0], _CMP_NGE_UQ)) == 0;
    }
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) return _mm512_cmp_ps_mask(x.part[0], bound.part[0], _CMP_NGE_UQ) == 0;
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 8) return _mm512_cmp_pd_mask(x.part[0], bound.part[0], _CMP_NGE_UQ) == 0;
#endif
    return !any(!(x >= bound));
  }

  friend GK_INLINE Mask is_near(Vec x) { return x >= math::constant<Vec, math::ExpConstants<T>::kNear>(); }

  // With a wide division, the inverse to 14 bits and one step for the residual are faster, and as precise.
  friend GK_INLINE Vec quotient(Vec a, Vec b) {
#if defined(__x86_64__)
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) {
      const Vec inverse = approximate_inverse(b);
      const Vec estimate = a * inverse;
      return fma(-fma(b, estimate, -a), inverse, estimate);  // -0 stays -0
    }
#endif
    return a / b;
  }

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

  // The processor's maximum and minimum are the second operand if either is nan.
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
  friend GK_INLINE Vec at_most(Vec bound, Vec x) {
#if defined(__x86_64__)
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 4) return {_mm512_min_ps(x.part[0], bound.part[0])};
    if constexpr (kRegisterBytes == 64 && sizeof(T) == 8) return {_mm512_min_pd(x.part[0], bound.part[0])};
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 4) return {_mm256_min_ps(x.part[0], bound.part[0])};
    if constexpr (kRegisterBytes == 32 && sizeof(T) == 8) {
      for (int i = 0; i < kRegisters; ++i) x.part[i] = _mm256_min_pd(x.part[i], bound.part[i]);
      return x;
    }
#endif
    return select(x < bound, x, bound);
  }

  friend GK_INLINE Vec exp2_of_rounded(Vec rounded) {
    using C = math::ExpConstants<T>;
    // Unsigned, because the sum may wrap.
    typedef typename C::bits_t UnsignedBits __attribute__((vector_size(kRegisterBytes)));
    Vec r;
    for (int i = 0; i < kRegisters; ++i) {
      const UnsignedBits bits = reinterpret_cast<UnsignedBits>(rounded.part[i]);
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

// One bit for each lane, the first lane in the lowest bit.
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

// Which lanes of a vector are used: all of them, or the first `count`, 0 < count < kLanes. These are two
// types, so that code for whole vectors does not test the count.
struct AllLanes {
  static constexpr bool kAll = true;
};
struct SomeLanes {
  static constexpr bool kAll = false;
  int count;
};

// Calls function(offset, lanes) for each vector of [begin, end): lanes is AllLanes, but SomeLanes for a rest
// that does not fill a vector.
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

// AVX2 has 16 registers. The constants of an exponential would be spread again for each vector, or be spilled to
// the stack. Here each constant is a vector in memory, which an instruction takes as its operand. The empty
// statement seems to write it, so that no compiler keeps it in a register.
template <const float& kValue>
struct Constant<cpu::Vec<float>, kValue> {
  static GK_INLINE cpu::Vec<float> get() {
    if constexpr (cpu::kRegisterBytes == 32) {
      asm("" : "+m"(lanes));
      return {lanes};
    }
    return cpu::Vec<float>(kValue);
  }

 private:
  static inline typename cpu::Vec<float>::Register lanes = kValue - typename cpu::Vec<float>::Register{};
};

}  // namespace gradkernels::math
