// How a library was built, for the report of `python -m gradkernels info`.
#pragma once

namespace gradkernels {

struct BuildInfo {
  const char* torch;
  const char* commit;
  const char* cuda_architectures;  // separated by spaces
  const char* compiler;
};

const BuildInfo& build_info();

}  // namespace gradkernels
