// batch_norm_act on CUDA. How a tensor is cut:
//
//   tensor   rows x channels x inner (common/shape.h)
//   slab     the channels whose statistics are computed together, in all rows: one channel if runs are long
//            (inner >= kShortRunElements), otherwise a group of neighbouring channels
//   line     the elements of a slab in one row: a channel's run, or the columns of the group
//   octet    eight neighbours of a line, the last ones maybe fewer; octets of a slab are counted line by line
//   part     the octets of a slab that one block takes; it may begin and end within a line
//
//   Long runs, slab = channel 1:                        Short runs, slab = channels 0 to 3:
//
//           channel 0    channel 1                             channels 0 to 3      channels 4 to 7
//   row 0   . . . . .   [octet|octet|oct]               row 0  [octet|octet|octet]  . . . . . . . .
//   row 1   . . . . .   [octet|octet|oct]  part 0       row 1  [octet|octet|octet]  . . . . . . . .  part 0
//   row 2   . . . . .   [octet|octet|oct]               row 2  [octet|octet|octet]  . . . . . . . .
//   - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - -
//   row 3   . . . . .   [octet|octet|oct]               row 3  [octet|octet|octet]  . . . . . . . .
//   row 4   . . . . .   [octet|octet|oct]  part 1       row 4  [octet|octet|octet]  . . . . . . . .  part 1
//
// A thread of a block takes every t.threads-th octet of its part. In short runs ("columns" below), it always
// has the same octet of the line.
//
// If the shared memory of a cluster of blocks can hold a slab, one kernel reads each operand once. Otherwise
// there are two passes: the first computes sums, which the last block of a slab merges, and the second walks
// back from the end and writes the result. Both ways use the same functions. The cut depends only on the
// shape and the device, and every sum has a fixed order: every run gives the same bits.
#include "ops/batch_norm_act.h"

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "math/batch_norm_act.h"

namespace gradkernels::cuda {
namespace {

constexpr int kThreads = 256;
// The number of blocks that an SM can hold, which limits the registers of a thread.
template <typename scalar_t>
constexpr int kBlocks = sizeof(scalar_t) == 8 ? 1 : 2;
// An octet is a number of whole packets in every dtype, and one byte of the mask.
constexpr int kOctetElements = 8;
// Bytes that a thread loads before it uses the first of them. Measure with bench/bench_batch_norm_act.py on a
// GPU.
constexpr int kSumsBytesInFlight = 64;
constexpr int kApplyBytesInFlight = 64;
// The most channels of a slab of short runs. In 16-bit types, a line of 64 channels with runs of one element
// has 128 bytes.
constexpr int kMostGroupChannels = 64;
constexpr int kGroupRowBytes = 128;
// A pass has this many blocks, if there is enough work: the pass for sums about four for each SM of the
// largest GPUs. The last block of a slab merges its parts, so there are at most kMostSumsParts.
constexpr int64_t kSumsBlocks = 512;
constexpr int64_t kMostSumsParts = 256;
constexpr int64_t kApplyBlocks = 4096;
constexpr int64_t kLeastOctetsOfThread = 4;
// The largest cluster, which not every GPU supports. The SMs that a cluster can use are not a multiple of 16,
// so some would be idle: larger clusters than 8 are only used if 8 blocks cannot hold a slab.
constexpr int kMostClusterBlocks = 16;
// The system reserves this much shared memory for each block.
constexpr int64_t kReservedSharedBytes = 1024;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- How a tensor is cut

// The numbers of the cut above.
struct Tiling {
  int64_t channels, inner, rows;
  int64_t row_stride;       // elements from one row to the next
  int64_t mask_row_stride;  // bytes
  int64_t octets_per_line;
  // The steps from a thread's octet to its next one, and the corrections if that is one line further.
  int64_t column_step, element_step, mask_step, element_wrap, mask_wrap;
  int64_t octets;  // of a slab
  int64_t part_octets;
  int64_t slabs;
  int group_channels;  // of a slab
  int parts;           // of a slab
  int threads;         // the threads of a block that take octets
  int lanes;           // the threads that merge the sums of one channel, a power of two
  bool aligned;        // whether every octet is aligned to a packet
  bool exceeds_cache;  // whether two such tensors do not fit into L2
};

Tiling tiling(const ChannelShape& shape, int64_t element_bytes, std::initializer_list<const void*> operands) {
  Tiling t{};
  t.channels = shape.channels;
  t.inner = shape.inner;
  t.rows = shape.rows;
  t.row_stride = shape.channels * shape.inner;
  if (shape.inner >= kShortRunElements) {
    t.group_channels = 1;
    t.octets_per_line = divide_up(shape.inner, kOctetElements);
    t.mask_row_stride = shape.channels * t.octets_per_line;
    t.threads = kThreads;
    t.aligned = shape.inner * element_bytes % kPacketBytes == 0;
  } else {
    // As many channels as give whole octets.
    const int64_t wish = divide_up(kGroupRowBytes / element_bytes / shape.inner, kOctetElements) * kOctetElements;
    const int64_t most = std::min<int64_t>(std::max<int64_t>(wish, kOctetElements), kMostGroupChannels);
    t.group_channels = static_cast<int>(std::min(most, shape.channels));
    t.octets_per_line = divide_up(t.group_channels * shape.inner, kOctetElements);
    t.mask_row_stride = divide_up(t.row_stride, kOctetElements);
    t.threads = static_cast<int>(kThreads / t.octets_per_line * t.octets_per_line);
    t.aligned = t.row_stride * element_bytes % kPacketBytes == 0;
  }
  t.aligned = t.aligned && at_packet(operands);
  const int64_t row_step = t.threads / t.octets_per_line;
  t.column_step = t.threads % t.octets_per_line;
  t.element_step = row_step * t.row_stride + t.column_step * kOctetElements;
  t.mask_step = row_step * t.mask_row_stride + t.column_step;
  t.element_wrap = t.row_stride - t.octets_per_line * kOctetElements;
  t.mask_wrap = t.mask_row_stride - t.octets_per_line;
  t.slabs = divide_up(shape.channels, t.group_channels);
  t.octets = shape.rows * t.octets_per_line;
  t.exceeds_cache = 2 * shape.rows * t.row_stride * element_bytes > device_limits().l2_bytes;
  t.lanes = kWarpThreads;
  while (t.lanes * t.group_channels > kThreads) t.lanes /= 2;
  return t;
}

// The cut with at most `parts` parts, all of one size, in which every thread has the same number of octets.
Tiling in_parts(Tiling t, int64_t parts) {
  t.part_octets = divide_up(divide_up(t.octets, parts), t.threads) * t.threads;
  t.parts = static_cast<int>(divide_up(t.octets, t.part_octets));
  return t;
}

Tiling for_sums(const Tiling& t) {
  const int64_t most = std::min(kMostSumsParts, divide_up(t.octets, t.threads * kLeastOctetsOfThread));
  return in_parts(t, std::clamp<int64_t>(divide_up(kSumsBlocks, t.slabs), 1, most));
}

Tiling for_apply(const Tiling& t) {
  const int64_t most = divide_up(t.octets, t.threads * kLeastOctetsOfThread);
  return in_parts(t, std::clamp<int64_t>(divide_up(kApplyBlocks, t.slabs), 1, most));
}

// The cut for clusters of at most `most` blocks that hold a slab in shared memory: `octet_bytes` for each
// octet, and `other_bytes` for each block. t.parts is 0 if a slab does not fit. Preferably an SM has two
// blocks, so that one loads while the other stores, and there are enough blocks to fill a GPU.
Tiling for_cluster(const Tiling& t, int64_t octet_bytes, int64_t other_bytes, int most) {
  const int64_t whole = device_limits().shared_bytes - other_bytes;
  const int64_t half = whole - (device_limits().shared_bytes + kReservedSharedBytes) / 2;
  const auto with = [&](int blocks) {
    Tiling cut = in_parts(t, blocks);
    cut.parts = blocks;
    return cut;
  };
  const auto fits = [&](int blocks, int64_t bytes) { return with(blocks).part_octets * octet_bytes <= bytes; };
  for (const int64_t bytes : {half, whole}) {
    int blocks = 1;
    while (blocks < most && !fits(blocks, bytes)) blocks *= 2;
    if (!fits(blocks, bytes)) continue;
    while (blocks < most && t.slabs * blocks < kSumsBlocks / 2 && t.octets / (2 * blocks) >= t.threads * kLeastOctetsOfThread) blocks *= 2;
    return with(blocks);
  }
  return Tiling{};
}

// A slab's place in the tensor.
struct Slab {
  int64_t first_channel;
  int channels;
  int64_t width;  // elements of a line
  int64_t element;
  int64_t mask_byte;
};

template <bool kColumns>
__device__ __forceinline__ Slab slab_of(const Tiling& t, int64_t index) {
  if constexpr (!kColumns) return {index, 1, t.inner, index * t.inner, index * t.octets_per_line};
  const int64_t first = index * t.group_channels;
  const int64_t left = t.channels - first;
  const int channels = static_cast<int>(left < t.group_channels ? left : t.group_channels);
  return {first, channels, channels * t.inner, first * t.inner, first * t.inner / kOctetElements};
}

// Where an octet lies, and how many of its elements exist: 0 after the end of the part.
struct At {
  int64_t element;
  int64_t mask_byte;
  int valid;
};

// Walks the octets of one thread, one after the other. A copy of a Walk walks them again.
template <bool kColumns>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Tiling& t, const Slab& slab, int64_t part) : width_(slab.width) {
    const int64_t first = part * t.part_octets + threadIdx.x;
    const int64_t end = (part + 1) * t.part_octets < t.octets ? (part + 1) * t.part_octets : t.octets;
    const bool takes_part = first < end && static_cast<int>(threadIdx.x) < t.threads;
    left_ = takes_part ? static_cast<int>(end - first - 1) / t.threads + 1 : 0;
    const int64_t row = quotient(first, t.octets_per_line, t.octets <= INT32_MAX);
    column_ = first - row * t.octets_per_line;
    element_ = slab.element + row * t.row_stride + column_ * kOctetElements;
    mask_byte_ = slab.mask_byte + row * t.mask_row_stride + column_;
    valid_ = valid();
  }

