// The schema and the operators below autograd, compiled as one file: reading torch's headers takes longer than
// compiling what includes them. Each file is complete, and knows nothing of the files before it.
#include "ops/activation.cpp"
#include "ops/batch_norm_act.cpp"
#include "ops/clip_grad.cpp"
#include "ops/group_norm_act.cpp"
#include "ops/optim.cpp"
#include "ops/sync_batch_norm_act.cpp"
#include "schema.cpp"
