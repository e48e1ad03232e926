// The activations on CUDA: elementwise passes over packets of 16 bytes, and sums for each channel if the
// parameter is learnt. A thread loads several packets before it uses them. The activation is a run-time
// argument, and each kernel contains one loop for each activation. A tensor that is not aligned to a packet
// is walked one element at a time.
#include "ops/activation.h"

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace gradkernels::cuda {
namespace {

constexpr int kThreads = 256;
// Blocks that an SM holds at least, for kernels in which ptxas would otherwise move loads behind arithmetic.
constexpr int kBlocks = 4;
// Bytes that a thread loads before it uses the first of them. Measure with bench/bench_activation.py on a GPU.
constexpr int kBytesInFlight = 64;

// W elements in the computing type.
template <typename scalar_t, int W>
struct Values {
  opmath_t<scalar_t> element[W];

  __device__ __forceinline__ static Values of(const Packet<scalar_t, W>& packet) {
    Values values;
    if constexpr (std::is_same<scalar_t, BFloat16>::value && W > 1) {
      // One instruction for each element of a word. nvcc would first take the word apart.
      uint32_t word[W / 2];
      __builtin_memcpy(word, &packet, sizeof(packet));
#pragma unroll
      for (int i = 0; i < W; ++i) values.element[i] = float_of(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xFFFF0000u);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) values.element[i] = static_cast<opmath_t<scalar_t>>(packet.element[i]);
    }
    return values;
  }
  __device__ __forceinline__ Packet<scalar_t, W> rounded() const {
    Packet<scalar_t, W> packet;
#pragma unroll
    for (int i = 0; i < W; ++i) packet.element[i] = static_cast<scalar_t>(element[i]);
    return packet;
  }
};

// The packets of each input that a thread loads before it uses them, and the elements of a block.
template <int W, int kInputs>
constexpr int kPacketsInFlight = W == 1                                          ? 4
                                 : kBytesInFlight / (kInputs * kPacketBytes) > 0 ? kBytesInFlight / (kInputs * kPacketBytes)
                                                                                 : 1;
template <int W, int kInputs>
constexpr int64_t kTileElements = int64_t{kThreads} * W * kPacketsInFlight<W, kInputs>;

// One tile of `elementwise`; kWhole: all of its elements exist.
template <bool kWhole, int W, typename scalar_t, int kInputs, typename Fetch, typename Apply>
__device__ __forceinline__ void tile(int64_t base, int64_t count, const scalar_t* const (&in)[kInputs], scalar_t* out, const Fetch& fetch,
                                     const Apply& apply) {
  constexpr int kInFlight = kPacketsInFlight<W, kInputs>;
  const int64_t mine = base + static_cast<int64_t>(threadIdx.x) * W;
  Packet<scalar_t, W> packet[kInFlight][kInputs];
  decltype(fetch(mine, count)) fetched[kInFlight];
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    const int64_t first = mine + j * kThreads * W;
#pragma unroll
    for (int input = 0; input < kInputs; ++input) {
      if (kWhole || first + W <= count) {
        load(packet[j][input], in[input] + first);
      } else {
        load_some(packet[j][input], in[input] + first, count - first, scalar_t(0.0f));
      }
    }
    fetched[j] = fetch(first, kWhole ? W : count - first);
  }
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    const int64_t first = mine + j * kThreads * W;
    Values<scalar_t, W> value[kInputs];
#pragma unroll
    for (int input = 0; input < kInputs; ++input) value[input] = Values<scalar_t, W>::of(packet[j][input]);
    const Packet<scalar_t, W> result = apply(first, kWhole ? W : count - first, fetched[j], value).rounded();
    if (kWhole || first + W <= count) {
      store(out + first, result);
    } else {
      store_some(out + first, result, count - first);
    }
  }
}

