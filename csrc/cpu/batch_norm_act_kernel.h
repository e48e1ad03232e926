// The SIMD loops of batch_norm_act, over two kinds of lines. Long runs: a line is one channel's run of `inner` elements, and what belongs
// to the channel stays in registers. Short runs, and channels_last with its runs of one: a line is a row across the channels of the slab,
// and what belongs to a channel is spread out to one value a column. Both bring the same types, so that what happens to an element is
// written once.
//
// The moments of a tile are taken in two passes, the mean first, while the tile lies in cache. Sums that may cancel, those of x - mean, of
// dz and of dz (x - mean), are float64. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "math/activation.h"
#include "math/batch_norm_act.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

// ---- Lines and tiles
// -----------------------------------------------------------------------------------------------------------------------

// Elements [begin, end) from offset + row * row_stride on, for each row; of long runs those of one channel, of short runs those of several.
struct Lines {
  int64_t channel_begin, channel_end;
  int64_t inner;
  int64_t row_begin, row_end;
  int64_t begin, end;
  int64_t offset, row_stride;
  int64_t mask_offset, mask_row_stride;  // bytes

  GK_INLINE int64_t channels() const { return channel_end - channel_begin; }
  GK_INLINE int64_t elements_per_channel() const { return (row_end - row_begin) * (end - begin) / channels(); }
};

// Calls tile(part) for tiles of at most `rows` rows and `width` elements of a row.
template <typename Function>
GK_INLINE void for_each_tile(const Lines& lines, int64_t rows, int64_t width, const Function& tile) {
  for (int64_t row = lines.row_begin; row < lines.row_end; row += rows) {
    for (int64_t begin = lines.begin; begin < lines.end; begin += width) {
      Lines part = lines;
      part.row_begin = row;
      part.row_end = row + rows < lines.row_end ? row + rows : lines.row_end;
      part.begin = begin;
      part.end = begin + width < lines.end ? begin + width : lines.end;
      tile(part);
    }
  }
}

// Where a vector stands: its first element in the operand and in the mask's bytes, and its column in the line; and whether the output's
// line is to be written past the caches.
struct Position {
  int64_t element;
  int64_t mask_byte;
  int64_t column;
  bool past_caches;
};

// Calls function(position, lanes) for each vector of the lines. With an output, its lines that begin at a register's alignment are written
// past the caches.
template <typename scalar_t, typename Function>
GK_INLINE void for_each_position(const Lines& lines, const scalar_t* streamed_output, const Function& function) {
  for (int64_t row = lines.row_begin; row < lines.row_end; ++row) {
    const int64_t element = lines.offset + row * lines.row_stride;
    const int64_t mask_byte = lines.mask_offset + row * lines.mask_row_stride;
    const bool past_caches =
        streamed_output != nullptr && reinterpret_cast<uintptr_t>(streamed_output + element + lines.begin) % kRegisterBytes == 0;
    for_each_vector<scalar_t>(lines.begin, lines.end, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
      function(Position{element + i, mask_byte + i / 8, i, past_caches}, lanes);
    });
  }
  if (streamed_output != nullptr) stream_fence();
}

template <typename scalar_t, typename Function>
GK_INLINE void for_each_position(const Lines& lines, const Function& function) {
  for_each_position<scalar_t>(lines, static_cast<const scalar_t*>(nullptr), function);
}

// The output where it is to be written past the caches, for being too large for the next reader to find it there; else null.
// bench/bench_batch_norm_act.py decides about the size.
template <typename scalar_t>
GK_INLINE const scalar_t* streamed(const BatchNormShape& shape, const scalar_t* output) {
  constexpr int64_t kStreamedBytes = 16 * 1024 * 1024;
  return shape.rows * shape.channels * shape.inner * static_cast<int64_t>(sizeof(scalar_t)) >= kStreamedBytes ? output : nullptr;
}

