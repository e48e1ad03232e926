// The launchers of csrc/cuda/clip_grad.cu for ctypes: plain numbers, and arrays with one element per tensor.
#include "ops/clip_grad.h"

#include <vector>

#include "cuda/tensor_table.cuh"

using namespace gradkernels;

namespace {

std::vector<Run> runs_of(int64_t count, const int64_t* dtypes, const int64_t* counts, void* const* data) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < count; ++i) runs.push_back({static_cast<DType>(dtypes[i]), counts[i], data[i]});
  return runs;
}

template <typename scalar_t>
void strided_kernel(const scalar_t* x, int64_t stride) {
  cuda::Packet<scalar_t, 1> packet;
  cuda::load_some(packet, x + threadIdx.x * stride, 1, scalar_t(0.0f));
}

}  // namespace

extern "C" {

// Each of 32 threads loads one float, `stride` floats after that of the thread before: what the count of
// sectors is tested with.
void strided(int64_t stride, const float* x) { cuda::launch(strided_kernel<float>, {dim3(1), dim3(32)}, x, stride); }

void grad_norms(int64_t count, const int64_t* dtypes, const int64_t* counts, void* const* data, int norm, double* norms, double* max_abs,
                int64_t* nonfinite, double* total_norm) {
  cuda::grad_norms(runs_of(count, dtypes, counts, data).data(), count, static_cast<Norm>(norm), {norms, max_abs, nonfinite, total_norm});
}

void clip_with_norm(int64_t count, const int64_t* dtypes, const int64_t* counts, void* const* data, double max_norm,
                    const double* total_norm) {
  cuda::clip_with_norm(runs_of(count, dtypes, counts, data).data(), count, max_norm, total_norm);
}

void clamp(int64_t count, const int64_t* dtypes, const int64_t* counts, void* const* data, double limit) {
  cuda::clamp(runs_of(count, dtypes, counts, data).data(), count, limit);
}

// param: of each tensor. units, elements: the number of units, and of the elements of one.
void adaptive_clip(int64_t count, const int64_t* dtypes, const int64_t* elements, void* const* grad, const int64_t* units,
                   void* const* param, int norm, double clip_factor, double eps) {
  std::vector<UnitRun> runs;
  for (int64_t i = 0; i < count; ++i) runs.push_back({static_cast<DType>(dtypes[i]), units[i], elements[i], param[i], grad[i]});
  cuda::adaptive_clip(runs.data(), count, static_cast<Norm>(norm), clip_factor, eps);
}

// The pieces of tensors with these counts. `out` gets four numbers for each slot: tensor, first element,
// number of elements, is_first. The data is not read, so tensors may have any size. found: the numbers of
// tables and of slots.
void pieces(int64_t count, const int64_t* dtypes, const int64_t* counts, void* const* data, int64_t room, int64_t* out, int64_t* found) {
  const std::vector<Run> runs = runs_of(count, dtypes, counts, data);
  found[0] = 0;
  int64_t* next = out;
  int64_t cut = 0, last = -1;
  found[1] = cuda::for_each_table<1>(
      runs.data(), count, [](const Run&, int) { return nullptr; },
      [&](const cuda::TensorTable<1>& table) {
        ++found[0];
        for (int64_t slot = 0; slot < table.slots() && next + 4 <= out + 4 * room; ++slot) {
          const cuda::Piece piece = table.piece(slot);
          const int64_t tensor = table.first_tensor + piece.entry;
          // A table that continues a tensor counts from its own first element.
          if (tensor != last) cut = 0;
          if (piece.entry == 0 && slot == 0 && table.continues) cut = next[-4] == tensor ? next[-3] + next[-2] : 0;
          last = tensor;
          *next++ = tensor;
          *next++ = (table.continues && piece.entry == 0 ? cut : 0) + piece.begin;
          *next++ = piece.count;
          *next++ = piece.is_first;
        }
      });
}

}  // extern "C"

#if defined(SIMT_RACES)
// Run by tests/simt_library.py under ThreadSanitizer: every kernel, on several blocks.
int main() {
  // More tensors than one block merges, of several slots and of other magnitudes.
  constexpr int64_t kTensors = 10;
  std::vector<float> wide(17000, 2.0f), narrow(8 * 30, 1.0f);
  std::vector<double> wider(300, 1e200);
  std::vector<int64_t> dtypes(kTensors, 0), counts(kTensors, 30), nonfinite(kTensors);
  std::vector<void*> data;
  for (int64_t i = 0; i < kTensors - 2; ++i) data.push_back(narrow.data() + 30 * i);
  data.insert(data.end(), {wide.data(), wider.data()});
  counts[kTensors - 2] = 17000;
  counts[kTensors - 1] = 300;
  dtypes[kTensors - 1] = 1;
  std::vector<double> norms(kTensors), max_abs(kTensors);
  double total;
  grad_norms(kTensors, dtypes.data(), counts.data(), data.data(), static_cast<int>(Norm::kTwo), norms.data(), max_abs.data(),
             nonfinite.data(), &total);
  clip_with_norm(kTensors, dtypes.data(), counts.data(), data.data(), 1.0, &total);
  clamp(kTensors, dtypes.data(), counts.data(), data.data(), 0.5);
  // Several units, of one warp and of a block; the tensors are their own parameters.
  std::vector<int64_t> elements{3000, 30, 30}, units{5, 1, 3};
  std::vector<void*> grads{wide.data(), narrow.data(), wider.data()};
  std::vector<int64_t> dtypes_of_grads{0, 0, 1};
  adaptive_clip(3, dtypes_of_grads.data(), elements.data(), grads.data(), units.data(), grads.data(), static_cast<int>(Norm::kTwo), 0.01,
                1e-3);
  return 0;
}
#endif
