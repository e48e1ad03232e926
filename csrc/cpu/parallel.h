// Threads: torch's own pool, through its C interface. This library then needs no OpenMP of its own (at::parallel_for is a header template
// that runs serially, without a word, where -fopenmp is missing, and a second runtime in the process oversubscribes the cores).
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace gradkernels::cpu {

// function(i) for i in [0, count), on any thread; a thread takes runs of at least `grain` of them. The function must not throw.
template <typename Function>
void parallel_for(int64_t count, int64_t grain, const Function& function) {
  if (count <= grain) {
    for (int64_t i = 0; i < count; ++i) function(i);
    return;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Function*>(context))(i);
  };
  torch_parallel_for(0, count, grain, run, const_cast<Function*>(&function));
}

}  // namespace gradkernels::cpu
