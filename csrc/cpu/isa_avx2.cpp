// The kernels for processors with AVX2, FMA and F16C. The pragma has to apply up to the end of the file,
// where templates are instantiated.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
namespace gradkernels::cpu {
namespace {
constexpr int kRegisterBytes = 32;
}
}  // namespace gradkernels::cpu

#include "cpu/kernels_table.h"

namespace gradkernels::cpu {
constexpr Kernels kernels_avx2 = kernels_named("avx2");
}
#endif
