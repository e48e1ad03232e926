// How a kernel walks a slab (cpu/slabs.h) of a tensor in which every channel has values of its own, such as a
// mean or a slope. The slab is walked in lines, and there are two kinds of lines.
//
// Long runs (inner >= kShortRunElements): a line is the run of one channel in one row, which is `inner`
// elements. The channel's values stay in registers. The Lines of channel 1:
//
//              channel 0       channel 1       channel 2
//     row 0    . . . . . . .  [x x x x x x x]  . . . . . . .
//     row 1    . . . . . . .  [x x x x x x x]  . . . . . . .
//     row 2    . . . . . . .  [x x x x x x x]  . . . . . . .
//
// Short runs, and channels_last, where a run is one element: a line is the part of a row that lies in the
// slab. The channel of a column is the same in every line, and each column has its own copy of the channel's
// values. The Lines of a slab of channels 0 to 2:
//
//              channel 0   1       2       3       4
//     row 0    [x x x   x x x   x x x]  . . .   . . .
//     row 1    [x x x   x x x   x x x]  . . .   . . .
//     column    0 1 2   3 4 5   6 7 8
//
// LongRuns and ShortRuns have the same members, so that a kernel is written once for both.
#pragma once

#include "cpu/double_vector.h"
#include "cpu/kernels.h"
#include "cpu/load_store.h"
#include "cpu/vector.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

// Lines [row_begin, row_end): elements [begin, end) of each, counted from offset + row * row_stride.
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

// Cuts the lines into tiles of at most `rows` rows and `width` columns, and calls tile(part) for each tile.
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

// Where a vector lies.
struct Position {
  int64_t element;    // its first element in the operand
  int64_t mask_byte;  // its first byte in the mask
  int64_t copied;     // its first element in a copy of the lines without gaps
  int64_t column;     // its first column in the line
  int64_t ahead;      // the element this far ahead is prefetched; 0 for none
  bool past_caches;   // whether the output is written past the caches
};

// The position of column 0 in a row.
GK_INLINE Position position_of_row(const Lines& lines, int64_t row, int64_t ahead) {
  return {lines.offset + row * lines.row_stride,
          lines.mask_offset + row * lines.mask_row_stride,
          (row - lines.row_begin) * lines.end,
          0,
          ahead,
          false};
}

GK_INLINE Position advanced(Position at, int64_t columns) {
  return {at.element + columns, at.mask_byte + columns / 8, at.copied + columns, at.column + columns, at.ahead, at.past_caches};
}

// Fetches into the second-level cache. In the first-level cache, rows that lie a power of two apart evict
// each other before they are read.
GK_INLINE void prefetch(const void* data) { __builtin_prefetch(data, 0, 2); }

// Loads a vector of an operand that is read for the first time, and prefetches the one `ahead`.
template <typename scalar_t, typename Lanes>
GK_INLINE Vec<opmath_t<scalar_t>> load_first(const scalar_t* data, Position at, Lanes lanes) {
  if (at.ahead != 0) prefetch(data + at.element + at.ahead);
  return load(data + at.element, lanes);
}

// Which run is prefetched while another is worked on: the one that begins `elements` later, if the lines go
// on for `rows` more rows.
struct RunAhead {
  int64_t elements;
  int64_t rows;

  GK_INLINE int64_t of_row(const Lines& lines, int64_t row) const { return row + rows < lines.row_end ? elements : 0; }
};

// An output that is written past the caches, because it is too large for the next reader to find it there; or
// null. Vectors may begin at every multiple of `step` elements of a line.
template <typename scalar_t>
struct Streamed {
  const scalar_t* output;
  int64_t step;

  // Whether a vector that begins at this element can be written past the caches. Its address must be a
  // multiple of the bytes that one register fills in memory: kRegisterBytes, or half of them for 16-bit
  // elements.
  GK_INLINE bool begins_at(int64_t element) const { return output != nullptr && bytes_before_alignment(element) == 0; }
  // The first of the columns [begin, end) of a line at which such a vector begins, or end if there is none.
  GK_INLINE int64_t begin(int64_t element_of_line, int64_t begin, int64_t end) const {
    if (output == nullptr) return end;
    const int64_t first = bytes_before_alignment(element_of_line + begin) / static_cast<int64_t>(sizeof(scalar_t));
    return first % step == 0 && begin + first < end ? begin + first : end;
  }

