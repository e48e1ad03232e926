// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011): the numbers of an element follow from
// a seed and the element's index alone, so that backward draws again what forward drew, in any order, on any number of threads.
#pragma once

#include "common/host_device.h"

namespace gradkernels::math {

struct PhiloxBlock {
  uint32_t word[4];
};

GK_HOST_DEVICE PhiloxBlock philox(uint64_t seed, uint64_t index) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  PhiloxBlock counter = {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key[0], static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key[1], static_cast<uint32_t>(a)}};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// Uniform in [0, 1), a multiple of 2^-24: exact in float32.
GK_HOST_DEVICE float uniform_of(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

}  // namespace gradkernels::math
