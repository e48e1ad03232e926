// batch_norm_act on CUDA. cuda/channel_cut.h has the cut of a tensor into slabs, parts and packets.
//
// There are two passes: the first computes the sums of a slab's channels, which the last of its blocks merges,
// and the second walks back from the end, where the cache still has what the first pass read last, and writes
// the result. The cut depends only on the shape and the device, and every sum has a fixed order: every run gives
// the same bits.
#include "ops/batch_norm_act.h"

#include <initializer_list>
#include <type_traits>

#include "cuda/channel_cut.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/values.cuh"
#include "math/batch_norm_act.h"

namespace gradkernels::cuda {
namespace {

// Bytes that a thread loads before it uses the first of them, and threads of an SM, which limit the registers of
// each: 64 KiB in flight are more than the memory of a GPU needs (docs/performance.md). Measure with
// bench/profile_cuda.py.
#ifndef GK_BYTES_IN_FLIGHT
#define GK_BYTES_IN_FLIGHT 64
#endif
#ifndef GK_SM_THREADS
#define GK_SM_THREADS 1024
#endif
#ifndef GK_SUMS_WAVES
#define GK_SUMS_WAVES 1
#endif
#ifndef GK_APPLY_WAVES
#define GK_APPLY_WAVES 2
#endif
constexpr int kBytesInFlight = GK_BYTES_IN_FLIGHT;
template <typename scalar_t>
constexpr int kThreadsOfProcessor = sizeof(scalar_t) == 8 ? 512 : GK_SM_THREADS;
template <typename scalar_t, bool kColumns>
constexpr int kBlocks = kThreadsOfProcessor<scalar_t> / threads_of(kColumns);

// How many packets of each of `operands` tensors a thread loads before it uses the first of them.
template <typename scalar_t, int W>
constexpr int packets_in_flight(int operands) {
  const int packets = kBytesInFlight / operands / (W * static_cast<int>(sizeof(scalar_t)));
  return packets < 1 ? 1 : packets < 8 ? packets : 8;
}

// ---- The packets of a thread

// A slab's place in the tensor.
struct Slab {
  int64_t first_channel;
  int channels;
  int64_t columns;  // of a line
  int64_t element;
  int64_t mask_byte;
};

template <bool kColumns>
__device__ __forceinline__ Slab slab_of(const ChannelCut& cut, int64_t index) {
  if constexpr (!kColumns) return {index, 1, cut.inner, index * cut.inner, index * divide_up(cut.inner, 8)};
  const int64_t first = index * cut.group_channels;
  const int64_t left = cut.channels - first;
  const int channels = static_cast<int>(left < cut.group_channels ? left : cut.group_channels);
  return {first, channels, channels * cut.inner, first * cut.inner, first * cut.inner / 8};
}

// Where a packet lies, and whether it exists. 32 bits are enough for the mask: no GPU holds 2^35 elements of x,
// residual and y.
struct At {
  int64_t element;
  uint32_t mask_byte;
  bool exists;
};

// Walks the packets of one thread, one after the other, or from the last one back.
template <int W, bool kColumns, bool kBack>
class Walk {
  // Whether a line is padded to whole bytes of the mask.
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
    column_ = static_cast<int>(first - row * cut.line_packets);
    element_ = slab.element + row * cut.row_stride + column_ * W;
    mask_byte_ = static_cast<uint32_t>(slab.mask_byte + row * cut.mask_row_stride + column_ * W / 8);
    columns_ = static_cast<int>(slab.columns);
    if (kColumns && (static_cast<int>(threadIdx.x) >= cut.threads || column_ * W >= columns_)) mine_ = 0;
    at_step_ = kBack ? steps_ - 1 : 0;
  }

  // The steps of the block, the same for all of its threads.
  __device__ __forceinline__ int steps() const { return steps_; }
  // In short runs, the thread's first column.
  __device__ __forceinline__ int column() const { return column_ * W; }

  __device__ __forceinline__ At next() {
    At at{element_, mask_byte_, at_step_ >= 0 && at_step_ < mine_};
    if constexpr (kPadded) at.exists = at.exists && column_ * W < columns_;
    if constexpr (kBack) {
      --at_step_;
      element_ -= cut_.element_step;
      mask_byte_ -= static_cast<uint32_t>(cut_.mask_step);
      if constexpr (!kColumns) {
        column_ -= static_cast<int>(cut_.column_step);
        if (column_ < 0) {
          column_ += static_cast<int>(cut_.line_packets);
          element_ -= cut_.element_wrap;
          mask_byte_ -= static_cast<uint32_t>(cut_.mask_wrap);
        }
      }
    } else {
      ++at_step_;
      element_ += cut_.element_step;
      mask_byte_ += static_cast<uint32_t>(cut_.mask_step);
      if constexpr (!kColumns) {
        column_ += static_cast<int>(cut_.column_step);
        if (column_ >= cut_.line_packets) {
          column_ -= static_cast<int>(cut_.line_packets);
          element_ += cut_.element_wrap;
          mask_byte_ += static_cast<uint32_t>(cut_.mask_wrap);
        }
      }
    }
    return at;
  }

