// Threads: torch's own pool, through its C interface. This library then needs no OpenMP of its own (at::parallel_for is a header template
// that runs serially, without a word, where -fopenmp is missing, and a second runtime in the process oversubscribes the cores).
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <new>

namespace gradkernels::cpu {

// function(begin, end) for ranges that make up [0, count), on any threads; a range has at least `grain` where there are so many. The
// function may throw std::bad_alloc alone: of an exception in one of the threads, torch says that there was one.
template <typename Function>
void parallel_for_ranges(int64_t count, int64_t grain, const Function& function) {
  if (count <= grain) {
    function(int64_t{0}, count);
    return;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Function*>(context))(begin, end); };
  if (torch_parallel_for(0, count, grain, run, const_cast<Function*>(&function)) != 0) throw std::bad_alloc();
}

// function(i) for i in [0, count), likewise.
template <typename Function>
void parallel_for(int64_t count, int64_t grain, const Function& function) {
  parallel_for_ranges(count, grain, [&function](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

}  // namespace gradkernels::cpu