  __device__ __forceinline__ bool done() const { return left_ <= 0; }
  __device__ __forceinline__ int64_t column() const { return column_; }

  __device__ __forceinline__ At next(const Tiling& t) {
    const At at{element_, mask_byte_, left_ <= 0 ? 0 : kColumns ? valid_ : valid()};
    --left_;
    element_ += t.element_step;
    mask_byte_ += t.mask_step;
    if constexpr (!kColumns) {
      column_ += t.column_step;
      if (column_ >= t.octets_per_line) {
        column_ -= t.octets_per_line;
        element_ += t.element_wrap;
        mask_byte_ += t.mask_wrap;
      }
    }
    return at;
  }

 private:
  __device__ __forceinline__ int valid() const {
    const int64_t left_in_line = width_ - column_ * kOctetElements;
    return left_in_line < kOctetElements ? static_cast<int>(left_in_line < 0 ? 0 : left_in_line) : kOctetElements;
  }

  int64_t width_, column_, element_, mask_byte_;
  int valid_;  // in columns, that of every octet
  int left_;
};

// ---- Octets

template <typename scalar_t>
struct Octet {
  static constexpr int kWidth = kPacketElements<scalar_t>;
  static constexpr int kPackets = kOctetElements / kWidth;
  using Piece = Packet<scalar_t, kWidth>;
  Piece packet[kPackets];

  __device__ __forceinline__ opmath_t<scalar_t> operator[](int k) const {
    return static_cast<opmath_t<scalar_t>>(packet[k / kWidth].element[k % kWidth]);
  }
};

// Reads an octet. Elements that do not exist are 0.
template <typename scalar_t>
__device__ __forceinline__ Octet<scalar_t> read(const scalar_t* x, const At& at, bool aligned) {
  using O = Octet<scalar_t>;
  O octet;
  if (aligned && at.valid == kOctetElements) {
#pragma unroll
    for (int i = 0; i < O::kPackets; ++i) load(octet.packet[i], x + at.element + i * O::kWidth);
  } else {
#pragma unroll
    for (int i = 0; i < O::kPackets; ++i)
      load_some(octet.packet[i], x + at.element + i * O::kWidth, at.valid - i * O::kWidth, scalar_t(0.0f));
  }
  return octet;
}