  // Calls function(at) with kTile packets at a time: at is an At[kTile]. All threads of a block call it equally
  // often.
  template <int kTile, typename Function>
  __device__ __forceinline__ void for_each_tile(const Function& function) {
    for (int done = 0; done < steps_; done += kTile) {
      At at[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) at[i] = next();
      function(at);
    }
  }

 private:
  const ChannelCut& cut_;
  int64_t element_;
  uint32_t mask_byte_;
  int column_, columns_, steps_, mine_, at_step_;
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

// Writes the mask's bits of a packet. One of the threads that share a byte collects their bits. All threads of a
// block must call it.
template <int W>
__device__ __forceinline__ void store_bits(uint8_t* mask, const At& at, unsigned bits) {
  constexpr int kLanes = 8 / W;
  const int place = static_cast<int>(threadIdx.x) % kLanes;
  bits = at.exists ? bits << (W * place) : 0u;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) bits |= __shfl_xor_sync(kWholeWarp, bits, distance);
  if (place == 0 && at.exists) mask[at.mask_byte] = static_cast<uint8_t>(bits);
}

template <int W>
__device__ __forceinline__ unsigned load_bits(const uint8_t* mask, const At& at) {
  return static_cast<unsigned>(mask[at.mask_byte]) >> (static_cast<int>(threadIdx.x) % (8 / W) * W);
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
  // Of a channel that does not exist, there are no sets.
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

  __device__ __forceinline__ Lane(const ChannelCut& cut, const Slab& slab)
      : in_slab(static_cast<int>(threadIdx.x) / cut.lanes),
        channel(slab.first_channel + in_slab),
        exists(in_slab < slab.channels),
        writes(exists && static_cast<int>(threadIdx.x) % cut.lanes == 0) {}
};

// The moments of a thread's elements, from the sums of their differences from `about`, and of the squares.
__device__ __forceinline__ math::Moments<double> thread_moments(double about, double count, const ThreadSum<float>& sum,
                                                                const ThreadSum<float>& squares) {
  const double step = sum.total * (1.0 / count);
  return {count, about + step, squares.total - sum.total * step, 0.0, 0.0};
}
__device__ __forceinline__ math::Moments<double> thread_moments(double about, double count, const ThreadSum<double>& sum,
                                                                const ThreadSum<double>& squares) {
  return math::moments_about(about, count, sum.value(), squares.value());
}

// The moments of a part in memory. Only float64 data have low parts.
template <typename opmath>
struct PartMoments {
  double mean, m2, count;

  PartMoments() = default;
  __device__ __forceinline__ explicit PartMoments(const math::Moments<double>& m) : mean(m.mean), m2(m.m2), count(m.count) {}
  __device__ __forceinline__ operator math::Moments<double>() const { return {count, mean, m2, 0.0, 0.0}; }
};
template <>
struct PartMoments<double> : math::Moments<double> {
  PartMoments() = default;
  __device__ __forceinline__ explicit PartMoments(const math::Moments<double>& m) : math::Moments<double>(m) {}
};

// Merges the results of all parts of slab `index`, through global memory, into the `found` of the last block.
// Returns whether this block is the last.
template <typename opmath, typename Found, typename InMemory>
__device__ __forceinline__ bool merge_parts(const ChannelCut& cut, const Lane& lane, int64_t index, int64_t part, Found& found,
                                            InMemory* partial, unsigned* counters, unsigned* flag) {
  if (cut.parts == 1) return true;
  if (lane.writes) partial[part * cut.channels + lane.channel] = InMemory(found);
  if (!is_last_block(counters + index, cut.parts, flag)) return false;
  merge<opmath>(found, cut.lanes, lane.exists ? cut.parts : 0, [&](int i) -> Found { return partial[i * cut.channels + lane.channel]; });
  return true;
}

// The results of each thread of a block: one value for each of its columns, or one for all of its elements if
// the block has one channel.
template <int W, bool kColumns>
struct ThreadValues {
  static constexpr int kValues = kColumns ? W : 1;
  // One more than the threads, so that the channels of neighbouring columns are in different banks.
  static constexpr int kPitch = threads_of(kColumns) + 1;
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
__device__ __forceinline__ int sets_of_block(const ChannelCut& cut) {
  if constexpr (!kColumns) return cut.threads;
  return cut.threads / static_cast<int>(cut.line_packets) * static_cast<int>(cut.inner);
}

template <int W, bool kColumns>
__device__ __forceinline__ ThreadColumn set_of_block(const ChannelCut& cut, int channel, int i) {
  if constexpr (!kColumns) return {i, i};
  const int inner = static_cast<int>(cut.inner);
  const int line = i / inner;
  const int column = channel * inner + (i - line * inner);
  const int thread = line * static_cast<int>(cut.line_packets) + column / W;
  return {thread, column % W * ThreadValues<W, kColumns>::kPitch + thread};
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

// Calls function(k, channel) for the columns of a packet that begins with column `column` of the line: `channel`
// is the column's channel, counted from the first of the slab. Columns that do not exist get the last channel.
template <int W, bool kColumns, typename Function>
__device__ __forceinline__ void for_each_column(const ChannelCut& cut, const Slab& slab, int column, const Function& function) {
  int channel = kColumns ? column / static_cast<int>(cut.inner) : 0;
  int within = kColumns ? column % static_cast<int>(cut.inner) : 0;
#pragma unroll
  for (int k = 0; k < ThreadValues<W, kColumns>::kValues; ++k) {
    function(k, channel < slab.channels ? channel : slab.channels - 1);
    if (++within == cut.inner) {
      within = 0;
      ++channel;
    }
  }
}

// The sum in pairs, so that its rounding error grows with the logarithm of the number.
template <int kFirst, int kNumber, typename T, int W>
__device__ __forceinline__ T sum_of(const T (&x)[W]) {
  if constexpr (kNumber == 1) {
    return x[kFirst];
  } else {
    return sum_of<kFirst, kNumber / 2>(x) + sum_of<kFirst + kNumber / 2, kNumber / 2>(x);
  }
}

// A thread's sums of two quantities, one for each of its columns, or one of each in a long run. Elements of one
// column are added up in the computing type and then in float64: those of a packet, in 16-bit types those of a
// tile.
template <typename scalar_t, int W, bool kColumns>
struct ThreadSums {
  using opmath = opmath_t<scalar_t>;
  static constexpr int kValues = ThreadValues<W, kColumns>::kValues;
  ThreadSum<opmath> first[kValues], second[kValues];
  opmath tile_first[kValues] = {}, tile_second[kValues] = {};

  __device__ __forceinline__ void add(const opmath (&a)[W], const opmath (&b)[W]) {
    if constexpr (kColumns) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        tile_first[k] += a[k];
        tile_second[k] += b[k];
      }
    } else {
      tile_first[0] += sum_of<0, W>(a);
      tile_second[0] += sum_of<0, W>(b);
    }
    if constexpr (sizeof(scalar_t) > 2) end_tile();
  }
  __device__ __forceinline__ void end_tile() {
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      first[k].add(tile_first[k]);
      second[k].add(tile_second[k]);
      tile_first[k] = tile_second[k] = opmath(0);
    }
  }
};