// Adds to float64 sums. Float64 terms leave their rounding errors in the second sum; of float32 terms, that of the additions is nothing.
template <typename scalar_t>
GK_INLINE void add_term(math::Sum<Vec<double>>& sum, Vec<double> x) {
  if constexpr (sizeof(scalar_t) == sizeof(double)) {
    math::add(sum, x);
  } else {
    sum.high = sum.high + x;
  }
}
template <typename scalar_t>
GK_INLINE void add_product(math::Sum<Vec<double>>& sum, Vec<double> a, Vec<double> b) {
  if constexpr (sizeof(scalar_t) == sizeof(double)) {
    const Vec<double> product = a * b;
    math::add(sum, product);
    sum.low = sum.low + fma(a, b, -product);
  } else {
    sum.high = fma(a, b, sum.high);
  }
}

// Vectors of eight doubles that a vector of scalar_t widens to, and a loop over them with a constant index, which keeps arrays of them in
// registers.
template <typename scalar_t>
constexpr int kParts = Vec<scalar_t>::kLanes / Vec<double>::kLanes;

template <int I>
struct Part {
  static constexpr int kIndex = I;
};

template <typename scalar_t, typename Function>
GK_INLINE void for_each_part(const Function& function) {
  function(Part<0>());
  if constexpr (kParts<scalar_t> == 2) function(Part<1>());
}

// ---- Long runs
// -----------------------------------------------------------------------------------------------------------------------------

struct LongRuns {
  // Calls function(lines) for each channel of the slab.
  template <typename Function>
  static GK_INLINE void for_each_lines(const BatchNormShape& shape, Slab s, const Function& function) {
    const int64_t line_bytes = (shape.inner + 7) / 8;
    for (int64_t channel = s.channel_begin; channel < s.channel_end; ++channel) {
      function(Lines{channel, channel + 1, shape.inner, s.row_begin, s.row_end, s.inner_begin, s.inner_end, channel * shape.inner,
                     shape.channels * shape.inner, channel * line_bytes, shape.channels * line_bytes});
    }
  }

  // C<scalar_t> of the channel, at every column.
  template <template <typename> class C, typename scalar_t>
  class Coefficients {
   public:
    template <typename OfChannel>
    GK_INLINE Coefficients(const Lines& lines, const OfChannel& of_channel)
        : value_(
              of_channel(lines.channel_begin).template map<Vec<scalar_t>>([](scalar_t x) GK_INLINE_LAMBDA { return Vec<scalar_t>(x); })) {}
    GK_INLINE const C<Vec<scalar_t>>& at(int64_t) const { return value_; }

   private:
    C<Vec<scalar_t>> value_;
  };

  // A float64 value of the channel.
  class Doubles {
   public:
    GK_INLINE Doubles(const Lines& lines, const double* of_channel) : value_(of_channel[lines.channel_begin]) {}
    GK_INLINE Vec<double> at(int64_t, int) const { return value_; }

   private:
    Vec<double> value_;
  };

  template <typename scalar_t>
  class Sums {
   public:
    explicit GK_INLINE Sums(const Lines&) {
      for_each_part<scalar_t>([&](auto part) GK_INLINE_LAMBDA { sum_[part.kIndex] = {Vec<double>(0.0), Vec<double>(0.0)}; });
    }
    template <int I>
    GK_INLINE void add(int64_t, Part<I>, Vec<double> x) {
      add_term<scalar_t>(sum_[I], x);
    }
    template <int I>
    GK_INLINE void add_product(int64_t, Part<I>, Vec<double> a, Vec<double> b) {
      cpu::add_product<scalar_t>(sum_[I], a, b);
    }
    GK_INLINE double of_channel(const Lines&, int64_t) const {
      double high = 0.0, low = 0.0;
      for_each_part<scalar_t>([&](auto part) GK_INLINE_LAMBDA {
        high += sum_of_lanes(sum_[part.kIndex].high);
        low += sum_of_lanes(sum_[part.kIndex].low);
      });
      return high + low;
    }

   private:
    math::Sum<Vec<double>> sum_[kParts<scalar_t>];
  };
};

