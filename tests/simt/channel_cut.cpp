// The cut of csrc/cuda/channel_cut.h for ctypes.
#include "cuda/channel_cut.h"

#include <iterator>

using namespace gradkernels;

// How a pass that reads `operands` tensors, and merges sums or does not, is run on a GPU of `processors` SMs, as `Plan` of
// tests/channel_cut.py.
extern "C" void plan_of(int64_t rows, int64_t channels, int64_t inner, int64_t samples, int element_bytes, int alignment, int operands,
                        int residual, int masked, int sums, int processors, int64_t* plan) {
  const ChannelShape shape{rows, channels, inner, samples};
  const bool columns = inner < kShortRunElements;
  const int width = cuda::width_of(shape, element_bytes, alignment);
  const cuda::Pass pass = sums ? cuda::Pass::kSums : cuda::Pass::kResults;
  const cuda::ChannelCut cut = cuda::cut_for(shape, element_bytes, width, operands, residual != 0, masked != 0, pass, processors);
  const int64_t values[] = {width,
                            cuda::blocks_of_processor(element_bytes, width, columns, residual != 0),
                            cuda::threads_of(width, columns),
                            cut.block_threads,
                            cut.threads,
                            cuda::packets_in_flight(element_bytes, width, operands + residual),
                            cut.slabs,
                            cut.sample_slabs,
                            cut.group_channels,
                            cut.parts,
                            cut.lanes,
                            cut.line_packets,
                            cut.packets};
  std::copy(std::begin(values), std::end(values), plan);
}

extern "C" int can_cut(int64_t rows, int64_t channels, int64_t inner, int64_t samples, int masked) {
  return cuda::can_cut({rows, channels, inner, samples}, masked != 0);
}