// ---- Forward

// The moments of each thread: mean, M2 and, of float64 data, the low part of the mean.
template <int W, bool kColumns, typename opmath>
struct ForwardShared {
  static constexpr bool kLow = std::is_same_v<opmath, double>;
  ThreadValues<W, kColumns> of_thread[kLow ? 3 : 2];
  double count[threads_of(kColumns)];
  unsigned flag;
};

// The moments of a part, for each channel of the slab; each lane of a channel gets them.
//
// A thread adds up the differences from the mean of the first tile that it loads, and their squares: a tile in
// the computing type, and then in float64. If the tile is m of the thread's n elements,
// M2 >= m (tile's mean - mean)^2: the part that cancels in the end is at most n / m times the result. In
// float32, squares overflow at 2^128: if x is further than 1e19 from its mean, the variance is inf and y is the
// bias, as in torch.
template <typename scalar_t, int W, bool kColumns>
__device__ __forceinline__ math::Moments<double> part_moments(const ChannelCut& cut, const Slab& slab, int64_t part, const scalar_t* x,
                                                              ForwardShared<W, kColumns, opmath_t<scalar_t>>& shared) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kTile = packets_in_flight<scalar_t, W>(1);
  constexpr int kValues = ThreadValues<W, kColumns>::kValues;
  opmath about[kValues] = {};
  int count = 0;
  ThreadSums<scalar_t, W, kColumns> sums;

  Walk<W, kColumns, false> walk(cut, slab, part);
  walk.template for_each_tile<kTile>([&](const At(&at)[kTile]) {
    Packet<scalar_t, W> packet[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (at[i].exists) load(packet[i], x + at[i].element);
    }
    if (count == 0) {
      opmath total[kValues] = {};
      int elements = 0;
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (!at[i].exists) continue;
        elements += kColumns ? 1 : W;
        const auto value = Values<scalar_t, W>::of(packet[i]);
        if constexpr (kColumns) {
#pragma unroll
          for (int k = 0; k < W; ++k) total[k] += value.element[k];
        } else {
          total[0] += sum_of<0, W>(value.element);
        }
      }
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        if (elements > 0) about[k] = math::zero_unless_finite(total[k] / static_cast<opmath>(elements));
      }
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (!at[i].exists) continue;
      count += kColumns ? 1 : W;
      opmath difference[W], square[W];
      const auto value = Values<scalar_t, W>::of(packet[i]);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        difference[k] = value.element[k] - about[kColumns ? k : 0];
        square[k] = difference[k] * difference[k];
      }
      sums.add(difference, square);
    }
    sums.end_tile();
  });

  double mean[kValues], m2[kValues], mean_low[kValues];
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    math::Moments<double> mine{0.0, 0.0, 0.0, 0.0, 0.0};
    if (count > 0) mine = thread_moments(static_cast<double>(about[k]), static_cast<double>(count), sums.first[k], sums.second[k]);
    mean[k] = mine.mean;
    m2[k] = mine.m2 + mine.m2_low;
    mean_low[k] = mine.mean_low;
  }
  constexpr bool kLow = ForwardShared<W, kColumns, opmath>::kLow;
  shared.of_thread[0].put(mean);
  shared.of_thread[1].put(m2);
  if constexpr (kLow) shared.of_thread[2].put(mean_low);
  shared.count[threadIdx.x] = static_cast<double>(count);
  __syncthreads();
  const Lane lane(cut, slab);
  math::Moments<double> found;
  merge<opmath>(found, cut.lanes, lane.exists ? sets_of_block<kColumns>(cut) : 0, [&](int i) {
    const ThreadColumn at = set_of_block<W, kColumns>(cut, lane.in_slab, i);
    const auto value = [&](int which) { return shared.of_thread[which].value[at.place]; };
    return math::Moments<double>{shared.count[at.thread], value(0), value(1), kLow ? value(kLow ? 2 : 0) : 0.0, 0.0};
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

// mean, invstd and the running statistics of every channel; or `moments` (csrc/schema.cpp)
//   launch   slabs * parts blocks; block b has part b / slabs of slab b % slabs; ForwardShared in shared memory
//   requires x dense in the order of the shape, and aligned to packets; partial[parts * channels] and
//            counters[slabs] = 0, unless a slab has one part
//   traffic  n elements read
template <typename scalar_t, int W, bool kColumns>
__global__ void __launch_bounds__(threads_of(kColumns), kBlocks<scalar_t, kColumns>)
    batch_norm_act_stats_kernel(BatchNormForward p, ChannelCut cut, double* moments, PartMoments<opmath_t<scalar_t>>* partial,
                                unsigned* counters) {
  using opmath = opmath_t<scalar_t>;
  auto& shared = *shared_memory<ForwardShared<W, kColumns, opmath>>();
  const int64_t index = blockIdx.x % cut.slabs;
  const int64_t part = blockIdx.x / cut.slabs;
  const Slab slab = slab_of<kColumns>(cut, index);
  math::Moments<double> found = part_moments<scalar_t, W, kColumns>(cut, slab, part, static_cast<const scalar_t*>(p.x), shared);
  const Lane lane(cut, slab);
  if (!merge_parts<opmath>(cut, lane, index, part, found, partial, counters, &shared.flag)) return;
  if (lane.writes) finish_channel(p, moments, lane.channel, math::rounded(found));
}

// y = act(batch_norm(x) + residual) from mean and invstd; in evaluation, the kernel computes these from the
// running statistics
//   launch   slabs * parts blocks, in reverse order; Normalisation[kMostGroupChannels] in shared memory
//   requires operands dense in the order of the shape, and aligned to packets
//   traffic  n elements read (2n with a residual), n written, n bits written if there is a mask
template <typename scalar_t, int W, bool kColumns, bool kResidual>
__global__ void __launch_bounds__(threads_of(kColumns), kBlocks<scalar_t, kColumns>)
    batch_norm_act_normalise_kernel(BatchNormForward p, ChannelCut cut, bool briefly) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kTile = packets_in_flight<scalar_t, W>(kResidual ? 2 : 1);
  auto* const normalisation = shared_memory<math::Normalisation<opmath>>();
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t part = block / cut.slabs;
  const Slab slab = slab_of<kColumns>(cut, block % cut.slabs);
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
  const scalar_t* const residual = static_cast<const scalar_t*>(p.residual);
  scalar_t* const y = static_cast<scalar_t*>(p.y);
  Walk<W, kColumns, true> walk(cut, slab, part);
  math::Normalisation<opmath> normalise[ThreadValues<W, kColumns>::kValues];
  for_each_column<W, kColumns>(cut, slab, walk.column(), [&](int k, int channel) { normalise[k] = normalisation[channel]; });
  walk.template for_each_tile<kTile>([&](const At(&at)[kTile]) {
    Packet<scalar_t, W> packet[kTile], added[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (!at[i].exists) continue;
      load(packet[i], x + at[i].element);
      if constexpr (kResidual) load(added[i], residual + at[i].element);
    }
    const auto normalised = [&](int i) {
      Values<scalar_t, W> u = Values<scalar_t, W>::of(packet[i]);
#pragma unroll
      for (int k = 0; k < W; ++k) u.element[k] = normalise[kColumns ? k : 0](u.element[k]);
      if constexpr (kResidual) {
        const auto value = Values<scalar_t, W>::of(added[i]);
#pragma unroll
        for (int k = 0; k < W; ++k) u.element[k] += value.element[k];
      }
      return u;
    };
    if (kResidual && p.mask != nullptr) {
      math::visit_two_slopes<opmath>(p.act, [&](auto f) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          Values<scalar_t, W> u = normalised(i);
          unsigned bits = 0;
#pragma unroll
          for (int k = 0; k < W; ++k) {
            bits |= static_cast<unsigned>(f.passes(u.element[k])) << k;
            u.element[k] = f.forward(u.element[k]);
          }
          store_bits<W>(p.mask, at[i], bits);
          if (at[i].exists) write(y + at[i].element, u, briefly);
        }
      });
      return;
    }
    math::visit<opmath, math::kPrecisionOf<scalar_t>>(p.act, [&](auto f) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        Values<scalar_t, W> u = normalised(i);
#pragma unroll
        for (int k = 0; k < W; ++k) u.element[k] = f.forward(u.element[k]);
        if (at[i].exists) write(y + at[i].element, u, briefly);
      }
    });
  });
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

