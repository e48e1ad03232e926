// The activations on CUDA: elementwise passes over packets of 16 bytes, and sums for each channel if the
// parameter is learnt. A thread loads several packets before it uses them. The activation is a run-time
// argument, and each kernel contains code for each activation. A tensor that is not aligned to a packet is
// walked one element at a time. With a learnt parameter, runs or rows of 16-bit elements may also be packets
// of 8 bytes: 14x14 elements, for example.
#include "ops/activation.h"

#include <algorithm>
#include <type_traits>

#include "cuda/channel_cut.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/values.cuh"

namespace gradkernels::cuda {
namespace {

constexpr int kThreads = 256;
// Blocks that an SM holds at least, for kernels in which ptxas would otherwise move loads behind arithmetic.
constexpr int kBlocks = 4;

// The packets of each input that a thread loads before it uses them, and the elements of a block.
template <int W, int kInputs>
constexpr int kPacketsInFlight = W == 1                                          ? 4
                                 : kBytesInFlight / (kInputs * kPacketBytes) > 0 ? kBytesInFlight / (kInputs * kPacketBytes)
                                                                                 : 1;
template <int W, int kInputs>
constexpr int64_t kTileElements = int64_t{kThreads} * W * kPacketsInFlight<W, kInputs>;

// kPackets packets of `elementwise`, which begin at element `begin` of the tensors; kWhole: all of their
// elements exist.
template <int W, int kPackets, bool kWhole, typename scalar_t, int kInputs, typename Fetch, typename Apply>
__device__ __forceinline__ void packets_from(int64_t begin, int64_t count, const scalar_t* const (&in)[kInputs], scalar_t* out,
                                             const Fetch& fetch, const Apply& apply) {
  const int64_t mine = begin + static_cast<int64_t>(threadIdx.x) * W;
  Packet<scalar_t, W> packet[kPackets][kInputs];
  decltype(fetch(mine, count)) fetched[kPackets];
#pragma unroll
  for (int j = 0; j < kPackets; ++j) {
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
  for (int j = 0; j < kPackets; ++j) {
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
  constexpr int kInFlight = kPacketsInFlight<W, kInputs>;
  const int64_t begin = blockIdx.x * kTileElements<W, kInputs>;
  const int64_t end = begin + kTileElements<W, kInputs>;
  if (end <= count) {
    packets_from<W, kInFlight, true>(begin, count, in, out, fetch, apply);
  } else {
#pragma unroll 1
    for (int64_t at = begin; at < count; at += kThreads * W) packets_from<W, 1, false>(at, count, in, out, fetch, apply);
  }
}

struct Nothing {};
struct FetchNothing {
  __device__ __forceinline__ Nothing operator()(int64_t, int64_t) const { return {}; }
};

// Stores one bit for each element. Whole warps must call it.
template <int W>
__device__ __forceinline__ void store_bits(uint8_t* mask, int64_t first, int64_t valid, unsigned bits) {
  bits = byte_of_bits<W>(bits);
  if (first % 8 == 0 && valid > 0) mask[first / 8] = static_cast<uint8_t>(bits);
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
  math::visit_with_parameter<opmath_t<scalar_t>, math::kPrecisionOf<scalar_t>>(act, [&](auto f) {
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
    math::visit_with_parameter<opmath, math::kPrecisionOf<scalar_t>>(
        act, [&](auto f) { run([&](opmath g, opmath x) { return f.backward(g, x); }); });
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

// Places are computed in 32 bits, in which divisions are fast.
constexpr int64_t kMostOfChannels = int64_t{1} << 30;

// Where the elements of a packet lie: in one channel; in W neighbouring channels, so inner = 1; or anywhere.
enum class Span : uint8_t { kRun, kColumns, kAny };

// The channel of an element, and the element's place in the run of its channel.
struct Place {
  unsigned channel;
  unsigned within;

  __device__ __forceinline__ Place(const ChannelShape& shape, int64_t element) {
    const unsigned inner = static_cast<unsigned>(shape.inner), channels = static_cast<unsigned>(shape.channels);
    const unsigned line = static_cast<unsigned>(element) / inner;
    channel = line % channels;
    within = static_cast<unsigned>(element) - line * inner;
  }
  // Goes on to the next element.
  __device__ __forceinline__ void advance(const ChannelShape& shape) {
    if (++within == static_cast<unsigned>(shape.inner)) {
      within = 0;
      if (++channel == static_cast<unsigned>(shape.channels)) channel = 0;
    }
  }
};

// y = act(x, parameter of the channel)
//   launch   as above
//   requires x and y dense, in the order of `shape`; both aligned to a packet, unless W = 1; packets that lie
//            as `span` says; with kColumns the parameter aligned to a packet; at most kMostOfChannels elements,
//            unless there is one channel
//   traffic  n elements read, n written
template <typename scalar_t, int W, Span span>
__global__ void __launch_bounds__(kThreads, kBlocks) parametric_forward_kernel(Parametric act, ChannelShape shape, int64_t count,
                                                                               const scalar_t* x, const scalar_t* parameter, scalar_t* y) {
  using opmath = opmath_t<scalar_t>;
  const scalar_t* const in[1] = {x};
  visit_parametric<scalar_t>(act, [&](auto activation) {
    if constexpr (span == Span::kRun) {
      const auto fetch = [&](int64_t first, int64_t) {
        return static_cast<opmath>(parameter[shape.channels == 1 ? 0 : Place(shape, first).channel]);
      };
      elementwise<W>(count, in, y, fetch, [&](int64_t, int64_t, opmath of_packet, const Values<scalar_t, W>(&value)[1]) {
        Values<scalar_t, W> result;
#pragma unroll
        for (int i = 0; i < W; ++i) result.element[i] = activation(of_packet).forward(value[0].element[i]);
        return result;
      });
    } else {
      elementwise<W>(count, in, y, FetchNothing(), [&](int64_t first, int64_t, Nothing, const Values<scalar_t, W>(&value)[1]) {
        Values<scalar_t, W> of_element, result;
        if constexpr (span == Span::kColumns) {
          Packet<scalar_t, W> packet;
          load(packet, parameter + static_cast<unsigned>(first) % static_cast<unsigned>(shape.channels));
          of_element = Values<scalar_t, W>::of(packet);
        } else {
          Place place(shape, first);
#pragma unroll
          for (int i = 0; i < W; ++i, place.advance(shape)) of_element.element[i] = static_cast<opmath>(parameter[place.channel]);
        }
#pragma unroll
        for (int i = 0; i < W; ++i) result.element[i] = activation(of_element.element[i]).forward(value[0].element[i]);
        return result;
      });
    }
  });
}

// Writes grad_x of kPackets packets, unless grad_x is null; first[k] is the index of the first element of
// packet k. activation_of(i) is the functor of element i of a packet. add(i, share) receives the element's
// share of the gradient of its parameter.
template <typename scalar_t, int W, int kPackets, typename ActivationOf, typename Add>
__device__ __forceinline__ void parametric_backward_packets(const ParametricBackward& p, const int64_t (&first)[kPackets],
                                                            const ActivationOf& activation_of, const Add& add) {
  Packet<scalar_t, W> grad_packet[kPackets], x_packet[kPackets];
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    load(grad_packet[k], static_cast<const scalar_t*>(p.grad_y) + first[k]);
    load(x_packet[k], static_cast<const scalar_t*>(p.x) + first[k]);
  }
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    const Values<scalar_t, W> gradients = Values<scalar_t, W>::of(grad_packet[k]);
    const Values<scalar_t, W> values = Values<scalar_t, W>::of(x_packet[k]);
    Values<scalar_t, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      opmath_t<scalar_t> share;
      result.element[i] = activation_of(i).backward(gradients.element[i], values.element[i], share);
      add(i, share);
    }
    if (p.grad_x != nullptr) store(static_cast<scalar_t*>(p.grad_x) + first[k], result.rounded());
  }
}

// The packets of each tensor that a thread of the next two kernels loads before it uses them.
template <typename scalar_t, int W>
constexpr int kPacketsOfStep = kBytesInFlight / (2 * std::max(W * static_cast<int>(sizeof(scalar_t)), 4));

// A sum of a few terms: float32 in float32, float64 with its rounding errors, because there is no wider type.
template <typename opmath>
struct FewTerms {
  opmath total = opmath(0);

  __device__ __forceinline__ void add(opmath x) { total += x; }
  __device__ __forceinline__ opmath rounded() const { return total; }
};
template <>
struct FewTerms<double> : ThreadSum<double> {};

// The sum over the threads of a block, in thread 0.
__device__ __forceinline__ double block_sum(const ThreadSum<float>& sum, BlockScratch<double>& scratch) {
  return block_reduce(sum.rounded(), scratch, 0.0, Add());
}
__device__ __forceinline__ double block_sum(const ThreadSum<double>& sum, BlockScratch<math::Sum<double>>& scratch) {
  const math::Sum<double> total = block_reduce(sum.value(), scratch, {0.0, 0.0}, AddSums());
  return total.high + total.low;
}

template <typename opmath>
struct RunShared {
  BlockScratch<std::conditional_t<std::is_same<opmath, double>::value, math::Sum<double>, double>> scratch;
  unsigned flag;
};

// The parts of channels that form runs: as many as give kRunBlocksPerProcessor blocks for each SM, which it
// can hold at once, but with at least kLeastPacketsOfPart packets each. 32 bits hold the number of packets.
constexpr int kRunBlocksPerProcessor = 6;
constexpr int64_t kLeastPacketsOfPart = 4 * kThreads;
constexpr int64_t kMostPacketsOfPart = int64_t{1} << 30;

// grad_x = grad_y act'(x), and the gradient of each channel's parameter, if the elements of a channel form
// runs
//   launch   parts * channels blocks of kThreads; the last block of a channel adds up its parts, in order
//   requires tensors dense, in the order of `shape`; unless W = 1, inner a multiple of W or a single run of at
//            least W, and all tensors aligned to a packet; counters = 0
//   traffic  2n elements read, n written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kThreads)
    parametric_backward_run_kernel(ParametricBackward p, int parts, int64_t packets_of_part, double* partial, unsigned* counters) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kStep = kPacketsOfStep<scalar_t, W>;
  auto& shared = *shared_memory<RunShared<opmath>>();
  const int64_t channel = blockIdx.x / static_cast<unsigned>(parts);
  const int64_t part = blockIdx.x % static_cast<unsigned>(parts);
  const int64_t packets_of_row = p.shape.inner / W;
  const int64_t all = p.shape.rows * packets_of_row;
  const int64_t end = (part + 1) * packets_of_part < all ? (part + 1) * packets_of_part : all;
  const int64_t mine = part * packets_of_part + threadIdx.x;
  const int64_t row = quotient(mine, packets_of_row, all <= INT32_MAX);
  const int64_t within = mine - row * packets_of_row;
  // A step of kThreads packets goes on by whole rows and some packets, and by one row more at the end of a
  // row. `left` counts the packets up to there; a row of more than 32 bits ends in no more than one step.
  const int row_packets = static_cast<int>(packets_of_row < INT32_MAX ? packets_of_row : INT32_MAX);
  const int rows_of_step = kThreads / row_packets;
  const int rest_of_step = kThreads - rows_of_step * row_packets;
  const int64_t row_elements = p.shape.channels * p.shape.inner;
  const int64_t step = rows_of_step * row_elements + static_cast<int64_t>(rest_of_step) * W;
  const int64_t to_next_row = row_elements - p.shape.inner;
  int left = static_cast<int>(packets_of_row - within < INT32_MAX ? packets_of_row - within : INT32_MAX);
  int64_t next = row * row_elements + channel * p.shape.inner + within * W;
  const auto advance = [&] {
    const int64_t here = next;
    next += step;
    left -= rest_of_step;
    if (left <= 0) {
      left += row_packets;
      next += to_next_row;
    }
    return here;
  };

  const opmath parameter = static_cast<opmath>(static_cast<const scalar_t*>(p.parameter)[channel]);
  int packets = mine < end ? static_cast<int>((end - mine + kThreads - 1) / kThreads) : 0;
  ThreadSum<opmath> total;
  visit_parametric<scalar_t>(p.act, [&](auto activation) {
    const auto f = activation(parameter);
    const auto packets_at = [&](auto width, const auto& first) {
      FewTerms<opmath> sum;
      parametric_backward_packets<scalar_t, decltype(width)::value>(
          p, first, [&](int) { return f; }, [&](int, opmath share) { sum.add(share); });
      total.add(sum.rounded());
    };
    using Packets = std::integral_constant<int, W>;
    for (; packets >= kStep; packets -= kStep) {
      int64_t first[kStep];
#pragma unroll
      for (int k = 0; k < kStep; ++k) first[k] = advance();
      packets_at(Packets(), first);
    }
    for (; packets > 0; --packets) {
      const int64_t first[1] = {advance()};
      packets_at(Packets(), first);
    }
    if (part == parts - 1 && static_cast<int>(threadIdx.x) < p.shape.inner % W) {
      const int64_t first[1] = {all * W + static_cast<int>(threadIdx.x)};
      packets_at(std::integral_constant<int, 1>(), first);
    }
  });
  if (p.grad_parameter == nullptr) return;
  double sum = block_sum(total, shared.scratch);
  if (parts > 1) {
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
    if (!is_last_block(counters + channel, static_cast<unsigned>(parts), &shared.flag)) return;
    ThreadSum<opmath> of_parts;
    for (int i = threadIdx.x; i < parts; i += kThreads) of_parts.add(partial[channel * parts + i]);
    sum = block_sum(of_parts, shared.scratch);
  }
  if (threadIdx.x == 0) static_cast<scalar_t*>(p.grad_parameter)[channel] = static_cast<scalar_t>(sum);
}

constexpr int kColumnThreads = 512;
constexpr int kColumnBlocksPerProcessor = 2;
// Bytes of a row that a block reads, and the rows that a thread adds up before it passes its sums on.
constexpr int kColumnBytes = 256;
constexpr int kRowsOfSum = 32;

template <typename scalar_t, int W>
struct ColumnShared {
  static constexpr int kPadding = kWarpThreads / W;  // against bank conflicts
  opmath_t<scalar_t> sum[W][kColumnThreads + kPadding];
  double group[kColumnThreads];
  unsigned flag;
};

// The same if rows run across channels
//   launch   (column blocks, parts of the rows) blocks of kColumnThreads; `columns` neighbouring threads take
//            W channels each of one row, the next `columns` threads those of the next row; columns * W is at
//            most kColumnThreads; the last block of a column block adds up its parts, in order
//   requires inner = 1; unless W = 1, channels a multiple of W and all tensors aligned to a packet; counters
//            = 0, one for each column block
//   traffic  2n elements read, n written
template <typename scalar_t, int W>
__global__ void __launch_bounds__(kColumnThreads, sizeof(opmath_t<scalar_t>) == 8 ? 1 : kColumnBlocksPerProcessor)
    parametric_backward_column_kernel(ParametricBackward p, int columns, int64_t rows_of_part, double* partial, unsigned* counters) {
  using opmath = opmath_t<scalar_t>;
  constexpr int kStep = kPacketsOfStep<scalar_t, W>;
  auto& shared = *shared_memory<ColumnShared<scalar_t, W>>();
  const int thread = static_cast<int>(threadIdx.x);
  const int lines = kColumnThreads / columns;
  const int line = thread / columns;
  const int64_t channels = p.shape.channels;
  const int64_t block_channel = static_cast<int64_t>(blockIdx.x) * columns * W;
  const int64_t channel = block_channel + (thread - line * columns) * W;
  const int64_t begin = blockIdx.y * rows_of_part;
  const int64_t end = begin + rows_of_part < p.shape.rows ? begin + rows_of_part : p.shape.rows;
  const bool works = line < lines && channel < channels;

  Values<scalar_t, W> parameter{};
  if (works) {
#pragma unroll
    for (int i = 0; i < W; ++i) parameter.element[i] = static_cast<opmath>(static_cast<const scalar_t*>(p.parameter)[channel + i]);
  }
  // When sums are merged, thread t takes channel t % width; threads with the same channel form its groups.
  const int width = columns * W;
  const int groups = kColumnThreads / width;
  const int group = thread / width;
  const int place = thread - group * width;
  const bool merges = group < groups && block_channel + place < channels;
  // The sum of value(i) for i in [0, count), for each channel, in its thread of group 0.
  ThreadSum<opmath> total;
  const auto add_own = [&](int count, const auto& value) {
    if (merges) {
      for (int i = group; i < count; i += groups) total.add(value(i));
    }
  };
  const auto merged = [&] {
    shared.group[thread] = total.rounded();
    __syncthreads();
    total = {};
    if (group == 0) {
      for (int i = 0; i < groups; ++i) total.add(shared.group[i * width + place]);
    }
    return total.rounded();
  };

  for (int64_t chunk = begin; chunk < end; chunk += int64_t{kRowsOfSum} * lines) {
    FewTerms<opmath> sum[W];
    if (works) {
      const int64_t chunk_end = chunk + int64_t{kRowsOfSum} * lines < end ? chunk + int64_t{kRowsOfSum} * lines : end;
      int rows = chunk + line < chunk_end ? static_cast<int>((chunk_end - chunk - line + lines - 1) / lines) : 0;
      const int64_t step = lines * channels;
      int64_t next = (chunk + line) * channels + channel;
      visit_parametric<scalar_t>(p.act, [&](auto activation) {
        const auto rows_at = [&](const auto& first) {
          parametric_backward_packets<scalar_t, W>(
              p, first, [&](int i) { return activation(parameter.element[i]); }, [&](int i, opmath share) { sum[i].add(share); });
        };
        for (; rows >= kStep; rows -= kStep) {
          int64_t first[kStep];
#pragma unroll
          for (int k = 0; k < kStep; ++k, next += step) first[k] = next;
          rows_at(first);
        }
        for (; rows > 0; --rows, next += step) {
          const int64_t first[1] = {next};
          rows_at(first);
        }
      });
    }
    if (p.grad_parameter == nullptr) continue;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < W; ++i) shared.sum[i][thread] = sum[i].rounded();
    __syncthreads();
    add_own(lines, [&](int i) { return shared.sum[place % W][i * columns + place / W]; });
  }
  if (p.grad_parameter == nullptr) return;
  double sum = merged();
  const bool writes = group == 0 && merges;
  if (gridDim.y > 1) {
    if (writes) partial[blockIdx.y * channels + block_channel + place] = sum;
    if (!is_last_block(counters + blockIdx.x, gridDim.y, &shared.flag)) return;
    total = {};
    add_own(static_cast<int>(gridDim.y), [&](int part) { return partial[part * channels + block_channel + place]; });
    sum = merged();
  }
  if (writes) static_cast<scalar_t*>(p.grad_parameter)[block_channel + place] = static_cast<scalar_t>(sum);
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

// Whether neighbouring elements are in neighbouring channels.
bool runs_across_channels(const ChannelShape& shape) { return shape.inner == 1 && shape.channels > 1; }

// Calls function(scalar_t(), width): width is the number of elements of a packet of `bytes`.
template <typename Function>
void with_packet(DType dtype, int bytes, const Function& function) {
  dispatch(dtype, [&](auto zero) {
    constexpr int kSize = static_cast<int>(sizeof(zero));
    if (bytes == kPacketBytes) {
      function(zero, std::integral_constant<int, kPacketBytes / kSize>());
    } else if (kSize == 2 && bytes == kPacketBytes / 2) {
      function(zero, std::integral_constant<int, kSize == 2 ? kPacketBytes / 2 / kSize : 1>());
    } else {
      function(zero, std::integral_constant<int, 1>());
    }
  });
}

// The launch of an elementwise kernel over `count` elements.
template <int W, int kInputs>
Launch over(int64_t count) {
  return {dim3(static_cast<unsigned>(divide_up(count, kTileElements<W, kInputs>))), kThreads};
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
  const ChannelShape& shape = p.shape;
  const int64_t count = shape.rows * shape.channels * shape.inner;
  if (shape.channels > 1 && count > kMostOfChannels) {
    // Some rows at a time, or some channels of one row.
    const bool has_rows = shape.rows > 1;
    const int64_t lines = has_rows ? shape.rows : shape.channels;
    const int64_t of_line = count / lines;
    const int64_t most = std::max(int64_t{1}, kMostOfChannels / of_line);
    for (int64_t begin = 0; begin < lines; begin += most) {
      ParametricForward part = p;
      (has_rows ? part.shape.rows : part.shape.channels) = std::min(most, lines - begin);
      const int64_t bytes = begin * of_line * size_of(p.dtype);
      part.x = static_cast<const char*>(p.x) + bytes;
      part.y = static_cast<char*>(p.y) + bytes;
      if (!has_rows) part.parameter = static_cast<const char*>(p.parameter) + begin * size_of(p.dtype);
      parametric_forward(part);
    }
    return;
  }
  const auto run = [&](auto zero, auto width, auto span) {
    using scalar_t = decltype(zero);
    constexpr int W = decltype(width)::value;
    launch(parametric_forward_kernel<scalar_t, W, decltype(span)::value>, over<W, 1>(count), p.act, shape, count,
           static_cast<const scalar_t*>(p.x), static_cast<const scalar_t*>(p.parameter), static_cast<scalar_t*>(p.y));
  };
  const bool in_columns = runs_across_channels(shape);
  const int bytes = in_columns ? packet_bytes(shape.channels, size_of(p.dtype), alignment_of({p.x, p.y, p.parameter}))
                               : packet_bytes(shape.channels == 1 ? kPacketBytes : shape.inner, size_of(p.dtype), alignment_of({p.x, p.y}));
  with_packet(p.dtype, bytes, [&](auto zero, auto width) {
    constexpr int W = decltype(width)::value;
    if constexpr (W > 1) {
      if (in_columns) {
        run(zero, width, std::integral_constant<Span, Span::kColumns>());
      } else {
        run(zero, width, std::integral_constant<Span, Span::kRun>());
      }
    } else if (at_packet({p.x, p.y})) {
      // Packets of any elements need fewer instructions than single elements.
      run(zero, std::integral_constant<int, kPacketElements<decltype(zero)>>(), std::integral_constant<Span, Span::kAny>());
    } else {
      run(zero, width, std::integral_constant<Span, Span::kRun>());
    }
  });
}

void parametric_backward(const ParametricBackward& p) {
  const ChannelShape& shape = p.shape;
  const bool in_columns = runs_across_channels(shape);
  // A single run may end with less than a packet.
  const int64_t run = in_columns                                                        ? shape.channels
                      : shape.rows * shape.channels == 1 && shape.inner >= kPacketBytes ? kPacketBytes
                                                                                        : shape.inner;
  const int bytes = packet_bytes(run, size_of(p.dtype), alignment_of({p.grad_y, p.x, p.grad_x}));
  const int64_t processors = device_limits().processors;
  with_packet(p.dtype, bytes, [&](auto zero, auto width) {
    using scalar_t = decltype(zero);
    constexpr int W = decltype(width)::value;
    if (in_columns) {
      // Column blocks of equal width, of at most kColumnBytes.
      constexpr int64_t kMostColumns = kColumnBytes / (W * static_cast<int64_t>(sizeof(scalar_t)));
      const int64_t packets = shape.channels / W;
      const int64_t column_blocks = divide_up(packets, kMostColumns);
      const int columns = static_cast<int>(divide_up(packets, column_blocks));
      // As many parts as the SMs hold at once, but a thread takes several rows.
      const int64_t rows_of_step = kColumnThreads / columns * kPacketsOfStep<scalar_t, W>;
      const int64_t most_parts = std::max(int64_t{1}, processors * kColumnBlocksPerProcessor / column_blocks);
      const int64_t rows_of_part = std::max(rows_of_step, divide_up(shape.rows, most_parts));
      const int64_t parts = divide_up(shape.rows, rows_of_part);
      const Partials<double> sums(parts, shape.channels, column_blocks);
      launch(parametric_backward_column_kernel<scalar_t, W>,
             {dim3(static_cast<unsigned>(column_blocks), static_cast<unsigned>(parts)), kColumnThreads, sizeof(ColumnShared<scalar_t, W>)},
             p, columns, rows_of_part, sums.values(), sums.counters());
    } else {
      const int64_t packets = shape.rows * shape.inner / W;
      const int64_t most_parts = std::max(int64_t{1}, processors * kRunBlocksPerProcessor / shape.channels);
      const int64_t packets_of_part = std::min(kMostPacketsOfPart, std::max(kLeastPacketsOfPart, divide_up(packets, most_parts)));
      const int64_t parts = divide_up(packets, packets_of_part);
      const Partials<double> sums(parts, shape.channels, shape.channels);
      launch(parametric_backward_run_kernel<scalar_t, W>,
             {dim3(static_cast<unsigned>(parts * shape.channels)), kThreads, sizeof(RunShared<opmath_t<scalar_t>>)}, p,
             static_cast<int>(parts), packets_of_part, sums.values(), sums.counters());
    }
  });
}

}  // namespace gradkernels::cuda
