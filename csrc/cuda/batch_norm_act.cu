// batch_norm_act and group_norm_act on CUDA. cuda/channel_cut.h has the cut of a tensor into slabs, parts and packets.
//
// There are two passes: the first computes the sums of a slab's channels, which the last of its blocks merges,
// and the second walks back from the end, where the cache still has what the first pass read last, and writes
// the result. The cut depends only on the shape and the device, and every sum has a fixed order: every run gives
// the same bits.
//
// The kernels of both norms are the same. In group norm, the results of the channels of a set are merged between the passes.
// A channel is counted within its sample where its weight is read, and over all samples elsewhere.
#include "ops/batch_norm_act.h"

#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "cuda/channel_sums.cuh"
#include "math/batch_norm_act.h"
#include "ops/group_norm_act.h"

namespace gradkernels::cuda {
namespace {

template <typename scalar_t, int W, bool kColumns, bool kResidual>
constexpr int kBlocks = blocks_of_processor(sizeof(scalar_t), W, kColumns, kResidual);

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
template <typename Arguments>
__device__ __forceinline__ int64_t set_of(const Arguments& p, int64_t channel) {
  return p.set_channels == 1 ? channel : channel / p.set_channels;
}

template <typename opmath, typename Arguments>
__device__ __forceinline__ math::Normalisation<opmath> channel_normalisation(const Arguments& p, int64_t channel, double mean,
                                                                             double invstd) {
  return math::normalisation<opmath>(mean, invstd, channel_value(p.parameter_dtype, p.weight, channel, 1.0),
                                     channel_value(p.parameter_dtype, p.bias, channel, 0.0));
}

// ---- Forward

// The moments of each thread: mean, M2 and, of float64 data, the low part of the mean.
template <int W, bool kColumns, typename opmath>
struct ForwardShared {
  static constexpr bool kLow = std::is_same_v<opmath, double>;
  ThreadValues<W, kColumns> of_thread[kLow ? 3 : 2];
  double count[threads_of(W, kColumns)];
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
  constexpr int kTile = packets_in_flight(sizeof(scalar_t), W, 1);
  constexpr int kValues = ThreadValues<W, kColumns>::kValues;
  opmath about[kValues] = {};
  int count = 0;
  ThreadSums<scalar_t, W, kColumns> sums;