// out = apply(first, valid, fetched, in...) for each packet of W elements of the block's tile. `first` is the
// index of the packet's first element. `valid` is the number of elements up to the end; it may be less than
// W, 0 or negative, because all lanes of a warp take part. `fetched` is fetch(first, valid), which is called
// while the packets are loaded: a load after the first store would wait for memory once more. `in` are the
// packets of the inputs.
template <int W, typename scalar_t, int kInputs, typename Fetch, typename Apply>
__device__ __forceinline__ void elementwise(int64_t count, const scalar_t* const (&in)[kInputs], scalar_t* out, const Fetch& fetch,
                                            const Apply& apply) {
  constexpr int64_t kTile = kTileElements<W, kInputs>;
  const int64_t base = blockIdx.x * kTile;
  if (base + kTile <= count) {
    tile<true, W>(base, count, in, out, fetch, apply);
  } else {
    tile<false, W>(base, count, in, out, fetch, apply);
  }
}

struct Nothing {};
struct FetchNothing {
  __device__ __forceinline__ Nothing operator()(int64_t, int64_t) const { return {}; }
};

// Stores one bit for each element. One of the lanes that share a byte collects their bits and writes the
// byte. Whole warps must call it.
template <int W>
__device__ __forceinline__ void store_bits(uint8_t* mask, int64_t first, int64_t valid, unsigned bits) {
  constexpr int kLanes = W < 8 ? 8 / W : 1;
  const int place = static_cast<int>(threadIdx.x) % kLanes;
  bits <<= W * place;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) bits |= __shfl_xor_sync(kWholeWarp, bits, distance);
  if (place == 0 && valid > 0) mask[first / 8] = static_cast<uint8_t>(bits);
}

template <int W>
__device__ __forceinline__ unsigned load_bits(const uint8_t* mask, int64_t first, int64_t valid) {
  return valid > 0 ? static_cast<unsigned>(mask[first / 8]) >> (W == 8 ? 0 : first % 8) : 0u;
}

template <int W, typename scalar_t, typename Activation>
__device__ __forceinline__ Values<scalar_t, W> forward_with_mask(const Activation& f, const Values<scalar_t, W>& x, unsigned& bits) {
  Values<scalar_t, W> y;
  bits = 0;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    bits |= static_cast<unsigned>(f.passes(x.element[i])) << i;
    y.element[i] = f.forward(x.element[i]);
  }
  return y;
}

// Sets the bits of elements after the end to 0.
template <int W>
__device__ __forceinline__ unsigned existing(unsigned bits, int64_t valid) {
  return valid >= W ? bits : valid <= 0 ? 0u : bits & ((1u << valid) - 1u);
}

// y = act(x)
//   launch   blocks of kThreads, one for each tile
//   requires x and y dense, in the same order; both aligned to a packet, unless W = 1; y may be x
//   traffic  n elements read, n written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    activation_forward_kernel(math::Activation act, int64_t count, const scalar_t* x, scalar_t* y) {
  const scalar_t* const in[1] = {x};
  math::visit<opmath_t<scalar_t>, math::kPrecisionOf<scalar_t>>(act, [&](auto f) {
    elementwise<W>(count, in, y, FetchNothing(), [&](int64_t, int64_t, Nothing, const Values<scalar_t, W>(&value)[1]) {
      Values<scalar_t, W> result;
#pragma unroll
      for (int i = 0; i < W; ++i) result.element[i] = f.forward(value[0].element[i]);
      return result;
    });
  });
}

// y = act(x) and the bits of the mask, for activations of two slopes
//   launch   as above
//   requires as above; a mask of ceil(n / 8) bytes
//   traffic  n elements read, n written, n bits written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    activation_forward_mask_kernel(math::Activation act, int64_t count, const scalar_t* x, scalar_t* y, uint8_t* mask) {
  const scalar_t* const in[1] = {x};
  math::visit_two_slopes<opmath_t<scalar_t>>(act, [&](auto f) {
    elementwise<W>(count, in, y, FetchNothing(), [&](int64_t first, int64_t valid, Nothing, const Values<scalar_t, W>(&value)[1]) {
      unsigned bits;
      const Values<scalar_t, W> result = forward_with_mask(f, value[0], bits);
      store_bits<W>(mask, first, valid, existing<W>(bits, valid));
      return result;
    });
  });
}