 private:
  GK_INLINE int64_t bytes_before_alignment(int64_t element) const {
    constexpr int64_t kAlignment = sizeof(scalar_t) > 2 ? kRegisterBytes : kRegisterBytes / 2;
    return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(output + element) % kAlignment);
  }
};

// With a mask, vectors begin at whole bytes of the mask.
template <typename scalar_t>
GK_INLINE Streamed<scalar_t> streamed(const ChannelShape& shape, const scalar_t* output, const uint8_t* mask) {
  // Measure with bench/bench_batch_norm_act.py.
  constexpr int64_t kStreamedBytes = 16 * 1024 * 1024;
  const bool large = shape.rows * shape.channels * shape.inner * static_cast<int64_t>(sizeof(scalar_t)) >= kStreamedBytes;
  return {large ? output : nullptr, mask == nullptr ? 1 : 8};
}

// The position of the vector at `column` of the row that begins at `begin`.
template <typename scalar_t>
GK_INLINE Position position(Position begin, Streamed<scalar_t> streamed, int64_t column) {
  Position at = advanced(begin, column);
  at.past_caches = streamed.begins_at(at.element);
  return at;
}

// Calls function(position, lanes) for each vector of the lines, row by row. The operand's elements are
// scalar_t.
template <typename scalar_t, typename Function>
GK_INLINE void for_each_position(const Lines& lines, Streamed<scalar_t> streamed, RunAhead ahead, const Function& function) {
  for (int64_t row = lines.row_begin; row < lines.row_end; ++row) {
    Position begin = position_of_row(lines, row, ahead.of_row(lines, row));
    const int64_t turn = streamed.begin(begin.element, lines.begin, lines.end);
    // Less than a vector lies before the turn. No instruction writes single elements of 16 bits past the
    // caches.
    begin.past_caches = turn < lines.end && sizeof(scalar_t) > 2;
    for (int64_t from = lines.begin, to = turn; from < lines.end; from = to, to = lines.end) {
      for_each_vector<opmath_t<scalar_t>>(from, to, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA { function(advanced(begin, i), lanes); });
      begin.past_caches = true;
    }
  }
}

// ---- Sums. Types are computing types from here on.

// Adds to a float64 sum in each lane. For float64 terms, sum.low collects the rounding errors. Float32 terms
// do not use it: a float64 addition of float32 terms rounds far below their precision.
template <typename opmath>
GK_INLINE void add_term(math::Sum<Vec<double>>& sum, Vec<double> x) {
  if constexpr (sizeof(opmath) == sizeof(double)) {
    math::add(sum, x);
  } else {
    sum.high = sum.high + x;
  }
}
template <typename opmath>
GK_INLINE void add_product(math::Sum<Vec<double>>& sum, Vec<double> a, Vec<double> b) {
  if constexpr (sizeof(opmath) == sizeof(double)) {
    const math::Sum<Vec<double>> product = math::product_of(a, b);
    math::add(sum, product.high);
    sum.low = sum.low + product.low;
  } else {
    sum.high = fma(a, b, sum.high);
  }
}

// A vector of opmath widens to this many vectors of eight doubles.
template <typename opmath>
constexpr int kParts = Vec<opmath>::kLanes / Vec<double>::kLanes;

// The loop over these vectors. Its index is a constant, so that arrays that it indexes stay in registers.
template <int I>
struct Part {
  static constexpr int kIndex = I;
};

template <typename opmath, typename Function>
GK_INLINE void for_each_part(const Function& function) {
  function(Part<0>());
  if constexpr (kParts<opmath> == 2) function(Part<1>());
}

