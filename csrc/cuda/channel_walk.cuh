// The packets of one thread in the cut of a tensor by channels (cuda/channel_cut.h): where they are, and how they
// and their bits of the mask are moved.
#pragma once

#include "cuda/channel_cut.h"
#include "cuda/values.cuh"

namespace gradkernels::cuda {

// A slab's place in the tensor.
struct Slab {
  int64_t first_channel;  // of the sample
  int64_t before;         // how many channels the samples before it have
  int channels;
  int64_t columns;  // of a line
  int64_t element;
  int64_t mask_byte;
};

template <bool kColumns>
__device__ __forceinline__ Slab slab_of(const ChannelCut& cut, int64_t index) {
  const int64_t sample = cut.samples == 1 ? 0 : index / cut.sample_slabs;
  const int64_t first = (index - sample * cut.sample_slabs) * (kColumns ? cut.group_channels : 1);
  const int64_t before = sample * cut.channels;
  const int64_t element = sample * cut.sample_elements + first * cut.inner, mask_byte = sample * cut.sample_mask_bytes;
  if constexpr (!kColumns) return {first, before, 1, cut.inner, element, mask_byte + first * divide_up(cut.inner, 8)};
  const int64_t left = cut.channels - first;
  const int channels = static_cast<int>(left < cut.group_channels ? left : cut.group_channels);
  return {first, before, channels, channels * cut.inner, element, mask_byte + first * cut.inner / 8};
}

// Where a packet lies, and whether it exists. can_cut says why 32 bits are enough for the mask.
struct At {
  int64_t element;
  uint32_t mask_byte;
  bool exists;
};

// Walks the packets of one thread, one after the other, or from the last one back.
template <int W, bool kColumns, bool kBack>
class Walk {
  // Whether a line may be padded to whole bytes of the mask.
  static constexpr bool kPadded = !kColumns && W < 8;

 public:
  __device__ __forceinline__ Walk(const ChannelCut& cut, const Slab& slab, int64_t part) : cut_(cut) {
    const int64_t step = static_cast<int64_t>(cut.parts) * cut.threads;
    const int64_t begin = part * cut.threads;
    const bool fit = cut.packets + step <= INT32_MAX;
    steps_ = begin < cut.packets ? static_cast<int>(quotient(cut.packets - 1 - begin, step, fit)) + 1 : 0;
    int64_t first = begin + threadIdx.x;
    mine_ = first < cut.packets ? static_cast<int>(quotient(cut.packets - 1 - first, step, fit)) + 1 : 0;
    if constexpr (kBack) first += (steps_ - 1) * step;
    const int64_t row = quotient(first, cut.line_packets, fit);
    column_ = static_cast<uint32_t>(first - row * cut.line_packets);
    element_ = slab.element + row * cut.row_stride + static_cast<int64_t>(column_) * W;
    mask_byte_ = static_cast<uint32_t>(slab.mask_byte + row * cut.mask_row_stride + static_cast<int64_t>(column_) * W / 8);
    columns_ = static_cast<uint32_t>(slab.columns / W);
    if (kColumns && (static_cast<int>(threadIdx.x) >= cut.threads || column_ >= columns_)) mine_ = 0;
    at_step_ = kBack ? steps_ - 1 : 0;
  }

  // In short runs, the first of the thread's columns.
  __device__ __forceinline__ int first_column() const { return static_cast<int>(column_) * W; }

  __device__ __forceinline__ At next() {
    // In a walk back, the steps before the first one are large unsigned numbers.
    At at{element_, mask_byte_, static_cast<uint32_t>(at_step_) < static_cast<uint32_t>(mine_)};
    if constexpr (kPadded) at.exists = at.exists && column_ < columns_;
    if constexpr (kBack) {
      --at_step_;
      element_ -= cut_.element_step;
      mask_byte_ -= cut_.mask_step;
      if constexpr (!kColumns) {
        const bool wraps = column_ < cut_.column_step;
        column_ -= cut_.column_step;
        if (wraps) {
          column_ += cut_.line_packets;
          element_ -= cut_.element_wrap;
          mask_byte_ -= cut_.mask_wrap;
        }
      }
    } else {
      ++at_step_;
      element_ += cut_.element_step;
      mask_byte_ += cut_.mask_step;
      if constexpr (!kColumns) {
        column_ += cut_.column_step;
        if (column_ >= cut_.line_packets) {
          column_ -= cut_.line_packets;
          element_ += cut_.element_wrap;
          mask_byte_ += cut_.mask_wrap;
        }
      }
    }
    return at;
  }