// Writes an octet. `briefly`: see Keep.
template <typename scalar_t>
__device__ __forceinline__ void write(scalar_t* y, const At& at, bool aligned, const opmath_t<scalar_t> (&value)[kOctetElements],
                                      bool briefly = false) {
  using O = Octet<scalar_t>;
  O octet;
#pragma unroll
  for (int k = 0; k < kOctetElements; ++k) octet.packet[k / O::kWidth].element[k % O::kWidth] = static_cast<scalar_t>(value[k]);
  if (aligned && at.valid == kOctetElements) {
#pragma unroll
    for (int i = 0; i < O::kPackets; ++i) {
      if (briefly) {
        store<Keep::kBriefly>(y + at.element + i * O::kWidth, octet.packet[i]);
      } else {
        store(y + at.element + i * O::kWidth, octet.packet[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < O::kPackets; ++i) store_some(y + at.element + i * O::kWidth, octet.packet[i], at.valid - i * O::kWidth);
  }
}

// Octets that a thread keeps in shared memory for itself, in the order of its walk. Packets of neighbouring
// threads are neighbours in memory.
template <typename scalar_t>
class Aside {
  using O = Octet<scalar_t>;

 public:
  __device__ __forceinline__ Aside(void* memory, int threads) : memory_(static_cast<typename O::Piece*>(memory)), threads_(threads) {}

  __device__ __forceinline__ void put(int slot, const O& octet) const {
#pragma unroll
    for (int i = 0; i < O::kPackets; ++i) memory_[place(slot, i)] = octet.packet[i];
  }
  __device__ __forceinline__ O get(int slot) const {
    O octet;
#pragma unroll
    for (int i = 0; i < O::kPackets; ++i) octet.packet[i] = memory_[place(slot, i)];
    return octet;
  }

 private:
  __device__ __forceinline__ int place(int slot, int i) const {
    return (slot * O::kPackets + i) * threads_ + static_cast<int>(threadIdx.x);
  }

  typename O::Piece* memory_;
  int threads_;
};

// The sum in pairs, so that its rounding error grows with the logarithm of eight.
template <typename T>
__device__ __forceinline__ T sum_of(const T (&x)[kOctetElements]) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// How many octets of each operand a thread loads before it uses the first of them.
template <typename scalar_t>
constexpr int octets_in_flight(int bytes, int operands) {
  const int octets = bytes / operands / (kOctetElements * static_cast<int>(sizeof(scalar_t)));
  return octets < 1 ? 1 : octets;
}

// ---- Sums of a channel over threads, blocks and parts

// Merges set(0) ... set(sets - 1) into `merged`. `lanes` threads work together, and each of them gets the
// result. Only float64 data have low parts.
template <typename opmath, typename Set>
__device__ __forceinline__ void merge(math::Moments<double>& merged, int lanes, int sets, const Set& set) {
  ThreadSum<float> count;  // exact
  ThreadSum<opmath> total, m2;
  for (int i = static_cast<int>(threadIdx.x) % lanes; i < sets; i += lanes) {
    const math::Moments<double> one = set(i);
    count.add(one.count);
    total.add(math::total_of(one));
  }
  count.add_over_lanes(lanes);
  total.add_over_lanes(lanes);
  math::Sum<double> mean{0.0, 0.0};
  // A block of a cluster may have no elements.
  if (count.total > 0.0) {
    if constexpr (std::is_same_v<opmath, double>) {
      mean = math::quotient_of(total.value(), count.total);
    } else {
      mean.high = total.total / count.total;
    }
  }
  for (int i = static_cast<int>(threadIdx.x) % lanes; i < sets; i += lanes) m2.add(math::m2_about(mean, set(i)));
  m2.add_over_lanes(lanes);
  merged = {count.total, mean.high, m2.value().high, mean.low, m2.value().low};
}

template <typename opmath, typename Set>
__device__ __forceinline__ void merge(math::GradientSums& merged, int lanes, int sets, const Set& set) {
  ThreadSum<opmath> dz, dz_x;
  for (int i = static_cast<int>(threadIdx.x) % lanes; i < sets; i += lanes) {
    const math::GradientSums one = set(i);
    dz.add(one.dz);
    dz_x.add(one.dz_x);
  }
  dz.add_over_lanes(lanes);
  dz_x.add_over_lanes(lanes);
  merged = {dz.rounded(), dz_x.rounded()};
}

// A thread's channel when its block merges sums. `lanes` neighbouring threads have the same channel, and the
// first of them writes the result.
struct Lane {
  int in_slab;
  int64_t channel;
  bool exists;
  bool writes;

  __device__ __forceinline__ Lane(const Tiling& t, const Slab& slab)
      : in_slab(static_cast<int>(threadIdx.x) / t.lanes),
        channel(slab.first_channel + in_slab),
        exists(in_slab < slab.channels),
        writes(exists && static_cast<int>(threadIdx.x) % t.lanes == 0) {}
};

// Merges the results of all parts of slab `index`, through global memory, into the `found` of the last block.
// Returns whether this block is the last.
template <typename opmath, typename Found>
__device__ __forceinline__ bool merge_parts(const Tiling& t, const Lane& lane, int64_t index, int64_t part, Found& found, Found* partial,
                                            unsigned* counters, unsigned* flag) {
  if (t.parts == 1) return true;
  if (lane.writes) partial[part * t.channels + lane.channel] = found;
  if (!is_last_block(counters + index, t.parts, flag)) return false;
  merge<opmath>(found, t.lanes, lane.exists ? t.parts : 0, [&](int i) { return partial[i * t.channels + lane.channel]; });
  return true;
}

// The same for a cluster, through its shared memory; every block gets the result. of_block has
// kMostGroupChannels results. A cluster_sync must follow before a block ends.
template <typename opmath, typename Found>
__device__ __forceinline__ void merge_cluster(const Tiling& t, const Lane& lane, Found& found, Found* of_block) {
  if (lane.writes) of_block[lane.in_slab] = found;
  cluster_sync();
  merge<opmath>(found, t.lanes, lane.exists ? t.parts : 0, [&](int i) { return *of_cluster_block(&of_block[lane.in_slab], i); });
}

// The results of each thread of a block: one value for each of its columns, or one for all of its elements if
// the block has one channel.
template <bool kColumns>
struct ThreadValues {
  static constexpr int kValues = kColumns ? kOctetElements : 1;
  // One more than kThreads, so that eight channels of neighbouring columns are in different banks.
  static constexpr int kPitch = kThreads + 1;
  double value[kValues * kPitch];

  __device__ __forceinline__ void put(const double (&values)[kValues]) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) value[k * kPitch + threadIdx.x] = values[k];
  }
};

// The thread of set `i` of a channel, and the place of its value in ThreadValues.
struct ThreadColumn {
  int thread;
  int place;
};

template <bool kColumns>
__device__ __forceinline__ int sets_of_block(const Tiling& t) {
  if constexpr (!kColumns) return t.threads;
  return t.threads / static_cast<int>(t.octets_per_line) * static_cast<int>(t.inner);
}

template <bool kColumns>
__device__ __forceinline__ ThreadColumn set_of_block(const Tiling& t, int channel, int i) {
  if constexpr (!kColumns) return {i, i};
  const int inner = static_cast<int>(t.inner);
  const int line = i / inner;
  const int column = channel * inner + (i - line * inner);
  const int thread = line * static_cast<int>(t.octets_per_line) + column / kOctetElements;
  return {thread, column % kOctetElements * ThreadValues<kColumns>::kPitch + thread};
}

// ---- Parameters of a channel

__device__ __forceinline__ double channel_value(DType dtype, const void* values, int64_t channel, double otherwise) {
  double value = otherwise;
  if (values != nullptr) {
    dispatch(dtype, [&](auto zero) { value = static_cast<double>(static_cast<const decltype(zero)*>(values)[channel]); });
  }
  return value;
}

__device__ __forceinline__ void set_channel_value(DType dtype, void* values, int64_t channel, double value) {
  if (values == nullptr) return;
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    static_cast<scalar_t*>(values)[channel] = static_cast<scalar_t>(value);
  });
}

// Arguments is BatchNormForward or BatchNormBackward.
template <typename opmath, typename Arguments>
__device__ __forceinline__ math::Normalisation<opmath> channel_normalisation(const Arguments& p, int64_t channel, double mean,
                                                                             double invstd) {
  return math::normalisation<opmath>(mean, invstd, channel_value(p.parameter_dtype, p.weight, channel, 1.0),
                                     channel_value(p.parameter_dtype, p.bias, channel, 0.0));
}

// Calls function(k, channel) for the columns of a thread, which are those of octet `octet` of the line.
// `channel` is the column's channel, counted from the first of the slab; columns that do not exist get the
// last channel.
template <bool kColumns, typename Function>
__device__ __forceinline__ void for_each_column(const Tiling& t, const Slab& slab, int64_t octet, const Function& function) {
  int channel = kColumns ? static_cast<int>(octet) * kOctetElements / static_cast<int>(t.inner) : 0;
  int within = kColumns ? static_cast<int>(octet) * kOctetElements % static_cast<int>(t.inner) : 0;
#pragma unroll
  for (int k = 0; k < ThreadValues<kColumns>::kValues; ++k) {
    function(k, channel < slab.channels ? channel : slab.channels - 1);
    if (++within == t.inner) {
      within = 0;
      ++channel;
    }
  }
}