// N float64 sums in each lane.
template <typename opmath, int N>
class Accumulators {
 public:
  GK_INLINE Accumulators() {
    for (int n = 0; n < N; ++n) {
      for_each_part<opmath>([&](auto part) GK_INLINE_LAMBDA { sum_[n][part.kIndex] = {Vec<double>(0.0), Vec<double>(0.0)}; });
    }
  }
  template <int n>
  GK_INLINE void add(Vec<opmath> x) {
    for_each_part<opmath>([&](auto part) GK_INLINE_LAMBDA { add_term<opmath>(sum_[n][part.kIndex], widen(x, part.kIndex)); });
  }
  template <int n>
  GK_INLINE void add_product(Vec<opmath> a, Vec<opmath> b) {
    for_each_part<opmath>(
        [&](auto part) GK_INLINE_LAMBDA { cpu::add_product<opmath>(sum_[n][part.kIndex], widen(a, part.kIndex), widen(b, part.kIndex)); });
  }
  template <int I>
  GK_INLINE const math::Sum<Vec<double>>& sum(int n, Part<I>) const {
    return sum_[n][I];
  }

 private:
  math::Sum<Vec<double>> sum_[N][kParts<opmath>];
};

// This many vectors of float32 terms are added up in float32 before their sum is added to a float64 sum.
constexpr int64_t kTerms = 8;

template <int N>
struct Float32Terms {
  Vec<float> sum[N];

  template <int n>
  GK_INLINE void add(Vec<float> x) {
    sum[n] = sum[n] + x;
  }
  template <int n>
  GK_INLINE void add_product(Vec<float> a, Vec<float> b) {
    sum[n] = fma(a, b, sum[n]);
  }
  GK_INLINE void add_to(Accumulators<float, N>& sums) const {
    static_assert(N <= 2);
    sums.template add<0>(sum[0]);
    if constexpr (N == 2) sums.template add<1>(sum[1]);
  }
};

// Calls function(terms), which adds at most kTerms vectors to `terms`, and adds `terms` to `sums`.
template <typename opmath, int N, typename Function>
GK_INLINE void add_terms(Accumulators<opmath, N>& sums, const Function& function) {
  if constexpr (sizeof(opmath) == sizeof(double)) {
    function(sums);
  } else {
    Float32Terms<N> terms;
    for (int n = 0; n < N; ++n) terms.sum[n] = Vec<float>(0.0f);
    function(terms);
    terms.add_to(sums);
  }
}

// ---- Long runs

struct LongRuns {
  // The processor cannot predict where the next run begins. (It prefetches almost all of a long run by
  // itself.) If a channel's part of the slab is small compared with the second-level cache, the run to
  // prefetch is the next channel's, which is the next to come from memory. (A second pass finds it in the
  // cache.) Otherwise it is the first run of this channel that begins at least kAheadBytes later. Measure the
  // sizes with bench/bench_batch_norm_act.py.
  template <typename scalar_t>
  static GK_INLINE RunAhead run_ahead(const Lines& lines) {
    constexpr int64_t kLongBytes = 16 * 1024, kSmallBytes = 128 * 1024, kAheadBytes = 4096;
    const int64_t bytes = (lines.end - lines.begin) * static_cast<int64_t>(sizeof(scalar_t));
    if (bytes >= kLongBytes) return {0, 0};
    if (bytes * (lines.row_end - lines.row_begin) <= kSmallBytes) return {lines.inner, 0};
    const int64_t rows = (kAheadBytes + bytes - 1) / bytes;
    return {rows * lines.row_stride, rows};
  }

  // Calls function(lines) for each channel of the slab.
  template <typename Function>
  static GK_INLINE void for_each_lines(const ChannelShape& shape, Slab s, const Function& function) {
    const int64_t line_bytes = (shape.inner + 7) / 8;
    for (int64_t channel = s.channel_begin; channel < s.channel_end; ++channel) {
      function(Lines{channel, channel + 1, shape.inner, s.row_begin, s.row_end, s.inner_begin, s.inner_end, channel * shape.inner,
                     shape.channels * shape.inner, channel * line_bytes, shape.channels * line_bytes});
    }
  }

