// The kernels for processors with AVX-512 F, BW, DQ and VL. The pragma has to apply up to the end of the
// file, where templates are instantiated.
#if defined(__x86_64__)
// Intrinsics read vectors that their header leaves undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace gradkernels::cpu {
namespace {
constexpr int kRegisterBytes = 64;
}
}  // namespace gradkernels::cpu

#include "cpu/kernels_table.h"

namespace gradkernels::cpu {
constexpr Kernels kernels_avx512 = kernels_named("avx512");
}
#endif