template <int W, bool kColumns, typename opmath>
struct BackwardShared {
  ThreadValues<W, kColumns> dz, dz_x;
  math::Normalisation<opmath> normalisation[kMostGroupChannels];
  unsigned flag;
};

// x, and dz, the gradient at the output of the normalisation, of the packets of a tile. kResidual: there was a
// residual; then dz comes from the mask if the activation has two slopes, otherwise from x and the residual.
template <typename scalar_t, int W, int kTile, bool kResidual>
struct GradientOperands {
  Packet<scalar_t, W> x[kTile], grad_y[kTile], residual[kTile];
  unsigned bits[kTile];

  __device__ __forceinline__ GradientOperands(const BatchNormBackward& p, const At (&at)[kTile]) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (!at[i].exists) continue;
      load(x[i], static_cast<const scalar_t*>(p.x) + at[i].element);
      load(grad_y[i], static_cast<const scalar_t*>(p.grad_y) + at[i].element);
    }
    if constexpr (kResidual) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (!at[i].exists) continue;
        if (p.mask != nullptr) {
          bits[i] = load_bits<W>(p.mask, at[i]);
        } else if (p.residual != nullptr) {
          load(residual[i], static_cast<const scalar_t*>(p.residual) + at[i].element);
        }
      }
    }
  }

  // Calls function(i, x, dz) for each packet that exists. normalise(k) is the normalisation of column k.
  template <typename Normalise, typename Function>
  __device__ __forceinline__ void for_each(const BatchNormBackward& p, const At (&at)[kTile], const Normalise& normalise,
                                           const Function& function) const {
    using opmath = opmath_t<scalar_t>;
    if (kResidual && p.mask != nullptr) {
      math::visit_two_slopes<opmath>(p.act, [&](auto f) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          if (!at[i].exists) continue;
          auto dz = Values<scalar_t, W>::of(grad_y[i]);
#pragma unroll
          for (int k = 0; k < W; ++k) dz.element[k] = f.backward_from_mask(dz.element[k], (bits[i] >> k & 1u) != 0u);
          function(i, Values<scalar_t, W>::of(x[i]), dz);
        }
      });
      return;
    }
    math::visit<opmath, math::kPrecisionOf<scalar_t>>(p.act, [&](auto f) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (!at[i].exists) continue;
        const auto value = Values<scalar_t, W>::of(x[i]);
        auto dz = Values<scalar_t, W>::of(grad_y[i]);
        opmath u[W];
#pragma unroll
        for (int k = 0; k < W; ++k) u[k] = normalise(k)(value.element[k]);
        if (kResidual && p.residual != nullptr) {
          const auto added = Values<scalar_t, W>::of(residual[i]);
#pragma unroll
          for (int k = 0; k < W; ++k) u[k] += added.element[k];
        }
#pragma unroll
        for (int k = 0; k < W; ++k) dz.element[k] = f.backward(dz.element[k], u[k]);
        function(i, value, dz);
      }
    });
  }
};