// grad_x = grad_y act'(x), from x; only elu's also from y
//   launch   as above
//   requires grad_y, saved and grad_x dense and aligned like x and y above; grad_x may be grad_y
//   traffic  2n elements read, n written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    activation_backward_kernel(math::Activation act, bool from_output, int64_t count, const scalar_t* grad_y, const scalar_t* saved,
                               scalar_t* grad_x) {
  using opmath = opmath_t<scalar_t>;
  const scalar_t* const in[2] = {grad_y, saved};
  const auto run = [&](const auto& gradient) {
    elementwise<W>(count, in, grad_x, FetchNothing(), [&](int64_t, int64_t, Nothing, const Values<scalar_t, W>(&value)[2]) {
      Values<scalar_t, W> result;
#pragma unroll
      for (int i = 0; i < W; ++i) result.element[i] = gradient(value[0].element[i], value[1].element[i]);
      return result;
    });
  };
  if (from_output) {
    const math::Elu<opmath> f{static_cast<opmath>(act.parameter)};
    run([&](opmath g, opmath y) { return f.backward_from_output(g, y); });
  } else {
    math::visit<opmath, math::kPrecisionOf<scalar_t>>(act, [&](auto f) { run([&](opmath g, opmath x) { return f.backward(g, x); }); });
  }
}

// grad_x = grad_y act'(x), from the mask
//   launch   as above
//   requires as above; the mask that forward wrote
//   traffic  n elements and n bits read, n written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    activation_backward_mask_kernel(math::Activation act, int64_t count, const scalar_t* grad_y, const uint8_t* mask, scalar_t* grad_x) {
  const scalar_t* const in[1] = {grad_y};
  math::visit_two_slopes<opmath_t<scalar_t>>(act, [&](auto f) {
    const auto fetch = [&](int64_t first, int64_t valid) { return load_bits<W>(mask, first, valid); };
    elementwise<W>(count, in, grad_x, fetch, [&](int64_t, int64_t, unsigned bits, const Values<scalar_t, W>(&value)[1]) {
      Values<scalar_t, W> result;
#pragma unroll
      for (int i = 0; i < W; ++i) result.element[i] = f.backward_from_mask(value[0].element[i], (bits >> i & 1u) != 0u);
      return result;
    });
  });
}

__device__ __forceinline__ math::RandomSlopes slopes_of(const SeededSlopes& seeded) {
  return {static_cast<uint64_t>(*seeded.seed), seeded.lower, seeded.upper};
}

// The slopes of elements [first, first + W).
template <typename scalar_t, int W>
struct DrawnSlopes {
  opmath_t<scalar_t> slope[W];

  __device__ __forceinline__ DrawnSlopes(const math::RandomSlopes& slopes, int64_t first) {
    const uint64_t block = static_cast<uint64_t>(first) / 4;
    if constexpr (W >= 4) {
#pragma unroll
      for (int i = 0; i < W; i += 4) slopes.draw(block + i / 4, slope + i);
    } else {
      const math::PhiloxBlock<uint64_t> random = math::philox(slopes.seed, block);
      const int place = static_cast<int>(first % 4);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        // An array with a run-time index would be in local memory.
        const int at = place + i;
        const uint64_t word = at == 0 ? random.word[0] : at == 1 ? random.word[1] : at == 2 ? random.word[2] : random.word[3];
        slope[i] = slopes.slope_of(static_cast<opmath_t<scalar_t>>(math::uniform_of(word)));
      }
    }
  }
};

// y = rrelu(x) with slopes drawn from the seed, and the bits of the mask
//   launch   as above
//   requires as activation_forward_mask_kernel
//   traffic  n elements read, n written, n bits written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads)
    rrelu_forward_kernel(SeededSlopes seeded, int64_t count, const scalar_t* x, scalar_t* y, uint8_t* mask) {
  using opmath = opmath_t<scalar_t>;
  const math::RandomSlopes slopes = slopes_of(seeded);
  const scalar_t* const in[1] = {x};
  elementwise<W>(count, in, y, FetchNothing(), [&](int64_t first, int64_t valid, Nothing, const Values<scalar_t, W>(&value)[1]) {
    const DrawnSlopes<scalar_t, W> drawn(slopes, first);
    Values<scalar_t, W> result;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const math::Rrelu<opmath> f{{drawn.slope[i]}};
      const bool passes = f.passes(value[0].element[i]);
      bits |= static_cast<unsigned>(passes) << i;
      // The value has the formula of the gradient, with x for grad_y.
      result.element[i] = f.backward_from_mask(value[0].element[i], passes);
    }
    store_bits<W>(mask, first, valid, existing<W>(bits, valid));
    return result;
  });
}

