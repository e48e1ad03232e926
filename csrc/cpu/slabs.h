// How a tensor is cut into slabs, the pieces that threads work on: some of its channels, in some of its rows
// (common/shape.h). The cut depends only on the shape, so that results do not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace gradkernels::cpu {

// A channel of at most this many elements is one thread's work: two float32 operands of this size fill a
// second-level cache of 2 MiB.
constexpr int64_t kWholeElements = 256 * 1024;
// With this many channels or more, a channel of up to kWholeElementsOfMany elements is one thread's work too:
// there is enough work for all threads. Its 4 MiB stay in the third-level cache.
constexpr int64_t kManyChannels = 16;
constexpr int64_t kWholeElementsOfMany = 1024 * 1024;
// A channel that is cut is cut into parts of this size. A task has at least about kGrainElements: less is not
// worth a thread.
constexpr int64_t kPartElements = 64 * 1024;
constexpr int64_t kGrainElements = 16 * 1024;
// The calls of a kernel cost little if its slab has this many elements.
constexpr int64_t kCallElements = 4 * 1024;
// A part has at least this many rows, which share the work of preparing its columns.
constexpr int64_t kLeastRows = 256;
// With two passes, samples are taken together until they have this many slabs: enough for many threads, and few enough
// that the second pass finds much of them in the third-level cache.
constexpr int64_t kSlabsTogether = 32;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Slabs {
 public:
  // The slabs of one sample. A kernel that reads a channel twice (`goes_twice`) gets channels that fit into a cache whole;
  // if `set_channels` neighbours have common statistics, it gets all of them.
  explicit Slabs(const ChannelShape& shape, bool goes_twice = true, int64_t set_channels = 1)
      : shape_(shape), set_channels_(set_channels), rows_(shape.rows), inner_(shape.inner) {
    const int64_t elements = shape.rows * shape.inner;
    int64_t limit = goes_twice ? kWholeElements : kPartElements;
    if (has_long_runs(shape)) {
      channels_ = std::clamp<int64_t>(kCallElements / (elements * set_channels), 1, shape.channels / set_channels) * set_channels;
      if (goes_twice && shape.samples * shape.channels / set_channels >= kManyChannels) limit = kWholeElementsOfMany;
    } else {
      // Loops want wide slabs, threads want many. With a multiple of 8 channels, slabs begin at whole bytes of
      // the mask. If there are enough rows to be cut, slabs are as wide as possible: the rows of a part then
      // follow each other in memory, or have few gaps.
      const int64_t most = kMaxColumns / std::max<int64_t>(shape.inner, 1) / 8 * 8;
      if (shape.rows >= 2 * kLeastRows) {
        limit = kPartElements;
        channels_ = divide_up(shape.channels, divide_up(shape.channels, most));
      } else {
        channels_ =
            std::min(std::clamp(elements * shape.channels / 16, kGrainElements, 2 * kPartElements) / std::max<int64_t>(elements, 1), most);
      }
      // A slab of whole sets, if it does not become too wide.
      const int64_t step = std::lcm<int64_t>(8, set_channels);
      channels_ = divide_up(std::max<int64_t>(channels_, 1), 8) * 8;
      if (step <= most) channels_ = std::min(divide_up(channels_, step), most / step) * step;
      channels_ = std::min(channels_, shape.channels);
    }
    if (elements * channels_ > limit) {
      if (has_long_runs(shape)) {
        channels_ = 1;
        rows_ = std::clamp<int64_t>(kPartElements / shape.inner, 1, shape.rows);
        inner_ = std::min(shape.inner, kPartElements);
      } else {
        rows_ = std::min(std::max(divide_up(kPartElements, channels_ * shape.inner * 8) * 8, kLeastRows), shape.rows);
      }
    }
    channel_slabs_ = divide_up(shape.channels, channels_);
    row_slabs_ = divide_up(shape.rows, rows_);
    inner_slabs_ = divide_up(shape.inner, inner_);
  }

  const ChannelShape& shape() const { return shape_; }
  // The number of slabs that one channel is cut into.
  int64_t parts() const { return row_slabs_ * inner_slabs_; }
  // Whether each slab has all elements of its sets of channels.
  bool hold_sets() const { return parts() == 1 && (channels_ % set_channels_ == 0 || channels_ == shape_.channels); }
  int64_t size() const { return channel_slabs_ * parts(); }
  int64_t part(int64_t i) const { return i / channel_slabs_; }
  int64_t grain() const { return std::max<int64_t>(1, kGrainElements / (rows_ * inner_ * channels_)); }

  Slab operator[](int64_t i) const {
    const int64_t channel = i % channel_slabs_ * channels_;
    const int64_t row = part(i) / inner_slabs_ * rows_;
    const int64_t inner = part(i) % inner_slabs_ * inner_;
    return {channel, std::min(channel + channels_, shape_.channels), row, std::min(row + rows_, shape_.rows),
            inner,   std::min(inner + inner_, shape_.inner)};
  }

  template <typename Function>
  void for_each(const Function& function) const {
    parallel_for(size(), grain(), function);
  }
  // Calls function(sample, i) for each slab of the samples [begin, end), and for each range of them prepare(elements)
  // before, whose result function gets as a third argument: `elements` is the size of a slab.
  template <typename Prepare, typename Function>
  void for_each_of_samples(int64_t begin, int64_t end, const Prepare& prepare, const Function& function) const {
    parallel_for_ranges((end - begin) * size(), grain(), [&](int64_t first, int64_t last) {
      auto prepared = prepare(rows_ * inner_ * channels_);
      for (int64_t i = first; i < last; ++i) function(begin + i / size(), i % size(), prepared);
    });
  }

 private:
  ChannelShape shape_;
  int64_t set_channels_;
  int64_t channels_, rows_, inner_;  // of one slab
  int64_t channel_slabs_, row_slabs_, inner_slabs_;
};

}  // namespace gradkernels::cpu
