// How a tensor is cut into slabs, the pieces that threads work on: some of its channels, in some of its rows
// (common/shape.h). The cut depends only on the shape, so that results do not depend on the number of
// threads.
#pragma once

#include <algorithm>
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
// A part has at least this many rows, which share the work of preparing its columns.
constexpr int64_t kLeastRows = 256;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Slabs {
 public:
  // A kernel that reads a channel twice (`goes_twice`) gets channels that fit into a cache whole.
  explicit Slabs(const ChannelShape& shape, bool goes_twice = true) : shape_(shape), rows_(shape.rows), inner_(shape.inner) {
    const int64_t elements = shape.rows * shape.inner;
    int64_t limit = goes_twice ? kWholeElements : kPartElements;
    if (shape.inner >= kShortRunElements) {
      channels_ = 1;
      if (goes_twice && shape.channels >= kManyChannels) limit = kWholeElementsOfMany;
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
      channels_ = std::min(divide_up(std::max<int64_t>(channels_, 1), 8) * 8, shape.channels);
    }
    if (elements * channels_ > limit) {
      if (shape.inner >= kShortRunElements) {
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

  // The number of slabs that one channel is cut into.
  int64_t parts() const { return row_slabs_ * inner_slabs_; }
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
  // Calls function(i, copy) for each slab. `copy` is the thread's own memory for a slab of elements of this
  // size; null for size 0.
  template <typename Function>
  void for_each_with_copy(int64_t element_bytes, const Function& function) const {
    parallel_for_ranges(size(), grain(), [&](int64_t begin, int64_t end) {
      std::vector<char> copy(rows_ * inner_ * channels_ * element_bytes);
      for (int64_t i = begin; i < end; ++i) function(i, element_bytes == 0 ? nullptr : copy.data());
    });
  }

 private:
  ChannelShape shape_;
  int64_t channels_, rows_, inner_;  // of one slab
  int64_t channel_slabs_, row_slabs_, inner_slabs_;
};

}  // namespace gradkernels::cpu
