// Threads: torch's own pool, through its C interface, so that this library does not need OpenMP.
// (at::parallel_for is a header template: without -fopenmp it runs serially and does not say so. A second
// OpenMP runtime in the process would oversubscribe the cores.)
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <new>

namespace gradkernels::cpu {

// Calls function(begin, end) for ranges that together are [0, count), on several threads. A range has at
// least `grain` numbers, if there are that many. The only exception that function may throw is
// std::bad_alloc: torch reports that a thread threw, but not what.
template <typename Function>
void parallel_for_ranges(int64_t count, int64_t grain, const Function& function) {
  if (count <= grain) {
    function(int64_t{0}, count);
    return;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Function*>(context))(begin, end); };
  if (torch_parallel_for(0, count, grain, run, const_cast<Function*>(&function)) != 0) throw std::bad_alloc();
}

// Calls function(i) for i in [0, count), likewise.
template <typename Function>
void parallel_for(int64_t count, int64_t grain, const Function& function) {
  parallel_for_ranges(count, grain, [&function](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

}  // namespace gradkernels::cpu
