// How a kernel goes through a slab (cpu/slabs.h) line by line. Every channel of the tensor has its own
// values, such as a mean or a slope. There are two kinds of lines.
//
// Long runs (has_long_runs in common/shape.h): a line is the run of one channel in one row. The run has
// `inner` elements, and a line may be a part of it. The channel's values stay in registers. The Lines of
// channel 1:
//
//              channel 0       channel 1       channel 2
//     row 0    . . . . . . .  [x x x x x x x]  . . . . . . .
//     row 1    . . . . . . .  [x x x x x x x]  . . . . . . .
//     row 2    . . . . . . .  [x x x x x x x]  . . . . . . .
//
// Short runs: a line is the part of a row that lies in the slab. (In channels_last a run is one element.) A
// column belongs to the same channel in every line. Each column has its own copy of this channel's values.
// The Lines of a slab of channels 0 to 2:
//
//              channel 0   1       2       3       4
//     row 0    [x x x   x x x   x x x]  . . .   . . .
//     row 1    [x x x   x x x   x x x]  . . .   . . .
//     column    0 1 2   3 4 5   6 7 8
//
// If the slab has all channels, its rows follow each other in memory without gaps. Some rows together are
// then folded into one line, so that the line consists of whole vectors. Rows of 3 columns, 8 in a line (in
// truth more, see rows_of_line):
//
//     line 0   [x x x   x x x   x x x   x x x   x x x   x x x   x x x   x x x]
//     line 1   [x x x   x x x   x x x]                          the last rows
//     column    0 1 2   3 4 5   6 7 8   ...                         21 22 23
//
// The lambdas of their loops are inlined only into a function with GK_FLATTEN (common/host_device.h).
// LongRuns and ShortRuns have the same members, so that a kernel is written once for both.
#pragma once

#include "cpu/double_vector.h"
#include "cpu/kernels.h"
#include "cpu/load_store.h"
#include "cpu/vector.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

// Lines of a slab, one in each of the rows [row_begin, row_end). The line of a row consists of the elements
// [begin, end), counted from the element offset + row * row_stride of the operand. The last line ends at
// last_end. If rows of the operand are folded, each line counts as one row here.
struct Lines {
  int64_t channel_begin, channel_end;
  int64_t inner;
  int64_t row_begin, row_end;
  int64_t begin, end, last_end;
  int64_t offset, row_stride;
  int64_t mask_offset, mask_row_stride;  // bytes
  int64_t copied_offset;                 // where a copy of the slab that has no gaps has the lines

  GK_INLINE int64_t channels() const { return channel_end - channel_begin; }
  GK_INLINE int64_t elements_per_channel() const { return (row_end - row_begin) * (end - begin) / channels(); }
  GK_INLINE int64_t end_of(int64_t row) const { return row + 1 < row_end ? end : last_end; }
  // The end of the lines that end at `end`.
  GK_INLINE int64_t whole_end() const { return last_end < end ? row_end - 1 : row_end; }
  GK_INLINE bool is_gapless() const { return end - begin == row_stride; }
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
      part.end = part.last_end = begin + width < lines.end ? begin + width : lines.end;
      tile(part);
    }
  }
}

// Where a vector lies, and how it is read and written.
struct Position {
  int64_t element;    // index of the vector's first element in the operand
  int64_t mask_byte;  // index of the vector's first byte in the mask
  int64_t copied;     // index of the vector's first element in a copy of the slab that has no gaps
  int64_t column;     // the vector's first column in the line
  int64_t ahead;      // prefetch the element that lies this many elements later; 0: no prefetch
  bool past_caches;   // whether the output is written past the caches
};

// The position of column 0 in a row.
GK_INLINE Position position_of_row(const Lines& lines, int64_t row, int64_t ahead) {
  return {lines.offset + row * lines.row_stride,
          lines.mask_offset + row * lines.mask_row_stride,
          lines.copied_offset + (row - lines.row_begin) * lines.end,
          0,
          ahead,
          false};
}

GK_INLINE Position advanced(Position at, int64_t columns) {
  return {at.element + columns, at.mask_byte + columns / 8, at.copied + columns, at.column + columns, at.ahead, at.past_caches};
}

// Prefetches data into the second-level cache. It does not use the first-level cache: rows whose distance is
// a power of two would evict each other there before they are read.
GK_INLINE void prefetch(const void* data) { __builtin_prefetch(data, 0, 2); }

