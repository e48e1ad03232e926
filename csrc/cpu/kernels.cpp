// The instruction sets: their names, and which one this processor runs, chosen once per process.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace gradkernels::cpu {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  // As in torch, an unknown value is ignored: the processor then decides.
  const auto is = [&](const char* name) { return capability != nullptr && std::strcmp(capability, name) == 0; };
  if (!is("default") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 && !is("avx2") ? kernels_avx512 : kernels_avx2;
  }
#endif
  return kernels_base;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* instruction_sets() {
  static const std::string names = [] {
    std::string all = kernels_base.name;
#if defined(__x86_64__)
    for (const Kernels* set : {&kernels_avx2, &kernels_avx512}) all += std::string(" ") + set->name;
#endif
    return all;
  }();
  return names.c_str();
}

}  // namespace gradkernels::cpu
