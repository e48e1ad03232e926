// A tensor's memory format as the kernels that walk by channel see it.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/shape.h"

namespace gradkernels {

// Of x.contiguous(format), for x of at least two dimensions; symbolic where x's sizes are.
struct Layout {
  at::MemoryFormat format;
  c10::SymInt rows, channels, inner;

  explicit Layout(const at::Tensor& x) : format(x.suggest_memory_format()), channels(x.sym_size(1)) {
    if (format == at::MemoryFormat::Contiguous) {
      rows = x.sym_size(0);
      inner = 1;
      for (int64_t d = 2; d < x.dim(); ++d) inner *= x.sym_size(d);
    } else {
      rows = x.sym_numel() / channels;
      inner = 1;
    }
  }
  ChannelShape shape() const { return {rows.expect_int(), channels.expect_int(), inner.expect_int()}; }
};

}  // namespace gradkernels
