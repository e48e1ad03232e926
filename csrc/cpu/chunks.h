// How a list of tensors is shared out among threads. Each tensor is cut into chunks, and neighbouring chunks
// form tasks of about equal size, so that a few large tensors and thousands of tiny ones are both shared out
// evenly. The cut depends only on the sizes of the tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace gradkernels::cpu {

// Elements [begin, begin + count) of a tensor.
struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t count;
};

class Chunks {
 public:
  // Large enough that the overhead of a chunk is negligible and that a task is worth the start of a thread,
  // about ten microseconds.
  static constexpr int64_t kChunkElements = 65536;

  // count_of(i) is the number of elements of tensor i.
  template <typename CountOf>
  Chunks(int64_t tensor_count, const CountOf& count_of) : Chunks(tensor_count, count_of, [](int64_t) { return int64_t{1}; }) {}

  // The same, with chunks of whole units: unit_of(i) is the number of elements of a unit of tensor i, at most
  // kChunkElements.
  template <typename CountOf, typename UnitOf>
  Chunks(int64_t tensor_count, const CountOf& count_of, const UnitOf& unit_of) {
    chunks_.reserve(tensor_count);
    int64_t task_elements = kTaskElements;
    for (int64_t tensor = 0; tensor < tensor_count; ++tensor) {
      const int64_t elements = count_of(tensor);
      if (elements == 0) continue;
      const int64_t chunk_elements = kChunkElements - kChunkElements % unit_of(tensor);
      for (int64_t begin = 0; begin < elements; begin += chunk_elements) {
        const int64_t count = elements - begin < chunk_elements ? elements - begin : chunk_elements;
        if (task_elements + count > kTaskElements) {
          first_of_task_.push_back(size());
          task_elements = 0;
        }
        task_elements += count + kChunkCostElements;
        chunks_.push_back({tensor, begin, count});
      }
    }
    first_of_task_.push_back(size());
  }

  int64_t size() const { return static_cast<int64_t>(chunks_.size()); }
  const Chunk& operator[](int64_t i) const { return chunks_[i]; }

  // Calls function(i) for every chunk. Each thread takes its chunks in order.
  template <typename Function>
  void for_each(const Function& function) const {
    parallel_for_ranges(tasks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = first_of_task_[begin]; i < first_of_task_[end]; ++i) function(i);
    });
  }

  // The same, with the last chunk first. Each thread gets the same chunks as in for_each, and the last ones
  // are still in its caches.
  template <typename Function>
  void for_each_reversed(const Function& function) const {
    parallel_for_ranges(tasks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = first_of_task_[end]; i-- > first_of_task_[begin];) function(i);
    });
  }

 private:
  static constexpr int64_t kTaskElements = 65536;
  // The overhead of a chunk takes as long as this many elements.
  static constexpr int64_t kChunkCostElements = 256;

  int64_t tasks() const { return static_cast<int64_t>(first_of_task_.size()) - 1; }

  std::vector<Chunk> chunks_;
  std::vector<int64_t> first_of_task_;
};

}  // namespace gradkernels::cpu
