// How batch_norm_act and group_norm_act on CUDA cut a tensor into the work of blocks and threads. This file includes
// nothing of CUDA, and the tests call it on the host (tests/test_channel_cut.py); kernels call its constexpr functions
// too, which nvcc allows with the flags of torch.
//
//   tensor   samples of rows x channels x inner (common/shape.h), which are cut alike; in batch norm there is one
//   slab     the channels of a sample whose sums are computed together, in all its rows: one channel if runs are long
//            (inner >= kShortRunElements), otherwise a group of neighbouring channels
//   line     the elements of a slab in one row: a channel's run, or the columns of the group
//   packet   `width` neighbours of a line, which a thread moves at once; with a mask, a line of packets is padded
//            to whole bytes of it; packets of a slab are counted line by line
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

// What is to be measured on a GPU (bench/profile_cuda.py): the bytes that a thread loads before it uses the first
// of them, and the waves of blocks of the passes for sums and for results. -D sets another number.
#ifndef GK_BYTES_IN_FLIGHT
#define GK_BYTES_IN_FLIGHT 64
#endif
#ifndef GK_SUM_WAVES
#define GK_SUM_WAVES 1
#endif
#ifndef GK_RESULT_WAVES
#define GK_RESULT_WAVES 1
#endif
constexpr int kBytesInFlight = GK_BYTES_IN_FLIGHT;
constexpr int kSumWaves = GK_SUM_WAVES;
constexpr int kResultWaves = GK_RESULT_WAVES;

// The most threads of a block. In short runs, larger blocks leave fewer results to merge, and if each thread has one
// column, a line of eight channels has up to 504.
constexpr int kRunThreads = 256;
constexpr int kGroupThreads = 352;
constexpr int kSinglesThreads = 512;
constexpr int kWarp = 32;
constexpr int threads_of(int width, bool columns) { return !columns ? kRunThreads : width > 1 ? kGroupThreads : kSinglesThreads; }

// The most channels of a slab of short runs.
constexpr int kMostGroupChannels = 64;
// The columns of a slab of short runs, if there are enough: whole sectors of memory in every type. More, if
// there are many channels, so that there are fewer slabs.
constexpr int kGroupColumns = 32;
constexpr int64_t kManyColumns = 256;
// The last block of a slab merges the results of its parts: at most 256 KiB (tests/test_channel_cut.py), which take
// about three microseconds by the speed of an SM's loads from L2, in at most six waits (for_each_set).
constexpr int64_t kMostParts = 320;
// The last of several waves of blocks should not leave much of the GPU idle.
constexpr double kFullWave = 0.96;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// The bytes of a packet: 16 if runs of `run` elements and all pointers are aligned to them; 8, which is less than
// an instruction can move, for 16-bit runs such as those of 14 x 14 pixels; otherwise those of an element.
// `alignment` is that of all pointers.
inline int packet_bytes(int64_t run, int64_t element_bytes, int alignment) {
  for (const int bytes : {16, 8}) {
    if ((bytes == 16 || element_bytes == 2) && run * element_bytes % bytes == 0 && alignment % bytes == 0) return bytes;
  }
  return static_cast<int>(element_bytes);
}

// The elements of a packet. In short runs they are at most 4, because a thread keeps numbers for each of its
// columns.
inline int width_of(const ChannelShape& shape, int element_bytes, int alignment) {
  const bool columns = shape.inner < kShortRunElements;
  const int width = packet_bytes(columns ? shape.channels * shape.inner : shape.inner, element_bytes, alignment) / element_bytes;
  return columns ? std::min(width, 4) : width;
}

// How many packets of each of `operands` tensors a thread loads before it uses the first of them.
constexpr int packets_in_flight(int element_bytes, int width, int operands) {
  const int packets = kBytesInFlight / operands / (width * element_bytes);
  return packets < 1 ? 1 : packets < 8 / operands ? packets : 8 / operands;
}

// The blocks that an SM can hold, which limit the registers of a thread: an SM has 65,536. An SM waits for 36 to
// 64 KiB at a time, which docs/design/cuda.md has for each shape; for 16 KiB if packets are single elements of 16
// bits.
constexpr int blocks_of_processor(int element_bytes, int width, bool columns, bool residual) {
  if (element_bytes == 8) return columns ? 1 : 2;
  return columns ? 2 : width * element_bytes < 16 || residual ? 3 : 4;
}

