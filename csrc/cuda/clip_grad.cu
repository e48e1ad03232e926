// Gradient clipping on CUDA: one launch computes the norms of all pieces, one merges the pieces of each
// tensor, and one writes. The CPU does not wait for the GPU, which decides whether anything is written.
// Squares are computed and summed in float64, so that the square of a float32 gradient cannot overflow or
// underflow. The squares of float64 gradients can; such gradients are read a second time. Eight squares of
// 16-bit gradients are summed in float32 first: many GPUs have 1/64 of the arithmetic units for float64.
// Adaptive clipping takes one launch: a block measures a unit, and scales it while it lies in L2.
#include "ops/clip_grad.h"

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/tensor_table.cuh"
#include "math/clip_grad.h"

namespace gradkernels::cuda {
namespace {

constexpr int kThreads = 256;
// Packets that a thread loads before it uses the first of them. Measure with bench/bench_clip_grad.py on a
// GPU.
constexpr int kInFlight = 4;
constexpr int kBlocksPerProcessor = 8;
// Without this bound, the compiler uses 40 registers for compute capability 8.0, and local memory for one more.
constexpr int kResidentBlocks = 5;
// A warp merges the slots of a tensor, or the block if there are more.
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int64_t kMostSlotsOfWarp = 16 * kWarpThreads;

using DoubleSum = math::Sum<double>;

// The norm of a piece.
struct Found {
  double sum = 0.0;  // of |x| or x^2
  double max_abs = 0.0;
};

struct MergeFound {
  __device__ __forceinline__ Found operator()(const Found& a, const Found& b) const {
    return {a.sum + b.sum, math::max_or_nan(a.max_abs, b.max_abs)};
  }
};

// The norm of a tensor or of all tensors.
struct Known {
  DoubleSum sum{0.0, 0.0};  // of |x| or x^2
  double max_abs = 0.0;
  int64_t nonfinite = 0;  // elements that are nan or inf
};

struct Merge {
  __device__ __forceinline__ Known operator()(const Known& a, const Known& b) const {
    return {AddSums()(a.sum, b.sum), math::max_or_nan(a.max_abs, b.max_abs), a.nonfinite + b.nonfinite};
  }
};

struct Shared {
  BlockScratch<Known> scratch;
  BlockScratch<Found> found;
  Known of_run[kWarps];
  unsigned flag;
};

// Global memory in which one launch leaves results for the next.
struct Scratch {
  double* sum;  // of each slot, like the next two
  double* max_abs;
  int64_t* nonfinite;
  int64_t* slot_begin;  // the first slot of each tensor
  double* run_sum;      // of each tensor
  unsigned* counter;

  static size_t bytes(int64_t slots, int64_t runs) { return static_cast<size_t>(3 * slots + 2 * runs + 1) * sizeof(double); }
  Scratch(void* data, int64_t slots, int64_t runs)
      : sum(static_cast<double*>(data)),
        max_abs(sum + slots),
        nonfinite(reinterpret_cast<int64_t*>(max_abs + slots)),
        slot_begin(nonfinite + slots),
        run_sum(reinterpret_cast<double*>(slot_begin + runs)),
        counter(reinterpret_cast<unsigned*>(run_sum + runs)) {}
};

// A magnitude as an integer. Integers order nan above inf, and inf above every number.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7FFFFFFFu; }
__device__ __forceinline__ uint64_t magnitude_bits(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7FFFFFFFFFFFFFFFu;
}
__device__ __forceinline__ double magnitude_of(uint32_t bits) { return static_cast<double>(float_of(bits)); }
__device__ __forceinline__ double magnitude_of(uint64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// Adds |x| or x^2 of up to eight 16-bit numbers to `sum`. float32 holds each of these terms exactly, unless a
// square overflows or underflows, and their sum with three roundings. Outside of the bounds, float64 is used:
// below 2^-100, what squares below float32's range have lost would count. `largest` is that of the numbers.
template <Norm norm, int W>
__device__ __forceinline__ void add_terms(double& sum, const float (&x)[W], uint32_t largest) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < W; ++i) {
    part[i % 4] = norm == Norm::kTwo ? math::fma(x[i], x[i], part[i % 4]) : part[i % 4] + float_of(magnitude_bits(x[i]));
  }
  const float terms = (part[0] + part[1]) + (part[2] + part[3]);
  if (terms <= 0x1p120f && (norm == Norm::kOne || terms >= 0x1p-100f || largest == 0u)) {
    sum += static_cast<double>(terms);
    return;
  }
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const double wide = static_cast<double>(float_of(magnitude_bits(x[i])));
    sum += norm == Norm::kTwo ? wide * wide : wide;
  }
}

