// Gradient clipping on the CPU: all tensors cut into chunks, the chunks over threads, partial results met in the order of the elements.
#include "ops/clip_grad.h"

#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "math/clip_grad.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

constexpr int64_t kChunkElements = 65536;

// A thread is worth its start from about this many elements on; tensors below it share one.
constexpr int64_t kGrainElements = 32768;

std::vector<Run> chunks_of(const Run* runs, int64_t run_count) {
  std::vector<Run> chunks;
  chunks.reserve(run_count);
  for (int64_t r = 0; r < run_count; ++r) {
    for (int64_t offset = 0; offset < runs[r].count; offset += kChunkElements) {
      const int64_t rest = runs[r].count - offset;
      chunks.push_back({runs[r].dtype, rest < kChunkElements ? rest : kChunkElements,
                        static_cast<char*>(runs[r].data) + offset * size_of(runs[r].dtype)});
    }
  }
  return chunks;
}

template <typename Function>
void for_each_chunk(const std::vector<Run>& chunks, const Function& function) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  int64_t elements = 1;
  for (const Run& chunk : chunks) elements += chunk.count;
  parallel_for(count, 1 + kGrainElements * count / elements, function);
}

// What `partial` returns for each chunk, in order.
template <typename Partial>
std::vector<double> partials_of(const std::vector<Run>& chunks, const Partial& partial) {
  std::vector<double> partials(chunks.size());
  for_each_chunk(chunks, [&](int64_t i) { partials[i] = partial(chunks[i]); });
  return partials;
}

double square_sum(const std::vector<Run>& chunks, double factor) {
  math::Sum<double> total{0.0, 0.0};
  for (const double partial :
       partials_of(chunks, [&](const Run& c) { return kernels().sum_of_squares(c.dtype, c.count, c.data, factor); })) {
    math::add(total, partial);
  }
  return total.high + total.low;
}

double max_magnitude(const std::vector<Run>& chunks) {
  double maximum = 0.0;
  for (const double partial : partials_of(chunks, [](const Run& c) { return kernels().max_magnitude(c.dtype, c.count, c.data); })) {
    maximum = math::max_or_nan(maximum, partial);
  }
  return maximum;
}

}  // namespace

double total_norm(const Run* runs, int64_t run_count, Norm norm) {
  const std::vector<Run> chunks = chunks_of(runs, run_count);
  if (norm == Norm::kInfinity) return max_magnitude(chunks);
  const double sum = square_sum(chunks, 1.0);
  if (sum >= math::kSmallestSafeSquareSum && sum <= math::kLargestSafeSquareSum) return math::sqrt(sum);
  const math::Rescaling rescaled = math::rescaling(max_magnitude(chunks));
  return math::sqrt(square_sum(chunks, rescaled.factor)) * rescaled.inverse;
}

void scale(const Run* runs, int64_t run_count, double coefficient) {
  const std::vector<Run> chunks = chunks_of(runs, run_count);
  // Last first: what the norm has read last is still in cache.
  for_each_chunk(chunks, [&](int64_t i) {
    const Run& chunk = chunks[chunks.size() - 1 - i];
    kernels().scale(chunk.dtype, chunk.count, chunk.data, coefficient);
  });
}

}  // namespace gradkernels::cpu