// The sums of a part about mean_high, for each channel of the slab; each lane of a channel gets them. Writes
// grad_residual unless it is null.
template <typename scalar_t, int W, bool kColumns, bool kResidual>
__device__ __forceinline__ math::GradientSums part_sums(const BatchNormBackward& p, const ChannelCut& cut, const Slab& slab, int64_t part,
                                                        BackwardShared<W, kColumns, opmath_t<scalar_t>>& shared) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kTile = packets_in_flight<scalar_t, W>(kResidual ? 3 : 2);
  constexpr int kValues = ThreadValues<W, kColumns>::kValues;
  if (static_cast<int>(threadIdx.x) < slab.channels) {
    const int64_t channel = slab.first_channel + threadIdx.x;
    shared.normalisation[threadIdx.x] = channel_normalisation<opmath>(p, channel, p.mean[channel], p.invstd[channel]);
  }
  __syncthreads();
  Walk<W, kColumns, false> walk(cut, slab, part);
  math::Normalisation<opmath> normalise[kValues];
  for_each_column<W, kColumns>(cut, slab, walk.column(), [&](int k, int channel) { normalise[k] = shared.normalisation[channel]; });
  ThreadSums<scalar_t, W, kColumns> sums;
  walk.template for_each_tile<kTile>([&](const At(&at)[kTile]) {
    const GradientOperands<scalar_t, W, kTile, kResidual> operands(p, at);
    const auto of_column = [&](int k) { return normalise[kColumns ? k : 0]; };
    operands.for_each(p, at, of_column, [&](int i, const Values<scalar_t, W>& x, const Values<scalar_t, W>& dz) {
      if (kResidual && p.grad_residual != nullptr) write(static_cast<scalar_t*>(p.grad_residual) + at[i].element, dz, false);
      opmath product[W];
#pragma unroll
      for (int k = 0; k < W; ++k) product[k] = dz.element[k] * (x.element[k] - normalise[kColumns ? k : 0].mean_high);
      sums.add(dz.element, product);
    });
    sums.end_tile();
  });
  double dz[kValues], dz_x[kValues];
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    dz[k] = sums.first[k].rounded();
    dz_x[k] = sums.second[k].rounded();
  }
  shared.dz.put(dz);
  shared.dz_x.put(dz_x);
  __syncthreads();
  const Lane lane(cut, slab);
  math::GradientSums found;
  merge<opmath>(found, cut.lanes, lane.exists ? sets_of_block<kColumns>(cut) : 0, [&](int i) {
    const int place = set_of_block<W, kColumns>(cut, lane.in_slab, i).place;
    return math::GradientSums{shared.dz.value[place], shared.dz_x.value[place]};
  });
  // About the mean instead of mean_high.
  const double mean_high = static_cast<double>(shared.normalisation[lane.exists ? lane.in_slab : 0].mean_high);
  const double mean = p.mean[lane.exists ? lane.channel : slab.first_channel];
  return math::about_mean(found, math::mean_low(mean, mean_high));
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
//   launch   slabs * parts blocks; block b has part b / slabs of slab b % slabs; BackwardShared in shared memory
//   requires operands dense in the order of the shape, and aligned to packets; partial[parts * channels] and
//            counters[slabs] = 0, unless a slab has one part
//   traffic  2n elements read (and n bits, or n elements of the residual), n written for grad_residual
template <typename scalar_t, int W, bool kColumns, bool kResidual>
__global__ void __launch_bounds__(threads_of(kColumns), kBlocks<scalar_t, kColumns>)
    batch_norm_act_backward_reduce_kernel(BatchNormBackward p, ChannelCut cut, double* sums, math::GradientSums* partial,
                                          unsigned* counters) {
  using opmath = opmath_t<scalar_t>;
  auto& shared = *shared_memory<BackwardShared<W, kColumns, opmath>>();
  const int64_t index = blockIdx.x % cut.slabs;
  const int64_t part = blockIdx.x / cut.slabs;
  const Slab slab = slab_of<kColumns>(cut, index);
  math::GradientSums found = part_sums<scalar_t, W, kColumns, kResidual>(p, cut, slab, part, shared);
  const Lane lane(cut, slab);
  if (!merge_parts<opmath>(cut, lane, index, part, found, partial, counters, &shared.flag)) return;
  if (lane.writes) finish_channel(p, sums, lane.channel, found);
}