  // Calls function(of_column(column), position, lanes) for each vector of the lines. The operand's elements
  // are scalar_t.
  template <typename scalar_t, typename OfColumn, typename Function>
  static GK_INLINE void for_each(const Lines& lines, Streamed<scalar_t> streamed, const OfColumn& of_column, const Function& function) {
    const auto values = of_column(0);
    for_each_position(lines, streamed, run_ahead<scalar_t>(lines),
                      [&](Position at, auto lanes) GK_INLINE_LAMBDA { function(values, at, lanes); });
    if (streamed.output != nullptr) stream_fence();
  }

  // The channel's C<opmath>, the same at every column.
  template <template <typename> class C, typename opmath>
  class Coefficients {
   public:
    template <typename OfChannel>
    GK_INLINE Coefficients(const Lines& lines, const OfChannel& of_channel)
        : value_(of_channel(lines.channel_begin).template map<Vec<opmath>>([](opmath x) GK_INLINE_LAMBDA { return Vec<opmath>(x); })) {}
    GK_INLINE const C<Vec<opmath>>& at(int64_t) const { return value_; }

   private:
    C<Vec<opmath>> value_;
  };

  // N sums over the elements of the channel.
  template <typename opmath, int N>
  class Sums {
   public:
    explicit GK_INLINE Sums(const Lines&) {}
    explicit GK_INLINE Sums(const Accumulators<opmath, N>& total) : total_(total) {}
    GK_INLINE double of_channel(const Lines&, int64_t, int n) const {
      math::Sum<double> sum{0.0, 0.0};
      for_each_part<opmath>([&](auto part) GK_INLINE_LAMBDA {
        sum.low += sum_of_lanes(total_.sum(n, part).low);
        if constexpr (sizeof(opmath) == sizeof(double)) {
          double lane[Vec<double>::kLanes];
          total_.sum(n, part).high.store(lane);
          for (double each : lane) math::add(sum, each);
        } else {
          sum.high += sum_of_lanes(total_.sum(n, part).high);
        }
      });
      return math::rounded(sum);
    }
    // Calls function(of_column(column), position, lanes, terms) for each vector of the lines; function adds
    // to `terms`.
    template <typename scalar_t, typename OfColumn, typename Function>
    GK_INLINE void add(const Lines& lines, Streamed<scalar_t> streamed, const OfColumn& of_column, const Function& function) {
      constexpr int64_t kStep = kTerms * Vec<opmath>::kLanes;
      const auto values = of_column(0);
      const RunAhead ahead = run_ahead<scalar_t>(lines);
      for (int64_t row = lines.row_begin; row < lines.row_end; ++row) {
        const Position begin = position_of_row(lines, row, ahead.of_row(lines, row));
        for (int64_t i = lines.begin; i < lines.end; i += kStep) {
          add_terms(total_, [&](auto& terms) GK_INLINE_LAMBDA {
            for_each_vector<opmath>(i, i + kStep < lines.end ? i + kStep : lines.end, [&](int64_t j, auto lanes) GK_INLINE_LAMBDA {
              function(values, position(begin, streamed, j), lanes, terms);
            });
          });
        }
      }
      if (streamed.output != nullptr) stream_fence();
    }

   private:
    Accumulators<opmath, N> total_;
  };
};

// ---- Short runs

// One value for each column. Lanes after the last column hold arbitrary values.
template <typename T>
struct Columns {
  alignas(64) T value[kMaxColumns + Vec<T>::kLanes];

  Columns() = default;
  explicit GK_INLINE Columns(const Lines& lines) {
    for (int64_t i = 0; i < lines.end; i += Vec<T>::kLanes) store(i, Vec<T>(T(0)));
  }
  GK_INLINE Vec<T> load(int64_t column) const { return Vec<T>::load(value + column); }
  GK_INLINE void store(int64_t column, Vec<T> x) { x.store(value + column); }
  // Sets `count` columns from `column` on to x. It may also write to the columns after them, which the next
  // call overwrites.
  GK_INLINE void spread(int64_t column, int64_t count, T x) {
    for (int64_t i = 0; i < count; i += Vec<T>::kLanes) store(column + i, Vec<T>(x));
  }
};

