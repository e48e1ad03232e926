// The kernels for every processor of the architecture. On x86-64 they use SSE2.
namespace gradkernels::cpu {
namespace {
constexpr int kRegisterBytes = 16;
}
}  // namespace gradkernels::cpu

#include "cpu/kernels_table.h"

namespace gradkernels::cpu {
constexpr Kernels kernels_base = kernels_named("base");
}
