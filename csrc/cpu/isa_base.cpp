// The kernels for every processor of the architecture. On x86-64 they use SSE2, and only processors without
// AVX2 run them. So GCC compiles them with -O1: 13 % more instructions, in two thirds of the time.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC optimize("O1")
#endif
namespace gradkernels::cpu {
namespace {
constexpr int kRegisterBytes = 16;
}
}  // namespace gradkernels::cpu

#include "cpu/kernels_table.h"

namespace gradkernels::cpu {
constexpr Kernels kernels_base = kernels_named("base");
}
