// A list of tensors as work for threads: each is cut into chunks, and neighbouring chunks make up tasks of about the same size, so that a
// list of a few large tensors and one of thousands of tiny ones are both spread evenly. How it is cut depends on the counts alone.
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
  // count_of(i): the elements of tensor i.
  template <typename CountOf>
  Chunks(int64_t tensor_count, const CountOf& count_of) {
    chunks_.reserve(tensor_count);
    int64_t task_elements = kTaskElements;
    for (int64_t tensor = 0; tensor < tensor_count; ++tensor) {
      const int64_t elements = count_of(tensor);
      for (int64_t begin = 0; begin < elements; begin += kChunkElements) {
        const int64_t count = elements - begin < kChunkElements ? elements - begin : kChunkElements;
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

  // function(i) for every chunk, a thread's own in order.
  template <typename Function>
  void for_each(const Function& function) const {
    parallel_for_ranges(tasks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = first_of_task_[begin]; i < first_of_task_[end]; ++i) function(i);
    });
  }

  // Last first, on the same threads: what a thread has read last is still in its caches.
  template <typename Function>
  void for_each_reversed(const Function& function) const {
    parallel_for_ranges(tasks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = first_of_task_[end]; i-- > first_of_task_[begin];) function(i);
    });
  }

 private:
  // Large enough that what a chunk costs by itself does not count, and that a task is worth a thread's start: some ten microseconds.
  static constexpr int64_t kChunkElements = 65536;
  static constexpr int64_t kTaskElements = 65536;
  // What a chunk costs by itself, in elements.
  static constexpr int64_t kChunkCostElements = 256;

  int64_t tasks() const { return static_cast<int64_t>(first_of_task_.size()) - 1; }

  std::vector<Chunk> chunks_;
  std::vector<int64_t> first_of_task_;
};

}  // namespace gradkernels::cpu
