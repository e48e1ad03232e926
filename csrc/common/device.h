// An operator's kernels run on the device of its first tensor.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

// The launcher for the device of x: cpu::launcher or, in a library built with CUDA, cuda::launcher. x must
// satisfy has_kernel.
#if defined(GK_WITH_CUDA)
#define GK_LAUNCHER(x, launcher) ((x).is_cuda() ? cuda::launcher : cpu::launcher)
#else
#define GK_LAUNCHER(x, launcher) (static_cast<void>(x), cpu::launcher)
#endif

namespace gradkernels {

inline c10::Device device_of_first(const at::Tensor& x) { return x.device(); }
inline c10::Device device_of_first(at::TensorList tensors) { return tensors.empty() ? c10::Device(c10::kCPU) : tensors.front().device(); }

template <auto operation>
struct OnDevice;

template <typename Result, typename First, typename... Rest, Result (*operation)(First, Rest...)>
struct OnDevice<operation> {
  static Result call(First first, Rest... rest) {
    c10::OptionalDeviceGuard guard;
    if (device_of_first(first).is_cuda()) guard.reset_device(device_of_first(first));
    return operation(std::forward<First>(first), std::forward<Rest>(rest)...);
  }
};

// `operation` with the device of its first argument as the current device, which CUDA's launchers and
// allocator use.
template <auto operation>
constexpr auto on_device = OnDevice<operation>::call;

}  // namespace gradkernels