// ---- Short runs
// ----------------------------------------------------------------------------------------------------------------------------

// A value a column; a lane past the last column holds anything.
template <typename T>
struct Columns {
  alignas(64) T value[kMaxColumns];

  Columns() = default;
  explicit GK_INLINE Columns(const Lines& lines) {
    for (int64_t i = 0; i < lines.end; i += Vec<T>::kLanes) store(i, Vec<T>(T(0)));
  }
  GK_INLINE Vec<T> load(int64_t column) const { return Vec<T>::load(value + column); }
  GK_INLINE void store(int64_t column, Vec<T> x) { x.store(value + column); }
};

struct ShortRuns {
  // Calls function(lines) for the slab.
  template <typename Function>
  static GK_INLINE void for_each_lines(const BatchNormShape& shape, Slab s, const Function& function) {
    const int64_t columns = shape.channels * shape.inner;
    const int64_t first = s.channel_begin * shape.inner;
    // `first` is a multiple of 8 (the driver sees to it), so that no two slabs share a byte of the mask.
    function(Lines{s.channel_begin, s.channel_end, shape.inner, s.row_begin, s.row_end, 0, (s.channel_end - s.channel_begin) * shape.inner,
                   first, columns, first / 8, (columns + 7) / 8});
  }

  template <template <typename> class C, typename scalar_t>
  class Coefficients {
   public:
    template <typename OfChannel>
    GK_INLINE Coefficients(const Lines& lines, const OfChannel& of_channel) {
      int64_t column = 0;
      for (int64_t channel = lines.channel_begin; channel < lines.channel_end; ++channel) {
        const C<scalar_t> coefficients = of_channel(channel);
        for (const int64_t end = column + lines.inner; column < end; ++column) {
          int member = 0;
          coefficients.template map<int>([&](scalar_t x) GK_INLINE_LAMBDA {
            member_[member].value[column] = x;
            return member++;
          });
        }
      }
    }
    GK_INLINE C<Vec<scalar_t>> at(int64_t column) const {
      int member = 0;
      return C<scalar_t>().template map<Vec<scalar_t>>([&](scalar_t) GK_INLINE_LAMBDA { return member_[member++].load(column); });
    }

   private:
    Columns<scalar_t> member_[sizeof(C<scalar_t>) / sizeof(scalar_t)];
  };

  class Doubles {
   public:
    GK_INLINE Doubles(const Lines& lines, const double* of_channel) {
      int64_t column = 0;
      for (int64_t channel = lines.channel_begin; channel < lines.channel_end; ++channel) {
        for (const int64_t end = column + lines.inner; column < end; ++column) value_.value[column] = of_channel[channel];
      }
    }
    GK_INLINE Vec<double> at(int64_t column, int part) const { return value_.load(column + part * Vec<double>::kLanes); }

   private:
    Columns<double> value_;
  };

  template <typename scalar_t>
  class Sums {
   public:
    explicit GK_INLINE Sums(const Lines& lines) : high_(lines), low_(lines) {}
    template <int I>
    GK_INLINE void add(int64_t column, Part<I>, Vec<double> x) {
      update(column + I * Vec<double>::kLanes, [&](math::Sum<Vec<double>>& sum) GK_INLINE_LAMBDA { add_term<scalar_t>(sum, x); });
    }
    template <int I>
    GK_INLINE void add_product(int64_t column, Part<I>, Vec<double> a, Vec<double> b) {
      update(column + I * Vec<double>::kLanes,
             [&](math::Sum<Vec<double>>& sum) GK_INLINE_LAMBDA { cpu::add_product<scalar_t>(sum, a, b); });
    }
    GK_INLINE Vec<double> of_columns(int64_t column) const { return high_.load(column) + low_.load(column); }
    GK_INLINE double of_channel(const Lines& lines, int64_t c) const {
      math::Sum<double> sum{0.0, 0.0};
      for (int64_t i = c * lines.inner; i < (c + 1) * lines.inner; ++i) {
        math::add(sum, high_.value[i]);
        sum.low += low_.value[i];
      }
      return sum.high + sum.low;
    }