struct ChannelCut {
  int64_t rows, channels, inner;
  int64_t samples;
  int64_t sample_slabs;       // of a sample
  int64_t sample_elements;    // from one sample to the next
  int64_t sample_mask_bytes;  // from one sample to the next
  int64_t row_stride;         // elements from one row to the next
  int64_t mask_row_stride;    // bytes
  uint32_t line_packets;
  int64_t packets;  // of a slab
  int64_t slabs;
  int group_channels;  // of a slab
  int width;           // elements of a packet
  int block_threads;   // whole warps, at most threads_of
  int threads;         // the threads of a block that take packets
  int lanes;           // the threads that merge the sums of one channel, a power of two
  int parts;           // of a slab
  // The steps from a thread's packet to its next one, and the corrections if that is one line further.
  int64_t element_step, element_wrap;
  uint32_t column_step, mask_step, mask_wrap;
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

// Whether the numbers of 32 bits below can count the packets of a line and the bytes of the mask.
inline bool can_cut(const ChannelShape& shape, bool masked) {
  const int64_t lines = shape.samples * shape.rows * (shape.inner < kShortRunElements ? 1 : shape.channels);
  const int64_t line = shape.inner < kShortRunElements ? shape.channels * shape.inner : shape.inner;
  return shape.inner <= INT32_MAX && (!masked || lines * divide_up(line, 8) <= UINT32_MAX);
}

// The cut in packets of `width`, without parts. masked: a line is padded to whole bytes of the mask, so that threads
// that share one are neighbours. A block has no more warps than find `least` packets for each thread: a sample of
// group norm may have few, and an SM holds more blocks of fewer threads.
inline ChannelCut cut_of(const ChannelShape& shape, int width, bool masked, int64_t least) {
  ChannelCut cut{};
  cut.samples = shape.samples;
  cut.rows = shape.rows;
  cut.channels = shape.channels;
  cut.inner = shape.inner;
  cut.row_stride = shape.channels * shape.inner;
  cut.width = width;
  const bool columns = shape.inner < kShortRunElements;
  cut.group_channels = columns ? static_cast<int>(group_of(shape)) : 1;
  const int64_t line = cut.group_channels * shape.inner;
  cut.mask_row_stride = columns ? divide_up(cut.row_stride, 8) : shape.channels * divide_up(line, 8);
  cut.line_packets = static_cast<uint32_t>((masked ? round_up(line, 8) : round_up(line, width)) / width);
  cut.packets = shape.rows * cut.line_packets;
  cut.sample_slabs = divide_up(shape.channels, cut.group_channels);
  cut.slabs = shape.samples * cut.sample_slabs;
  cut.sample_elements = shape.rows * cut.row_stride;
  cut.sample_mask_bytes = shape.rows * cut.mask_row_stride;
  const int64_t most = threads_of(width, columns), unit = columns ? int64_t{cut.line_packets} : kWarp;
  cut.threads = static_cast<int>(std::min(most / unit, divide_up(cut.packets, unit * least)) * unit);
  // In a merge, each channel has at least one thread.
  cut.block_threads = static_cast<int>(round_up(std::max(cut.threads, cut.group_channels), kWarp));
  cut.lanes = kWarp;
  while (cut.lanes * cut.group_channels > cut.block_threads) cut.lanes /= 2;
  return cut;
}

inline ChannelCut in_parts(ChannelCut cut, int64_t parts) {
  cut.parts = static_cast<int>(parts);
  const int64_t step = parts * cut.threads;
  const int64_t rows = step / cut.line_packets, width = cut.width;
  cut.column_step = static_cast<uint32_t>(step % cut.line_packets);
  cut.element_step = rows * cut.row_stride + int64_t{cut.column_step} * width;
  cut.mask_step = static_cast<uint32_t>(rows * cut.mask_row_stride + int64_t{cut.column_step} * width / 8);
  cut.element_wrap = cut.row_stride - int64_t{cut.line_packets} * width;
  cut.mask_wrap = static_cast<uint32_t>(cut.mask_row_stride - int64_t{cut.line_packets} * width / 8);
  return cut;
}

// The cut for a GPU that runs `resident` blocks at once: the fewest parts that give it blocks for `waves` waves,
// the last of them nearly full, and leave each thread `least` packets.
inline ChannelCut in_waves(const ChannelCut& cut, int64_t resident, int64_t waves, int64_t least, int64_t most_parts) {
  const int64_t most = std::clamp<int64_t>(cut.packets / (cut.threads * least), 1, most_parts);
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

// A pass for sums leaves results of its parts to be merged; one for results does not.
enum class Pass : uint8_t { kSums, kResults };

// The cut of a pass that reads `operands` tensors, and those of a residual, on a GPU of `processors` SMs.
inline ChannelCut cut_for(const ChannelShape& shape, int element_bytes, int width, int operands, bool residual, bool masked, Pass pass,
                          int processors) {
  const bool columns = shape.inner < kShortRunElements, sums = pass == Pass::kSums;
  const int64_t resident = int64_t{blocks_of_processor(element_bytes, width, columns, residual)} * processors;
  const int packets = packets_in_flight(element_bytes, width, operands + residual);
  return in_waves(cut_of(shape, width, masked, packets), resident, sums ? kSumWaves : kResultWaves, packets, sums ? kMostParts : INT32_MAX);
}

}  // namespace gradkernels::cuda
