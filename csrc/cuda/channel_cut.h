// How batch_norm_act on CUDA cuts a tensor into the work of blocks and threads. Host code without CUDA: the
// tests call it too (tests/test_channel_cut.py).
//
//   tensor   rows x channels x inner (common/shape.h)
//   slab     the channels whose statistics are computed together, in all rows: one channel if runs are long
//            (inner >= kShortRunElements), otherwise a group of neighbouring channels
//   line     the elements of a slab in one row: a channel's run, or the columns of the group
//   packet   `width` neighbours of a line, which a thread moves at once; a line of packets is padded to whole
//            bytes of the mask, and packets of a slab are counted line by line
//   part     what one block takes of a slab: of each `threads` packets in turn, every parts-th
//
//   Long runs, slab = channel 1:                        Short runs, slab = channels 0 to 3:
//
//           channel 0   channel 1                               channels 0 to 3   channels 4 to 7
//   row 0   . . . . .  [part 0|part 1|pa                row 0  [part 0        ]   . . . . . . . .
//   row 1   . . . . .  rt 0|part 1|part                 row 1  [part 0        ]   . . . . . . . .
//   row 2   . . . . .  0|part 1|part 0|p                row 2  [part 1        ]   . . . . . . . .
//   row 3   . . . . .  art 1|part 0|part                row 3  [part 1        ]   . . . . . . . .
//   row 4   . . . . .  1|part 0]                        row 4  [part 0        ]   . . . . . . . .
//
// So all blocks move over the tensor together, and what the L2 cache holds in the end is the end of the tensor,
// where the second pass begins. In short runs, a thread has the same columns in every line.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/shape.h"

namespace gradkernels::cuda {

// Threads of a block. In short runs, larger blocks leave fewer results to merge.
constexpr int kRunThreads = 256;
#ifndef GK_COLUMN_THREADS
#define GK_COLUMN_THREADS 512
#endif
constexpr int kColumnThreads = GK_COLUMN_THREADS;
constexpr int threads_of(bool columns) { return columns ? kColumnThreads : kRunThreads; }

// The most channels of a slab of short runs.
constexpr int kMostGroupChannels = 64;
// The columns of a slab of short runs, if there are enough: whole sectors of memory in every type. More, if
// there are many channels, so that there are fewer slabs.
constexpr int kGroupColumns = 32;
constexpr int64_t kManyColumns = 256;
// The last block of a slab merges the results of its parts.
constexpr int64_t kMostParts = 320;
// The last of several waves of blocks should not leave much of the GPU idle.
constexpr double kFullWave = 0.9;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct ChannelCut {
  int64_t rows, channels, inner;
  int64_t row_stride;       // elements from one row to the next
  int64_t mask_row_stride;  // bytes
  int64_t line_packets;
  int64_t packets;  // of a slab
  int64_t slabs;
  int group_channels;  // of a slab
  int width;           // elements of a packet
  int threads;         // the threads of a block that take packets
  int lanes;           // the threads that merge the sums of one channel, a power of two
  int parts;           // of a slab
  // The steps from a thread's packet to its next one, and the corrections if that is one line further.
  int64_t column_step, element_step, mask_step, element_wrap, mask_wrap;
};

// The channels of a slab of short runs: as few columns idle in the last slab as can be. The columns of a slab
// fill whole bytes of the mask, so channels come in eights unless one slab has all.
inline int64_t group_of(const ChannelShape& shape) {
  const int64_t columns = shape.channels * shape.inner < kManyColumns ? kGroupColumns : 2 * kGroupColumns;
  const int64_t most = std::clamp<int64_t>(columns / shape.inner / 8 * 8, 8, kMostGroupChannels);
  if (shape.channels <= most) return shape.channels;
  int64_t best = most;
  const auto idle = [&](int64_t group) { return round_up(shape.channels, group) - shape.channels; };
  for (int64_t group = most; group >= 8 && 2 * group >= most; group -= 8) {
    if (idle(group) < idle(best)) best = group;
  }
  return best;
}

// The cut in packets of `width`, without parts.
inline ChannelCut cut_of(const ChannelShape& shape, int width) {
  ChannelCut cut{};
  cut.rows = shape.rows;
  cut.channels = shape.channels;
  cut.inner = shape.inner;
  cut.row_stride = shape.channels * shape.inner;
  cut.width = width;
  const bool columns = shape.inner < kShortRunElements;
  cut.group_channels = columns ? static_cast<int>(group_of(shape)) : 1;
  const int64_t bytes_of_line = divide_up(cut.group_channels * shape.inner, 8);
  cut.mask_row_stride = columns ? divide_up(cut.row_stride, 8) : shape.channels * bytes_of_line;
  cut.line_packets = bytes_of_line * 8 / width;
  cut.packets = shape.rows * cut.line_packets;
  cut.slabs = divide_up(shape.channels, cut.group_channels);
  const int threads = threads_of(columns);
  cut.threads = columns ? static_cast<int>(threads / cut.line_packets * cut.line_packets) : threads;
  cut.lanes = 32;
  while (cut.lanes * cut.group_channels > threads) cut.lanes /= 2;
  return cut;
}

inline ChannelCut in_parts(ChannelCut cut, int64_t parts) {
  cut.parts = static_cast<int>(parts);
  const int64_t step = parts * cut.threads;
  const int64_t rows = step / cut.line_packets;
  cut.column_step = step % cut.line_packets;
  cut.element_step = rows * cut.row_stride + cut.column_step * cut.width;
  cut.mask_step = rows * cut.mask_row_stride + cut.column_step * cut.width / 8;
  cut.element_wrap = cut.row_stride - cut.line_packets * cut.width;
  cut.mask_wrap = cut.mask_row_stride - cut.line_packets * cut.width / 8;
  return cut;
}

// The cut for a GPU that runs `resident` blocks at once: the fewest parts that give it blocks for `waves` waves,
// the last of them nearly full, and leave each thread `least` packets.
inline ChannelCut in_waves(const ChannelCut& cut, int64_t resident, int64_t waves, int64_t least) {
  const int64_t most = std::clamp<int64_t>(cut.packets / (cut.threads * least), 1, kMostParts);
  const auto full = [&](int64_t parts) {
    return static_cast<double>(cut.slabs * parts) / static_cast<double>(round_up(cut.slabs * parts, resident));
  };
  const auto enough = [&](int64_t parts) {
    return static_cast<double>(cut.slabs * parts) >= kFullWave * static_cast<double>(waves * resident);
  };
  int64_t best = 1;
  for (int64_t parts = 1; parts <= most && cut.slabs * parts <= (waves + 2) * resident; ++parts) {
    if (!enough(best) || full(parts) > full(best)) best = parts;
    if (enough(best) && full(best) >= kFullWave) break;
  }
  return in_parts(cut, best);
}

}  // namespace gradkernels::cuda
