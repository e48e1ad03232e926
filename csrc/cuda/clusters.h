// Whether clusters can run, for python -m gradkernels info. Without them batch norm takes two passes, with the
// same results.
#pragma once

namespace gradkernels::cuda {

// Whether the current device can run a cluster of `blocks` blocks, each with all of the shared memory that a
// block may have.
bool can_run_cluster(unsigned blocks);

}  // namespace gradkernels::cuda
