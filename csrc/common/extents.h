// Memory that tensors occupy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gradkernels {

// From the first byte of a tensor to the byte after its last.
struct Extent {
  uintptr_t begin;
  uintptr_t end;
};

inline bool disjoint(std::vector<Extent> extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  return std::adjacent_find(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return b.begin < a.end; }) ==
         extents.end();
}

}  // namespace gradkernels
