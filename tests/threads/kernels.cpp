// Runs the CPU kernels on threads of this program, without Python. ThreadSanitizer (make sanitize) does not
// know the barriers of OpenMP, which torch's threads use, and emulated processors (make emulate) have no
// Python. Every launcher runs in every dtype on one thread and on four, on operands that are large enough to
// be cut. The results must be the same bits. The printed hash is the same on every processor that runs the
// base kernels.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "ops/activation.h"
#include "ops/batch_norm_act.h"
#include "ops/clip_grad.h"
#include "ops/group_norm_act.h"
#include "ops/optim.h"

namespace {

int64_t threads = 1;

using namespace gradkernels;
using math::Activation;
using math::ActivationKind;

// Numbers between -2 and 2, the same in every run.
template <typename scalar_t>
std::vector<scalar_t> numbers(int64_t count, uint32_t seed) {
  std::vector<scalar_t> made(count);
  for (scalar_t& each : made) {
    seed = seed * 1664525u + 1013904223u;
    each = static_cast<scalar_t>(static_cast<int32_t>(seed) * 0x1p-30);
  }
  return made;
}

template <typename scalar_t>
std::vector<scalar_t> positive(int64_t count, uint32_t seed) {
  std::vector<scalar_t> made = numbers<scalar_t>(count, seed);
  for (scalar_t& each : made) each = static_cast<scalar_t>(std::fabs(static_cast<double>(each)) + 0.5);
  return made;
}

// The number of bytes that the launchers write, and a hash of them (FNV-1a, 8 bytes at a time).
struct Results {
  uint64_t hash = 0xCBF29CE484222325u;
  size_t bytes = 0;