// The norm of a thread's share of a piece, of which each of `threads` threads has one.
template <Norm norm, int threads, typename scalar_t>
__device__ __forceinline__ Found found_of(const scalar_t* x, int64_t count, double factor) {
  using opmath = opmath_t<scalar_t>;
  decltype(magnitude_bits(opmath())) largest = 0;
  double sum[2] = {0.0, 0.0};
  for_each_packet<threads, kInFlight>(x, count, [&](const auto& packet, int64_t, int64_t) {
    constexpr int W = sizeof(packet) / sizeof(scalar_t);
    opmath value[W];
    decltype(largest) largest_of_packet = 0;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      // Elements after the end are 0.
      value[i] = static_cast<opmath>(packet.element[i]);
      const auto bits = magnitude_bits(value[i]);
      largest_of_packet = bits > largest_of_packet ? bits : largest_of_packet;
    }
    largest = largest_of_packet > largest ? largest_of_packet : largest;
    if constexpr (norm != Norm::kInfinity && sizeof(scalar_t) == 2) {
      add_terms<norm>(sum[0], value, largest_of_packet);
    } else if constexpr (norm != Norm::kInfinity) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const double wide = sizeof(opmath) == 8 ? static_cast<double>(value[i]) * factor : static_cast<double>(value[i]);
        if constexpr (norm == Norm::kTwo) sum[i % 2] = math::fma(wide, wide, sum[i % 2]);
        if constexpr (norm == Norm::kOne) sum[i % 2] += wide < 0.0 ? -wide : wide;
      }
    }
  });
  return {sum[0] + sum[1], magnitude_of(largest)};
}

template <typename scalar_t>
__device__ __forceinline__ int64_t nonfinite_of(const scalar_t* x, int64_t count) {
  int64_t nonfinite = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const opmath_t<scalar_t> value = static_cast<opmath_t<scalar_t>>(x[i]);
    nonfinite += !(value - value == opmath_t<scalar_t>(0));
  }
  return nonfinite;
}

// The norm of each slot, and where the slots of each tensor begin; with `rescues`, only for tensors whose
// squares are lost, rescaled
//   launch   a block of kThreads for each slot of the table
//   requires with `rescues`, the results of a first run and of grad_norms_of_runs_kernel
//   traffic  n elements read
template <Norm norm>
__global__ void __launch_bounds__(kThreads)
    grad_norms_kernel(const __grid_constant__ TensorTable<1> table, Scratch scratch, bool rescues, GradNorms out) {
  Shared& shared = *shared_memory<Shared>();
  const Piece piece = table.piece(blockIdx.x);
  const int64_t slot = table.first_slot + blockIdx.x;
  const int64_t run = table.first_tensor + piece.entry;
  double factor = 1.0;
  if (rescues) {
    if (!math::squares_are_lost(scratch.run_sum[run], out.max_abs[run])) return;
    factor = math::rescaling(out.max_abs[run]).factor;
  }
  // Calls function(x) with the elements of the piece.
  const auto with_elements = [&](const auto& function) {
    dispatch(piece.dtype, [&](auto zero) { function(static_cast<const decltype(zero)*>(table.pointer[0][piece.entry]) + piece.begin); });
  };
  Found found;
  with_elements([&](const auto* x) { found = found_of<norm, kThreads>(x, piece.count, factor); });
  found = block_all_reduce(found, shared.found, Found(), MergeFound());
  int64_t nonfinite = 0;
  // Rare: a gradient with a nan or an inf is read twice.
  if (!(found.max_abs - found.max_abs == 0.0)) {
    with_elements([&](const auto* x) { nonfinite = nonfinite_of(x, piece.count); });
    nonfinite = block_reduce(Known{{0.0, 0.0}, 0.0, nonfinite}, shared.scratch, Known(), Merge()).nonfinite;
  }
  if (threadIdx.x == 0) {
    scratch.sum[slot] = found.sum;
    scratch.max_abs[slot] = found.max_abs;
    scratch.nonfinite[slot] = nonfinite;
    if (piece.is_first) scratch.slot_begin[run] = slot;
  }
}

