// Uniform random numbers for many elements at once: math::philox in vectors of 64-bit words.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/host_device.h"
#include "cpu/double_vector.h"
#include "cpu/half_vector.h"
#include "cpu/load_store.h"
#include "cpu/vector.h"
#include "math/philox.h"

namespace gradkernels::cpu {
namespace {

// A register of 64-bit words, which math::philox computes in.
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

// Numbers uniform in [0, 1). philox gives them in blocks of four; these are the blocks from `block` on, one
// for each lane of LongWords.
struct UniformNumbers {
  static constexpr int kCount = 4 * LongWords::kLanes;

  float number[kCount];

  GK_INLINE UniformNumbers(uint64_t seed, uint64_t block) {
    // The first half of the blocks is in the even lanes: the interleaving below then puts all blocks in
    // order.
    LongWords::Register blocks;
    for (int i = 0; i < LongWords::kLanes; ++i) blocks[i] = block + static_cast<uint64_t>(i / 2 + i % 2 * (LongWords::kLanes / 2));
    const math::PhiloxBlock<LongWords> random = math::philox(seed, LongWords(blocks));
    const LongWords::Register first = pair(random.word[0], random.word[1]), second = pair(random.word[2], random.word[3]);
    store_uniform(number, interleave_even(first, second));
    store_uniform(number + kCount / 2, interleave_odd(first, second));
  }

  // A vector of the numbers from number i on.
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

  // math::uniform_of of each 32-bit word.
  static GK_INLINE void store_uniform(float* target, LongWords::Register words) {
    const Vec<float>::Bits bits = reinterpret_cast<Vec<float>::Bits>(reinterpret_cast<Words>(words) >> 8);
    const FloatRegister uniform = __builtin_convertvector(bits, FloatRegister) * 0x1p-24f;
    __builtin_memcpy(target, &uniform, sizeof(uniform));
  }
};

}  // namespace
}  // namespace gradkernels::cpu
