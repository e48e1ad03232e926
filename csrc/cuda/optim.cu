// RMSprop on CUDA: it reads parameters, gradients and averages once and writes them once.
#include "ops/optim.h"

#include "cuda/launch.cuh"
#include "cuda/tensor_table.cuh"

namespace gradkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;
constexpr int kPointers = 5;
// Without this bound, the compiler uses 64 registers, and local memory for one more.
constexpr int kResidentBlocks = 3;

template <typename scalar_t, bool centered, bool has_momentum>
__device__ __forceinline__ void rmsprop_piece(const TensorTable<kPointers>& table, const Piece& piece,
                                              const math::RmspropOptions& options) {
  using opmath = opmath_t<scalar_t>;
  const math::Rmsprop<opmath> rmsprop(options);
  const auto at = [&](int i) { return static_cast<scalar_t*>(table.pointer[i][piece.entry]) + piece.begin; };
  scalar_t* param = at(0);
  const scalar_t* grad = at(1);
  scalar_t* square_avg = at(2);
  scalar_t* grad_avg = at(3);
  scalar_t* momentum_buffer = at(4);
  const auto walk = [&](auto width) {
    constexpr int W = decltype(width)::value;
    for (int64_t first = static_cast<int64_t>(threadIdx.x) * W; first < piece.count; first += int64_t{kThreads} * W) {
      const int64_t valid = piece.count - first;
      const auto load_valid = [&](Packet<scalar_t, W>& to, const scalar_t* p) {
        if (valid >= W) {
          load(to, p + first);
        } else {
          load_some(to, p + first, valid, scalar_t(0.0f));
        }
      };
      Packet<scalar_t, W> params, grads, square_avgs, grad_avgs, momentum_buffers;
      load_valid(params, param);
      load_valid(grads, grad);
      load_valid(square_avgs, square_avg);
      if constexpr (centered) load_valid(grad_avgs, grad_avg);
      if constexpr (has_momentum) load_valid(momentum_buffers, momentum_buffer);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        math::RmspropState<opmath> x{static_cast<opmath>(params.element[i]), static_cast<opmath>(square_avgs.element[i]), opmath(0),
                                     opmath(0)};
        if constexpr (centered) x.grad_avg = static_cast<opmath>(grad_avgs.element[i]);
        if constexpr (has_momentum) x.momentum_buffer = static_cast<opmath>(momentum_buffers.element[i]);
        x = rmsprop.template step<centered, has_momentum>(x, static_cast<opmath>(grads.element[i]));
        params.element[i] = static_cast<scalar_t>(x.param);
        square_avgs.element[i] = static_cast<scalar_t>(x.square_avg);
        if constexpr (centered) grad_avgs.element[i] = static_cast<scalar_t>(x.grad_avg);
        if constexpr (has_momentum) momentum_buffers.element[i] = static_cast<scalar_t>(x.momentum_buffer);
      }
      store_valid(param + first, params, valid);
      store_valid(square_avg + first, square_avgs, valid);
      if constexpr (centered) store_valid(grad_avg + first, grad_avgs, valid);
      if constexpr (has_momentum) store_valid(momentum_buffer + first, momentum_buffers, valid);
    }
  };
  const auto stands_at_packet = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kPacketBytes == 0; };
  if (stands_at_packet(param) && stands_at_packet(grad) && stands_at_packet(square_avg) && (!centered || stands_at_packet(grad_avg)) &&
      (!has_momentum || stands_at_packet(momentum_buffer))) {
    walk(std::integral_constant<int, kPacketElements<scalar_t>>());
  } else {
    walk(std::integral_constant<int, 1>());
  }
}

// One step of every parameter of the table (csrc/math/optim.h)
//   launch   blocks of kThreads that stride over the slots of the table
//   requires the tensors of a parameter dense and in one order; no two parameters in the same memory
//   traffic  3n elements read, 2n written; one more each for grad_avg, and for momentum_buffer
template <bool centered, bool has_momentum>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    rmsprop_kernel(const __grid_constant__ TensorTable<kPointers> table, const math::RmspropOptions options) {
  for (int64_t slot = blockIdx.x; slot < table.slots(); slot += gridDim.x) {
    const Piece piece = table.piece(slot);
    dispatch(piece.dtype, [&](auto zero) { rmsprop_piece<decltype(zero), centered, has_momentum>(table, piece, options); });
  }
}

}  // namespace

void rmsprop(const RmspropRun* runs, int64_t run_count, const math::RmspropOptions& options) {
  // The options are the same for all parameters, but an empty parameter has null pointers.
  bool centered = false, has_momentum = false;
  for (int64_t r = 0; r < run_count; ++r) {
    centered |= runs[r].grad_avg != nullptr;
    has_momentum |= runs[r].momentum_buffer != nullptr;
  }
  const auto kernel = centered ? (has_momentum ? rmsprop_kernel<true, true> : rmsprop_kernel<true, false>)
                               : (has_momentum ? rmsprop_kernel<false, true> : rmsprop_kernel<false, false>);
  const auto pointer_of = [](const RmspropRun& run, int i) -> void* {
    void* const pointers[kPointers] = {run.param, const_cast<void*>(run.grad), run.square_avg, run.grad_avg, run.momentum_buffer};
    return pointers[i];
  };
  for_each_table<kPointers>(runs, run_count, pointer_of, [&](const TensorTable<kPointers>& table) {
    launch(kernel, {grid_for(table.slots(), kBlocksPerProcessor), kThreads}, table, options);
  });
}

}  // namespace gradkernels::cuda