// ---- Forward

template <bool kColumns, typename opmath>
struct ForwardShared {
  ThreadValues<kColumns> mean, m2;
  double count[kThreads];
  math::Moments<double> of_block[kMostGroupChannels];
  math::Normalisation<opmath> normalisation[kMostGroupChannels];
  unsigned flag;
};

// The moments of a part, for each channel of the slab; each lane of a channel gets them. keep(slot, octet)
// receives every octet of the thread, one after the other.
//
// A thread adds up the differences from the mean of the first tile that it loads, and their squares: an octet
// (or the rows of a tile) in the computing type, and then in float64. If the tile is m of the thread's n
// elements, M2 >= m (tile's mean - mean)^2: the part that cancels in the end is at most n / m times the
// result. In float32, squares overflow at 2^128: if x is further than 1e19 from its mean, the variance is inf
// and y is the bias, as in torch.
template <typename scalar_t, bool kColumns, typename Keep>
__device__ __forceinline__ math::Moments<double> part_moments(const Tiling& t, const Slab& slab, int64_t part, const scalar_t* x,
                                                              ForwardShared<kColumns, opmath_t<scalar_t>>& shared, const Keep& keep) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kTile = octets_in_flight<scalar_t>(kSumsBytesInFlight, 1);
  constexpr int kValues = ThreadValues<kColumns>::kValues;
  opmath about[kValues] = {};
  double count = 0.0;
  ThreadSum<opmath> sum[kValues], squares[kValues];

  Walk<kColumns> walk(t, slab, part);
  for (int slot = 0; !walk.done(); slot += kTile) {
    Octet<scalar_t> tile[kTile];
    int valid[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const At at = walk.next(t);
      tile[i] = read(x, at, t.aligned);
      valid[i] = at.valid;
    }
    int elements = 0;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      elements += kColumns ? valid[i] > 0 : valid[i];
      if (valid[i] > 0) keep(slot + i, tile[i]);
    }
    if (slot == 0) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        opmath total = opmath(0);
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          if constexpr (kColumns) {
            total += tile[i][k];
          } else {
            opmath value[kOctetElements];
#pragma unroll
            for (int j = 0; j < kOctetElements; ++j) value[j] = tile[i][j];
            total += sum_of(value);
          }
        }
        if (elements > 0) about[k] = math::zero_unless_finite(total / static_cast<opmath>(elements));
      }
    }
    count += static_cast<double>(elements);
    if constexpr (kColumns) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        opmath tile_sum = opmath(0), tile_squares = opmath(0);
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          const opmath difference = valid[i] > 0 ? tile[i][k] - about[k] : opmath(0);
          tile_sum += difference;
          tile_squares = math::fma(difference, difference, tile_squares);
        }
        sum[k].add(tile_sum);
        squares[k].add(tile_squares);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        opmath difference[kOctetElements], square[kOctetElements];
#pragma unroll
        for (int k = 0; k < kOctetElements; ++k) difference[k] = tile[i][k] - about[0];
        if (valid[i] < kOctetElements) {
#pragma unroll
          for (int k = 0; k < kOctetElements; ++k) {
            if (k >= valid[i]) difference[k] = opmath(0);
          }
        }
#pragma unroll
        for (int k = 0; k < kOctetElements; ++k) square[k] = difference[k] * difference[k];
        sum[0].add(sum_of(difference));
        squares[0].add(sum_of(square));
      }
    }
  }

  double mean[kValues], m2[kValues];
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    math::Moments<double> mine{0.0, 0.0, 0.0, 0.0, 0.0};
    if (count > 0.0) mine = math::moments_about(static_cast<double>(about[k]), count, sum[k].total, squares[k].total);
    // The low parts are only dropped here. A single thread's rounding error matters little, and slabs need
    // the shared memory.
    mine = math::rounded(mine);
    mean[k] = mine.mean;
    m2[k] = mine.m2;
  }
  shared.mean.put(mean);
  shared.m2.put(m2);
  shared.count[threadIdx.x] = count;
  __syncthreads();
  const Lane lane(t, slab);
  math::Moments<double> found;
  merge<opmath>(found, t.lanes, lane.exists ? sets_of_block<kColumns>(t) : 0, [&](int i) {
    const ThreadColumn at = set_of_block<kColumns>(t, lane.in_slab, i);
    return math::Moments<double>{shared.count[at.thread], shared.mean.value[at.place], shared.m2.value[at.place], 0.0, 0.0};
  });
  return found;
}

// Writes mean, invstd and the running statistics from a channel's rounded moments; or, unless `moments` is
// null, only `moments` (csrc/schema.cpp).
__device__ __forceinline__ void finish_channel(const BatchNormForward& p, double* moments, int64_t channel,
                                               const math::Moments<double>& found) {
  if (moments != nullptr) {
    if (channel == 0) moments[0] = found.count;
    moments[1 + channel] = found.mean;
    moments[1 + p.shape.channels + channel] = found.m2;
    return;
  }
  p.mean[channel] = found.mean;
  p.invstd[channel] = math::inverse_std_of_batch(found.m2 / found.count, p.eps);
  const double momentum = p.batches == nullptr ? p.momentum : math::cumulative_momentum(static_cast<double>(*p.batches));
  const auto update = [&](void* running, double observed) {
    set_channel_value(p.parameter_dtype, running, channel,
                      math::update_running(channel_value(p.parameter_dtype, running, channel, 0.0), observed, momentum));
  };
  update(p.running_mean, found.mean);
  update(p.running_var, found.m2 / (found.count - 1.0));
}

// Writes y of a part; source(slot, at) is x. y is stored `briefly` if it would evict elements from the cache
// that are still to be read.
template <typename scalar_t, bool kColumns, typename Source>
__device__ __forceinline__ void normalise_part(const BatchNormForward& p, const Tiling& t, const Slab& slab, int64_t part,
                                               const math::Normalisation<opmath_t<scalar_t>>* of_channels, bool briefly,
                                               const Source& source) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kTile = octets_in_flight<scalar_t>(kApplyBytesInFlight, 1);
  const scalar_t* const residual = static_cast<const scalar_t*>(p.residual);
  scalar_t* const y = static_cast<scalar_t*>(p.y);
  Walk<kColumns> walk(t, slab, part);
  math::Normalisation<opmath> normalise[ThreadValues<kColumns>::kValues];
  for_each_column<kColumns>(t, slab, walk.column(), [&](int k, int channel) { normalise[k] = of_channels[channel]; });
  for (int slot = 0; !walk.done(); slot += kTile) {
    Octet<scalar_t> x[kTile], added[kTile];
    Walk<kColumns> for_residual = walk, for_y = walk;
#pragma unroll
    for (int i = 0; i < kTile; ++i) x[i] = source(slot + i, walk.next(t));
    if (residual != nullptr) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) added[i] = read(residual, for_residual.next(t), t.aligned);
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const At at = for_y.next(t);
      opmath u[kOctetElements];