// The norm of all tensors. All threads of the block must call it, after a barrier that follows the last use of
// shared.scratch.
template <Norm norm>
__device__ double total_norm_of(const Scratch& scratch, int64_t runs, bool rescues, const GradNorms& out, Shared& shared) {
  Known total;
  for (int64_t r = threadIdx.x; r < runs; r += kThreads) {
    math::add(total.sum, scratch.run_sum[r]);
    total.max_abs = math::max_or_nan(total.max_abs, norm == Norm::kTwo ? out.norms[r] : out.max_abs[r]);
    if (rescues) total.nonfinite += math::squares_are_lost(scratch.run_sum[r], out.max_abs[r]);
  }
  total = block_all_reduce(total, shared.scratch, Known(), Merge());
  const double sum = total.sum.high + total.sum.low;
  if (norm == Norm::kInfinity) return total.max_abs;
  if (norm == Norm::kOne) return sum;
  if (!rescues || (total.nonfinite == 0 && math::is_safe_square_sum(sum))) return math::sqrt(sum);
  // The norm of the norms, whose squares may overflow or underflow too. For zeros, both ways give 0.
  const math::Rescaling rescaled = math::rescaling(total.max_abs);
  Known squares;
  for (int64_t r = threadIdx.x; r < runs; r += kThreads) {
    const double scaled = out.norms[r] * rescaled.factor;
    math::add(squares.sum, scaled * scaled);
  }
  __syncthreads();
  squares = block_all_reduce(squares, shared.scratch, Known(), Merge());
  return math::sqrt(squares.sum.high + squares.sum.low) * rescaled.inverse;
}

// The norm of each tensor from its slots; the last block also computes the norm of all tensors
//   launch   a block of kThreads for each kWarps tensors
//   requires the results of grad_norms_kernel for all slots; counter = 0
//   traffic  24 bytes read for each slot
template <Norm norm>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    grad_norms_of_runs_kernel(int64_t runs, int64_t slots, Scratch scratch, bool rescues, GradNorms out) {
  Shared& shared = *shared_memory<Shared>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const auto end_of = [&](int64_t run) { return run + 1 < runs ? scratch.slot_begin[run + 1] : slots; };
  const auto is_for_block = [&](int64_t run) { return end_of(run) - scratch.slot_begin[run] > kMostSlotsOfWarp; };
  // What a thread of `threads` knows of a tensor.
  const auto share_of = [&](int64_t run, int thread, int threads) {
    Known known;
    for (int64_t slot = scratch.slot_begin[run] + thread; slot < end_of(run); slot += threads) {
      math::add(known.sum, scratch.sum[slot]);
      known.max_abs = math::max_or_nan(known.max_abs, scratch.max_abs[slot]);
      known.nonfinite += scratch.nonfinite[slot];
    }
    return known;
  };
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps;
  for (int i = 0; i < kWarps && first + i < runs; ++i) {
    if (!is_for_block(first + i)) continue;
    const Known known = block_reduce(share_of(first + i, static_cast<int>(threadIdx.x), kThreads), shared.scratch, Known(), Merge());
    if (threadIdx.x == 0) shared.of_run[i] = known;
    __syncthreads();
  }
  const int64_t run = first + warp;
  if (run < runs && (!rescues || math::squares_are_lost(scratch.run_sum[run], out.max_abs[run]))) {
    const Known known = is_for_block(run) ? shared.of_run[warp] : warp_reduce(share_of(run, lane, kWarpThreads), Merge());
    const double sum = known.sum.high + known.sum.low;
    const double root = norm == Norm::kTwo ? math::sqrt(sum) : sum;
    if (lane == 0 && rescues) {
      // run_sum keeps its value, which shows that the tensor was rescued.
      out.norms[run] = root * math::rescaling(out.max_abs[run]).inverse;
    } else if (lane == 0) {
      scratch.run_sum[run] = sum;
      out.max_abs[run] = known.max_abs;
      out.nonfinite[run] = known.nonfinite;
      out.norms[run] = norm == Norm::kInfinity ? known.max_abs : root;
    }
  }
  if (!is_last_block(scratch.counter, gridDim.x, &shared.flag)) return;
  const double total = total_norm_of<norm>(scratch, runs, rescues, out, shared);
  if (threadIdx.x == 0) *out.total_norm = total;
}

