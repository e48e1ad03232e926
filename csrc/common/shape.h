// A tensor seen by channel, in any layout.
#pragma once

#include <cstdint>

namespace gradkernels {

// Element i of channel c in row r lies at (r * channels + c) * inner + i. N,C,*,* has N rows, and `inner` is
// the number of pixels of an image. channels_last and N,C have inner = 1, and one row for each pixel.
struct ChannelShape {
  int64_t rows;
  int64_t channels;
  int64_t inner;
};

// A channel's run of fewer elements is too short for a loop of its own. Kernels then walk across channels.
constexpr int64_t kShortRunElements = 64;

}  // namespace gradkernels
