// The memory format and the ChannelShape of a tensor, for kernels that walk it by channel.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/shape.h"

namespace gradkernels {

// They describe x.contiguous(format). x must have at least two dimensions. Sizes are symbolic if those of x
// are.
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