  Walk<W, kColumns, false> walk(cut, slab, part);
  using TileOf = Tile<scalar_t, W, kTile>;
  walk.template for_each_tile<kTile>(
      TileOf{x, {}}, [] {},
      [&](const At(&at)[kTile], const TileOf& tile) {
        if (count == 0) {
          opmath total[kValues] = {};
          int elements = 0;
#pragma unroll
          for (int i = 0; i < kTile; ++i) {
            if (!at[i].exists) continue;
            elements += kColumns ? 1 : W;
            const auto value = tile[i];
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
          opmath difference[W];
          const auto value = tile[i];
#pragma unroll
          for (int k = 0; k < W; ++k) difference[k] = value.element[k] - about[kColumns ? k : 0];
          sums.add(difference, difference, difference);
        }
        sums.end_tile();
      });

  double mean[kValues], m2[kValues], mean_low[kValues];
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    math::Moments<double> mine{0.0, 0.0, 0.0, 0.0, 0.0};
    if (count > 0) mine = moments_of_sums(static_cast<double>(about[k]), static_cast<double>(count), sums.first[k], sums.second[k]);
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

// Group norm has no running statistics, and its invstd is inf if the variance and eps are 0, as in torch.
enum class Norm : uint8_t { kBatch, kGroup };

// Writes mean, invstd and the running statistics from a channel's rounded moments; or, unless `moments` is
// null, only `moments` (csrc/schema.cpp).
__device__ __forceinline__ void finish_channel(const BatchNormForward& p, Norm norm, double* moments, int64_t channel,
                                               const math::Moments<double>& found) {
  if (moments != nullptr) {
    if (channel == 0) moments[0] = found.count;
    moments[1 + channel] = found.mean;
    moments[1 + p.shape.samples * p.shape.channels + channel] = found.m2;
    return;
  }
  const double variance = found.m2 / found.count;
  p.mean[channel] = found.mean;
  p.invstd[channel] = norm == Norm::kGroup ? math::inverse_std(variance, p.eps) : math::inverse_std_of_batch(variance, p.eps);
  if (norm == Norm::kGroup) return;
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
__global__ void __launch_bounds__(threads_of(W, kColumns), kBlocks<scalar_t, W, kColumns, false>)
    batch_norm_act_stats_kernel(BatchNormForward p, ChannelCut cut, Norm norm, double* moments, PartMoments<opmath_t<scalar_t>>* partial,
                                unsigned* counters) {
  using opmath = opmath_t<scalar_t>;
  auto& shared = *shared_memory<ForwardShared<W, kColumns, opmath>>();
  const int64_t index = blockIdx.x % cut.slabs;
  const int64_t part = blockIdx.x / cut.slabs;
  const Slab slab = slab_of<kColumns>(cut, index);
  math::Moments<double> found = part_moments<scalar_t, W, kColumns>(cut, slab, part, static_cast<const scalar_t*>(p.x), shared);
  const Lane lane(cut, slab);
  if (!merge_parts<opmath>(cut, lane, index, part, found, partial, counters, &shared.flag)) return;
  if (lane.writes) finish_channel(p, norm, moments, lane.channel, math::rounded(found));
}

template <typename scalar_t, int W, int kTile, bool kResidual>
struct ForwardOperands {
  Tile<scalar_t, W, kTile> x, residual;

  __device__ __forceinline__ explicit ForwardOperands(const BatchNormForward& p)
      : x{static_cast<const scalar_t*>(p.x), {}}, residual{static_cast<const scalar_t*>(p.residual), {}} {}
  __device__ __forceinline__ void load(const At (&at)[kTile]) {
    x.load(at);
    if constexpr (kResidual) residual.load(at);
  }
};

// y = act(batch_norm(x) + residual) from mean and invstd; in evaluation, the kernel computes these from the
// running statistics; it also counts the batch
//   launch   slabs * parts blocks, in reverse order; Normalisation[kMostGroupChannels] in shared memory
//   requires operands dense in the order of the shape, and aligned to packets
//   traffic  n elements read (2n with a residual), n written, n bits written if there is a mask
template <typename scalar_t, int W, bool kColumns, bool kResidual>
__global__ void __launch_bounds__(threads_of(W, kColumns), kBlocks<scalar_t, W, kColumns, kResidual>)
    batch_norm_act_normalise_kernel(BatchNormForward p, ChannelCut cut, bool briefly) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kTile = packets_in_flight(sizeof(scalar_t), W, 1 + kResidual);
  auto* const normalisation = shared_memory<math::Normalisation<opmath>>();
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t part = block / cut.slabs;
  const Slab slab = slab_of<kColumns>(cut, block % cut.slabs);
  // The kernel before this one has read it for the momentum.
  if (p.counted != nullptr && block == 0 && threadIdx.x == 0) ++*p.counted;
  scalar_t* const y = static_cast<scalar_t*>(p.y);
  Walk<W, kColumns, true> walk(cut, slab, part);
  math::Normalisation<opmath> normalise[ThreadValues<W, kColumns>::kValues];
  using Operands = ForwardOperands<scalar_t, W, kTile, kResidual>;
  const auto prepare = [&] {
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
        const int64_t set = set_of(p, slab.before + channel);
        mean = p.mean[set];
        invstd = p.invstd[set];
      }
      normalisation[threadIdx.x] = channel_normalisation<opmath>(p, channel, mean, invstd);
    }
    __syncthreads();
    for_each_column<W, kColumns>(cut, slab, walk.first_column(), [&](int k, int channel) { normalise[k] = normalisation[channel]; });
  };
  walk.template for_each_tile<kTile>(Operands(p), prepare, [&](const At(&at)[kTile], const Operands& tile) {
    const auto normalised = [&](int i) {
      Values<scalar_t, W> u = tile.x[i];
#pragma unroll
      for (int k = 0; k < W; ++k) u.element[k] = normalise[kColumns ? k : 0](u.element[k]);
      if constexpr (kResidual) {
        const auto value = tile.residual[i];
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

// The coefficients of a channel, from its sums. mean_high of math::InputGradient is that of math::Normalisation. So is
// the scale, unless a set has several channels.
template <typename T>
struct SetGradientCoefficients {
  math::Normalisation<T> normalise;
  T dz_mean_high;
  T slope;
  T offset;
  T scale;
  T weight;

  // With the weight of 1 that it has in sets of one channel, this has the bits of math::InputGradient::training.
  __device__ __forceinline__ T training(T dz, T x) const { return input().in_set(weight, dz, x); }
  __device__ __forceinline__ math::InputGradient<T> input() const { return {normalise.mean_high, dz_mean_high, scale, slope, offset}; }
};

// For sets of one channel in short runs, where a thread keeps a copy for each of its columns.
template <typename T>
struct GradientCoefficients {
  math::Normalisation<T> normalise;
  T dz_mean_high;
  T slope;
  T offset;

  __device__ __forceinline__ explicit GradientCoefficients(const SetGradientCoefficients<T>& c)
      : normalise(c.normalise), dz_mean_high(c.dz_mean_high), slope(c.slope), offset(c.offset) {}
  GradientCoefficients() = default;
  __device__ __forceinline__ T training(T dz, T x) const { return input().training(dz, x); }
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
  Tile<scalar_t, W, kTile> x, grad_y, residual;
  const uint8_t* mask;
  unsigned bits[kTile];

  __device__ __forceinline__ explicit GradientOperands(const BatchNormBackward& p)
      : x{static_cast<const scalar_t*>(p.x), {}},
        grad_y{static_cast<const scalar_t*>(p.grad_y), {}},
        residual{static_cast<const scalar_t*>(p.residual), {}},
        mask(p.mask) {}
  __device__ __forceinline__ void load(const At (&at)[kTile]) {
    x.load(at);
    grad_y.load(at);
    if constexpr (kResidual) {
      if (mask != nullptr) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) bits[i] = at[i].exists ? load_bits<W>(mask, at[i]) : 0u;
      } else if (residual.from != nullptr) {
        residual.load(at);
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
          auto dz = grad_y[i];
#pragma unroll
          for (int k = 0; k < W; ++k) dz.element[k] = f.backward_from_mask(dz.element[k], (bits[i] >> k & 1u) != 0u);
          function(i, x[i], dz);
        }
      });
      return;
    }
    math::visit<opmath, math::kPrecisionOf<scalar_t>>(p.act, [&](auto f) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (!at[i].exists) continue;
        const auto value = x[i];
        auto dz = grad_y[i];
        opmath u[W];
#pragma unroll
        for (int k = 0; k < W; ++k) u[k] = normalise(k)(value.element[k]);
        if (kResidual && p.residual != nullptr) {
          const auto added = residual[i];
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
  constexpr int kTile = packets_in_flight(sizeof(scalar_t), W, 2 + kResidual);
  constexpr int kValues = ThreadValues<W, kColumns>::kValues;
  Walk<W, kColumns, false> walk(cut, slab, part);
  math::Normalisation<opmath> normalise[kValues];
  ThreadSums<scalar_t, W, kColumns> sums;
  using Operands = GradientOperands<scalar_t, W, kTile, kResidual>;
  const auto prepare = [&] {
    if (static_cast<int>(threadIdx.x) < slab.channels) {
      const int64_t channel = slab.first_channel + threadIdx.x, set = set_of(p, slab.before + channel);
      shared.normalisation[threadIdx.x] = channel_normalisation<opmath>(p, channel, p.mean[set], p.invstd[set]);
    }
    __syncthreads();
    for_each_column<W, kColumns>(cut, slab, walk.first_column(), [&](int k, int channel) { normalise[k] = shared.normalisation[channel]; });
  };
  walk.template for_each_tile<kTile>(Operands(p), prepare, [&](const At(&at)[kTile], const Operands& operands) {
    const auto of_column = [&](int k) { return normalise[kColumns ? k : 0]; };
    operands.for_each(p, at, of_column, [&](int i, const Values<scalar_t, W>& x, const Values<scalar_t, W>& dz) {
      if (kResidual && p.grad_residual != nullptr) write(static_cast<scalar_t*>(p.grad_residual) + at[i].element, dz, false);
      opmath difference[W];
#pragma unroll
      for (int k = 0; k < W; ++k) difference[k] = x.element[k] - normalise[kColumns ? k : 0].mean_high;
      sums.add(dz.element, dz.element, difference);
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
  const double mean = p.mean[set_of(p, lane.exists ? lane.channel : slab.before + slab.first_channel)];
  return math::about_mean(found, math::mean_low(mean, mean_high));
}

// Writes grad_weight, grad_bias and `sums` (csrc/schema.cpp), unless they are null. Group norm needs `sums` alone.
__device__ __forceinline__ void finish_channel(const BatchNormBackward& p, double* sums, int64_t channel, const math::GradientSums& found) {
  if (sums != nullptr) {
    sums[channel] = found.dz;
    sums[p.shape.samples * p.shape.channels + channel] = found.dz_x;
  }
  if (p.grad_weight != nullptr) set_channel_value(p.parameter_dtype, p.grad_weight, channel, found.dz_x * p.invstd[channel]);
  set_channel_value(p.parameter_dtype, p.grad_bias, channel, found.dz);
}

// The coefficients of a channel, which is counted within its sample, and whose set has these sums and this count.
template <typename opmath>
__device__ __forceinline__ SetGradientCoefficients<opmath> channel_gradient(const BatchNormBackward& p, int64_t channel, int64_t set,
                                                                            double count, const math::GradientSums& sums) {
  const double mean = p.mean[set], invstd = p.invstd[set], weight = channel_value(p.parameter_dtype, p.weight, channel, 1.0);
  const bool of_several = p.set_channels > 1;
  const math::Normalisation<opmath> normalise = channel_normalisation<opmath>(p, channel, mean, invstd);
  const math::InputGradient<opmath> input =
      math::input_gradient<opmath>(mean, normalise.mean_high, invstd, of_several ? 1.0 : weight, count, sums);
  return {normalise, input.dz_mean_high, input.slope, input.offset, input.scale, of_several ? static_cast<opmath>(weight) : opmath(1)};
}

// S1 = sum dz and S2 = sum dz (x - mean) of every channel of a sample; grad_weight and grad_bias from them, if there
// is one sample; grad_residual = dz
//   launch   slabs * parts blocks; block b has part b / slabs of slab b % slabs; BackwardShared in shared memory
//   requires operands dense in the order of the shape, and aligned to packets; partial[parts * channels] and
//            counters[slabs] = 0, unless a slab has one part
//   traffic  2n elements read (and n bits, or n elements of the residual), n written for grad_residual
template <typename scalar_t, int W, bool kColumns, bool kResidual>
__global__ void __launch_bounds__(threads_of(W, kColumns), kBlocks<scalar_t, W, kColumns, kResidual>)
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

// grad_x from the sums of every set and the count of all processes; sums may be null in evaluation; a null count means
// that of this process. kSets: sets have several channels; in long runs the same kernel takes both.
//   launch   slabs * parts blocks, in reverse order; SetGradientCoefficients[kMostGroupChannels] in shared memory
//   requires operands dense in the order of the shape, and aligned to packets
//   traffic  2n elements read (and n bits, or n elements of the residual), n written
template <typename scalar_t, int W, bool kColumns, bool kResidual, bool kSets>
__global__ void __launch_bounds__(threads_of(W, kColumns), kBlocks<scalar_t, W, kColumns, kResidual>)
    batch_norm_act_backward_elemt_kernel(BatchNormBackward p, ChannelCut cut, const double* sums, const double* count, bool briefly) {
  using opmath = opmath_t<scalar_t>;
  using Coefficients = std::conditional_t<kSets || !kColumns, SetGradientCoefficients<opmath>, GradientCoefficients<opmath>>;
  constexpr int kTile = packets_in_flight(sizeof(scalar_t), W, 2 + kResidual);
  auto* const coefficients = shared_memory<Coefficients>();
  // Numbers of 64 bits would take registers that sm_100 does not have.
  const unsigned block = gridDim.x - 1 - blockIdx.x, slabs = static_cast<unsigned>(cut.slabs);
  const Slab slab = slab_of<kColumns>(cut, block % slabs);
  Walk<W, kColumns, true> walk(cut, slab, block / slabs);
  Coefficients mine[ThreadValues<W, kColumns>::kValues];
  using Operands = GradientOperands<scalar_t, W, kTile, kResidual>;
  const auto prepare = [&] {
    if (static_cast<int>(threadIdx.x) < slab.channels) {
      const auto sets_before = [&](int64_t channel) { return kSets || !kColumns ? set_of(p, channel) : channel; };
      const int64_t channel = slab.first_channel + threadIdx.x, set = sets_before(slab.before + channel);
      const int64_t sets = sets_before(cut.samples * cut.channels);
      const math::GradientSums of_set = sums == nullptr ? math::GradientSums{0.0, 0.0} : math::GradientSums{sums[set], sums[sets + set]};
      const double of_all = count == nullptr ? static_cast<double>(cut.rows * cut.inner * p.set_channels) : *count;
      coefficients[threadIdx.x] = Coefficients(channel_gradient<opmath>(p, channel, set, of_all, of_set));
    }
    __syncthreads();
    for_each_column<W, kColumns>(cut, slab, walk.first_column(), [&](int k, int channel) { mine[k] = coefficients[channel]; });
  };
  walk.template for_each_tile<kTile>(Operands(p), prepare, [&](const At(&at)[kTile], const Operands& operands) {
    const auto of_column = [&](int k) { return mine[kColumns ? k : 0].normalise; };
    operands.for_each(p, at, of_column, [&](int i, const Values<scalar_t, W>& x, const Values<scalar_t, W>& dz) {
      Values<scalar_t, W> grad_x;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const Coefficients& c = mine[kColumns ? k : 0];
        grad_x.element[k] = p.training ? c.training(dz.element[k], x.element[k]) : c.input().evaluation(dz.element[k]);
      }
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
    finish_channel(p, Norm::kBatch, nullptr, channel, math::rounded(merged));
  } else {
    p.mean[channel] = p.invstd[channel] = 0.0;
  }
}

// ---- Sets of group norm

constexpr int kSetThreads = 128;
constexpr int kSetsOfBlock = kSetThreads / kWarpThreads;

// A warp merges the results of a set, or of a channel in all samples.
__device__ __forceinline__ int64_t set_of_warp() { return int64_t{blockIdx.x} * kSetsOfBlock + threadIdx.x / kWarpThreads; }

// mean and invstd of every set from the moments of its channels
//   launch   a warp for each set
//   requires the moments of every channel of a sample (csrc/schema.cpp)
//   traffic  2 float64 read for each channel of a sample
template <typename opmath>
__global__ void __launch_bounds__(kSetThreads) group_norm_act_statistics_kernel(BatchNormForward p, const double* moments) {
  const int64_t set = set_of_warp(), channels = p.shape.samples * p.shape.channels;
  if (set >= set_of(p, channels)) return;
  const double count = static_cast<double>(p.shape.rows * p.shape.inner);
  const double* const of_set = moments + 1 + set * p.set_channels;
  math::Moments<double> found;
  merge<opmath>(found, kWarpThreads, static_cast<int>(p.set_channels),
                [&](int i) { return math::Moments<double>{count, of_set[i], of_set[channels + i], 0.0, 0.0}; });
  if (threadIdx.x % kWarpThreads == 0) finish_channel(p, Norm::kGroup, nullptr, set, math::rounded(found));
}

// sum weight dz and sum weight dz (x - mean) of every set, grad_weight and grad_bias, from the sums of every channel of a
// sample
//   launch   a warp for each of `sets` sets, and one for each channel
//   requires sums (csrc/schema.cpp)
//   traffic  2 float64 read for each channel of a sample, and again for grad_weight and grad_bias
template <typename opmath>
__global__ void __launch_bounds__(kSetThreads)
    group_norm_act_sums_kernel(BatchNormBackward p, const double* sums, double* of_sets, int64_t sets) {
  const int64_t channels = p.shape.channels, all_channels = p.shape.samples * channels, set = set_of_warp(), channel = set - sets;
  if (channel >= channels) return;
  const bool of_set = channel < 0;
  math::GradientSums found;
  merge<opmath>(found, kWarpThreads, static_cast<int>(of_set ? p.set_channels : p.shape.samples), [&](int i) {
    const int64_t at = of_set ? set * p.set_channels + i : i * channels + channel;
    const double dz = sums[at], dz_x = sums[all_channels + at];
    if (!of_set) return math::GradientSums{dz, dz_x * p.invstd[set_of(p, at)]};
    const double weight = channel_value(p.parameter_dtype, p.weight, at % channels, 1.0);
    return math::GradientSums{weight * dz, weight * dz_x};
  });
  if (threadIdx.x % kWarpThreads != 0) return;
  if (of_set) {
    of_sets[set] = found.dz;
    of_sets[sets + set] = found.dz_x;
  } else {
    set_channel_value(p.parameter_dtype, p.grad_weight, channel, found.dz_x);
    set_channel_value(p.parameter_dtype, p.grad_bias, channel, found.dz);
  }
}

// ---- Launches

template <int kValue>
using Width = std::integral_constant<int, kValue>;

// Calls function(scalar_t(), width, columns) with the type, the elements of a packet and whether runs are short,
// the latter two as integral_constants.
template <typename Function>
void visit_cut(DType dtype, const ChannelShape& shape, bool masked, std::initializer_list<const void*> operands, const Function& function) {
  if (!can_cut(shape, masked)) {
    throw std::runtime_error("a norm on CUDA: a channel of an image has at most 2^31 - 1 elements, and the mask 2^32 - 1 bytes");
  }
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kWhole = kPacketElements<scalar_t>;
    constexpr int kColumn = kWhole < 4 ? kWhole : 4;
    const int width = width_of(shape, sizeof(scalar_t), alignment_of(operands));
    if (shape.inner < kShortRunElements) {
      return width == 1 ? function(zero, Width<1>(), std::true_type()) : function(zero, Width<kColumn>(), std::true_type());
    }
    if constexpr (kColumn < kWhole) {
      if (width == kColumn) return function(zero, Width<kColumn>(), std::false_type());
    }
    return width == 1 ? function(zero, Width<1>(), std::false_type()) : function(zero, Width<kWhole>(), std::false_type());
  });
}

template <typename Function>
void visit_cut(const BatchNormForward& p, const Function& function) {
  visit_cut(p.dtype, p.shape, p.mask != nullptr, {p.x, p.residual, p.y}, function);
}
template <typename Function>
void visit_cut(const BatchNormBackward& p, const Function& function) {
  visit_cut(p.dtype, p.shape, p.mask != nullptr, {p.grad_y, p.x, p.residual, p.grad_x, p.grad_residual}, function);
}

template <typename scalar_t, int W>
ChannelCut cut_here(const ChannelShape& shape, int operands, bool residual, bool masked, Pass pass) {
  return cut_for(shape, sizeof(scalar_t), W, operands, residual, masked, pass, device_limits().processors);
}

// Whether two tensors do not fit into L2, so that what is written should leave it first.
bool exceeds_cache(DType dtype, const ChannelShape& shape) {
  return 2 * shape.samples * shape.rows * shape.channels * shape.inner * size_of(dtype) > device_limits().l2_bytes;
}

// Whether a backward has anything to read or to write for a residual.
bool has_residual(const BatchNormBackward& p) { return p.residual != nullptr || p.mask != nullptr || p.grad_residual != nullptr; }

// With `kNumber` times Shared in shared memory.
template <typename Shared, int kNumber = 1>
Launch as_launch(const ChannelCut& cut) {
  static_assert(kNumber * sizeof(Shared) <= kPlainSharedBytes, "more shared memory would have to be asked for");
  return {dim3(static_cast<unsigned>(cut.slabs * cut.parts)), dim3(static_cast<unsigned>(cut.block_threads)), kNumber * sizeof(Shared)};
}

template <typename scalar_t, int W, bool kColumns>
void launch_stats(const BatchNormForward& p, Norm norm, double* moments) {
  using opmath = opmath_t<scalar_t>;
  const ChannelCut cut = cut_here<scalar_t, W>(p.shape, 1, false, false, Pass::kSums);
  const Partials<PartMoments<opmath>> of_parts(cut.parts, cut.samples * cut.channels, cut.slabs);
  launch(batch_norm_act_stats_kernel<scalar_t, W, kColumns>, as_launch<ForwardShared<W, kColumns, opmath>>(cut), p, cut, norm, moments,
         of_parts.values(), of_parts.counters());
}

template <typename scalar_t, int W, bool kColumns, bool kResidual>
void launch_normalise(const BatchNormForward& p) {
  const ChannelCut cut = cut_here<scalar_t, W>(p.shape, 1, kResidual, p.mask != nullptr, Pass::kResults);
  const int64_t sample_bytes = mask_bytes(p.shape.rows, p.shape.channels, p.shape.inner);
  if (p.mask != nullptr && cut.sample_mask_bytes < sample_bytes) {
    // A single row of short runs may have the mask of long runs, of which the last bytes are not used here.
    check(cudaMemsetAsync(p.mask, 0, static_cast<size_t>(p.shape.samples * sample_bytes), current_stream()));
  }
  launch(batch_norm_act_normalise_kernel<scalar_t, W, kColumns, kResidual>,
         as_launch<math::Normalisation<opmath_t<scalar_t>>, kMostGroupChannels>(cut), p, cut,
         p.training && exceeds_cache(p.dtype, p.shape));
}

template <typename scalar_t, int W, bool kColumns, bool kResidual>
void launch_backward_reduce(const BatchNormBackward& p, double* sums) {
  const ChannelCut cut = cut_here<scalar_t, W>(p.shape, 2, kResidual, p.mask != nullptr, Pass::kSums);
  const Partials<math::GradientSums> of_parts(cut.parts, cut.samples * cut.channels, cut.slabs);
  launch(batch_norm_act_backward_reduce_kernel<scalar_t, W, kColumns, kResidual>,
         as_launch<BackwardShared<W, kColumns, opmath_t<scalar_t>>>(cut), p, cut, sums, of_parts.values(), of_parts.counters());
}

template <typename scalar_t, int W, bool kColumns, bool kResidual>
void launch_backward_elemt(const BatchNormBackward& p, const double* sums, const double* count) {
  const ChannelCut cut = cut_here<scalar_t, W>(p.shape, 2, kResidual, p.mask != nullptr, Pass::kResults);
  // In long runs, both are the same kernel.
  auto* const kernel = p.set_channels > 1 ? batch_norm_act_backward_elemt_kernel<scalar_t, W, kColumns, kResidual, kColumns>
                                          : batch_norm_act_backward_elemt_kernel<scalar_t, W, kColumns, kResidual, false>;
  launch(kernel, as_launch<SetGradientCoefficients<opmath_t<scalar_t>>, kMostGroupChannels>(cut), p, cut, sums, count,
         exceeds_cache(p.dtype, p.shape));
}

void find_statistics(const BatchNormForward& p, Norm norm, double* moments) {
  visit_cut(p, [&](auto zero, auto width, auto columns) { launch_stats<decltype(zero), width, columns>(p, norm, moments); });
}

dim3 blocks_for_sets(int64_t sets) { return dim3(static_cast<unsigned>(divide_up(sets, kSetsOfBlock))); }

// Calls function with a zero of the computing type.
template <typename Function>
void visit_opmath(DType dtype, const Function& function) {
  dtype == DType::kFloat64 ? function(0.0) : function(0.0f);
}

}  // namespace

void batch_norm_act_stats(const BatchNormForward& p, double* moments) { find_statistics(p, Norm::kBatch, moments); }

void batch_norm_act_elemt(const BatchNormForward& p) {
  visit_cut(p, [&](auto zero, auto width, auto columns) {
    using scalar_t = decltype(zero);
    p.residual == nullptr ? launch_normalise<scalar_t, width, columns, false>(p) : launch_normalise<scalar_t, width, columns, true>(p);
  });
}

void batch_norm_act_forward(const BatchNormForward& p) {
  if (p.training) batch_norm_act_stats(p, nullptr);
  batch_norm_act_elemt(p);
}

void batch_norm_act_backward_reduce(const BatchNormBackward& p, double* sums) {
  visit_cut(p, [&](auto zero, auto width, auto columns) {
    using scalar_t = decltype(zero);
    has_residual(p) ? launch_backward_reduce<scalar_t, width, columns, true>(p, sums)
                    : launch_backward_reduce<scalar_t, width, columns, false>(p, sums);
  });
}

void batch_norm_act_backward_elemt(const BatchNormBackward& p, const double* sums, const double* count) {
  visit_cut(p, [&](auto zero, auto width, auto columns) {
    using scalar_t = decltype(zero);
    BatchNormBackward q = p;
    if (p.grad_residual != nullptr && sizeof(scalar_t) > 2) {
      // The first pass has written dz. (dz of 16 bits is rounded, and not used.)
      q.grad_y = p.grad_residual;
      q.act.kind = math::ActivationKind::kIdentity;
      q.mask = nullptr;
      q.residual = q.grad_residual = nullptr;
    }
    has_residual(q) ? launch_backward_elemt<scalar_t, width, columns, true>(q, sums, count)
                    : launch_backward_elemt<scalar_t, width, columns, false>(q, sums, count);
  });
}

void batch_norm_act_backward(const BatchNormBackward& p) {
  const bool needs_sums = p.grad_weight != nullptr || p.grad_bias != nullptr || p.grad_residual != nullptr || p.training;
  const Workspace sums(needs_sums && p.grad_x != nullptr ? 2 * p.shape.channels * sizeof(double) : 0);
  double* const of_channels = static_cast<double*>(sums.data());
  if (needs_sums) batch_norm_act_backward_reduce(p, of_channels);
  if (p.grad_x != nullptr) batch_norm_act_backward_elemt(p, of_channels, nullptr);
}

void batch_norm_act_gather_stats(const BatchNormForward& p, int64_t ranks, const double* moments) {
  launch(batch_norm_act_gather_stats_kernel, {dim3(static_cast<unsigned>(divide_up(p.shape.channels, kRunThreads))), dim3(kRunThreads)}, p,
         ranks, moments);
}

void group_norm_act_forward(const BatchNormForward& p) {
  BatchNormForward sets = p;
  if (p.shape.rows == 1 && p.shape.inner * p.set_channels <= INT32_MAX) {
    // A set lies in memory like the run of one channel.
    sets.shape.channels /= p.set_channels;
    sets.shape.inner *= p.set_channels;
    sets.set_channels = 1;
  }
  const bool of_channels = sets.set_channels > 1;
  const int64_t channels = p.shape.samples * p.shape.channels;
  const Workspace memory(of_channels ? (1 + 2 * channels) * sizeof(double) : 0);
  double* const moments = static_cast<double*>(memory.data());
  find_statistics(sets, Norm::kGroup, moments);
  if (of_channels) {
    visit_opmath(p.dtype, [&](auto zero) {
      launch(group_norm_act_statistics_kernel<decltype(zero)>, {blocks_for_sets(channels / p.set_channels), dim3(kSetThreads)}, p, moments);
    });
  }
  batch_norm_act_elemt(p);
}

void group_norm_act_elemt(const BatchNormForward& p) { batch_norm_act_elemt(p); }

void group_norm_act_backward(const BatchNormBackward& p) {
  const int64_t channels = p.shape.samples * p.shape.channels, sets = channels / p.set_channels;
  const bool of_parameters = p.grad_weight != nullptr || p.grad_bias != nullptr, of_sets = p.grad_x != nullptr && p.set_channels > 1;
  const Workspace memory(2 * (channels + (of_sets ? sets : 0)) * sizeof(double));
  double* const sums = static_cast<double*>(memory.data());
  double* const set_sums = of_sets ? sums + 2 * channels : sums;
  BatchNormBackward q = p;
  q.grad_weight = q.grad_bias = nullptr;
  batch_norm_act_backward_reduce(q, sums);
  if (of_parameters || of_sets) {
    const int64_t summed_sets = of_sets ? sets : 0;
    visit_opmath(p.dtype, [&](auto zero) {
      launch(group_norm_act_sums_kernel<decltype(zero)>,
             {blocks_for_sets(summed_sets + (of_parameters ? p.shape.channels : 0)), dim3(kSetThreads)}, p, sums, set_sums, summed_sets);
    });
  }
  if (p.grad_x != nullptr) batch_norm_act_backward_elemt(q, set_sums, nullptr);
}

}  // namespace gradkernels::cuda