// grad_x from the sums and the count of all processes; sums may be null in evaluation; a null count means
// that of this process
//   launch   slabs * parts blocks, in reverse order; GradientCoefficients[kMostGroupChannels] in shared memory
//   requires operands dense in the order of the shape, and aligned to packets
//   traffic  2n elements read (and n bits, or n elements of the residual), n written
template <typename scalar_t, int W, bool kColumns, bool kResidual>
__global__ void __launch_bounds__(threads_of(kColumns), kBlocks<scalar_t, kColumns>)
    batch_norm_act_backward_elemt_kernel(BatchNormBackward p, ChannelCut cut, const double* sums, const double* count, bool briefly) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kTile = packets_in_flight<scalar_t, W>(kResidual ? 3 : 2);
  auto* const coefficients = shared_memory<GradientCoefficients<opmath>>();
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const Slab slab = slab_of<kColumns>(cut, block % cut.slabs);
  if (static_cast<int>(threadIdx.x) < slab.channels) {
    const int64_t channel = slab.first_channel + threadIdx.x;
    const math::GradientSums of_channel =
        sums == nullptr ? math::GradientSums{0.0, 0.0} : math::GradientSums{sums[channel], sums[cut.channels + channel]};
    coefficients[threadIdx.x] =
        channel_gradient<opmath>(p, channel, count == nullptr ? static_cast<double>(cut.rows * cut.inner) : *count, of_channel);
  }
  __syncthreads();
  Walk<W, kColumns, true> walk(cut, slab, block / cut.slabs);
  GradientCoefficients<opmath> mine[ThreadValues<W, kColumns>::kValues];
  for_each_column<W, kColumns>(cut, slab, walk.column(), [&](int k, int channel) { mine[k] = coefficients[channel]; });
  walk.template for_each_tile<kTile>([&](const At(&at)[kTile]) {
    const GradientOperands<scalar_t, W, kTile, kResidual> operands(p, at);
    const auto of_column = [&](int k) { return mine[kColumns ? k : 0].normalise; };
    operands.for_each(p, at, of_column, [&](int i, const Values<scalar_t, W>& x, const Values<scalar_t, W>& dz) {
      Values<scalar_t, W> grad_x;
#pragma unroll
      for (int k = 0; k < W; ++k) grad_x.element[k] = grad_x_of(p, mine[kColumns ? k : 0], dz.element[k], x.element[k]);
      write(static_cast<scalar_t*>(p.grad_x) + at[i].element, grad_x, briefly);
    });
  });
}