#pragma unroll
      for (int k = 0; k < kOctetElements; ++k) u[k] = normalise[kColumns ? k : 0](x[i][k]);
      if (residual != nullptr) {
#pragma unroll
        for (int k = 0; k < kOctetElements; ++k) u[k] += added[i][k];
      }
      if (p.mask != nullptr && at.valid > 0) {
        unsigned bits = 0;
        math::visit_two_slopes<opmath>(p.act, [&](auto f) {
#pragma unroll
          for (int k = 0; k < kOctetElements; ++k) bits |= static_cast<unsigned>(f.passes(u[k])) << k;
        });
        p.mask[at.mask_byte] = static_cast<uint8_t>(bits & ((1u << at.valid) - 1u));
      }
      math::visit<opmath, math::kPrecisionOf<scalar_t>>(p.act, [&](auto f) {
#pragma unroll
        for (int k = 0; k < kOctetElements; ++k) u[k] = f.forward(u[k]);
      });
      write(y, at, t.aligned, u, briefly);
    }
  }
}

// mean, invstd and the running statistics of every channel; or `moments` (csrc/schema.cpp)
//   launch   slabs * parts blocks of kThreads; block b has part b / slabs of slab b % slabs; ForwardShared in
//            shared memory
//   requires partial[parts * channels] and counters[slabs] = 0, unless a slab has one part
//   traffic  n elements read
template <typename scalar_t, bool kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    batch_norm_act_stats_kernel(BatchNormForward p, Tiling t, double* moments, math::Moments<double>* partial, unsigned* counters) {
  auto& shared = *shared_memory<ForwardShared<kColumns, opmath_t<scalar_t>>>();
  const int64_t index = blockIdx.x % t.slabs;
  const int64_t part = blockIdx.x / t.slabs;
  const Slab slab = slab_of<kColumns>(t, index);
  math::Moments<double> found = part_moments(t, slab, part, static_cast<const scalar_t*>(p.x), shared, [](int, const Octet<scalar_t>&) {});
  const Lane lane(t, slab);
  if (!merge_parts<opmath_t<scalar_t>>(t, lane, index, part, found, partial, counters, &shared.flag)) return;
  if (lane.writes) finish_channel(p, moments, lane.channel, math::rounded(found));
}

// y = act(batch_norm(x) + residual) from mean and invstd; in evaluation, the kernel computes these from the
// running statistics
//   launch   slabs * parts blocks of kThreads, in reverse order, because the elements that the first pass
//            read last are still in the cache; Normalisation[kMostGroupChannels] in shared memory
//   requires operands dense in the order of the shape
//   traffic  n elements read (2n with a residual), n written, n bits written if there is a mask
template <typename scalar_t, bool kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>) batch_norm_act_normalise_kernel(BatchNormForward p, Tiling t) {
  using opmath = opmath_t<scalar_t>;
  auto* const normalisation = shared_memory<math::Normalisation<opmath>>();
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t part = block / t.slabs;
  const Slab slab = slab_of<kColumns>(t, block % t.slabs);
  if (static_cast<int>(threadIdx.x) < slab.channels) {
    const int64_t channel = slab.first_channel + threadIdx.x;
    double mean, invstd;
    if (!p.training && p.running_mean != nullptr) {
      mean = channel_value(p.parameter_dtype, p.running_mean, channel, 0.0);
      invstd = math::inverse_std(channel_value(p.parameter_dtype, p.running_var, channel, 1.0), p.eps);
      if (part == 0) {
        p.mean[channel] = mean;
        p.invstd[channel] = invstd;
      }
    } else {
      mean = p.mean[channel];
      invstd = p.invstd[channel];
    }
    normalisation[threadIdx.x] = channel_normalisation<opmath>(p, channel, mean, invstd);
  }
  __syncthreads();
  const scalar_t* const x = static_cast<const scalar_t*>(p.x);
  normalise_part<scalar_t, kColumns>(p, t, slab, part, normalisation, p.training && t.exceeds_cache,
                                     [&](int, const At& at) { return read(x, at, t.aligned); });
}

// Both in one kernel: a cluster of blocks keeps its slab in shared memory
//   launch   slabs clusters of `parts` blocks of kThreads; ForwardShared and the octets of the part in shared
//            memory
//   requires as the two above
//   traffic  n elements read (2n with a residual), n written, n bits written if there is a mask
template <typename scalar_t, bool kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>) batch_norm_act_forward_kernel(BatchNormForward p, Tiling t) {
  using opmath = opmath_t<scalar_t>;
  using Shared = ForwardShared<kColumns, opmath>;
  auto& shared = *shared_memory<Shared>();
  const Aside<scalar_t> aside(shared_memory<unsigned char>() + divide_up(sizeof(Shared), kPacketBytes) * kPacketBytes, t.threads);
  const int64_t part = blockIdx.x % t.parts;
  const Slab slab = slab_of<kColumns>(t, blockIdx.x / t.parts);
  math::Moments<double> found = part_moments(t, slab, part, static_cast<const scalar_t*>(p.x), shared,
                                             [&](int slot, const Octet<scalar_t>& octet) { aside.put(slot, octet); });
  const Lane lane(t, slab);
  merge_cluster<opmath>(t, lane, found, shared.of_block);
  if (lane.writes) {
    found = math::rounded(found);
    if (part == 0) finish_channel(p, nullptr, lane.channel, found);
    shared.normalisation[lane.in_slab] =
        channel_normalisation<opmath>(p, lane.channel, found.mean, math::inverse_std_of_batch(found.m2 / found.count, p.eps));
  }
  // No block reads another block's shared memory after this.
  cluster_sync();
  normalise_part<scalar_t, kColumns>(p, t, slab, part, shared.normalisation, false,
                                     [&](int slot, const At& at) { return at.valid > 0 ? aside.get(slot) : Octet<scalar_t>{}; });
}

// ---- Backward

// The coefficients of a channel, from its sums. The other two members of math::InputGradient are those of
// math::Normalisation.
template <typename T>
struct GradientCoefficients {
  math::Normalisation<T> normalise;
  T dz_mean_high;
  T slope;
  T offset;

  __device__ __forceinline__ math::InputGradient<T> input() const {
    return {normalise.mean_high, dz_mean_high, normalise.scale, slope, offset};
  }
};

template <bool kColumns, typename opmath>
struct BackwardShared {
  ThreadValues<kColumns> dz, dz_x;
  math::GradientSums of_block[kMostGroupChannels];
  GradientCoefficients<opmath> coefficients[kMostGroupChannels];
  unsigned flag;
};

template <typename scalar_t, int kTile>
struct GradientOperands {
  Octet<scalar_t> x[kTile], grad_y[kTile];
  unsigned bits[kTile];