  template <typename T>
  void add(const std::vector<T>& values) {
    const size_t size = values.size() * sizeof(T);
    const char* data = reinterpret_cast<const char*>(values.data());
    for (size_t i = 0; i < size; i += sizeof(hash)) {
      uint64_t word = 0;
      std::memcpy(&word, data + i, std::min(sizeof(word), size - i));
      hash = (hash ^ word) * 0x100000001B3u;
    }
    bytes += size;
  }
};

template <typename scalar_t>
void activations(DType dtype, Results& results) {
  const int64_t count = 200'003;
  const std::vector<scalar_t> x = numbers<scalar_t>(count, 1), grad_y = numbers<scalar_t>(count, 2);
  std::vector<scalar_t> y(count), grad_x(count);
  std::vector<uint8_t> mask((count + 7) / 8);
  for (const Activation act : {Activation{ActivationKind::kLeakyRelu, 0.1}, {ActivationKind::kElu, 1.3}, {ActivationKind::kSwish, 1.7}}) {
    const bool masked = act.kind == ActivationKind::kLeakyRelu;
    cpu::activation_forward(dtype, act, count, x.data(), y.data(), masked ? mask.data() : nullptr);
    results.add(y);
    results.add(mask);
    const void* saved = masked ? static_cast<const void*>(mask.data()) : x.data();
    cpu::activation_backward(dtype, act, masked ? Saved::kMask : Saved::kInput, count, grad_y.data(), saved, grad_x.data());
    results.add(grad_x);
  }
  const int64_t seed = 7;
  cpu::rrelu_forward(dtype, {&seed, 0.1, 0.3}, count, x.data(), y.data(), mask.data());
  cpu::rrelu_backward(dtype, {&seed, 0.1, 0.3}, count, grad_y.data(), mask.data(), grad_x.data());
  results.add(y);
  results.add(grad_x);
}

// All four shapes in float32 only, because emulated processors are slow. All dtypes are cut in the same way.
std::vector<ChannelShape> shapes_of(DType dtype) {
  std::vector<ChannelShape> shapes{{8, 24, 961}, {64, 129, 9}};
  if (dtype == DType::kFloat32) shapes.insert(shapes.end(), {{6151, 67, 1}, {3, 2, 100'003}});
  return shapes;
}

template <typename scalar_t>
void parametric(DType dtype, Results& results) {
  for (const ChannelShape& shape : shapes_of(dtype)) {
    const int64_t count = shape.rows * shape.channels * shape.inner;
    const std::vector<scalar_t> x = numbers<scalar_t>(count, 3), grad_y = numbers<scalar_t>(count, 4),
                                parameter = numbers<scalar_t>(shape.channels, 5);
    std::vector<scalar_t> y(count), grad_x(count), grad_parameter(shape.channels);
    for (const Parametric act : {Parametric::kPrelu, Parametric::kSwish}) {
      cpu::parametric_forward({dtype, shape, act, x.data(), parameter.data(), y.data()});
      cpu::parametric_backward({dtype, shape, act, grad_y.data(), x.data(), parameter.data(), grad_x.data(), grad_parameter.data()});
      results.add(y);
      results.add(grad_x);
      results.add(grad_parameter);
    }
  }
}

// The shape of a sample, and the channels of a group: in one pass; in two, with few groups, and with groups over many rows.
std::vector<std::pair<ChannelShape, int64_t>> grouped_of(DType dtype) {
  std::vector<std::pair<ChannelShape, int64_t>> shapes{{{1, 24, 961, 3}, 3}};
  if (dtype == DType::kFloat32) shapes.insert(shapes.end(), {{{1, 4, 100'003, 1}, 2}, {{600, 72, 1, 2}, 9}});
  return shapes;
}

// Batch norm, or group norm if a set has several channels.
template <typename scalar_t>
void norm_act(DType dtype, const ChannelShape& shape, int64_t set_channels, Results& results) {
  const bool grouped = set_channels > 1;
  for (const ActivationKind kind : {ActivationKind::kRelu6, ActivationKind::kSwish}) {
    const int64_t count = shape.samples * shape.rows * shape.channels * shape.inner, channels = shape.channels;
    const std::vector<scalar_t> x = numbers<scalar_t>(count, 6), grad_y = numbers<scalar_t>(count, 7),
                                residual = numbers<scalar_t>(count, 8);
    const std::vector<scalar_t> weight = positive<scalar_t>(channels, 9), bias = numbers<scalar_t>(channels, 10);
    std::vector<scalar_t> running_mean = numbers<scalar_t>(channels, 11), running_var = positive<scalar_t>(channels, 12), y(count);
    const int64_t sets = shape.samples * channels / set_channels;
    std::vector<double> mean(sets), invstd(sets), moments(1 + 2 * channels), sums(2 * channels);
    const Activation act{kind, 1.0};
    std::vector<uint8_t> mask(act.has_two_slopes() ? shape.samples * mask_bytes(shape.rows, channels, shape.inner) : 0);
    BatchNormForward forward{};
    forward.dtype = forward.parameter_dtype = dtype;
    forward.shape = shape;
    forward.set_channels = set_channels;
    forward.act = act;
    forward.training = true;
    forward.momentum = 0.1;
    forward.eps = 1e-5;
    forward.x = x.data();
    forward.residual = residual.data();
    forward.weight = weight.data();
    forward.bias = bias.data();
    forward.running_mean = running_mean.data();
    forward.running_var = running_var.data();
    forward.mean = mean.data();
    forward.invstd = invstd.data();
    forward.y = y.data();
    forward.mask = mask.empty() ? nullptr : mask.data();
    grouped ? cpu::group_norm_act_forward(forward) : cpu::batch_norm_act_forward(forward);
    results.add(y);
    results.add(running_var);
    results.add(mask);
    if (!grouped) cpu::batch_norm_act_stats(forward, moments.data());
    grouped ? cpu::group_norm_act_elemt(forward) : cpu::batch_norm_act_elemt(forward);
    results.add(moments);
    results.add(y);

    std::vector<scalar_t> grad_x(count), grad_residual(count), grad_weight(channels), grad_bias(channels);
    BatchNormBackward backward{};
    backward.dtype = backward.parameter_dtype = dtype;
    backward.shape = shape;
    backward.set_channels = set_channels;
    backward.act = act;
    backward.training = true;
    backward.grad_y = grad_y.data();
    backward.x = x.data();
    backward.residual = mask.empty() ? residual.data() : nullptr;
    backward.mask = forward.mask;
    backward.weight = weight.data();
    backward.bias = bias.data();
    backward.mean = mean.data();
    backward.invstd = invstd.data();
    backward.grad_x = grad_x.data();
    backward.grad_weight = grad_weight.data();
    backward.grad_bias = grad_bias.data();
    for (const bool with_residual : {false, true}) {
      backward.grad_residual = with_residual ? grad_residual.data() : nullptr;
      grouped ? cpu::group_norm_act_backward(backward) : cpu::batch_norm_act_backward(backward);
      results.add(grad_x);
      results.add(grad_weight);
      results.add(grad_bias);
    }
    results.add(grad_residual);
    if (grouped) continue;
    cpu::batch_norm_act_backward_reduce(backward, sums.data());
    const double count_of_all = static_cast<double>(2 * shape.rows * shape.inner);
    cpu::batch_norm_act_backward_elemt(backward, sums.data(), &count_of_all);
    results.add(sums);
    results.add(grad_x);
  }
}

template <typename scalar_t>
void gradients(DType dtype, Results& results) {
  const int64_t sizes[] = {1, 70'001, 0, 17, 300'000, 65'536};
  std::vector<std::vector<scalar_t>> grads, params, square_avgs, momentum_buffers;
  std::vector<Run> runs;
  std::vector<RmspropRun> rmsprop_runs;
  for (const int64_t size : sizes) {
    grads.push_back(numbers<scalar_t>(size, 13));
    params.push_back(numbers<scalar_t>(size, 14));
    square_avgs.push_back(positive<scalar_t>(size, 15));
    momentum_buffers.push_back(numbers<scalar_t>(size, 16));
  }
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t count = static_cast<int64_t>(grads[i].size());
    runs.push_back({dtype, count, grads[i].data()});
    rmsprop_runs.push_back({dtype, count, params[i].data(), grads[i].data(), square_avgs[i].data(), nullptr, momentum_buffers[i].data()});
  }
  const int64_t count = static_cast<int64_t>(runs.size());
  std::vector<double> norms(count), max_abs(count), total(1);
  std::vector<int64_t> nonfinite(count);
  for (const Norm norm : {Norm::kOne, Norm::kTwo, Norm::kInfinity}) {
    cpu::grad_norms(runs.data(), count, norm, {norms.data(), max_abs.data(), nonfinite.data(), total.data()});
    results.add(norms);
    results.add(total);
  }
  cpu::clip_with_norm(runs.data(), count, 0.37 * total[0], total.data());
  cpu::clamp(runs.data(), count, 0.5);
  cpu::rmsprop(rmsprop_runs.data(), count, {0.1, 0.9, 1e-8, 0.01, 0.9, 0.5});
  for (size_t i = 0; i < grads.size(); ++i) {
    results.add(grads[i]);
    results.add(params[i]);
    results.add(momentum_buffers[i]);
  }
}

Results everything(int64_t with_threads) {
  threads = with_threads;
  Results results;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    dispatch(dtype, [&](auto zero) {
      using scalar_t = decltype(zero);
      activations<scalar_t>(dtype, results);
      parametric<scalar_t>(dtype, results);
      for (const ChannelShape& shape : shapes_of(dtype)) norm_act<scalar_t>(dtype, shape, 1, results);
      for (const auto& [shape, set_channels] : grouped_of(dtype)) norm_act<scalar_t>(dtype, shape, set_channels, results);
      gradients<scalar_t>(dtype, results);
    });
  }
  return results;
}

}  // namespace

// Like torch's: cuts the range into equal parts of at least `grain_size`, one for each thread.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, (end - begin + grain_size - 1) / grain_size));
  const int64_t part = (end - begin + parts - 1) / parts;
  std::vector<std::thread> pool;
  for (int64_t from = begin; from < end; from += part) pool.emplace_back(func, from, std::min(from + part, end), ctx);
  for (std::thread& thread : pool) thread.join();
  return 0;
}

int main() {
  const Results one = everything(1), four = everything(4);
  if (one.bytes != four.bytes || one.hash != four.hash) {
    std::puts("results depend on the number of threads");
    return 1;
  }
  std::printf("%s: %zu bytes of results, the same on 1 and on 4 threads, hash %016llx\n", cpu::kernels().name, one.bytes,
              static_cast<unsigned long long>(one.hash));
  return 0;
}
