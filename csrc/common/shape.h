// A tensor seen by channel, whatever its layout.
#pragma once

#include <cstdint>

namespace gradkernels {

// Element i of channel c in row r lies at (r * channels + c) * inner + i: N,C,*,* has rows = N and inner = the pixels of one image;
// channels_last and N,C have inner = 1 and a row for every pixel.
struct ChannelShape {
  int64_t rows;
  int64_t channels;
  int64_t inner;
};

// Below this many elements a channel's run is too short for a loop of its own; kernels then walk across channels.
constexpr int64_t kShortRunElements = 64;

}  // namespace gradkernels