  template <typename Walk>
  __device__ __forceinline__ void load(const BatchNormBackward& p, const Tiling& t, Walk walk) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const At at = walk.next(t);
      x[i] = read(static_cast<const scalar_t*>(p.x), at, t.aligned);
      grad_y[i] = read(static_cast<const scalar_t*>(p.grad_y), at, t.aligned);
      bits[i] = p.mask != nullptr && at.valid > 0 ? p.mask[at.mask_byte] : 0u;
    }
  }

  // dz, the gradient at the output of the normalisation, of octet i, which lies at `at`. normalise(k) is the
  // normalisation of column k. Only gradients that read the value need the residual. It is read here and not
  // earlier, to save registers.
  template <typename Coefficient>
  __device__ __forceinline__ void dz(const BatchNormBackward& p, const Tiling& t, int i, const At& at, const Coefficient& normalise,
                                     opmath_t<scalar_t> (&out)[kOctetElements]) const {
    using opmath = opmath_t<scalar_t>;
    if (p.mask != nullptr) {
      math::visit_two_slopes<opmath>(p.act, [&](auto f) {
#pragma unroll
        for (int k = 0; k < kOctetElements; ++k) out[k] = f.backward_from_mask(grad_y[i][k], (bits[i] >> k & 1u) != 0u);
      });
      return;
    }
    opmath u[kOctetElements];
#pragma unroll
    for (int k = 0; k < kOctetElements; ++k) u[k] = normalise(k)(x[i][k]);
    if (p.residual != nullptr) {
      const Octet<scalar_t> added = read(static_cast<const scalar_t*>(p.residual), at, t.aligned);
#pragma unroll
      for (int k = 0; k < kOctetElements; ++k) u[k] += added[k];
    }
    // Four elements at a time: swish of eight elements needs more registers than there are.
#pragma unroll
    for (int half = 0; half < kOctetElements; half += kOctetElements / 2) {
      math::visit<opmath, math::kPrecisionOf<scalar_t>>(p.act, [&](auto f) {
#pragma unroll
        for (int k = half; k < half + kOctetElements / 2; ++k) out[k] = f.backward(grad_y[i][k], u[k]);
      });
    }
  }
};

// The sums of a part about mean_high, for each channel of the slab; each lane of a channel gets them. Writes
// grad_residual unless it is null. keep(slot, x, dz) receives every octet of the thread, one after the other.
template <typename scalar_t, bool kColumns, typename Keep>
__device__ __forceinline__ math::GradientSums part_sums(const BatchNormBackward& p, const Tiling& t, const Slab& slab, int64_t part,
                                                        BackwardShared<kColumns, opmath_t<scalar_t>>& shared, const Keep& keep) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kTile = octets_in_flight<scalar_t>(kApplyBytesInFlight, 2);
  constexpr int kValues = ThreadValues<kColumns>::kValues;
  if (static_cast<int>(threadIdx.x) < slab.channels) {
    const int64_t channel = slab.first_channel + threadIdx.x;
    shared.coefficients[threadIdx.x].normalise = channel_normalisation<opmath>(p, channel, p.mean[channel], p.invstd[channel]);
  }
  __syncthreads();
  Walk<kColumns> walk(t, slab, part);
  math::Normalisation<opmath> normalise[kValues];
  for_each_column<kColumns>(t, slab, walk.column(), [&](int k, int channel) { normalise[k] = shared.coefficients[channel].normalise; });
  ThreadSum<opmath> sum[kValues], sum_x[kValues];
  for (int slot = 0; !walk.done(); slot += kTile) {
    GradientOperands<scalar_t, kTile> operands;
    operands.load(p, t, walk);
    opmath tile_sum[kOctetElements], tile_sum_x[kOctetElements];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const At at = walk.next(t);
      opmath dz[kOctetElements];
      operands.dz(p, t, i, at, [&](int k) { return normalise[kColumns ? k : 0]; }, dz);
      if (p.grad_residual != nullptr) write(static_cast<scalar_t*>(p.grad_residual), at, t.aligned, dz);
      if (at.valid > 0) keep(slot + i, operands.x[i], dz);
#pragma unroll
      for (int k = 0; k < kOctetElements; ++k) {
        const opmath product = dz[k] * (operands.x[i][k] - normalise[kColumns ? k : 0].mean_high);
        tile_sum[k] = kColumns && i > 0 ? tile_sum[k] + dz[k] : dz[k];
        tile_sum_x[k] = kColumns && i > 0 ? tile_sum_x[k] + product : product;
      }
      if constexpr (!kColumns) {
        sum[0].add(sum_of(tile_sum));
        sum_x[0].add(sum_of(tile_sum_x));
      }
    }
    if constexpr (kColumns) {
#pragma unroll
      for (int k = 0; k < kOctetElements; ++k) {
        sum[k].add(tile_sum[k]);
        sum_x[k].add(tile_sum_x[k]);
      }
    }
  }
  double dz[kValues], dz_x[kValues];
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    dz[k] = sum[k].rounded();
    dz_x[k] = sum_x[k].rounded();
  }
  shared.dz.put(dz);
  shared.dz_x.put(dz_x);
  __syncthreads();
  const Lane lane(t, slab);
  math::GradientSums found;
  merge<opmath>(found, t.lanes, lane.exists ? sets_of_block<kColumns>(t) : 0, [&](int i) {
    const int place = set_of_block<kColumns>(t, lane.in_slab, i).place;
    return math::GradientSums{shared.dz.value[place], shared.dz_x.value[place]};
  });
  return found;
}

// The sums of the lane's channel about its mean, from the sums of part_sums about mean_high.
template <typename Shared>
__device__ __forceinline__ math::GradientSums about_mean(const BatchNormBackward& p, const Lane& lane, const math::GradientSums& found,
                                                         const Shared& shared) {
  const double mean_high = static_cast<double>(shared.coefficients[lane.in_slab].normalise.mean_high);
  return math::about_mean(found, math::mean_low(p.mean[lane.channel], mean_high));
}

// Writes grad_weight, grad_bias and `sums` (csrc/schema.cpp), unless they are null.
__device__ __forceinline__ void finish_channel(const BatchNormBackward& p, double* sums, int64_t channel, const math::GradientSums& found) {
  if (sums != nullptr) {
    sums[channel] = found.dz;
    sums[p.shape.channels + channel] = found.dz_x;
  }
  set_channel_value(p.parameter_dtype, p.grad_weight, channel, found.dz_x * p.invstd[channel]);
  set_channel_value(p.parameter_dtype, p.grad_bias, channel, found.dz);
}

template <typename opmath>
__device__ __forceinline__ GradientCoefficients<opmath> channel_gradient(const BatchNormBackward& p, int64_t channel, double count,
                                                                         const math::GradientSums& sums) {
  const double mean = p.mean[channel], invstd = p.invstd[channel];
  const math::InputGradient<opmath> input =
      math::input_gradient<opmath>(mean, invstd, channel_value(p.parameter_dtype, p.weight, channel, 1.0), count, sums);
  return {channel_normalisation<opmath>(p, channel, mean, invstd), input.dz_mean_high, input.slope, input.offset};
}

template <typename opmath>
__device__ __forceinline__ opmath grad_x_of(const BatchNormBackward& p, const GradientCoefficients<opmath>& c, opmath dz, opmath x) {
  return p.training ? c.input().training(dz, x) : c.input().evaluation(dz);
}

// S1 = sum dz and S2 = sum dz (x - mean) of every channel; grad_weight and grad_bias from them;
// grad_residual = dz
//   launch   slabs * parts blocks of kThreads; block b has part b / slabs of slab b % slabs; BackwardShared
//            in shared memory
//   requires partial[parts * channels] and counters[slabs] = 0, unless a slab has one part
//   traffic  2n elements read (and n bits, or n elements of the residual), n written for grad_residual
template <typename scalar_t, bool kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    batch_norm_act_backward_reduce_kernel(BatchNormBackward p, Tiling t, double* sums, math::GradientSums* partial, unsigned* counters) {
  using opmath = opmath_t<scalar_t>;
  auto& shared = *shared_memory<BackwardShared<kColumns, opmath>>();
  const int64_t index = blockIdx.x % t.slabs;
  const int64_t part = blockIdx.x / t.slabs;
  const Slab slab = slab_of<kColumns>(t, index);
  math::GradientSums found =
      part_sums<scalar_t, kColumns>(p, t, slab, part, shared, [](int, const Octet<scalar_t>&, const opmath(&)[kOctetElements]) {});
  const Lane lane(t, slab);
  if (!merge_parts<opmath>(t, lane, index, part, found, partial, counters, &shared.flag)) return;
  if (lane.writes) finish_channel(p, sums, lane.channel, about_mean(p, lane, found, shared));
}