struct ShortRuns {
  // Calls function(lines) once, with the lines of the slab.
  template <typename Function>
  static GK_INLINE void for_each_lines(const ChannelShape& shape, Slab s, const Function& function) {
    const int64_t columns = shape.channels * shape.inner;
    const int64_t first = s.channel_begin * shape.inner;
    // `first` is a multiple of 8 (cpu/slabs.h), so that no two slabs share a byte of the mask.
    function(Lines{s.channel_begin, s.channel_end, shape.inner, s.row_begin, s.row_end, 0, (s.channel_end - s.channel_begin) * shape.inner,
                   first, columns, first / 8, (columns + 7) / 8});
  }

  // Calls function(column, lanes, row, row_end, ahead) for each vector of columns, in blocks of one or four
  // rows that cover [first, last). Blocks of one row follow the order of memory. In a block of four rows, a
  // column's values (`values` numbers of type opmath) are loaded once for all four. Blocks have four rows if
  // these values do not stay in the first-level cache from row to row, or if rows do not follow each other in
  // memory. AVX-512 then prefetches the next block, unless rows lie a page or more apart: such rows the
  // processor predicts.
  template <typename scalar_t, typename Function>
  static GK_INLINE void for_each_block(const Lines& lines, int64_t first, int64_t last, int64_t values, const Function& function) {
    using opmath = opmath_t<scalar_t>;
    constexpr int64_t kCachedBytes = 16 * 1024;
    constexpr int64_t kForeseenBytes = 4096;
    const int64_t bytes = (lines.end - lines.begin) * values * static_cast<int64_t>(sizeof(opmath));
    const bool is_gapless = lines.end - lines.begin == lines.row_stride;
    const auto for_each_vector_of = [&](int64_t row, int64_t row_end, int64_t ahead) GK_INLINE_LAMBDA {
      for_each_vector<opmath>(lines.begin, lines.end,
                              [&](int64_t column, auto lanes) GK_INLINE_LAMBDA { function(column, lanes, row, row_end, ahead); });
    };
    const int64_t rows = is_gapless && bytes <= kCachedBytes ? 1 : 4;
    // The wider the vectors, the more a branch in the loop costs, so AVX-512 has a loop of its own for blocks
    // of one row. Narrower vectors have one loop: a second one would double the compiled code.
    if constexpr (kRegisterBytes == 64) {
      if (rows == 1) {
        for (int64_t row = first; row < last; ++row) for_each_vector_of(row, row + 1, 0);
        return;
      }
    }
    const bool fetches_ahead = kRegisterBytes == 64 && lines.row_stride * static_cast<int64_t>(sizeof(scalar_t)) < kForeseenBytes;
    for (int64_t row = first; row < last; row += rows) {
      const int64_t row_end = row + rows < last ? row + rows : last;
      for_each_vector_of(row, row_end, fetches_ahead && row_end + rows <= lines.row_end ? rows * lines.row_stride : 0);
    }
  }

  template <typename scalar_t, typename OfColumn, typename Function>
  static GK_INLINE void for_each(const Lines& lines, Streamed<scalar_t> streamed, const OfColumn& of_column, const Function& function) {
    const auto block = [&](int64_t column, auto lanes, int64_t row, int64_t row_end, int64_t ahead) GK_INLINE_LAMBDA {
      const auto values = of_column(column);
      for (; row < row_end; ++row) function(values, position(position_of_row(lines, row, ahead), streamed, column), lanes);
    };
    for_each_block<scalar_t>(lines, lines.row_begin, lines.row_end, sizeof(of_column(0)) / sizeof(Vec<opmath_t<scalar_t>>), block);
    if (streamed.output != nullptr) stream_fence();
  }