// grad_x of rrelu, which draws the same slopes again
//   launch   as above
//   requires as activation_backward_mask_kernel
//   traffic  n elements and n bits read, n written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads)
    rrelu_backward_kernel(SeededSlopes seeded, int64_t count, const scalar_t* grad_y, const uint8_t* mask, scalar_t* grad_x) {
  using opmath = opmath_t<scalar_t>;
  const math::RandomSlopes slopes = slopes_of(seeded);
  const scalar_t* const in[1] = {grad_y};
  const auto fetch = [&](int64_t first, int64_t valid) { return load_bits<W>(mask, first, valid); };
  elementwise<W>(count, in, grad_x, fetch, [&](int64_t first, int64_t, unsigned bits, const Values<scalar_t, W>(&value)[1]) {
    const DrawnSlopes<scalar_t, W> drawn(slopes, first);
    Values<scalar_t, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      result.element[i] = math::Rrelu<opmath>{{drawn.slope[i]}}.backward_from_mask(value[0].element[i], (bits >> i & 1u) != 0u);
    }
    return result;
  });
}

// Calls function(activation); activation(parameter) is the functor.
template <typename scalar_t, typename Function>
__device__ __forceinline__ void visit_parametric(Parametric act, const Function& function) {
  using opmath = opmath_t<scalar_t>;
  if (act == Parametric::kPrelu) {
    function([](opmath parameter) { return math::LeakyRelu<opmath>{parameter}; });
  } else {
    function([](opmath parameter) { return math::Swish<opmath, math::kPrecisionOf<scalar_t>>{parameter}; });
  }
}

// The channel of an element and, after each next(), of the next element. A packet needs the divisions only
// once.
struct ChannelOf {
  int64_t inner;
  int64_t channels;
  int64_t within;
  int64_t channel;

  __device__ __forceinline__ ChannelOf(const ChannelShape& shape, int64_t count, int64_t element)
      : inner(shape.inner), channels(shape.channels) {
    const bool fit = count <= INT32_MAX;
    const int64_t line = quotient(element, inner, fit);
    within = element - line * inner;
    channel = line - quotient(line, channels, fit) * channels;
  }
  __device__ __forceinline__ void next() {
    if (++within == inner) {
      within = 0;
      if (++channel == channels) channel = 0;
    }
  }
};

// y = act(x, parameter of the channel)
//   launch   as above
//   requires x and y dense, in the order of `shape`; both aligned to a packet, unless W = 1
//   traffic  n elements read, n written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads, kBlocks) parametric_forward_kernel(Parametric act, ChannelShape shape, int64_t count,
                                                                               const scalar_t* x, const scalar_t* parameter, scalar_t* y) {
  using opmath = opmath_t<scalar_t>;
  const scalar_t* const in[1] = {x};
  visit_parametric<scalar_t>(act, [&](auto activation) {
    elementwise<W>(count, in, y, FetchNothing(), [&](int64_t first, int64_t, Nothing, const Values<scalar_t, W>(&value)[1]) {
      Values<scalar_t, W> result;
      ChannelOf at(shape, count, first);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        result.element[i] = activation(static_cast<opmath>(parameter[at.channel])).forward(value[0].element[i]);
        at.next();
      }
      return result;
    });
  });
}

using DoubleSum = math::Sum<double>;

struct ParametricShared {
  BlockScratch<DoubleSum> scratch;
  unsigned flag;
};

// A block adds up the parameter gradients of kElementsOfPart elements. A column has at most kMostParts parts.
constexpr int64_t kElementsOfPart = 64 * kThreads;
constexpr int64_t kMostParts = 256;