   private:
    template <typename Change>
    GK_INLINE void update(int64_t column, const Change& change) {
      if constexpr (sizeof(scalar_t) == sizeof(double)) {
        math::Sum<Vec<double>> sum{high_.load(column), low_.load(column)};
        change(sum);
        high_.store(column, sum.high);
        low_.store(column, sum.low);
      } else {
        math::Sum<Vec<double>> sum{high_.load(column), Vec<double>(0.0)};
        change(sum);
        high_.store(column, sum.high);
      }
    }

    Columns<double> high_, low_;
  };
};

// Calls function(Runs()) with the kind of lines that the shape has.
template <typename Function>
GK_INLINE void visit_runs(const BatchNormShape& shape, const Function& function) {
  if (shape.inner >= kShortRunElements) {
    function(LongRuns());
  } else {
    function(ShortRuns());
  }
}

// ---- Statistics
// ----------------------------------------------------------------------------------------------------------------------------

// Sums of (x - about) and of its square over a tile of one channel.
struct DifferenceSums {
  double differences;
  double squares;
};

// Float64, with the rounding errors kept.
GK_INLINE DifferenceSums sum_differences(const double* x, const Lines& tile, double about) {
  using V = Vec<double>;
  LongRuns::Sums<double> differences(tile), squares(tile);
  for_each_position<double>(tile, [&](Position at, auto lanes) GK_INLINE_LAMBDA {
    const V difference = load(x + at.element, lanes, V(about)) - V(about);
    differences.add(0, Part<0>(), difference);
    squares.add_product(0, Part<0>(), difference, difference);
  });
  return {differences.of_channel(tile, 0), squares.of_channel(tile, 0)};
}

// Float32: eight differences, and eight squares, meet in float32 before they enter a float64 sum.
GK_INLINE DifferenceSums sum_differences(const float* x, const Lines& tile, float about) {
  using V = Vec<float>;
  constexpr int64_t kStep = 8 * V::kLanes;
  LongRuns::Sums<float> differences(tile), squares(tile);
  const auto take = [&](V difference, V square) GK_INLINE_LAMBDA {
    for_each_part<float>([&](auto part) GK_INLINE_LAMBDA {
      differences.add(0, part, widen(difference, part.kIndex));
      squares.add(0, part, widen(square, part.kIndex));
    });
  };
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    const float* run = x + tile.offset + row * tile.row_stride;
    int64_t i = tile.begin;
    for (; i + kStep <= tile.end; i += kStep) {
      V difference[4], square[4];
      for (int k = 0; k < 4; ++k) {
        const V a = V::load(run + i + k * V::kLanes) - V(about);
        const V b = V::load(run + i + (k + 4) * V::kLanes) - V(about);
        difference[k] = a + b;
        square[k] = fma(b, b, a * a);
      }
      take((difference[0] + difference[1]) + (difference[2] + difference[3]), (square[0] + square[1]) + (square[2] + square[3]));
    }
    for_each_vector<float>(i, tile.end, [&](int64_t j, auto lanes) GK_INLINE_LAMBDA {
      const V difference = load(run + j, lanes, V(about)) - V(about);
      take(difference, difference * difference);
    });
  }
  return {differences.of_channel(tile, 0), squares.of_channel(tile, 0)};
}

// About the mean of a tile: near enough for differences from it not to cancel.
template <typename scalar_t>
GK_INLINE scalar_t approximate_mean(const scalar_t* x, const Lines& tile, double count) {
  using V = Vec<scalar_t>;
  constexpr int64_t kStep = 4 * V::kLanes;
  V sum[4] = {V(scalar_t(0)), V(scalar_t(0)), V(scalar_t(0)), V(scalar_t(0))};
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    const scalar_t* run = x + tile.offset + row * tile.row_stride;
    int64_t i = tile.begin;
    for (; i + kStep <= tile.end; i += kStep) {
      for (int k = 0; k < 4; ++k) sum[k] = sum[k] + V::load(run + i + k * V::kLanes);
    }
    for_each_vector<scalar_t>(i, tile.end, [&](int64_t j, auto lanes) GK_INLINE_LAMBDA { sum[0] = sum[0] + load(run + j, lanes); });
  }
  return static_cast<scalar_t>(sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / count);
}