  // The C<opmath> of each column's channel.
  template <template <typename> class C, typename opmath>
  class Coefficients {
   public:
    template <typename OfChannel>
    GK_INLINE Coefficients(const Lines& lines, const OfChannel& of_channel) {
      int64_t column = 0;
      for (int64_t channel = lines.channel_begin; channel < lines.channel_end; ++channel, column += lines.inner) {
        int member = 0;
        of_channel(channel).template map<int>([&](opmath x) GK_INLINE_LAMBDA {
          member_[member].spread(column, lines.inner, x);
          return member++;
        });
      }
    }
    GK_INLINE C<Vec<opmath>> at(int64_t column) const {
      int member = 0;
      return C<opmath>().template map<Vec<opmath>>([&](opmath) GK_INLINE_LAMBDA { return member_[member++].load(column); });
    }

   private:
    Columns<opmath> member_[sizeof(C<opmath>) / sizeof(opmath)];
  };

  // N sums in each column, which of_channel adds up.
  template <typename opmath, int N>
  class Sums {
   public:
    explicit GK_INLINE Sums(const Lines& lines) {
      for (int n = 0; n < N; ++n) high_[n] = low_[n] = Columns<double>(lines);
    }
    GK_INLINE double of_channel(const Lines& lines, int64_t c, int n) const {
      math::Sum<double> sum{0.0, 0.0};
      for (int64_t i = c * lines.inner; i < (c + 1) * lines.inner; ++i) {
        if constexpr (sizeof(opmath) == sizeof(double)) {
          math::add(sum, high_[n].value[i]);
        } else {
          sum.high += high_[n].value[i];
        }
        sum.low += low_[n].value[i];
      }
      return math::rounded(sum);
    }
    template <typename scalar_t, typename OfColumn, typename Function>
    GK_INLINE void add(const Lines& lines, Streamed<scalar_t> streamed, const OfColumn& of_column, const Function& function) {
      for (int64_t first = lines.row_begin; first < lines.row_end; first += kTerms) {
        const int64_t last = first + kTerms < lines.row_end ? first + kTerms : lines.row_end;
        const auto block = [&](int64_t column, auto lanes, int64_t row, int64_t row_end, int64_t ahead) GK_INLINE_LAMBDA {
          const auto values = of_column(column);
          const auto add_rows = [&](auto& terms) GK_INLINE_LAMBDA {
            for (int64_t r = row; r < row_end; ++r) {
              function(values, position(position_of_row(lines, r, ahead), streamed, column), lanes, terms);
            }
          };
          Accumulators<opmath, N> sums;
          if constexpr (sizeof(opmath) == sizeof(double)) {
            add_rows(sums);
          } else {
            Float32Terms<N> terms;
            for (int n = 0; n < N; ++n) terms.sum[n] = row == first ? Vec<float>(0.0f) : terms_[n].load(column);
            add_rows(terms);
            for (int n = 0; n < N; ++n) terms_[n].store(column, terms.sum[n]);
            if (row_end < last) return;
            terms.add_to(sums);
          }
          add(column, sums);
        };
        for_each_block<scalar_t>(lines, first, last, sizeof(of_column(0)) / sizeof(Vec<opmath>) + N, block);
      }
      if (streamed.output != nullptr) stream_fence();
    }
    GK_INLINE void add(int64_t column, const Accumulators<opmath, N>& sums) {
      for (int n = 0; n < N; ++n) {
        for_each_part<opmath>([&](auto part) GK_INLINE_LAMBDA {
          const int64_t i = column + part.kIndex * Vec<double>::kLanes;
          math::Sum<Vec<double>> total{high_[n].load(i), Vec<double>(0.0)};
          add_term<opmath>(total, sums.sum(n, part).high);
          high_[n].store(i, total.high);
          // The low part of float32 terms is 0.
          if constexpr (sizeof(opmath) == sizeof(double)) low_[n].store(i, low_[n].load(i) + total.low + sums.sum(n, part).low);
        });
      }
    }

   private:
    Columns<double> high_[N], low_[N];
    Columns<opmath> terms_[N];
  };
};

// Calls function(LongRuns()) or function(ShortRuns()), whichever the shape has.
template <typename Function>
GK_INLINE void visit_runs(const ChannelShape& shape, const Function& function) {
  if (shape.inner >= kShortRunElements) {
    function(LongRuns());
  } else {
    function(ShortRuns());
  }
}

}  // namespace
}  // namespace gradkernels::cpu