// Writes grad_x of the W elements from `first` on, unless grad_x is null. activation_of(j) is the functor of
// element j. add(j, share) receives the element's share of the gradient of its parameter.
template <typename scalar_t, int W, typename ActivationOf, typename Add>
__device__ __forceinline__ void parametric_backward_packet(const ParametricBackward& p, int64_t first, const ActivationOf& activation_of,
                                                           const Add& add) {
  Packet<scalar_t, W> grad_packet, x_packet;
  load(grad_packet, static_cast<const scalar_t*>(p.grad_y) + first);
  load(x_packet, static_cast<const scalar_t*>(p.x) + first);
  const Values<scalar_t, W> gradients = Values<scalar_t, W>::of(grad_packet);
  const Values<scalar_t, W> values = Values<scalar_t, W>::of(x_packet);
  Values<scalar_t, W> result;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    opmath_t<scalar_t> share;
    result.element[j] = activation_of(j).backward(gradients.element[j], values.element[j], share);
    add(j, share);
  }
  if (p.grad_x != nullptr) store(static_cast<scalar_t*>(p.grad_x) + first, result.rounded());
}

// grad_x = grad_y act'(x), and the gradient of each channel's parameter, if the elements of a channel form
// runs
//   launch   parts * channels blocks of kThreads; the last block of a channel adds up its parts, in order
//   requires tensors dense, in the order of `shape`; unless W = 1, inner a multiple of W and all tensors
//            aligned to a packet; counters = 0
//   traffic  2n elements read, n written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    parametric_backward_run_kernel(ParametricBackward p, int parts, double* partial, unsigned* counters) {
  using opmath = opmath_t<scalar_t>;
  ParametricShared& shared = *shared_memory<ParametricShared>();
  const int64_t channel = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  const int64_t packets_of_row = p.shape.inner / W;
  const int64_t begin = part * (kElementsOfPart / W);
  const int64_t all = p.shape.rows * packets_of_row;
  const int64_t end = begin + kElementsOfPart / W < all ? begin + kElementsOfPart / W : all;
  const opmath parameter = static_cast<opmath>(static_cast<const scalar_t*>(p.parameter)[channel]);

  ThreadSum<opmath> sum;
  visit_parametric<scalar_t>(p.act, [&](auto activation) {
    const auto f = activation(parameter);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const int64_t row = quotient(i, packets_of_row, all <= INT32_MAX);
      const int64_t first = (row * p.shape.channels + channel) * p.shape.inner + (i - row * packets_of_row) * W;
      parametric_backward_packet<scalar_t, W>(p, first, [&](int) { return f; }, [&](int, opmath share) { sum.add(share); });
    }
  });
  if (p.grad_parameter == nullptr) return;
  const DoubleSum total = block_reduce(sum.value(), shared.scratch, DoubleSum{0.0, 0.0}, AddSums());
  if (threadIdx.x == 0) partial[blockIdx.x] = total.high + total.low;
  if (!is_last_block(counters + channel, parts, &shared.flag)) return;
  DoubleSum of_parts{0.0, 0.0};
  for (int i = threadIdx.x; i < parts; i += kThreads) math::add(of_parts, partial[channel * parts + i]);
  of_parts = block_reduce(of_parts, shared.scratch, DoubleSum{0.0, 0.0}, AddSums());
  if (threadIdx.x == 0) static_cast<scalar_t*>(p.grad_parameter)[channel] = static_cast<scalar_t>(of_parts.high + of_parts.low);
}

template <int W>
struct ParametricColumnShared {
  double sum[kThreads][W];
  unsigned flag;
};