template <typename scalar_t>
math::Moments<double> long_run_moments(const scalar_t* x, const Lines& lines) {
  // 16 KiB of float32 or 32 of float64: the second pass finds them in the first-level cache.
  constexpr int64_t kTileElements = 4096;
  const int64_t width = lines.end - lines.begin < kTileElements ? lines.end - lines.begin : kTileElements;
  math::Moments<double> moments{0.0, 0.0, 0.0};
  for_each_tile(lines, kTileElements / width, width, [&](const Lines& tile) GK_INLINE_LAMBDA {
    const double count = static_cast<double>(tile.elements_per_channel());
    const scalar_t about = approximate_mean(x, tile, count);
    const DifferenceSums sums = sum_differences(x, tile, about);
    moments = math::merge(moments, math::moments_about(static_cast<double>(about), count, sums.differences, sums.squares));
  });
  return moments;
}

// Each column by itself; the columns of a channel meet at the end.
template <typename scalar_t>
void short_run_moments(const scalar_t* x, const Lines& lines, math::Moments<double>* out) {
  using V = Vec<scalar_t>;
  using D = Vec<double>;
  Columns<double> means(lines), m2s(lines);
  double rows_before = 0.0;
  // Enough rows to make a merge cheap (and in float64, rare, since each one rounds), few enough to stay in the second-level cache.
  for_each_tile(lines, sizeof(scalar_t) == sizeof(double) ? 128 : 32, lines.end, [&](const Lines& tile) GK_INLINE_LAMBDA {
    const double rows = static_cast<double>(tile.row_end - tile.row_begin);
    Columns<scalar_t> about(tile);
    for_each_position<scalar_t>(tile, [&](Position at, auto lanes) GK_INLINE_LAMBDA {
      about.store(at.column, about.load(at.column) + load(x + at.element, lanes));
    });
    for (int64_t i = 0; i < lines.end; i += V::kLanes) about.store(i, about.load(i) / V(static_cast<scalar_t>(rows)));
    ShortRuns::Sums<scalar_t> differences(tile), squares(tile);
    for_each_position<scalar_t>(tile, [&](Position at, auto lanes) GK_INLINE_LAMBDA {
      const V difference = load(x + at.element, lanes, about.load(at.column)) - about.load(at.column);
      for_each_part<scalar_t>([&](auto part) GK_INLINE_LAMBDA {
        const D difference_part = widen(difference, part.kIndex);
        differences.add(at.column, part, difference_part);
        squares.add_product(at.column, part, difference_part, difference_part);
      });
    });
    for (int64_t i = 0; i < lines.end; i += D::kLanes) {
      const auto merged =
          math::merge(math::Moments<D>{D(rows_before), means.load(i), m2s.load(i)},
                      math::moments_about(load_double(about.value + i), D(rows), differences.of_columns(i), squares.of_columns(i)));
      means.store(i, merged.mean);
      m2s.store(i, merged.m2);
    }
    rows_before += rows;
  });
  for (int64_t c = 0; c < lines.channels(); ++c) {
    out[c] = {0.0, 0.0, 0.0};
    for (int64_t i = c * lines.inner; i < (c + 1) * lines.inner; ++i) {
      out[c] = math::merge(out[c], math::Moments<double>{rows_before, means.value[i], m2s.value[i]});
    }
  }
}