// grad_x from the sums and the count of all processes; sums may be null in evaluation; a null count means
// that of this process
//   launch   slabs * parts blocks of kThreads, in reverse order; GradientCoefficients[kMostGroupChannels] in
//            shared memory
//   requires operands dense in the order of the shape
//   traffic  2n elements read (and n bits, or n elements of the residual), n written
template <typename scalar_t, bool kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    batch_norm_act_backward_elemt_kernel(BatchNormBackward p, Tiling t, const double* sums, const double* count) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kTile = octets_in_flight<scalar_t>(kApplyBytesInFlight, 2);
  auto* const coefficients = shared_memory<GradientCoefficients<opmath>>();
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const Slab slab = slab_of<kColumns>(t, block % t.slabs);
  if (static_cast<int>(threadIdx.x) < slab.channels) {
    const int64_t channel = slab.first_channel + threadIdx.x;
    const math::GradientSums of_channel =
        sums == nullptr ? math::GradientSums{0.0, 0.0} : math::GradientSums{sums[channel], sums[t.channels + channel]};
    coefficients[threadIdx.x] =
        channel_gradient<opmath>(p, channel, count == nullptr ? static_cast<double>(t.rows * t.inner) : *count, of_channel);
  }
  __syncthreads();
  Walk<kColumns> walk(t, slab, block / t.slabs);
  GradientCoefficients<opmath> mine[ThreadValues<kColumns>::kValues];
  for_each_column<kColumns>(t, slab, walk.column(), [&](int k, int channel) { mine[k] = coefficients[channel]; });
  while (!walk.done()) {
    GradientOperands<scalar_t, kTile> operands;
    operands.load(p, t, walk);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const At at = walk.next(t);
      opmath dz[kOctetElements];
      operands.dz(p, t, i, at, [&](int k) { return mine[kColumns ? k : 0].normalise; }, dz);
#pragma unroll
      for (int k = 0; k < kOctetElements; ++k) dz[k] = grad_x_of(p, mine[kColumns ? k : 0], dz[k], operands.x[i][k]);
      write(static_cast<scalar_t*>(p.grad_x), at, t.aligned, dz, t.exceeds_cache);
    }
  }
}

// Both in one kernel: a cluster of blocks keeps x and dz of its slab in shared memory
//   launch   slabs clusters of `parts` blocks of kThreads; BackwardShared and the octets of the part in
//            shared memory, dz in the computing type
//   requires as the two above; grad_x is not null
//   traffic  2n elements read (and n bits, or n elements of the residual), n written (2n with grad_residual)
template <typename scalar_t, bool kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>) batch_norm_act_backward_kernel(BatchNormBackward p, Tiling t) {
  using opmath = opmath_t<scalar_t>;
  using Shared = BackwardShared<kColumns, opmath>;
  auto& shared = *shared_memory<Shared>();
  unsigned char* const behind = shared_memory<unsigned char>() + divide_up(sizeof(Shared), kPacketBytes) * kPacketBytes;
  const Aside<opmath> dz_aside(behind, t.threads);
  const Aside<scalar_t> x_aside(behind + t.part_octets * kOctetElements * sizeof(opmath), t.threads);
  const int64_t part = blockIdx.x % t.parts;
  const Slab slab = slab_of<kColumns>(t, blockIdx.x / t.parts);
  math::GradientSums found =
      part_sums<scalar_t, kColumns>(p, t, slab, part, shared, [&](int slot, const Octet<scalar_t>& x, const opmath(&dz)[kOctetElements]) {
        Octet<opmath> wide;
#pragma unroll
        for (int k = 0; k < kOctetElements; ++k) wide.packet[k / wide.kWidth].element[k % wide.kWidth] = dz[k];
        x_aside.put(slot, x);
        dz_aside.put(slot, wide);
      });
  const Lane lane(t, slab);
  merge_cluster<opmath>(t, lane, found, shared.of_block);
  if (lane.writes) {
    found = about_mean(p, lane, found, shared);
    if (part == 0) finish_channel(p, nullptr, lane.channel, found);
    shared.coefficients[lane.in_slab] = channel_gradient<opmath>(p, lane.channel, static_cast<double>(t.rows * t.inner), found);
  }
  // No block reads another block's shared memory after this.
  cluster_sync();
  Walk<kColumns> walk(t, slab, part);
  GradientCoefficients<opmath> mine[ThreadValues<kColumns>::kValues];
  for_each_column<kColumns>(t, slab, walk.column(), [&](int k, int channel) { mine[k] = shared.coefficients[channel]; });
  for (int slot = 0; !walk.done(); ++slot) {
    const At at = walk.next(t);
    if (at.valid == 0) continue;
    const Octet<scalar_t> x = x_aside.get(slot);
    const Octet<opmath> dz = dz_aside.get(slot);
    opmath grad_x[kOctetElements];
#pragma unroll
    for (int k = 0; k < kOctetElements; ++k) grad_x[k] = grad_x_of(p, mine[kColumns ? k : 0], dz[k], x[k]);
    write(static_cast<scalar_t*>(p.grad_x), at, t.aligned, grad_x);
  }
}

// mean, invstd and the running statistics from the moments of several processes, merged in the order of the
// ranks
//   launch   a thread for each channel
//   requires the moments of `ranks` processes (csrc/schema.cpp)
//   traffic  2 ranks float64 read for each channel
__global__ void __launch_bounds__(kThreads) batch_norm_act_gather_stats_kernel(BatchNormForward p, int64_t ranks, const double* moments) {
  const unsigned channel = blockIdx.x * kThreads + threadIdx.x;
  const int64_t channels = p.shape.channels;
  if (channel >= channels) return;
  math::Moments<double> merged{0.0, 0.0, 0.0, 0.0, 0.0};
  // Not unrolled: next to the calls of the division, a second rank would need local memory.
#pragma unroll 1
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const double* const of_rank = moments + rank * (1 + 2 * channels);
    if (of_rank[0] > 0.0) merged = math::merge(merged, {of_rank[0], of_rank[1 + channel], of_rank[1 + channels + channel], 0.0, 0.0});
  }
  // One value has no variance, so the running statistics are not updated.
  if (merged.count <= 1.0) p.running_mean = p.running_var = nullptr;
  if (merged.count > 0.0) {
    finish_channel(p, nullptr, channel, math::rounded(merged));
  } else {
    p.mean[channel] = p.invstd[channel] = 0.0;
  }
}

// ---- Launches

