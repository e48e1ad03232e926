// oneDNN's batch norm with a fused ReLU, channels_last, in training: a provider of bench_batch_norm_act.py, which
// compiles this file where <dnnl.hpp> is (apt-get install libdnnl-dev) and checks the results. For oneDNN 2.
#include <algorithm>
#include <cstdint>
#include <dnnl.hpp>
#include <unordered_map>

namespace {

using dnnl::memory;
using Arguments = std::unordered_map<int, memory>;

struct Step {
  dnnl::stream stream;
  dnnl::primitive forward, backward;
  Arguments of_forward, of_backward;
};

}  // namespace

// The operands are (n, c, h, w) in channels_last; scale has c elements. y and grad_x are written by onednn_run.
extern "C" Step* onednn_step(int64_t n, int64_t c, int64_t h, int64_t w, float* x, float* scale, float* grad_y, float* y, float* grad_x) {
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  const memory::desc whole({n, c, h, w}, memory::data_type::f32, memory::format_tag::nhwc);
  const memory::desc channel({c}, memory::data_type::f32, memory::format_tag::x);
  const auto flags =
      dnnl::normalization_flags::use_scale | dnnl::normalization_flags::use_shift | dnnl::normalization_flags::fuse_norm_relu;
  const dnnl::batch_normalization_forward::primitive_desc forward({dnnl::prop_kind::forward_training, whole, 1e-5f, flags}, engine);
  const dnnl::batch_normalization_backward::primitive_desc backward({dnnl::prop_kind::backward, whole, whole, 1e-5f, flags}, engine,
                                                                    forward);
  const auto fresh = [&](const memory::desc& desc) { return memory(desc, engine); };
  memory shift = fresh(channel);
  std::fill_n(static_cast<float*>(shift.get_data_handle()), c, 0.0f);
  Arguments both = {{DNNL_ARG_SRC, memory(whole, engine, x)},
                    {DNNL_ARG_MEAN, fresh(channel)},
                    {DNNL_ARG_VARIANCE, fresh(channel)},
                    {DNNL_ARG_SCALE, memory(channel, engine, scale)},
                    {DNNL_ARG_SHIFT, shift},
                    {DNNL_ARG_WORKSPACE, fresh(forward.workspace_desc())}};
  Arguments of_forward = both, of_backward = both;
  of_forward.insert({DNNL_ARG_DST, memory(whole, engine, y)});
  of_backward.insert({{DNNL_ARG_DIFF_DST, memory(whole, engine, grad_y)},
                      {DNNL_ARG_DIFF_SRC, memory(whole, engine, grad_x)},
                      {DNNL_ARG_DIFF_SCALE, fresh(channel)},
                      {DNNL_ARG_DIFF_SHIFT, fresh(channel)}});
  return new Step{dnnl::stream(engine), dnnl::batch_normalization_forward(forward), dnnl::batch_normalization_backward(backward),
                  of_forward, of_backward};
}

extern "C" void onednn_run(Step* step) {
  step->forward.execute(step->stream, step->of_forward);
  step->backward.execute(step->stream, step->of_backward);
  step->stream.wait();
}