void batch_norm_moments_kernel(const BatchNormForward& p, Slab slab, math::Moments<double>* out) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* x = static_cast<const scalar_t*>(p.x);
    if (p.shape.inner >= kShortRunElements) {
      LongRuns::for_each_lines(p.shape, slab,
                               [&](const Lines& lines) { out[lines.channel_begin - slab.channel_begin] = long_run_moments(x, lines); });
    } else {
      ShortRuns::for_each_lines(p.shape, slab, [&](const Lines& lines) { short_run_moments(x, lines, out); });
    }
  });
}

// ---- Forward
// -------------------------------------------------------------------------------------------------------------------------------

template <typename scalar_t>
GK_INLINE double channel_value(const void* values, int64_t channel, double otherwise) {
  return values == nullptr ? otherwise : static_cast<double>(static_cast<const scalar_t*>(values)[channel]);
}

// Problem is BatchNormForward or BatchNormBackward: both passes see the same normalisation.
template <typename scalar_t, typename Problem>
GK_INLINE math::Normalisation<scalar_t> channel_normalisation(const Problem& p, int64_t channel) {
  return math::normalisation<scalar_t>(p.mean[channel], p.invstd[channel], channel_value<scalar_t>(p.weight, channel, 1.0),
                                       channel_value<scalar_t>(p.bias, channel, 0.0));
}

void batch_norm_normalise_kernel(const BatchNormForward& p, Slab slab) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using V = Vec<scalar_t>;
    const scalar_t* x = static_cast<const scalar_t*>(p.x);
    const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
    scalar_t* y = static_cast<scalar_t*>(p.y);
    visit_runs(p.shape, [&](auto runs) {
      using Runs = decltype(runs);
      const auto for_each_vector_of_slab = [&](const auto& function) GK_INLINE_LAMBDA {
        Runs::for_each_lines(p.shape, slab, [&](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<math::Normalisation, scalar_t> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA { return channel_normalisation<scalar_t>(p, channel); });
          for_each_position<scalar_t>(lines, streamed(p.shape, y), [&](Position at, auto lanes) GK_INLINE_LAMBDA {
            function(coefficients.at(at.column)(load(x + at.element, lanes)), at, lanes);
          });
        });
      };
      if (p.mask != nullptr) {
        math::visit_two_slopes<V>(p.act, [&](auto f) {
          for_each_vector_of_slab([&](V u, Position at, auto lanes) GK_INLINE_LAMBDA {
            u = u + load(residual + at.element, lanes);
            store_bits<scalar_t>(p.mask + at.mask_byte, lanes, f.passes(u));
            store(y + at.element, lanes, f.forward(u), at.past_caches);
          });
        });
      } else {
        math::visit<V>(p.act, [&](auto f) {
          for_each_vector_of_slab([&](V u, Position at, auto lanes) GK_INLINE_LAMBDA {
            if (residual != nullptr) u = u + load(residual + at.element, lanes);
            store(y + at.element, lanes, f.forward(u), at.past_caches);
          });
        });
      }
    });
  });
}

// ---- Backward
// ------------------------------------------------------------------------------------------------------------------------------

// Calls function(dz), where dz(normalise, x, at, lanes) is the gradient at the output of the normalisation.
template <typename scalar_t, typename Function>
GK_INLINE void visit_gradient(const BatchNormBackward& p, const Function& function) {
  using V = Vec<scalar_t>;
  const scalar_t* grad_y = static_cast<const scalar_t*>(p.grad_y);
  const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
  if (p.mask != nullptr) {
    const uint8_t* mask = p.mask;
    math::visit_two_slopes<V>(p.act, [&](auto f) {
      function([=](const auto&, V, Position at, auto lanes) GK_INLINE_LAMBDA {
        return f.backward_from_mask(load(grad_y + at.element, lanes), load_bits<scalar_t>(mask + at.mask_byte, lanes));
      });
    });
  } else {
    math::visit<V>(p.act, [&](auto f) {
      function([=](const auto& normalise, V x, Position at, auto lanes) GK_INLINE_LAMBDA {
        V u = normalise(x);
        if (residual != nullptr) u = u + load(residual + at.element, lanes);
        return f.backward(load(grad_y + at.element, lanes), u);
      });
    });
  }
}