// Loads a vector of an operand that is read for the first time. Prefetches the element `at.ahead` elements
// later.
template <typename scalar_t, typename Lanes>
GK_INLINE Vec<opmath_t<scalar_t>> load_first(const scalar_t* data, Position at, Lanes lanes) {
  if (at.ahead != 0) prefetch(data + at.element + at.ahead);
  return load(data + at.element, lanes);
}

// Stores a vector of an output. The element that will be stored `at.ahead` elements later is prefetched for writing:
// the first stores of a run would otherwise wait until their cache lines are read.
template <typename scalar_t, typename Lanes>
GK_INLINE void store_first(scalar_t* data, Position at, Lanes lanes, Vec<opmath_t<scalar_t>> value) {
#if defined(__x86_64__)
  // Processors without this instruction do nothing.
  if (at.ahead != 0 && !at.past_caches) asm volatile("prefetchw %0" : : "m"(data[at.element + at.ahead]));
#endif
  store(data + at.element, lanes, value, at.past_caches);
}

// Which run to prefetch while the kernel works on another run: the run that begins `elements` elements later.
// It is prefetched only if the row that is `rows` rows later belongs to the lines, too.
struct RunAhead {
  int64_t elements;
  int64_t rows;

  GK_INLINE int64_t of_row(const Lines& lines, int64_t row) const { return row + rows < lines.row_end ? elements : 0; }
};

// An output that is written past the caches, or null. Such an output is too large to stay in the caches until
// it is read. In a line, a vector may begin only at a multiple of `step` elements.
template <typename scalar_t>
struct Streamed {
  const scalar_t* output;
  int64_t step;

  // Whether a vector that begins at this element can be written past the caches. The address of the element
  // must be a multiple of the bytes that one register fills in memory. These are kRegisterBytes, or half as
  // many for 16-bit elements, which are computed in float32.
  GK_INLINE bool begins_at(int64_t element) const { return output != nullptr && bytes_before_alignment(element) == 0; }
  // The first of the columns [begin, end) at which such a vector can begin; end if there is none.
  // `element_of_line` is the index of column 0 in the output.
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

// If there is a mask, each vector begins at the first bit of a byte of the mask.
template <typename scalar_t>
GK_INLINE Streamed<scalar_t> streamed(const ChannelShape& shape, const scalar_t* output, const uint8_t* mask) {
  // To choose this size, measure with bench/bench_batch_norm_act.py.
  constexpr int64_t kStreamedBytes = 16 * 1024 * 1024;
  // 16-bit elements fill half a register. Past the caches, 16 bytes at a time are slower than through them.
  constexpr bool kPays = sizeof(scalar_t) > 2 || kRegisterBytes == 64;
  const int64_t elements = shape.samples * shape.rows * shape.channels * shape.inner;
  const bool large = elements * static_cast<int64_t>(sizeof(scalar_t)) >= kStreamedBytes;
  return {kPays && large ? output : nullptr, mask == nullptr ? 1 : 8};
}

// The position of the vector at `column` of a row. `begin` is the position of the row's column 0.
template <typename scalar_t>
GK_INLINE Position position(Position begin, Streamed<scalar_t> streamed, int64_t column) {
  Position at = advanced(begin, column);
  at.past_caches = streamed.begins_at(at.element);
  return at;
}

// Calls function(position, lanes) for each vector of the lines, row by row. The operand has elements of type
// scalar_t.
template <typename scalar_t, typename Function>
GK_INLINE void for_each_position(const Lines& lines, Streamed<scalar_t> streamed, RunAhead ahead, const Function& function) {
  for (int64_t row = lines.row_begin; row < lines.row_end; ++row) {
    Position begin = position_of_row(lines, row, ahead.of_row(lines, row));
    const int64_t turn = streamed.begin(begin.element, lines.begin, lines.end);
    // From column `turn` on, whole vectors are written past the caches. Less than a vector lies before it.
    // These elements are written past the caches one by one, unless they have 16 bits: no instruction does
    // that for a single 16-bit element.
    begin.past_caches = turn < lines.end && sizeof(scalar_t) > 2;
    for (int64_t from = lines.begin, to = turn; from < lines.end; from = to, to = lines.end) {
      for_each_vector<opmath_t<scalar_t>>(from, to, [&](int64_t i, auto lanes) { function(advanced(begin, i), lanes); });
      begin.past_caches = true;
    }
  }
}

// ---- Sums. The terms have the computing type, opmath.

// Adds x to a float64 sum, lane by lane. For float64 terms, sum.low collects the rounding errors of the
// additions. For float32 terms, sum.low stays 0: the rounding errors of a float64 addition are far smaller
// than the precision of float32.
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

// The number of vectors of eight doubles that one vector of opmath becomes.
template <typename opmath>
constexpr int kParts = Vec<opmath>::kLanes / Vec<double>::kLanes;

// for_each_part loops over these vectors of doubles. The index of the loop is a compile-time constant. So the
// compiler can keep arrays with this index in registers.
template <int I>
struct Part {
  static constexpr int kIndex = I;
};

template <typename opmath, typename Function>
GK_INLINE void for_each_part(const Function& function) {
  function(Part<0>());
  if constexpr (kParts<opmath> == 2) function(Part<1>());
}

// N float64 sums for each lane of a vector.
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

// Float32 terms are first added in float32, at most this many vectors. Their sum is then added to a float64
// sum.
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

// Calls function(terms), which adds at most kTerms vectors to `terms`. Then adds `terms` to `sums`. In
// float64, `terms` is `sums` itself.
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
  // Which run to prefetch.
  // - Runs of kLongBytes or more: none. The processor cannot predict where the next run begins, but inside a
  //   long run it prefetches almost all data itself.
  // - If a channel's part of the slab has at most kSmallBytes: the next channel's run. These bytes are few
  //   compared with the second-level cache, so a second pass over this channel finds them there. The next
  //   data that memory has to deliver is the next channel.
  // - Otherwise: the first run of this channel that begins at least kAheadBytes later.
  // To choose these sizes, measure with bench/bench_batch_norm_act.py.
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
  template <typename opmath, typename Function>
  static GK_INLINE void for_each_lines(const ChannelShape& shape, Slab s, const Function& function) {
    const int64_t line_bytes = (shape.inner + 7) / 8;
    const int64_t elements = (s.row_end - s.row_begin) * (s.inner_end - s.inner_begin);
    for (int64_t channel = s.channel_begin; channel < s.channel_end; ++channel) {
      function(Lines{channel, channel + 1, shape.inner, s.row_begin, s.row_end, s.inner_begin, s.inner_end, s.inner_end,
                     channel * shape.inner, shape.channels * shape.inner, channel * line_bytes, shape.channels * line_bytes,
                     (channel - s.channel_begin) * elements});
    }
  }

