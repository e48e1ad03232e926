# The compiled module (csrc/module.cpp): thin functions that call the dispatcher, with positional arguments. Its
# import also registers torch.ops.gradkernels.

from typing import TypedDict

from torch import Tensor

class _BuildInfo(TypedDict):
    torch: str
    instruction_sets: list[str]
    cuda_architectures: list[str]
    compiler: str
    commit: str

class _Packed: ...

def build_info() -> _BuildInfo: ...
def instruction_set() -> str: ...
def leaky_relu(x: Tensor, negative_slope: float, inplace: bool, /) -> Tensor: ...
def elu(x: Tensor, alpha: float, inplace: bool, /) -> Tensor: ...
def swish(x: Tensor, beta: float, /) -> Tensor: ...
def swish_tensor(x: Tensor, beta: Tensor, /) -> Tensor: ...
def prelu(x: Tensor, weight: Tensor, /) -> Tensor: ...
def rrelu(x: Tensor, seed: Tensor, lower: float, upper: float, inplace: bool, /) -> Tensor: ...
def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    act: str,
    act_param: float,
    /,
) -> Tensor: ...
def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    act_param: float,
    /,
) -> Tensor: ...
def clip_grad_supports(tensors: list[Tensor], /) -> bool: ...
def clip_grad_norm_(
    parameters: list[Tensor | tuple[str, Tensor]], max_norm: float, norm_type: float, error_if_nonfinite: bool, /
) -> tuple[Tensor, bool] | None: ...
def grad_norms(grads: list[Tensor], norm_type: float, /) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def clip_grads_with_norm_(grads: list[Tensor], max_norm: float, total_norm: Tensor, /) -> None: ...
def clip_grad_value_(grads: list[Tensor], clip_value: float, /) -> None: ...
def adaptive_clip_grad_(params: list[Tensor], grads: list[Tensor], clip_factor: float, eps: float, norm_type: float, /) -> None: ...
def rmsprop_supports(params: list[Tensor], lists: list[list[Tensor]], /) -> bool: ...
def rmsprop_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    grad_coefficient: float,
    /,
) -> None: ...
def pack_hook(x: Tensor, /) -> _Packed: ...
def unpack_hook(packed: _Packed, /) -> Tensor: ...