void batch_norm_gradient_sums_kernel(const BatchNormBackward& p, Slab slab, math::GradientSums* out) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* x_data = static_cast<const scalar_t*>(p.x);
    scalar_t* grad_residual = static_cast<scalar_t*>(p.grad_residual);
    visit_runs(p.shape, [&](auto runs) {
      using Runs = decltype(runs);
      visit_gradient<scalar_t>(p, [&](auto dz_of) {
        Runs::for_each_lines(p.shape, slab, [&](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<math::Normalisation, scalar_t> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA { return channel_normalisation<scalar_t>(p, channel); });
          const typename Runs::Doubles mean(lines, p.mean);
          typename Runs::template Sums<scalar_t> dz_sum(lines), dz_x_sum(lines);
          for_each_position<scalar_t>(lines, [&](Position at, auto lanes) GK_INLINE_LAMBDA {
            const Vec<scalar_t> x = load(x_data + at.element, lanes);
            const Vec<scalar_t> dz = dz_of(coefficients.at(at.column), x, at, lanes);
            if (grad_residual != nullptr) store(grad_residual + at.element, lanes, dz);
            for_each_part<scalar_t>([&](auto part) GK_INLINE_LAMBDA {
              const Vec<double> dz_part = widen(dz, part.kIndex);
              dz_sum.add(at.column, part, dz_part);
              dz_x_sum.add_product(at.column, part, dz_part, widen(x, part.kIndex) - mean.at(at.column, part.kIndex));
            });
          });
          for (int64_t c = 0; c < lines.channels(); ++c) {
            out[lines.channel_begin + c - slab.channel_begin] = {dz_sum.of_channel(lines, c), dz_x_sum.of_channel(lines, c)};
          }
        });
      });
    });
  });
}

template <typename T>
struct GradientCoefficients {
  math::Normalisation<T> normalise;
  math::InputGradient<T> input;

  template <typename U, typename Function>
  GK_INLINE GradientCoefficients<U> map(const Function& function) const {
    return {normalise.template map<U>(function), input.template map<U>(function)};
  }
};

void batch_norm_gradient_input_kernel(const BatchNormBackward& p, Slab slab, const math::GradientSums* sums) {
  BatchNormBackward source = p;
  if (p.grad_residual != nullptr) {
    // dz is already there: the first pass has left it.
    source.grad_y = p.grad_residual;
    source.act.kind = math::ActivationKind::kIdentity;
    source.mask = nullptr;
    source.residual = nullptr;
  }
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using V = Vec<scalar_t>;
    const scalar_t* x_data = static_cast<const scalar_t*>(p.x);
    scalar_t* grad_x = static_cast<scalar_t*>(p.grad_x);
    const double count = static_cast<double>(p.shape.rows * p.shape.inner);
    const bool training = p.training;
    visit_runs(p.shape, [&](auto runs) {
      using Runs = decltype(runs);
      visit_gradient<scalar_t>(source, [&](auto dz_of) {
        Runs::for_each_lines(p.shape, slab, [&](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<GradientCoefficients, scalar_t> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA {
                return GradientCoefficients<scalar_t>{
                    channel_normalisation<scalar_t>(p, channel),
                    math::input_gradient<scalar_t>(p.mean[channel], p.invstd[channel], channel_value<scalar_t>(p.weight, channel, 1.0),
                                                   count, sums[channel])};
              });
          for_each_position<scalar_t>(lines, streamed(p.shape, grad_x), [&](Position at, auto lanes) GK_INLINE_LAMBDA {
            const auto& c = coefficients.at(at.column);
            const V x = load(x_data + at.element, lanes);
            const V dz = dz_of(c.normalise, x, at, lanes);
            store(grad_x + at.element, lanes, training ? c.input.training(dz, x) : c.input.evaluation(dz), at.past_caches);
          });
        });
      });
    });
  });
}

}  // namespace
}  // namespace gradkernels::cpu