// mean, invstd and the running statistics from the moments of several processes, merged in the order of the
// ranks
//   launch   a thread for each channel
//   requires the moments of `ranks` processes (csrc/schema.cpp)
//   traffic  2 ranks float64 read for each channel
__global__ void __launch_bounds__(kRunThreads)
    batch_norm_act_gather_stats_kernel(BatchNormForward p, int64_t ranks, const double* moments) {
  const unsigned channel = blockIdx.x * kRunThreads + threadIdx.x;
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

template <int kValue>
using Width = std::integral_constant<int, kValue>;

// Calls function(scalar_t(), width, columns) with the type, the elements of a packet and whether runs are short,
// the latter two as integral_constants. Packets have 16 bytes. In short runs they have at most 4 elements,
// because a thread keeps numbers for each of its columns; long runs in 16 bits may be aligned to 8 bytes only, as
// those of 14 x 14 pixels. Otherwise, a packet is an element.
template <typename Function>
void visit_cut(DType dtype, const ChannelShape& shape, std::initializer_list<const void*> operands, const Function& function) {
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kWhole = kPacketElements<scalar_t>;
    constexpr int kHalf = sizeof(scalar_t) == 2 ? kWhole / 2 : kWhole;
    const auto fits = [&](int width) {
      const int64_t line = shape.inner >= kShortRunElements ? shape.inner : shape.inner == 1 ? shape.channels : 1;
      return line % width == 0 && aligned(operands, width * static_cast<int>(sizeof(scalar_t)));
    };
    if (shape.inner < kShortRunElements) {
      if (fits(kHalf)) return function(zero, Width<kHalf>(), std::true_type());
      return function(zero, Width<1>(), std::true_type());
    }
    if (fits(kWhole)) return function(zero, Width<kWhole>(), std::false_type());
    if constexpr (kHalf < kWhole) {
      if (fits(kHalf)) return function(zero, Width<kHalf>(), std::false_type());
    }
    return function(zero, Width<1>(), std::false_type());
  });
}

template <typename Function>
void visit_cut(const BatchNormForward& p, const Function& function) {
  visit_cut(p.dtype, p.shape, {p.x, p.residual, p.y}, function);
}
template <typename Function>
void visit_cut(const BatchNormBackward& p, const Function& function) {
  visit_cut(p.dtype, p.shape, {p.grad_y, p.x, p.residual, p.grad_x, p.grad_residual}, function);
}

// The cut for a kernel that loads `packets` packets of each operand at once.
template <typename scalar_t, int W, bool kColumns>
ChannelCut cut_in_waves(const ChannelShape& shape, int64_t waves, int64_t packets) {
  return in_waves(cut_of(shape, W), int64_t{kBlocks<scalar_t, kColumns>} * device_limits().processors, waves, packets);
}

// Whether two tensors do not fit into L2, so that what is written should leave it first.
bool exceeds_cache(DType dtype, const ChannelShape& shape) {
  return 2 * shape.rows * shape.channels * shape.inner * size_of(dtype) > device_limits().l2_bytes;
}

// Whether a backward has anything to read or to write for a residual.
bool has_residual(const BatchNormBackward& p) { return p.residual != nullptr || p.mask != nullptr || p.grad_residual != nullptr; }

template <typename Shared>
Launch as_launch(const ChannelCut& cut, bool columns, int number = 1) {
  return {dim3(static_cast<unsigned>(cut.slabs * cut.parts)), dim3(static_cast<unsigned>(threads_of(columns))), sizeof(Shared) * number};
}

// Memory for the results that the blocks of a slab leave for the last one; empty if a slab has one block.
template <typename Found>
Partials<Found> partials(const ChannelCut& cut) {
  return cut.parts > 1 ? Partials<Found>(cut.parts * cut.channels, cut.slabs) : Partials<Found>(0, 0);
}

template <typename scalar_t, int W, bool kColumns>
void launch_stats(const BatchNormForward& p, double* moments) {
  using opmath = opmath_t<scalar_t>;
  const ChannelCut cut = cut_in_waves<scalar_t, W, kColumns>(p.shape, GK_SUMS_WAVES, packets_in_flight<scalar_t, W>(1));
  const auto of_parts = partials<PartMoments<opmath>>(cut);
  launch(batch_norm_act_stats_kernel<scalar_t, W, kColumns>, as_launch<ForwardShared<W, kColumns, opmath>>(cut, kColumns), p, cut, moments,
         of_parts.values(), of_parts.counters());
}

