// A tensor seen by channel, in any layout.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace gradkernels {

// Element i of channel c in row r lies at (r * channels + c) * inner + i. N,C,*,* has N rows, and `inner` is
// the number of pixels of an image. channels_last and N,C have inner = 1, and one row for each pixel.
struct ChannelShape {
  int64_t rows;
  int64_t channels;
  int64_t inner;
  // Group norm computes statistics for each sample: the tensor consists of this many samples of rows x channels x inner.
  int64_t samples = 1;
};

// A channel's run of fewer elements is too short for a loop of its own. Kernels then walk across channels.
constexpr int64_t kShortRunElements = 64;

// Whether kernels on the CPU have a loop for each run; it sets the size of the mask on every device. If there is one row, what
// is computed for each column of a walk across channels would be used once.
template <typename Int>
GK_HOST_DEVICE bool has_long_runs(const Int& rows, const Int& inner) {
  constexpr int64_t kOneRowElements = 48;
  return inner >= kShortRunElements || (inner >= kOneRowElements && rows == 1);
}
GK_HOST_DEVICE bool has_long_runs(const ChannelShape& shape) { return has_long_runs(shape.rows, shape.inner); }

}  // namespace gradkernels
