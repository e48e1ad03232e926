// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011). The
// numbers of an element depend only on a seed and the index of the element: backward draws the same numbers
// as forward, in any order and on any number of threads.
#pragma once

#include "common/host_device.h"

namespace gradkernels::math {

// The lower half of each word is random; the upper half is not.
template <typename Word>
struct PhiloxBlock {
  Word word[4];
};

GK_HOST_DEVICE uint64_t multiply_lower(uint64_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // nvcc adds the product of the upper halves, which is 0, to each result.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<uint32_t>(a)), "r"(b));
  return product;
#else
  return uint64_t{static_cast<uint32_t>(a)} * b;
#endif
}
GK_HOST_DEVICE uint64_t upper(uint64_t a) { return a >> 32; }

// Word is uint64_t, or a vector of uint64_t, which computes one block in each lane.
template <typename Word>
GK_HOST_DEVICE PhiloxBlock<Word> philox(uint64_t seed, Word index) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  PhiloxBlock<Word> counter = {{index, upper(index), Word(uint64_t{0}), Word(uint64_t{0})}};
  for (int round = 0; round < 10; ++round) {
    const Word a = multiply_lower(counter.word[0], 0xD2511F53);
    const Word b = multiply_lower(counter.word[2], 0xCD9E8D57);
    counter = {{upper(b) ^ counter.word[1] ^ Word(uint64_t{key[0]}), b, upper(a) ^ counter.word[3] ^ Word(uint64_t{key[1]}), a}};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// Uniform in [0, 1). The result is a multiple of 2^-24, which float32 represents exactly.
GK_HOST_DEVICE float uniform_of(uint64_t word) { return static_cast<float>(static_cast<uint32_t>(word) >> 8) * 0x1p-24f; }

}  // namespace gradkernels::math