template <typename scalar_t, int W, bool kColumns>
void launch_normalise(const BatchNormForward& p) {
  const ChannelCut cut = cut_in_waves<scalar_t, W, kColumns>(p.shape, GK_APPLY_WAVES, packets_in_flight<scalar_t, W>(1));
  launch(p.residual == nullptr ? batch_norm_act_normalise_kernel<scalar_t, W, kColumns, false>
                               : batch_norm_act_normalise_kernel<scalar_t, W, kColumns, true>,
         as_launch<math::Normalisation<opmath_t<scalar_t>>>(cut, kColumns, kMostGroupChannels), p, cut,
         p.training && exceeds_cache(p.dtype, p.shape));
}

template <typename scalar_t, int W, bool kColumns>
void launch_backward_reduce(const BatchNormBackward& p, double* sums) {
  const ChannelCut cut = cut_in_waves<scalar_t, W, kColumns>(p.shape, GK_SUMS_WAVES, packets_in_flight<scalar_t, W>(2));
  const auto of_parts = partials<math::GradientSums>(cut);
  launch(has_residual(p) ? batch_norm_act_backward_reduce_kernel<scalar_t, W, kColumns, true>
                         : batch_norm_act_backward_reduce_kernel<scalar_t, W, kColumns, false>,
         as_launch<BackwardShared<W, kColumns, opmath_t<scalar_t>>>(cut, kColumns), p, cut, sums, of_parts.values(), of_parts.counters());
}

template <typename scalar_t, int W, bool kColumns>
void launch_backward_elemt(BatchNormBackward p, const double* sums, const double* count) {
  if (p.grad_residual != nullptr && sizeof(scalar_t) > 2) {
    // The first pass has written dz. (dz of 16 bits is rounded, and not used.)
    p.grad_y = p.grad_residual;
    p.act.kind = math::ActivationKind::kIdentity;
    p.mask = nullptr;
    p.residual = nullptr;
  }
  const ChannelCut cut = cut_in_waves<scalar_t, W, kColumns>(p.shape, GK_APPLY_WAVES, packets_in_flight<scalar_t, W>(2));
  launch(has_residual(p) ? batch_norm_act_backward_elemt_kernel<scalar_t, W, kColumns, true>
                         : batch_norm_act_backward_elemt_kernel<scalar_t, W, kColumns, false>,
         as_launch<GradientCoefficients<opmath_t<scalar_t>>>(cut, kColumns, kMostGroupChannels), p, cut, sums, count,
         exceeds_cache(p.dtype, p.shape));
}

}  // namespace

void batch_norm_act_stats(const BatchNormForward& p, double* moments) {
  visit_cut(p, [&](auto zero, auto width, auto columns) { launch_stats<decltype(zero), width, columns>(p, moments); });
}

void batch_norm_act_elemt(const BatchNormForward& p) {
  visit_cut(p, [&](auto zero, auto width, auto columns) { launch_normalise<decltype(zero), width, columns>(p); });
}

void batch_norm_act_forward(const BatchNormForward& p) {
  visit_cut(p, [&](auto zero, auto width, auto columns) {
    using scalar_t = decltype(zero);
    if (p.training) launch_stats<scalar_t, width, columns>(p, nullptr);
    launch_normalise<scalar_t, width, columns>(p);
  });
}

void batch_norm_act_backward_reduce(const BatchNormBackward& p, double* sums) {
  visit_cut(p, [&](auto zero, auto width, auto columns) { launch_backward_reduce<decltype(zero), width, columns>(p, sums); });
}

void batch_norm_act_backward_elemt(const BatchNormBackward& p, const double* sums, const double* count) {
  visit_cut(p, [&](auto zero, auto width, auto columns) { launch_backward_elemt<decltype(zero), width, columns>(p, sums, count); });
}

void batch_norm_act_backward(const BatchNormBackward& p) {
  const bool needs_sums = p.grad_weight != nullptr || p.grad_bias != nullptr || p.grad_residual != nullptr || p.training;
  visit_cut(p, [&](auto zero, auto width, auto columns) {
    using scalar_t = decltype(zero);
    const Workspace sums(needs_sums && p.grad_x != nullptr ? 2 * p.shape.channels * sizeof(double) : 0);
    double* const of_channels = static_cast<double*>(sums.data());
    if (needs_sums) launch_backward_reduce<scalar_t, width, columns>(p, of_channels);
    if (p.grad_x != nullptr) launch_backward_elemt<scalar_t, width, columns>(p, of_channels, nullptr);
  });
}

void batch_norm_act_gather_stats(const BatchNormForward& p, int64_t ranks, const double* moments) {
  launch(batch_norm_act_gather_stats_kernel, {dim3(static_cast<unsigned>(divide_up(p.shape.channels, kRunThreads))), dim3(kRunThreads)}, p,
         ranks, moments);
}

}  // namespace gradkernels::cuda
