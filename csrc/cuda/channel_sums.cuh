// Sums for each channel of a slab: over the packets of a thread, the threads of a block, and the blocks of the
// slab, the last of which merges what the others have left in memory.
#pragma once

#include "cuda/channel_walk.cuh"
#include "cuda/reduce.cuh"
#include "math/batch_norm_act.h"

namespace gradkernels::cuda {

// The moments of elements, from the sums of their differences from `about`, and of the squares.
__device__ __forceinline__ math::Moments<double> moments_of_sums(double about, double count, const ThreadSum<float>& sum,
                                                                 const ThreadSum<float>& squares) {
  const double step = sum.total * (1.0 / count);
  return {count, about + step, squares.total - sum.total * step, 0.0, 0.0};
}
__device__ __forceinline__ math::Moments<double> moments_of_sums(double about, double count, const ThreadSum<double>& sum,
                                                                 const ThreadSum<double>& squares) {
  return math::moments_about(about, count, sum.value(), squares.value());
}

// Calls use(set(i)) for the sets of this lane: of 0 ... sets - 1 every lanes-th. It loads several before it uses the first:
// the sets of parts are in global memory, and the last block has nothing else to do than to wait for them.
template <typename Found, typename Set, typename Use>
__device__ __forceinline__ void for_each_set(int lanes, int sets, const Set& set, const Use& use) {
  constexpr int kLoaded = 6;
  for (int first = static_cast<int>(threadIdx.x) % lanes; first < sets; first += kLoaded * lanes) {
    Found found[kLoaded];
#pragma unroll
    for (int j = 0; j < kLoaded; ++j) found[j] = first + j * lanes < sets ? set(first + j * lanes) : Found{};
#pragma unroll
    for (int j = 0; j < kLoaded; ++j) use(found[j]);
  }
}

// Merges set(0) ... set(sets - 1) into `merged`. `lanes` threads work together, and each of them gets the
// result. Only float64 data have low parts.
//
// The moments are summed about the mean of the first set, which has as many elements as any: as with the first tile of a
// thread, what cancels is at most `sets` times what remains.
template <typename opmath, typename Set>
__device__ __forceinline__ void merge(math::Moments<double>& merged, int lanes, int sets, const Set& set) {
  ThreadSum<float> count;  // exact
  ThreadSum<opmath> first, second;
  const double about = sets > 0 ? math::zero_unless_finite(set(0).mean) : 0.0;
  for_each_set<math::Moments<double>>(lanes, sets, set, [&](const math::Moments<double>& one) {
    const math::TermsAbout terms = math::terms_about(about, one);
    count.add(one.count);
    first.add(terms.first);
    second.add(terms.second);
  });
  count.add_over_lanes(lanes);
  first.add_over_lanes(lanes);
  second.add_over_lanes(lanes);
  merged = {};
  // Of a channel that does not exist, there are no sets.
  if (count.total > 0.0) merged = moments_of_sums(about, count.total, first, second);
}

template <typename opmath, typename Set>
__device__ __forceinline__ void merge(math::GradientSums& merged, int lanes, int sets, const Set& set) {
  ThreadSum<opmath> dz, dz_x;
  for_each_set<math::GradientSums>(lanes, sets, set, [&](const math::GradientSums& one) {
    dz.add(one.dz);
    dz_x.add(one.dz_x);
  });
  dz.add_over_lanes(lanes);
  dz_x.add_over_lanes(lanes);
  merged = {dz.rounded(), dz_x.rounded()};
}

// A thread's channel when its block merges sums. `lanes` neighbouring threads have the same channel, and the
// first of them writes the result.
struct Lane {
  int in_slab;
  int64_t channel;  // of all samples
  bool exists;
  bool writes;

  __device__ __forceinline__ Lane(const ChannelCut& cut, const Slab& slab)
      : in_slab(static_cast<int>(threadIdx.x) / cut.lanes),
        channel(slab.before + slab.first_channel + in_slab),
        exists(in_slab < slab.channels),
        writes(exists && static_cast<int>(threadIdx.x) % cut.lanes == 0) {}
};

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
  const int64_t all_channels = cut.samples * cut.channels;
  if (lane.writes) partial[part * all_channels + lane.channel] = InMemory(found);
  if (!is_last_block(counters + index, cut.parts, flag)) return false;
  merge<opmath>(found, cut.lanes, lane.exists ? cut.parts : 0, [&](int i) -> Found { return partial[i * all_channels + lane.channel]; });
  return true;
}

// The results of each thread of a block: one value for each of its columns, or one for all of its elements if
// the block has one channel.
template <int W, bool kColumns>
struct ThreadValues {
  static constexpr int kValues = kColumns ? W : 1;
  // One more than the threads, so that the channels of neighbouring columns are in different banks.
  static constexpr int kPitch = threads_of(W, kColumns) + 1;
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

// The sum in pairs, so that its rounding error grows with the logarithm of the number.
template <int kFirst, int kNumber, typename T, int W>
__device__ __forceinline__ T sum_of(const T (&x)[W]) {
  if constexpr (kNumber == 1) {
    return x[kFirst];
  } else {
    return sum_of<kFirst, kNumber / 2>(x) + sum_of<kFirst + kNumber / 2, kNumber / 2>(x);
  }
}

// A thread's sums of a and of b c, one of each for each of its columns, or one in a long run. Elements of one
// column are added up in the computing type and then in float64: those of a tile in 16-bit types and in packets of
// columns, otherwise those of a packet.
template <typename scalar_t, int W, bool kColumns>
struct ThreadSums {
  using opmath = opmath_t<scalar_t>;
  static constexpr int kValues = ThreadValues<W, kColumns>::kValues;
  ThreadSum<opmath> first[kValues], second[kValues];
  opmath tile_first[kValues] = {}, tile_second[kValues] = {};

  __device__ __forceinline__ void add(const opmath (&a)[W], const opmath (&b)[W], const opmath (&c)[W]) {
    if constexpr (kColumns) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        tile_first[k] += a[k];
        tile_second[k] = math::fma(b[k], c[k], tile_second[k]);
      }
    } else if constexpr (W == 1) {
      tile_first[0] += a[0];
      tile_second[0] = math::fma(b[0], c[0], tile_second[0]);
    } else {
      opmath products[W / 2];
#pragma unroll
      for (int k = 0; k < W / 2; ++k) products[k] = math::fma(b[k + W / 2], c[k + W / 2], b[k] * c[k]);
      tile_first[0] += sum_of<0, W>(a);
      tile_second[0] += sum_of<0, W / 2>(products);
    }
    if constexpr (sizeof(scalar_t) > 2 && !(kColumns && W > 1)) end_tile();
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

}  // namespace gradkernels::cuda