  // operands.load(at) and use(at, operands) for kTile packets at a time: at is an At[kTile]. prepare() is called once, when
  // the first packets are on their way. All threads of a block call the three equally often.
  template <int kTile, typename Operands, typename Prepare, typename Use>
  __device__ __forceinline__ void for_each_tile(Operands&& operands, const Prepare& prepare, const Use& use) {
    At at[kTile];
    const auto step = [&] {
#pragma unroll
      for (int i = 0; i < kTile; ++i) at[i] = next();
    };
    step();
    operands.load(at);
    prepare();
    for (int done = kTile;; done += kTile) {
      use(at, operands);
      if (done >= steps_) return;
      step();
      operands.load(at);
    }
  }

 private:
  const ChannelCut& cut_;
  int64_t element_;
  uint32_t mask_byte_, column_, columns_;
  int steps_, mine_, at_step_;
};

// The packets of a tile of one operand; those that do not exist are not defined. They are kept in words: of a packet that
// may not be loaded, the compiler would move each element of 16 bits by itself.
template <typename scalar_t, int W, int kTile>
struct Tile {
  using Word = std::conditional_t<sizeof(Packet<scalar_t, W>) % 4 == 0, uint32_t, scalar_t>;
  const scalar_t* from;
  Packet<Word, sizeof(Packet<scalar_t, W>) / sizeof(Word)> packet[kTile];

  __device__ __forceinline__ void load(const At (&at)[kTile]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (at[i].exists) cuda::load(packet[i], reinterpret_cast<const Word*>(from + at[i].element));
    }
  }
  __device__ __forceinline__ Values<scalar_t, W> operator[](int i) const { return Values<scalar_t, W>::of(packet[i]); }
};

// Writes a packet. `briefly`: see Keep.
template <typename scalar_t, int W>
__device__ __forceinline__ void write(scalar_t* y, const Values<scalar_t, W>& values, bool briefly) {
  if (briefly) {
    store<Keep::kBriefly>(y, values.rounded());
  } else {
    store(y, values.rounded());
  }
}

// Writes the mask's bits of a packet. All threads of a block must call it.
template <int W>
__device__ __forceinline__ void store_bits(uint8_t* mask, const At& at, unsigned bits) {
  bits = byte_of_bits<W>(at.exists ? bits : 0u);
  if (static_cast<int>(threadIdx.x) % (8 / W) == 0 && at.exists) mask[at.mask_byte] = static_cast<uint8_t>(bits);
}

template <int W>
__device__ __forceinline__ unsigned load_bits(const uint8_t* mask, const At& at) {
  return static_cast<unsigned>(mask[at.mask_byte]) >> (static_cast<int>(threadIdx.x) % (8 / W) * W);
}

// Calls function(k, channel) for the columns of a packet that begins with column `column` of the line: `channel`
// is the column's channel, counted from the first of the slab. Columns that do not exist get the last channel.
template <int W, bool kColumns, typename Function>
__device__ __forceinline__ void for_each_column(const ChannelCut& cut, const Slab& slab, int column, const Function& function) {
  int channel = kColumns ? column / static_cast<int>(cut.inner) : 0;
  int within = kColumns ? column % static_cast<int>(cut.inner) : 0;
#pragma unroll
  for (int k = 0; k < (kColumns ? W : 1); ++k) {
    function(k, channel < slab.channels ? channel : slab.channels - 1);
    if (++within == cut.inner) {
      within = 0;
      ++channel;
    }
  }
}

}  // namespace gradkernels::cuda
