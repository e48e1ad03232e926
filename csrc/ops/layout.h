// The memory format and the ChannelShape of a tensor, for kernels that walk it by channel.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/shape.h"

namespace gradkernels {

// They describe x.contiguous(format). x must have at least two dimensions. Sizes are symbolic if those of x
// are.
struct Layout {
  at::MemoryFormat format;
  c10::SymInt rows, channels, inner;
  // In group norm, the rows are those of one sample, and neighbouring channels have common statistics.
  c10::SymInt samples = 1, set_channels = 1;

  explicit Layout(const at::Tensor& x, std::optional<int64_t> num_groups = {})
      : format(x.suggest_memory_format()), channels(x.sym_size(1)) {
    if (format == at::MemoryFormat::Contiguous) {
      rows = x.sym_size(0);
      inner = 1;
      for (int64_t d = 2; d < x.dim(); ++d) inner *= x.sym_size(d);
    } else {
      rows = x.sym_numel() / channels;
      inner = 1;
    }
    if (num_groups.has_value()) {
      samples = x.sym_size(0);
      rows = rows / samples;
      set_channels = channels / *num_groups;
    }
  }
  ChannelShape shape() const { return {rows.expect_int(), channels.expect_int(), inner.expect_int(), samples.expect_int()}; }
  // How many means there are.
  c10::SymInt sets() const { return samples * (channels / set_channels); }
};

}  // namespace gradkernels