// The same if rows run across channels
//   launch   (column blocks, parts of the rows) blocks of kThreads; `columns` neighbouring threads take W
//            channels each of one row, the next `columns` threads those of the next row
//   requires inner = 1; unless W = 1, channels a multiple of W and all tensors aligned to a packet; counters
//            = 0, one for each column block
//   traffic  2n elements read, n written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    parametric_backward_column_kernel(ParametricBackward p, int columns, int64_t rows_of_part, double* partial, unsigned* counters) {
  using opmath = opmath_t<scalar_t>;
  auto& shared = *shared_memory<ParametricColumnShared<W>>();
  const int column = static_cast<int>(threadIdx.x) % columns;
  const int lines = kThreads / columns;
  const int line = static_cast<int>(threadIdx.x) / columns;
  const int64_t channels = p.shape.channels;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * columns + column) * W;
  const int64_t begin = blockIdx.y * rows_of_part;
  const int64_t end = begin + rows_of_part < p.shape.rows ? begin + rows_of_part : p.shape.rows;

  ThreadSum<opmath> sum[W];
  if (channel < channels) {
    Values<scalar_t, W> parameter;
#pragma unroll
    for (int j = 0; j < W; ++j) parameter.element[j] = static_cast<opmath>(static_cast<const scalar_t*>(p.parameter)[channel + j]);
    visit_parametric<scalar_t>(p.act, [&](auto activation) {
      for (int64_t row = begin + line; row < end; row += lines) {
        parametric_backward_packet<scalar_t, W>(
            p, row * channels + channel, [&](int j) { return activation(parameter.element[j]); },
            [&](int j, opmath share) { sum[j].add(share); });
      }
    });
  }
  if (p.grad_parameter == nullptr) return;
#pragma unroll
  for (int j = 0; j < W; ++j) shared.sum[threadIdx.x][j] = sum[j].rounded();
  __syncthreads();
  if (line == 0 && channel < channels) {
    for (int j = 0; j < W; ++j) {
      DoubleSum total{0.0, 0.0};
      for (int below = 0; below < lines; ++below) math::add(total, shared.sum[below * columns + column][j]);
      partial[blockIdx.y * channels + channel + j] = total.high + total.low;
    }
  }
  if (!is_last_block(counters + blockIdx.x, gridDim.y, &shared.flag)) return;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * columns * W + threadIdx.x;
       c < (blockIdx.x + int64_t{1}) * columns * W && c < channels; c += kThreads) {
    DoubleSum total{0.0, 0.0};
    for (unsigned part = 0; part < gridDim.y; ++part) math::add(total, partial[part * channels + c]);
    static_cast<scalar_t*>(p.grad_parameter)[c] = static_cast<scalar_t>(total.high + total.low);
  }
}

// Calls function(scalar_t(), width): width is the number of elements of a packet if in_packets, otherwise 1.
template <typename Function>
void with_width(DType dtype, bool in_packets, const Function& function) {
  dispatch(dtype, [&](auto zero) {
    if (in_packets) {
      function(zero, std::integral_constant<int, kPacketElements<decltype(zero)>>());
    } else {
      function(zero, std::integral_constant<int, 1>());
    }
  });
}

// The launch of an elementwise kernel over `count` elements.
template <int W, int kInputs>
Launch over(int64_t count) {
  return {dim3(static_cast<unsigned>((count + kTileElements<W, kInputs> - 1) / kTileElements<W, kInputs>)), kThreads};
}

}  // namespace

void activation_forward(DType dtype, math::Activation act, int64_t count, const void* x, void* y, uint8_t* mask) {
  with_width(dtype, at_packet({x, y}), [&](auto zero, auto width) {
    using scalar_t = decltype(zero);
    constexpr int W = decltype(width)::value;
    if (mask == nullptr) {
      launch(activation_forward_kernel<scalar_t, W>, over<W, 1>(count), act, count, static_cast<const scalar_t*>(x),
             static_cast<scalar_t*>(y));
    } else {
      launch(activation_forward_mask_kernel<scalar_t, W>, over<W, 1>(count), act, count, static_cast<const scalar_t*>(x),
             static_cast<scalar_t*>(y), mask);
    }
  });
}

void activation_backward(DType dtype, math::Activation act, Saved kind, int64_t count, const void* grad_y, const void* saved,
                         void* grad_x) {
  const bool has_mask = kind == Saved::kMask;
  with_width(dtype, at_packet({grad_y, has_mask ? grad_y : saved, grad_x}), [&](auto zero, auto width) {
    using scalar_t = decltype(zero);
    constexpr int W = decltype(width)::value;
    if (has_mask) {
      launch(activation_backward_mask_kernel<scalar_t, W>, over<W, 1>(count), act, count, static_cast<const scalar_t*>(grad_y),
             static_cast<const uint8_t*>(saved), static_cast<scalar_t*>(grad_x));
    } else {
      launch(activation_backward_kernel<scalar_t, W>, over<W, 2>(count), act, kind == Saved::kOutput, count,
             static_cast<const scalar_t*>(grad_y), static_cast<const scalar_t*>(saved), static_cast<scalar_t*>(grad_x));
    }
  });
}