  // Calls function(of_column(column), position, lanes) for each vector of the lines. of_column(column)
  // returns the values of the columns of a vector. The operand has elements of type scalar_t.
  template <typename scalar_t, typename OfColumn, typename Function>
  static GK_INLINE void for_each(const Lines& lines, Streamed<scalar_t> streamed, const OfColumn& of_column, const Function& function) {
    const auto values = of_column(0);
    for_each_position(lines, streamed, run_ahead<scalar_t>(lines), [&](Position at, auto lanes) { function(values, at, lanes); });
    if (streamed.output != nullptr) stream_fence();
  }

  // The values of the channel as a C<opmath>. They are the same for every column.
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
    // Calls function(of_column(column), position, lanes, terms) for each vector of the lines. In each call,
    // `function` adds its terms to `terms`.
    template <typename scalar_t, typename OfColumn, typename Function>
    GK_INLINE void add(const Lines& lines, Streamed<scalar_t> streamed, const OfColumn& of_column, const Function& function) {
      constexpr int64_t kStep = kTerms * Vec<opmath>::kLanes;
      const auto values = of_column(0);
      const RunAhead ahead = run_ahead<scalar_t>(lines);
      for (int64_t row = lines.row_begin; row < lines.row_end; ++row) {
        const Position begin = position_of_row(lines, row, ahead.of_row(lines, row));
        for (int64_t i = lines.begin; i < lines.end; i += kStep) {
          add_terms(total_, [&](auto& terms) {
            for_each_vector<opmath>(i, i + kStep < lines.end ? i + kStep : lines.end,
                                    [&](int64_t j, auto lanes) { function(values, position(begin, streamed, j), lanes, terms); });
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
  explicit GK_INLINE Columns(const Lines& lines) { clear(lines); }
  GK_INLINE void clear(const Lines& lines) {
    for (int64_t i = 0; i < lines.end; i += Vec<T>::kLanes) store(i, Vec<T>(T(0)));
  }
  GK_INLINE Vec<T> load(int64_t column) const { return Vec<T>::load(value + column); }
  GK_INLINE void store(int64_t column, Vec<T> x) { x.store(value + column); }
  // Writes x to `count` columns, beginning at `column`. It may also write to the columns after these; the
  // next call then overwrites them.
  GK_INLINE void spread(int64_t column, int64_t count, T x) {
    for (int64_t i = 0; i < count; i += Vec<T>::kLanes) store(column + i, Vec<T>(x));
  }
  // Copies the first `period` columns to the columns up to `end`, again and again.
  GK_INLINE void repeat(int64_t period, int64_t end) {
    for (int64_t i = period; i < end; ++i) value[i] = value[i - period];
  }
};

struct ShortRuns {
  // Calls function(lines) once, with the lines of the slab.
  template <typename opmath, typename Function>
  static GK_INLINE void for_each_lines(const ChannelShape& shape, Slab s, const Function& function) {
    const int64_t row_stride = shape.channels * shape.inner;
    const int64_t first = s.channel_begin * shape.inner;
    const int64_t columns = (s.channel_end - s.channel_begin) * shape.inner;
    const int64_t rows = s.row_end - s.row_begin;
    Lines lines{s.channel_begin, s.channel_end, shape.inner, s.row_begin,          s.row_end, 0, columns, columns,
                first,           row_stride,    first / 8,   (row_stride + 7) / 8, 0};
    const int64_t folds = columns == row_stride ? rows_of_line<opmath>(shape.rows, columns) : 1;
    if (folds > 1) {
      // s.row_begin is a multiple of 8 (cpu/slabs.h): no two slabs share a byte of the mask.
      const int64_t elements = rows * columns;
      lines.offset = s.row_begin * columns;
      lines.mask_offset = lines.offset / 8;
      lines.end = lines.row_stride = folds * columns;
      lines.mask_row_stride = lines.end / 8;
      lines.row_begin = 0;
      lines.row_end = (elements + lines.end - 1) / lines.end;
      lines.last_end = elements - (lines.row_end - 1) * lines.end;
    }
    function(lines);
  }

  // How many rows without gaps make a line: as few as make whole vectors and kLeastColumns; one, if these were
  // too many columns, or more than the rows of the tensor. It is the same for all slabs of a tensor, although the
  // last slab may have fewer rows than a line: the bits of the mask then have one order.
  template <typename opmath>
  static GK_INLINE int64_t rows_of_line(int64_t rows, int64_t columns) {
    constexpr int64_t kLeastColumns = 64;
    int64_t folds = Vec<opmath>::kLanes;
    while (folds % 2 == 0 && columns * (folds / 2) % Vec<opmath>::kLanes == 0) folds /= 2;
    folds *= (kLeastColumns + folds * columns - 1) / (folds * columns);
    return folds <= rows && folds * columns <= kMaxColumns ? folds : 1;
  }

  // Calls function(column) for each column of channel channel_begin + c.
  template <typename Function>
  static GK_INLINE void for_each_column_of(const Lines& lines, int64_t c, const Function& function) {
    for (int64_t first = c * lines.inner; first < lines.end; first += lines.channels() * lines.inner) {
      for (int64_t i = first; i < first + lines.inner; ++i) function(i);
    }
  }

  // Divides the rows [first, last) into blocks of one row or of four rows. In each block, calls
  // function(column, lanes, row, row_end, ahead) for each vector of columns.
  //
  // Each column has numbers of its own, of as many bytes as `values` numbers of type opmath. In a block of four
  // rows, they are loaded once for all four rows. Blocks of one row read memory in its order. Blocks have four
  // rows in two cases: the numbers of all columns do not stay in the first-level cache from row to row, or memory
  // has gaps between the rows.
  //
  // With AVX-512 and blocks of four rows, the next block is prefetched. It is not prefetched if the distance
  // of two rows is a page or more and the lines are not narrow, because the processor predicts such rows itself.
  template <typename scalar_t, typename Function>
  static GK_INLINE void for_each_block(const Lines& lines, int64_t first, int64_t last, int64_t values, const Function& function) {
    using opmath = opmath_t<scalar_t>;
    constexpr int64_t kCachedBytes = 24 * 1024;
    // To choose these sizes, measure with bench/bench_batch_norm_act.py and bench_group_norm_act.py.
    constexpr int64_t kForeseenBytes = 4096, kNarrowBytes = 1024;
    constexpr int64_t kElementBytes = sizeof(scalar_t);
    const int64_t width = lines.end - lines.begin;
    const int64_t bytes = width * values * static_cast<int64_t>(sizeof(opmath));
    const auto for_each_vector_of = [&](int64_t row, int64_t row_end, int64_t end, int64_t ahead) {
      for_each_vector<opmath>(lines.begin, end, [&](int64_t column, auto lanes) { function(column, lanes, row, row_end, ahead); });
    };
    if (lines.is_gapless() && bytes <= kCachedBytes) {
      for (int64_t row = first; row < last; ++row) for_each_vector_of(row, row + 1, lines.end_of(row), 0);
      return;
    }
    constexpr int64_t kRows = 4;
    const bool is_foreseen = lines.row_stride * kElementBytes >= kForeseenBytes && width * kElementBytes >= kNarrowBytes;
    const bool fetches_ahead = kRegisterBytes == 64 && !is_foreseen;
    const int64_t whole = lines.whole_end();
    for (int64_t row = first, row_end; row < last; row = row_end) {
      const int64_t end = row < whole && whole < last ? whole : last;
      row_end = row + kRows < end ? row + kRows : end;
      const bool fetches = fetches_ahead && row_end + kRows <= lines.row_end;
      for_each_vector_of(row, row_end, lines.end_of(row), fetches ? kRows * lines.row_stride : 0);
    }
  }

  template <typename scalar_t, typename OfColumn, typename Function>
  static GK_INLINE void for_each(const Lines& lines, Streamed<scalar_t> streamed, const OfColumn& of_column, const Function& function) {
    const auto block = [&](int64_t column, auto lanes, int64_t row, int64_t row_end, int64_t ahead) {
      const auto values = of_column(column);
      for (; row < row_end; ++row) function(values, position(position_of_row(lines, row, ahead), streamed, column), lanes);
    };
    for_each_block<scalar_t>(lines, lines.row_begin, lines.row_end, sizeof(of_column(0)) / sizeof(Vec<opmath_t<scalar_t>>), block);
    if (streamed.output != nullptr) stream_fence();
  }

  // A C<opmath> for each column. It holds the values of the column's channel.
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
      for (Columns<opmath>& member : member_) member.repeat(column, lines.end);
    }
    GK_INLINE C<Vec<opmath>> at(int64_t column) const {
      int member = 0;
      return C<opmath>().template map<Vec<opmath>>([&](opmath) GK_INLINE_LAMBDA { return member_[member++].load(column); });
    }

   private:
    Columns<opmath> member_[sizeof(C<opmath>) / sizeof(opmath)];
  };

  // N sums for each column. of_channel adds the sums of all columns of a channel.
  template <typename opmath, int N>
  class Sums {
   public:
    explicit GK_INLINE Sums(const Lines& lines) {
      for (int n = 0; n < N; ++n) {
        high_[n].clear(lines);
        low_[n].clear(lines);
      }
    }
    GK_INLINE double of_channel(const Lines& lines, int64_t c, int n) const {
      math::Sum<double> sum{0.0, 0.0};
      for_each_column_of(lines, c, [&](int64_t i) GK_INLINE_LAMBDA {
        if constexpr (sizeof(opmath) == sizeof(double)) {
          math::add(sum, high_[n].value[i]);
        } else {
          sum.high += high_[n].value[i];
        }
        sum.low += low_[n].value[i];
      });
      return math::rounded(sum);
    }
    template <typename scalar_t, typename OfColumn, typename Function>
    GK_INLINE void add(const Lines& lines, Streamed<scalar_t> streamed, const OfColumn& of_column, const Function& function) {
      const int64_t whole = lines.whole_end();
      for (int64_t first = lines.row_begin, last; first < lines.row_end; first = last) {
        // A shorter line has terms of its own, because the columns after its end get their sums before it.
        last = first < whole ? (first + kTerms < whole ? first + kTerms : whole) : lines.row_end;
        const auto block = [&](int64_t column, auto lanes, int64_t row, int64_t row_end, int64_t ahead) {
          const auto values = of_column(column);
          const auto add_rows = [&](auto& terms) {
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
        for_each_block<scalar_t>(lines, first, last, sizeof(of_column(0)) / sizeof(Vec<opmath>) + 2 * N, block);
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

// Calls function(LongRuns()) if the runs of the shape are long, else function(ShortRuns()).
template <typename Function>
GK_INLINE void visit_runs(const ChannelShape& shape, const Function& function) {
  if (has_long_runs(shape)) {
    function(LongRuns());
  } else {
    function(ShortRuns());
  }
}

}  // namespace
}  // namespace gradkernels::cpu
