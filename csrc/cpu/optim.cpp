// RMSprop on the CPU: one pass over all parameters, which are cut into chunks for torch's threads.
#include "ops/optim.h"

#include "cpu/chunks.h"
#include "cpu/kernels.h"

namespace gradkernels::cpu {

void rmsprop(const RmspropRun* runs, int64_t run_count, const math::RmspropOptions& options) {
  const Chunks chunks(run_count, [runs](int64_t r) { return runs[r].count; });
  const auto rmsprop_chunk = kernels().rmsprop;
  chunks.for_each([&](int64_t i) { rmsprop_chunk(runs[chunks[i].tensor], chunks[i].begin, chunks[i].count, options); });
}

}  // namespace gradkernels::cpu