void rrelu_forward(DType dtype, SeededSlopes slopes, int64_t count, const void* x, void* y, uint8_t* mask) {
  with_width(dtype, at_packet({x, y}), [&](auto zero, auto width) {
    using scalar_t = decltype(zero);
    constexpr int W = decltype(width)::value;
    launch(rrelu_forward_kernel<scalar_t, W>, over<W, 1>(count), slopes, count, static_cast<const scalar_t*>(x), static_cast<scalar_t*>(y),
           mask);
  });
}

void rrelu_backward(DType dtype, SeededSlopes slopes, int64_t count, const void* grad_y, const uint8_t* mask, void* grad_x) {
  with_width(dtype, at_packet({grad_y, grad_x}), [&](auto zero, auto width) {
    using scalar_t = decltype(zero);
    constexpr int W = decltype(width)::value;
    launch(rrelu_backward_kernel<scalar_t, W>, over<W, 1>(count), slopes, count, static_cast<const scalar_t*>(grad_y), mask,
           static_cast<scalar_t*>(grad_x));
  });
}

void parametric_forward(const ParametricForward& p) {
  const int64_t count = p.shape.rows * p.shape.channels * p.shape.inner;
  with_width(p.dtype, at_packet({p.x, p.y}), [&](auto zero, auto width) {
    using scalar_t = decltype(zero);
    constexpr int W = decltype(width)::value;
    launch(parametric_forward_kernel<scalar_t, W>, over<W, 1>(count), p.act, p.shape, count, static_cast<const scalar_t*>(p.x),
           static_cast<const scalar_t*>(p.parameter), static_cast<scalar_t*>(p.y));
  });
}

void parametric_backward(const ParametricBackward& p) {
  const ChannelShape& shape = p.shape;
  const bool by_column = shape.inner == 1 && shape.channels > 1;
  const int64_t run = by_column ? shape.channels : shape.inner;
  const bool in_packets = at_packet({p.grad_y, p.x, p.grad_x}) && run % (kPacketBytes / size_of(p.dtype)) == 0;
  with_width(p.dtype, in_packets, [&](auto zero, auto width) {
    using scalar_t = decltype(zero);
    constexpr int W = decltype(width)::value;
    if (by_column) {
      int columns = kWarpThreads;
      while (columns / 2 * W >= shape.channels && columns > 1) columns /= 2;
      const int64_t column_blocks = (shape.channels + int64_t{columns} * W - 1) / (int64_t{columns} * W);
      // A thread takes 32 rows; more, if there would be too many parts for the last block.
      const int64_t lines = kThreads / columns;
      int64_t rows_of_part = lines * 32;
      if (rows_of_part * kMostParts < shape.rows) rows_of_part = (shape.rows + kMostParts - 1) / kMostParts;
      const int64_t parts = (shape.rows + rows_of_part - 1) / rows_of_part;
      const Partials<double> sums(parts * shape.channels, column_blocks);
      launch(parametric_backward_column_kernel<scalar_t, W>,
             {dim3(static_cast<unsigned>(column_blocks), static_cast<unsigned>(parts)), kThreads, sizeof(ParametricColumnShared<W>)}, p,
             columns, rows_of_part, sums.values(), sums.counters());
    } else {
      const int64_t parts = (shape.rows * shape.inner + kElementsOfPart - 1) / kElementsOfPart;
      const Partials<double> sums(parts * shape.channels, shape.channels);
      launch(parametric_backward_run_kernel<scalar_t, W>,
             {dim3(static_cast<unsigned>(parts * shape.channels)), kThreads, sizeof(ParametricShared)}, p, static_cast<int>(parts),
             sums.values(), sums.counters());
    }
  });
}

}  // namespace gradkernels::cuda