// x *= coefficient, by each of `threads` threads for its share. As on the CPU, the product is computed in float64
// and rounded once, because a coefficient may be too small for float32 when the product is not. For 16-bit
// elements it is computed in float32 if the coefficient is a normal float32: the rounding to 16 bits hides that
// of float32.
template <int threads, typename scalar_t>
__device__ __forceinline__ void scale(scalar_t* x, int64_t count, double coefficient) {
  const auto scale_by = [&](auto factor) {
    for_each_packet<threads, kInFlight>(x, count, [&](auto packet, int64_t first, int64_t valid) {
      constexpr int W = sizeof(packet) / sizeof(scalar_t);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        packet.element[i] = static_cast<scalar_t>(static_cast<decltype(factor)>(packet.element[i]) * factor);
      }
      store_valid(x + first, packet, valid);
    });
  };
  const double magnitude = coefficient < 0.0 ? -coefficient : coefficient;
  const bool fits_float = !(magnitude < 0x1p-126 || magnitude > 0x1p127) || magnitude == 0.0;
  if (sizeof(scalar_t) == 2 && fits_float) {
    scale_by(static_cast<float>(coefficient));
  } else {
    scale_by(coefficient);
  }
}

// x *= coefficient
//   launch   blocks of kThreads that stride over the slots of the table, last slot first, because the last
//            slots are still in L2
//   requires the total norm in global memory
//   traffic  n elements read, n written; none if math::leaves_unscaled
__global__ void __launch_bounds__(kThreads)
    clip_with_norm_kernel(const __grid_constant__ TensorTable<1> table, double max_norm, const double* total_norm) {
  const double coefficient = math::clip_coefficient(*total_norm, max_norm);
  if (math::leaves_unscaled(coefficient)) return;
  for (int64_t slot = table.slots() - 1 - blockIdx.x; slot >= 0; slot -= gridDim.x) {
    const Piece piece = table.piece(slot);
    dispatch(piece.dtype, [&](auto zero) {
      scale<kThreads>(static_cast<decltype(zero)*>(table.pointer[0][piece.entry]) + piece.begin, piece.count, coefficient);
    });
  }
}

// x = clamp(x, limit)
//   launch   blocks of kThreads that stride over the slots of the table
//   requires no two tensors in the same memory
//   traffic  n elements read, at most n written: packets within the limit are not written
__global__ void __launch_bounds__(kThreads) clamp_kernel(const __grid_constant__ TensorTable<1> table, double limit) {
  for (int64_t slot = blockIdx.x; slot < table.slots(); slot += gridDim.x) {
    const Piece piece = table.piece(slot);
    dispatch(piece.dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      using opmath = opmath_t<scalar_t>;
      scalar_t* x = static_cast<scalar_t*>(table.pointer[0][piece.entry]) + piece.begin;
      for_each_packet<kThreads, kInFlight>(x, piece.count, [&](auto packet, int64_t first, int64_t valid) {
        constexpr int W = sizeof(packet) / sizeof(scalar_t);
        bool changed = false;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const opmath value = static_cast<opmath>(packet.element[i]);
          const opmath clamped = math::clamp(value, static_cast<opmath>(limit));
          changed |= clamped != value;
          packet.element[i] = static_cast<scalar_t>(clamped);
        }
        if (changed) store_valid(x + first, packet, valid);
      });
    });
  }
}