// Calls function(scalar_t(), columns); `columns` says whether runs are short, as an integral_constant.
template <typename Function>
void visit_layout(DType dtype, const ChannelShape& shape, const Function& function) {
  dispatch(dtype, [&](auto zero) {
    if (shape.inner >= kShortRunElements) {
      function(zero, std::false_type());
    } else {
      function(zero, std::true_type());
    }
  });
}

Tiling tiling(const BatchNormForward& p) { return tiling(p.shape, size_of(p.dtype), {p.x, p.residual, p.y}); }
Tiling tiling(const BatchNormBackward& p) {
  return tiling(p.shape, size_of(p.dtype), {p.grad_y, p.x, p.residual, p.grad_x, p.grad_residual});
}

unsigned blocks_of(const Tiling& t) { return static_cast<unsigned>(t.slabs * t.parts); }

// Memory for the results that the blocks of a slab leave for the last one; empty if a slab has one block.
template <typename Found>
Partials<Found> partials(const Tiling& t) {
  return t.parts > 1 ? Partials<Found>(t.parts * t.channels, t.slabs) : Partials<Found>(0, 0);
}

template <typename scalar_t, bool kColumns>
void launch_stats(const BatchNormForward& p, double* moments) {
  const Tiling t = for_sums(tiling(p));
  const auto of_parts = partials<math::Moments<double>>(t);
  launch(batch_norm_act_stats_kernel<scalar_t, kColumns>,
         {dim3(blocks_of(t)), dim3(kThreads), sizeof(ForwardShared<kColumns, opmath_t<scalar_t>>)}, p, t, moments, of_parts.values(),
         of_parts.counters());
}

template <typename scalar_t, bool kColumns>
void launch_normalise(const BatchNormForward& p) {
  const Tiling t = for_apply(tiling(p));
  launch(batch_norm_act_normalise_kernel<scalar_t, kColumns>,
         {dim3(blocks_of(t)), dim3(kThreads), sizeof(math::Normalisation<opmath_t<scalar_t>>) * kMostGroupChannels}, p, t);
}

template <typename scalar_t, bool kColumns>
void launch_backward_reduce(const BatchNormBackward& p, double* sums) {
  const Tiling t = for_sums(tiling(p));
  const auto of_parts = partials<math::GradientSums>(t);
  launch(batch_norm_act_backward_reduce_kernel<scalar_t, kColumns>,
         {dim3(blocks_of(t)), dim3(kThreads), sizeof(BackwardShared<kColumns, opmath_t<scalar_t>>)}, p, t, sums, of_parts.values(),
         of_parts.counters());
}

template <typename scalar_t, bool kColumns>
void launch_backward_elemt(BatchNormBackward p, const double* sums, const double* count) {
  if (p.grad_residual != nullptr && sizeof(scalar_t) > 2) {
    // The first pass has written dz. (dz of 16 bits is rounded, and not used.)
    p.grad_y = p.grad_residual;
    p.act.kind = math::ActivationKind::kIdentity;
    p.mask = nullptr;
    p.residual = nullptr;
  }
  const Tiling t = for_apply(tiling(p));
  launch(batch_norm_act_backward_elemt_kernel<scalar_t, kColumns>,
         {dim3(blocks_of(t)), dim3(kThreads), sizeof(GradientCoefficients<opmath_t<scalar_t>>) * kMostGroupChannels}, p, t, sums, count);
}

// Launches the kernel that keeps a slab in shared memory, after Shared. Returns false if no cluster can hold
// a slab.
template <typename Shared, typename Arguments>
bool launch_in_cluster(void (*kernel)(Arguments, Tiling), const Arguments& p, int64_t octet_bytes) {
  const int64_t shared_bytes = divide_up(sizeof(Shared), kPacketBytes) * kPacketBytes;
  const auto as_launch = [&](const Tiling& t) {
    return Launch{dim3(blocks_of(t)), dim3(kThreads), static_cast<size_t>(shared_bytes + t.part_octets * octet_bytes),
                  static_cast<unsigned>(t.parts)};
  };
  const Tiling whole = tiling(p);
  const bool clusters = compiled_for_clusters(kernel);
  Tiling t = for_cluster(whole, octet_bytes, shared_bytes, clusters ? static_cast<int>(kMostPortableCluster) : 1);
  if (t.parts == 0 && clusters) t = for_cluster(whole, octet_bytes, shared_bytes, kMostClusterBlocks);
  if (t.parts == 0 || (t.parts > 1 && !can_run(kernel, as_launch(t)))) return false;
  launch(kernel, as_launch(t), p, t);
  return true;
}

}  // namespace

void batch_norm_act_stats(const BatchNormForward& p, double* moments) {
  visit_layout(p.dtype, p.shape, [&](auto zero, auto columns) { launch_stats<decltype(zero), columns>(p, moments); });
}

void batch_norm_act_elemt(const BatchNormForward& p) {
  visit_layout(p.dtype, p.shape, [&](auto zero, auto columns) { launch_normalise<decltype(zero), columns>(p); });
}

void batch_norm_act_forward(const BatchNormForward& p) {
  visit_layout(p.dtype, p.shape, [&](auto zero, auto columns) {
    using scalar_t = decltype(zero);
    using Shared = ForwardShared<columns, opmath_t<scalar_t>>;
    if (p.training) {
      if (launch_in_cluster<Shared>(batch_norm_act_forward_kernel<scalar_t, columns>, p, kOctetElements * sizeof(scalar_t))) return;
      launch_stats<scalar_t, columns>(p, nullptr);
    }
    launch_normalise<scalar_t, columns>(p);
  });
}

void batch_norm_act_backward_reduce(const BatchNormBackward& p, double* sums) {
  visit_layout(p.dtype, p.shape, [&](auto zero, auto columns) { launch_backward_reduce<decltype(zero), columns>(p, sums); });
}

void batch_norm_act_backward_elemt(const BatchNormBackward& p, const double* sums, const double* count) {
  visit_layout(p.dtype, p.shape, [&](auto zero, auto columns) { launch_backward_elemt<decltype(zero), columns>(p, sums, count); });
}

void batch_norm_act_backward(const BatchNormBackward& p) {
  const bool needs_sums = p.grad_weight != nullptr || p.grad_bias != nullptr || p.grad_residual != nullptr || p.training;
  visit_layout(p.dtype, p.shape, [&](auto zero, auto columns) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    if (!needs_sums) return launch_backward_elemt<scalar_t, columns>(p, nullptr, nullptr);
    if (p.grad_x == nullptr) return launch_backward_reduce<scalar_t, columns>(p, nullptr);
    if (launch_in_cluster<BackwardShared<columns, opmath>>(batch_norm_act_backward_kernel<scalar_t, columns>, p,
                                                           kOctetElements * (sizeof(scalar_t) + sizeof(opmath)))) {
      return;
    }
    const Workspace sums(2 * p.shape.channels * sizeof(double));
    launch_backward_reduce<scalar_t, columns>(p, static_cast<double*>(sums.data()));
    launch_backward_elemt<scalar_t, columns>(p, static_cast<const double*>(sums.data()), nullptr);
  });
}

void batch_norm_act_gather_stats(const BatchNormForward& p, int64_t ranks, const double* moments) {
  launch(batch_norm_act_gather_stats_kernel, {dim3(static_cast<unsigned>(divide_up(p.shape.channels, kThreads))), dim3(kThreads)}, p, ranks,
         moments);
}

}  // namespace gradkernels::cuda
