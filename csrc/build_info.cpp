// Compiled again after every commit, as device.cpp is with CUDA, and nothing else: module.cpp takes half a
// minute. build_stamp.h is written by setup.py.
#include "build_info.h"

#include "build_stamp.h"

namespace gradkernels {
namespace {

// gradkernels/_native.py looks for these bytes in the file before it loads the file: loading a library that
// was built for another torch can end the process.
__attribute__((used)) constexpr char kStamp[] = "gradkernels-built-for-torch=" GK_BUILT_FOR_TORCH;

}  // namespace

const BuildInfo& build_info() {
#if defined(__clang__)
  static constexpr const char* kCompiler = "clang " __clang_version__;
#else
  static constexpr const char* kCompiler = "g++ " __VERSION__;
#endif
  static constexpr BuildInfo kBuildInfo = {GK_BUILT_FOR_TORCH, GK_COMMIT, GK_CUDA_ARCHITECTURES, kCompiler};
  return kBuildInfo;
}

}  // namespace gradkernels