// A list of parameters and gradients as an argument of a kernel, cut into units.
struct UnitTable {
  static constexpr int kMostEntries = (kTableBytes - 16) / 33 - 1;

  const void* param[kMostEntries];
  void* grad[kMostEntries];
  int64_t elements[kMostEntries];          // of a unit
  int64_t units_before[kMostEntries + 1];  // of the entries before
  DType dtype[kMostEntries];
  int32_t entries;

  __device__ __forceinline__ int entry_of(int64_t unit) const {
    int low = 0, high = entries;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (units_before[middle] <= unit) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// The norm of `count` elements; all threads of the block get it.
template <Norm norm, int threads, typename scalar_t>
__device__ __forceinline__ double norm_of(const scalar_t* x, int64_t count, BlockScratch<Found>& scratch) {
  const auto found_by = [&](double factor) {
    // The barrier stands between two uses of the scratch.
    __syncthreads();
    return block_all_reduce(found_of<norm, threads>(x, count, factor), scratch, Found(), MergeFound());
  };
  const Found found = found_by(1.0);
  if (norm == Norm::kInfinity) return found.max_abs;
  if (norm == Norm::kOne) return found.sum;
  if (sizeof(scalar_t) < 8 || !math::squares_are_lost(found.sum, found.max_abs)) return math::sqrt(found.sum);
  const math::Rescaling rescaled = math::rescaling(found.max_abs);
  return math::sqrt(found_by(rescaled.factor).sum) * rescaled.inverse;
}

// A unit with fewer elements is for a block of one warp.
constexpr int64_t kWarpUnitElements = 2048;

// grad *= coefficient, for each unit its own
//   launch   blocks of `threads` that stride over the units of the table
//   requires no two gradients in the same memory
//   traffic  2n elements read; n read again and written in the units that are clipped
template <Norm norm, int threads>
__global__ void __launch_bounds__(threads) adaptive_clip_kernel(const __grid_constant__ UnitTable table, double clip_factor, double eps) {
  BlockScratch<Found>& scratch = *shared_memory<BlockScratch<Found>>();
  for (int64_t unit = blockIdx.x; unit < table.units_before[table.entries]; unit += gridDim.x) {
    const int entry = table.entry_of(unit);
    const int64_t count = table.elements[entry];
    const int64_t begin = (unit - table.units_before[entry]) * count;
    double coefficient = 1.0;
    dispatch(table.dtype[entry], [&](auto zero) {
      using scalar_t = decltype(zero);
      const double param_norm = norm_of<norm, threads>(static_cast<const scalar_t*>(table.param[entry]) + begin, count, scratch);
      const double grad_norm = norm_of<norm, threads>(static_cast<const scalar_t*>(table.grad[entry]) + begin, count, scratch);
      coefficient = math::adaptive_clip_coefficient(param_norm, grad_norm, clip_factor, eps);
    });
    if (math::leaves_unscaled(coefficient)) continue;
    dispatch(table.dtype[entry],
             [&](auto zero) { scale<threads>(static_cast<decltype(zero)*>(table.grad[entry]) + begin, count, coefficient); });
  }
}

// Clips the units for blocks of `threads`: those of one warp are short.
template <Norm norm, int threads>
void adaptive_clip_by(const UnitRun* runs, int64_t run_count, double clip_factor, double eps) {
  UnitTable table;
  table.entries = 0;
  table.units_before[0] = 0;
  const auto finish = [&] {
    const dim3 grid = grid_for(table.units_before[table.entries], kBlocksPerProcessor * kThreads / threads);
    launch(adaptive_clip_kernel<norm, threads>, {grid, threads, sizeof(BlockScratch<Found>)}, table, clip_factor, eps);
    table.entries = 0;
  };
  for (int64_t r = 0; r < run_count; ++r) {
    if ((runs[r].elements < kWarpUnitElements) != (threads == kWarpThreads)) continue;
    const int entry = table.entries++;
    table.param[entry] = runs[r].param;
    table.grad[entry] = runs[r].grad;
    table.elements[entry] = runs[r].elements;
    table.dtype[entry] = runs[r].dtype;
    table.units_before[entry + 1] = table.units_before[entry] + runs[r].units;
    if (table.entries == UnitTable::kMostEntries) finish();
  }
  finish();
}

template <Norm norm>
void adaptive_clip_of(const UnitRun* runs, int64_t run_count, double clip_factor, double eps) {
  adaptive_clip_by<norm, kWarpThreads>(runs, run_count, clip_factor, eps);
  adaptive_clip_by<norm, kThreads>(runs, run_count, clip_factor, eps);
}

// Calls launch(table) for the tables of the runs.
template <typename Launch>
int64_t over_tables(const Run* runs, int64_t run_count, const Launch& launch) {
  return for_each_table<1>(runs, run_count, [](const Run& run, int) { return run.data; }, launch);
}

template <Norm norm>
void grad_norms_of(const Run* runs, int64_t run_count, const GradNorms& out) {
  const int64_t most = most_slots(runs, run_count);
  const Workspace workspace(Scratch::bytes(most, run_count));
  const Scratch scratch(workspace.data(), most, run_count);
  check(cudaMemsetAsync(scratch.counter, 0, sizeof(unsigned), current_stream()));
  bool may_lose_squares = false;
  for (int64_t r = 0; r < run_count; ++r) may_lose_squares |= norm == Norm::kTwo && runs[r].dtype == DType::kFloat64;
  for (const bool rescues : {false, true}) {
    if (rescues && !may_lose_squares) break;
    const int64_t slots = over_tables(runs, run_count, [&](const TensorTable<1>& table) {
      launch(grad_norms_kernel<norm>, {dim3(static_cast<unsigned>(table.slots())), kThreads, sizeof(Shared)}, table, scratch, rescues, out);
    });
    launch(grad_norms_of_runs_kernel<norm>, {dim3(static_cast<unsigned>((run_count + kWarps - 1) / kWarps)), kThreads, sizeof(Shared)},
           run_count, slots, scratch, rescues, out);
  }
}

}  // namespace

void grad_norms(const Run* runs, int64_t run_count, Norm norm, const GradNorms& out) {
  if (norm == Norm::kTwo) return grad_norms_of<Norm::kTwo>(runs, run_count, out);
  if (norm == Norm::kOne) return grad_norms_of<Norm::kOne>(runs, run_count, out);
  return grad_norms_of<Norm::kInfinity>(runs, run_count, out);
}

void clip_with_norm(const Run* runs, int64_t run_count, double max_norm, const double* total_norm) {
  over_tables(runs, run_count, [&](const TensorTable<1>& table) {
    launch(clip_with_norm_kernel, {grid_for(table.slots(), kBlocksPerProcessor), kThreads}, table, max_norm, total_norm);
  });
}

void clamp(const Run* runs, int64_t run_count, double limit) {
  over_tables(runs, run_count, [&](const TensorTable<1>& table) {
    launch(clamp_kernel, {grid_for(table.slots(), kBlocksPerProcessor), kThreads}, table, limit);
  });
}

void adaptive_clip(const UnitRun* runs, int64_t run_count, Norm norm, double clip_factor, double eps) {
  if (norm == Norm::kTwo) return adaptive_clip_of<Norm::kTwo>(runs, run_count, clip_factor, eps);
  if (norm == Norm::kOne) return adaptive_clip_of<Norm::kOne>(runs, run_count, clip_factor, eps);
  return adaptive_clip_of<Norm::kInfinity>(runs, run_count, clip_factor, eps);
}

}  // namespace gradkernels::cuda
