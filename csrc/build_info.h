// How the library was built, for the report of module.cpp.
#pragma once

namespace gradkernels {

struct BuildInfo {
  const char* torch;
  const char* commit;
  const char* cuda_architectures;  // separated by spaces
};

const BuildInfo& build_info();

}  // namespace gradkernels
